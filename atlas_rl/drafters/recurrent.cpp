// The recurrent drafter on CPU in float32: recurrent.py says what it computes, and holds the weights.
//
// Letters in names: R rows, D hidden size, I inner size of the MLP, V words of the draft vocabulary, S sources of features.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "noise.h"
#include "panels.h"

namespace {

using Floats = std::vector<float>;

inline void normalise(const float* x, const float* weight, float eps, int64_t size, float* out) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; i++) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

inline int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// log(x) of a normal positive x within 1e-5: a guess needs no more.
inline float rough_log(float x) {
    const int32_t bits = bits_of(x), exponent = (bits - 0x3F3504F3) >> 23;  // the mantissa in [sqrt(1/2), sqrt(2))
    const float m = float_of(bits - (exponent << 23)) - 1.0f;
    float p = -0.13418264f;
    p = p * m + 0.1787052f;
    p = p * m - 0.24631287f;
    p = p * m + 0.3328612f;
    p = p * m - 0.50002295f;
    p = p * m + 1.0000038f;
    return exponent * 0.6931472f + p * m;
}

inline float rough_exp(float x) {
    const float clamped = std::max(-87.0f, std::min(87.0f, x)), shifted = clamped * 1.44269504f + 12582912.0f;
    const float r = clamped - (shifted - 12582912.0f) * 0.6931472f;
    const float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * 0.0083333333f))));
    return p * float_of((bits_of(shifted) - 0x4B400000 + 127) << 23);
}

// -log(-log(1 - v)); small v are the winners, and lose nothing here.
inline float rough_gumbel(float v) {
    const float series = v * (1.0f + v * (0.5f + v * (0.33333334f + v * 0.25f)));
    return -rough_log(v < 0.1f ? series : -rough_log(1.0f - v));
}

struct Linear {
    Floats panels;
    atlas::Weight weight{};
    void load(const float* from, int64_t out, int64_t in) {
        panels.assign(atlas::packed_size(in, out), 0.0f);
        atlas::pack(from, out, in, 0, panels.data());
        weight = {panels.data(), in, out, nullptr};
    }
    // A thread's share of the outputs; barriers are the caller's.
    void operator()(const float* x, int64_t x_stride, int64_t rows, float* out, const float* residual = nullptr) const {
        const auto [first, last] =
            atlas::share_of(atlas::num_panels(weight.out), omp_get_thread_num(), omp_get_num_threads());
        if (first < last) atlas::product(weight, first, last, x, x_stride, rows, out, weight.out, residual);
    }
};

struct Model {
    int64_t D, I, S;
    float eps;
    Linear fc, state_gate_up, token_gate_up, down, head;
    Floats source_norms, norm_state, norm_token, norm_out;
    Floats token_part;  // [vocabulary, 2I]: what each token adds to gate and up, if there is room for it
    const float* embeddings = nullptr;  // [vocabulary, D], the policy's own
    std::vector<int64_t> ids;           // of the draft vocabulary
    // buffers of a proposal
    Floats features, state, x, inner, active, ready, logits;
    std::vector<int64_t> row, token;
    std::vector<float> prob;
};

// The best of scores logits / T + noise, and by how much it beats the second.
void draw(const Model& model, const float* logits, float temperature, atlas::RowKeys keys, float* scores, int64_t* best_at,
          float* margin) {
    const int64_t size = model.ids.size();
    const int64_t* ids = model.ids.data();
    const float scale = temperature > 0 ? 1.0f / temperature : 1.0f;
    if (temperature > 0) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            scores[i] = logits[i] * scale + rough_gumbel(atlas::uniform(atlas::noise_bits((uint32_t)ids[i], keys)));
    } else {
        std::copy(logits, logits + size, scores);
    }
    float best = -1e30f, second = -1e30f;
    int64_t at = 0;
    for (int64_t i = 0; i < size; i++) {
        if (!(scores[i] > second)) continue;
        if (scores[i] > best)
            second = best, best = scores[i], at = i;
        else
            second = scores[i];
    }
    *best_at = at;
    *margin = best - second;
}

}  // namespace

