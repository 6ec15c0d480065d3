// The suffix drafter's model (see suffix.py): counts of what followed the last n tokens, mixed over all n, drawn with the policy's noise.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "noise.h"

namespace {

constexpr int LONGEST = 8;      // tokens of the longest context
constexpr int CANDIDATES = 4;   // tokens that an entry counts
constexpr int WAYS = 4;         // places that a context can be in
constexpr int MAX_GUESSES = 32;
constexpr float UNIT = 8;       // a count of one occurrence: halves have to fit in integers
constexpr int MAX_COUNT = 60000;
constexpr float ROW_DECAY = .95f, ROW_PRIOR = 4;  // how far back a row's own record goes, and what it has to outweigh
constexpr int MEMORY = 255, MEMORY_AFTER_UPDATE = 31, PRIOR_WEIGHT = 4;  // guesses that a cell's average runs over

// Shorter contexts are mixed in first, and a prompt's own after the shared one of the same length.
struct Source {
    int length;
    bool own;     // of one prompt's rows only
    float prior;  // weight of what shorter contexts say, per distinct token seen
};
constexpr Source SOURCES[] = {{1, false, .5f}, {2, false, .5f}, {2, true, .25f}, {3, false, .5f}, {3, true, .25f},
                              {4, false, .5f}, {4, true, .25f}, {6, false, .5f}, {8, false, .5f}};
constexpr int NUM_SOURCES = sizeof(SOURCES) / sizeof(Source);

struct Entry {
    uint64_t tag;  // 48 bits of the context's hash, 16 bits of the epoch of its counts
    uint32_t tokens[CANDIDATES];
    uint16_t counts[CANDIDATES];
};

constexpr float SHARES[] = {.25f, .45f, .65f, .8f, .9f, .95f, .98f};
constexpr float SHARE_PRIORS[] = {.15f, .3f, .45f, .6f, .7f, .8f, .9f, .95f};
constexpr int NUM_SHARES = 8, NUM_MARGINS = 3, NUM_CELLS = NUM_SOURCES * NUM_SHARES * NUM_MARGINS;

struct Row {
    uint64_t prompt;
    int64_t seed, position;  // of its noise, and of the token to come in the completion
    uint32_t recent[LONGEST];  // newest first
    bool greedy, on_track;
    float right, promised;  // of its own guesses, decayed: some rows say what no row has said before
    int num_guesses;
    uint32_t guesses[MAX_GUESSES];
    int cells[MAX_GUESSES];
};

inline void shift(uint32_t* recent, uint32_t token) {
    std::memmove(recent + 1, recent, (LONGEST - 1) * sizeof *recent);
    recent[0] = token;
}

struct Model {
    std::vector<Entry> table;
    std::vector<Row> rows;
    std::vector<int64_t> free_rows;
    std::vector<float> decay;  // by epochs passed
    uint16_t epoch = 0;
    float chance[2][NUM_CELLS];
    int num_seen[2][NUM_CELLS] = {};

    Model(int64_t log2_entries, double half_life) : table(size_t(1) << log2_entries), decay(1024) {
        for (size_t i = 0; i < decay.size(); i++) decay[i] = (float)std::pow(0.5, i / half_life);
        for (auto& cells : chance)
            for (int c = 0; c < NUM_CELLS; c++) cells[c] = SHARE_PRIORS[c / NUM_MARGINS % NUM_SHARES];
    }

    float decay_of(const Entry& e) const {
        const uint16_t age = epoch - (uint16_t)e.tag;
        return decay[std::min<size_t>(age, decay.size() - 1)];
    }

    void keys(const uint32_t* recent, uint64_t prompt, uint64_t* out) const {
        uint64_t hash = 0, by_length[LONGEST + 1];
        for (int n = 1; n <= LONGEST; n++) by_length[n] = hash = (hash ^ (recent[n - 1] + 1ull)) * 0x9E3779B97F4A7C15u + n;
        for (int s = 0; s < NUM_SOURCES; s++) {
            out[s] = atlas::splitmix64(by_length[SOURCES[s].length] + (SOURCES[s].own ? prompt : 0));
            __builtin_prefetch(&table[bucket(out[s])]);
            __builtin_prefetch(&table[bucket(out[s]) + WAYS / 2]);
        }
    }

    size_t bucket(uint64_t key) const { return (key & (table.size() - 1)) & ~size_t(WAYS - 1); }
    static uint64_t tag_of(uint64_t key) { return key & ~0xFFFFull; }

    const Entry* find(uint64_t key) const {
        const Entry* entries = &table[bucket(key)];
        for (int w = 0; w < WAYS; w++)
            if ((entries[w].tag & ~0xFFFFull) == tag_of(key) && entries[w].counts[0]) return entries + w;
        return nullptr;
    }