extern "C" {

void* recurrent_new(int64_t D, int64_t I, int64_t S, float eps) { return new Model{D, I, S, eps}; }

void recurrent_free(void* model) { delete static_cast<Model*>(model); }

// fc [D, S·D], both gate_up [2I, D], down [D, I], norms: of the S sources, the state, the token, the output.
void recurrent_load(void* pointer, const float* fc, const float* state_gate_up, const float* token_gate_up, const float* down,
                    const float* norms) {
    Model& model = *static_cast<Model*>(pointer);
    const int64_t D = model.D, S = model.S;
    model.fc.load(fc, D, S * D);
    model.state_gate_up.load(state_gate_up, 2 * model.I, D);
    model.token_gate_up.load(token_gate_up, 2 * model.I, D);
    model.down.load(down, D, model.I);
    model.source_norms.assign(norms, norms + S * D);
    model.norm_state.assign(norms + S * D, norms + (S + 1) * D);
    model.norm_token.assign(norms + (S + 1) * D, norms + (S + 2) * D);
    model.norm_out.assign(norms + (S + 2) * D, norms + (S + 3) * D);
}

// The policy's embeddings [vocabulary, D], which stay where they are, and rows `ids` of its output head. With `keep_token_part`
// what tokens add to gate and up is computed now, for the whole vocabulary.
void recurrent_bind(void* pointer, const float* embeddings, int64_t vocab_size, const float* head, const int64_t* ids,
                    int64_t num_ids, int64_t keep_token_part) {
    Model& model = *static_cast<Model*>(pointer);
    const int64_t D = model.D, I = model.I;
    model.embeddings = embeddings;
    model.ids.assign(ids, ids + num_ids);
    Floats rows(num_ids * D);
    for (int64_t i = 0; i < num_ids; i++) std::copy_n(head + ids[i] * D, D, rows.data() + i * D);
    model.head.load(rows.data(), num_ids, D);
    model.token_part.clear();
    if (!keep_token_part) return;
    Floats normed(vocab_size * D);
    model.token_part.resize(vocab_size * 2 * I);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t v = 0; v < vocab_size; v++)
            normalise(embeddings + v * D, model.norm_token.data(), model.eps, D, normed.data() + v * D);
        model.token_gate_up(normed.data(), D, vocab_size, model.token_part.data());
    }
}