    // The context's entry with up-to-date counts; where there is none, the one in its bucket that matters least gives way.
    Entry& take(uint64_t key) {
        if (const Entry* known = find(key)) {
            Entry& e = const_cast<Entry&>(*known);
            const float factor = decay_of(e);
            if (factor < 1)
                for (auto& count : e.counts) count = (uint16_t)(count * factor);
            e.tag = tag_of(key) | epoch;
            return e;
        }
        Entry *entries = &table[bucket(key)], *least = entries;
        float least_weight = std::numeric_limits<float>::infinity();
        for (int w = 0; w < WAYS; w++) {
            float weight = 0;
            for (auto count : entries[w].counts) weight += count;
            weight *= decay_of(entries[w]);
            if (weight < least_weight) least = entries + w, least_weight = weight;
        }
        *least = Entry{tag_of(key) | epoch, {}, {}};
        return *least;
    }

    static void count(Entry& e, uint32_t token) {
        int place = 0, rarest = 0;
        while (place < CANDIDATES && !(e.counts[place] && e.tokens[place] == token)) {
            if (e.counts[place] < e.counts[rarest]) rarest = place;
            place++;
        }
        if (place == CANDIDATES) {
            if (e.counts[rarest] > UNIT) {  // a full entry: what is rare has to be met again and again to get in
                e.counts[rarest] -= (uint16_t)(UNIT / 2);
                return;
            }
            place = rarest, e.tokens[place] = token, e.counts[place] = 0;
        }
        if (e.counts[place] > MAX_COUNT)
            for (auto& other : e.counts) other /= 2;
        e.counts[place] += (uint16_t)UNIT;
        if (place && e.counts[place] > e.counts[0]) {  // an entry in use has its first count above 0
            std::swap(e.counts[place], e.counts[0]);
            std::swap(e.tokens[place], e.tokens[0]);
        }
        if (!e.counts[0]) std::swap(e.counts[place], e.counts[0]), std::swap(e.tokens[place], e.tokens[0]);
    }

    void learn(uint32_t* recent, uint64_t prompt, const int64_t* tokens, int64_t num_tokens) {
        for (int64_t i = 0; i < num_tokens; i++) {
            uint64_t places[NUM_SOURCES];
            keys(recent, prompt, places);
            for (auto key : places) count(take(key), (uint32_t)tokens[i]);
            shift(recent, (uint32_t)tokens[i]);
        }
    }

    // The token that the mixed distribution and the policy's own noise draw, and the cell that says how such draws fared.
    bool guess(const Row& row, const uint32_t* recent, int64_t position, uint32_t& token, int& cell) const {
        uint64_t places[NUM_SOURCES];
        keys(recent, row.prompt, places);
        uint32_t tokens[NUM_SOURCES * CANDIDATES];
        float shares[NUM_SOURCES * CANDIDATES];
        int num = 0, top = -1;
        for (int s = 0; s < NUM_SOURCES; s++) {
            const Entry* e = find(places[s]);
            if (!e) continue;
            const float factor = decay_of(*e) / UNIT;
            float total = 0, distinct = 0;
            for (auto c : e->counts) total += c * factor, distinct += c > 0;
            if (total <= 0) continue;
            top = s;
            const float weight = total / (total + distinct * SOURCES[s].prior);
            for (int i = 0; i < num; i++) shares[i] *= 1 - weight;
            for (int c = 0; c < CANDIDATES; c++) {
                if (!e->counts[c]) continue;
                int i = 0;
                while (i < num && tokens[i] != e->tokens[c]) i++;
                if (i == num) tokens[num] = e->tokens[c], shares[num++] = 0;
                shares[i] += weight * e->counts[c] * factor / total;
            }
        }
        if (top < 0) return false;
        const atlas::RowKeys noise = atlas::row_keys(row.seed, position);
        float best = std::numeric_limits<float>::infinity(), second = best;
        int winner = 0;
        for (int i = 0; i < num; i++) {  // argmax(log share + Gumbel) is argmin(exponential / share)
            const float race = (row.greedy ? 1.0f : -std::log1p(-atlas::uniform(atlas::noise_bits(tokens[i], noise)))) / shares[i];
            if (race < best) second = best, best = race, winner = i;
            else if (race < second) second = race;
        }
        int share = 0;
        while (share < NUM_SHARES - 1 && shares[winner] >= SHARES[share]) share++;
        const int margin = second < 2 * best ? 0 : second < 8 * best ? 1 : 2;
        token = tokens[winner];
        cell = (top * NUM_SHARES + share) * NUM_MARGINS + margin;
        return true;
    }