// Drafts for R rows. sources: S arrays [.., D], of which row r reads row places[r]. last_tokens, seeds, positions (of the first
// guess within the completion): [R]. right, total: [max_depth, num_edges + 1] counts by which a guess's probability of being
// right is told from its depth and margin. Writes tokens, cells, probs [R, width]; what it does not write stays.
void recurrent_propose(void* pointer, const float* const* sources, const int64_t* places, const int64_t* last_tokens,
                       const int64_t* seeds, const int64_t* positions, const int64_t* max_lens, int64_t num_rows,
                       float temperature, float min_prob, const float* edges, int64_t num_edges, const double* right,
                       const double* total, int64_t max_depth, int64_t width, int64_t* tokens, int64_t* cells, double* probs) {
    Model& model = *static_cast<Model*>(pointer);
    const int64_t D = model.D, I = model.I, S = model.S, V = model.ids.size();
    const bool has_part = !model.token_part.empty();
    model.row.clear(), model.token.clear(), model.prob.clear();
    for (int64_t r = 0; r < num_rows; r++)
        if (max_lens[r] > 0) model.row.push_back(r), model.token.push_back(last_tokens[r]), model.prob.push_back(1.0f);
    int64_t n = model.row.size();
    if (!n) return;
    model.features.resize(n * S * D), model.state.resize(n * D), model.x.resize(n * 2 * D), model.inner.resize(n * 2 * I);
    model.active.resize(n * I), model.ready.resize(n * D), model.logits.resize(n * 2 * V);
    float *features = model.features.data(), *state = model.state.data(), *x = model.x.data(), *inner = model.inner.data(),
          *active = model.active.data(), *ready = model.ready.data(), *logits = model.logits.data();
    int64_t *row = model.row.data(), *token = model.token.data();
    float* prob = model.prob.data();
    const int64_t num_cells = num_edges + 1;

#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        auto mine = atlas::share_of(n, thread, num_threads);
        for (int64_t r = mine.first; r < mine.second; r++)
            for (int64_t s = 0; s < S; s++)
                normalise(sources[s] + places[row[r]] * D, model.source_norms.data() + s * D, model.eps, D,
                          features + (r * S + s) * D);
#pragma omp barrier
        model.fc(features, S * D, n, state);
#pragma omp barrier
        for (int64_t depth = 0; n > 0; depth++) {
            mine = atlas::share_of(n, thread, num_threads);
            for (int64_t r = mine.first; r < mine.second; r++) {
                normalise(state + r * D, model.norm_state.data(), model.eps, D, x + r * D);
                if (has_part)
                    std::copy_n(model.token_part.data() + token[r] * 2 * I, 2 * I, inner + r * 2 * I);
                else
                    normalise(model.embeddings + token[r] * D, model.norm_token.data(), model.eps, D, x + (n + r) * D);
            }
#pragma omp barrier
            if (!has_part) model.token_gate_up(x + n * D, D, n, inner);  // a thread reads only what it wrote: no barrier
            model.state_gate_up(x, D, n, inner, inner);
#pragma omp barrier
            for (int64_t r = mine.first; r < mine.second; r++) {
                const float *gate = inner + r * 2 * I, *up = gate + I;
#pragma omp simd
                for (int64_t i = 0; i < I; i++) active[r * I + i] = gate[i] / (1.0f + rough_exp(-gate[i])) * up[i];
            }
#pragma omp barrier
            model.down(active, I, n, state, state);
#pragma omp barrier
            for (int64_t r = mine.first; r < mine.second; r++)
                normalise(state + r * D, model.norm_out.data(), model.eps, D, ready + r * D);
#pragma omp barrier
            model.head(ready, D, n, logits);
#pragma omp barrier
            for (int64_t r = mine.first; r < mine.second; r++) {
                const int64_t place = row[r] * width + depth, level = std::min(depth, max_depth - 1) * num_cells;
                const auto keys = atlas::row_keys(seeds[row[r]], positions[row[r]] + depth);
                int64_t at;
                float margin;
                draw(model, logits + r * V, temperature, keys, logits + (n + r) * V, &at, &margin);
                const int64_t cell = std::lower_bound(edges, edges + num_edges, margin) - edges;
                prob[r] *= (float)(right[level + cell] / total[level + cell]);
                cells[place] = cell;
                token[r] = model.ids[at];
                if (!(prob[r] >= min_prob)) {
                    token[r] = -1;  // ends before this guess
                    continue;
                }
                tokens[place] = token[r];
                probs[place] = prob[r];
                if (depth + 1 >= max_lens[row[r]]) token[r] = -1;
            }
#pragma omp barrier
#pragma omp single
            {
                int64_t kept = 0;
                for (int64_t r = 0; r < n; r++) {
                    if (token[r] < 0) continue;
                    if (kept != r) std::copy_n(state + r * D, D, state + kept * D);
                    row[kept] = row[r], token[kept] = token[r], prob[kept] = prob[r], kept++;
                }
                n = kept;
            }
        }
    }
}

// Of the first num_drafted[r] guesses of row r, whose cells [R, width] these are, the first num_accepted[r] were right.
void recurrent_judge(const int64_t* cells, const int64_t* num_drafted, const int64_t* num_accepted, int64_t num_rows,
                     int64_t width, int64_t num_cells, int64_t max_depth, double half_life, double* right, double* total) {
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t k = 0; k < num_drafted[r] && k <= num_accepted[r]; k++) {
            const int64_t at = std::min(k, max_depth - 1) * num_cells + cells[r * width + k];
            total[at] += 1, right[at] += k < num_accepted[r];
            if (total[at] > half_life) total[at] /= 2, right[at] /= 2;
        }
}

}  // extern "C"