    // Judges guesses, verified or not, by what was emitted. A row whose last token was guessed is on track: the next guess is
    // worth more than one where it has just left the beaten path.
    void score(Row& row, const int64_t* emitted, int64_t num_emitted) {
        bool on_track = row.on_track;
        int i = 0;
        for (; i < row.num_guesses && i < num_emitted; i++) {
            const int cell = row.cells[i];
            float& average = chance[on_track][cell];
            int& seen = num_seen[on_track][cell];
            const int weight = seen + 1 + PRIOR_WEIGHT;
            if (weight < MEMORY) seen++;
            on_track = row.guesses[i] == (uint32_t)emitted[i];
            row.promised = row.promised * ROW_DECAY + average;
            row.right = row.right * ROW_DECAY + on_track;
            average += (on_track - average) / weight;
            if (!on_track) break;
        }
        row.on_track = on_track && i == num_emitted;
        row.num_guesses = 0;
    }
};

}  // namespace

extern "C" {

void* suffix_new(int64_t log2_entries, double half_life) { return new Model(log2_entries, half_life); }

void suffix_free(void* model) { delete static_cast<Model*>(model); }

// `learned`: tokens that are to be learned (a prompt that no live row has); `recent`: the last ones before the token to come.
int64_t suffix_admit(void* self, uint64_t prompt, const int64_t* learned, int64_t num_learned, const int64_t* recent,
                     int64_t num_recent, int64_t position, int64_t seed, int64_t greedy) {
    Model& model = *static_cast<Model*>(self);
    if (model.free_rows.empty()) model.free_rows.push_back((int64_t)model.rows.size()), model.rows.emplace_back();
    const int64_t slot = model.free_rows.back();
    model.free_rows.pop_back();
    Row& row = model.rows[slot];
    row = Row{};
    row.prompt = prompt, row.seed = seed, row.position = position, row.greedy = greedy;
    std::fill(row.recent, row.recent + LONGEST, ~0u);
    model.learn(row.recent, prompt, learned, num_learned);
    std::fill(row.recent, row.recent + LONGEST, ~0u);
    for (int64_t i = 0; i < num_recent; i++) shift(row.recent, (uint32_t)recent[i]);
    return slot;
}

void suffix_release(void* self, int64_t slot) { static_cast<Model*>(self)->free_rows.push_back(slot); }

// tokens and probs are [num_rows, width]; a draft ends where its probs are 0.
void suffix_propose(void* self, const int64_t* slots, const int64_t* max_lens, int64_t num_rows, int64_t width, float floor,
                    int64_t* tokens, double* probs) {
    Model& model = *static_cast<Model*>(self);
#pragma omp parallel for schedule(dynamic, 2) if (num_rows >= 16)
    for (int64_t r = 0; r < num_rows; r++) {
        Row& row = model.rows[slots[r]];
        const float trust = std::min(1.25f, (row.right + ROW_PRIOR) / (row.promised + ROW_PRIOR));
        uint32_t recent[LONGEST];
        std::memcpy(recent, row.recent, sizeof recent);
        double prob = 1;
        row.num_guesses = 0;
        for (int64_t i = 0; i < std::min<int64_t>(max_lens[r], MAX_GUESSES); i++) {
            uint32_t token;
            int cell;
            if (!model.guess(row, recent, row.position + i, token, cell)) break;
            row.guesses[i] = token, row.cells[i] = cell, row.num_guesses++;
            prob *= std::min(1.0f, trust * model.chance[i ? true : row.on_track][cell]);
            if (prob < floor) break;  // not drafted, yet scored: a cell could not recover from early bad luck otherwise
            tokens[r * width + i] = token, probs[r * width + i] = prob;
            shift(recent, token);
        }
    }
}

// tokens: what each row emitted since it was last observed, back to back, counts[r] each.
void suffix_observe(void* self, const int64_t* slots, const int64_t* tokens, const int64_t* counts, int64_t num_rows) {
    Model& model = *static_cast<Model*>(self);
    for (int64_t r = 0; r < num_rows; tokens += counts[r++]) {
        Row& row = model.rows[slots[r]];
        model.score(row, tokens, counts[r]);
        model.learn(row.recent, row.prompt, tokens, counts[r]);
        row.position += counts[r];
    }
}

void suffix_policy_updated(void* self) {
    Model& model = *static_cast<Model*>(self);
    model.epoch++;
    for (auto& cells : model.num_seen)
        for (auto& seen : cells) seen = std::min(seen, MEMORY_AFTER_UPDATE);
}

}  // extern "C"
