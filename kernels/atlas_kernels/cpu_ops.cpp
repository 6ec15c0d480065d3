// CPU kernels in float32, called through ctypes by cpu.py, which also says what each computes.
//
// Letters in names: N tokens, R rows, H KV heads, D head dim, S slots per block, V vocabulary. One layer of the KV cache is
// [2 (keys, values), blocks, H, S, D]. Loops share torch's OpenMP threads; small ones stay on the calling thread.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "noise.h"
#include "panels.h"

namespace {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float VecU __attribute__((vector_size(4 * LANES), aligned(4)));  // for unaligned memory

constexpr int64_t PARALLEL_WORK = 1 << 15;  // elements from which waking the other threads pays
constexpr int MAX_TILE = 4;                 // query vectors that share one pass over the keys and values

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

inline float sum(Vec v) {
    typedef float Half __attribute__((vector_size(2 * LANES)));
    typedef float Quarter __attribute__((vector_size(LANES)));
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    half[0] += half[1];
    Quarter quarter[2];
    std::memcpy(quarter, half, sizeof half[0]);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

template <int FOR_WRITING = 0>
inline void prefetch(const float* p, int64_t size) {
    for (int64_t i = 0; i < size; i += 64 / sizeof(float)) __builtin_prefetch(p + i, FOR_WRITING);
}

// exp(x) within 2 ulp: 2^n times a polynomial (Cephes); 0 below -87.3. NaN stays NaN.
inline float fast_exp(float x) {
    const float clamped = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
    const float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const int32_t exponent = (bits - 0x4B400000 + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, 4);
    return x < -87.3f ? 0.0f : p * power;
}

inline float dot(const float* a, const float* b, int64_t size) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; i++) total += a[i] * b[i];
    return total;
}

inline void normalise(const float* x, const float* weight, float eps, int64_t size, float* out) {
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

// What a tile of query vectors attends to: slots [first, last] of one row, for one KV head.
struct Context {
    const float *keys, *values;  // of this head in block 0
    const int64_t* blocks;       // the row's block table
    int64_t block_stride, block_size, head_dim;
    const float* slot(const float* base, int64_t s) const {
        return base + blocks[s / block_size] * block_stride + (s % block_size) * head_dim;
    }
};

struct Query {
    const float* vector;
    float* out;
    int64_t first, last;
};

// VECS = head_dim / LANES where it is a constant, else 0.
template <int TILE, int VECS>
void attend(const Context& context, const Query* queries, float scaling, float softcap, float* scores, int64_t pitch) {
    const int vecs = VECS ? VECS : context.head_dim / LANES;
    constexpr int HELD = VECS ? VECS : 16;  // head dims up to 256
    int64_t first = queries[0].first, last = queries[0].last;
    for (int t = 1; t < TILE; t++) first = std::min(first, queries[t].first), last = std::max(last, queries[t].last);

    for (int64_t s = first; s <= last; s++) {
        const float* key = context.slot(context.keys, s);
        // the blocks of a row lie apart: the processor foresees nothing across them. After the last keys come the first values
        const int64_t ahead = s + context.block_size;
        prefetch(ahead <= last ? context.slot(context.keys, ahead)
                               : context.slot(context.values, std::min(last, ahead - last - 1 + first)),
                 vecs * LANES);
#pragma GCC unroll 4
        for (int t = 0; t < TILE; t++) {
            Vec total = load(queries[t].vector) * load(key);
#pragma GCC unroll 8
            for (int i = 1; i < vecs; i++) total += load(queries[t].vector + i * LANES) * load(key + i * LANES);
            scores[t * pitch + s - first] = sum(total) * scaling;
        }
    }
    float norm[TILE];
    for (int t = 0; t < TILE; t++) {
        float* row = scores + t * pitch;
        if (softcap > 0)
            for (int64_t s = 0; s <= last - first; s++) row[s] = std::tanh(row[s] / softcap) * softcap;
        const int64_t from = queries[t].first - first, to = queries[t].last - first + 1;
        float highest = row[from];
#pragma omp simd reduction(max : highest)
        for (int64_t s = from; s < to; s++) highest = row[s] > highest ? row[s] : highest;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t s = from; s < to; s++) total += row[s] = fast_exp(row[s] - highest);
        std::fill(row, row + from, 0.0f);
        std::fill(row + to, row + last - first + 1, 0.0f);
        norm[t] = 1.0f / total;
    }
    Vec mixed[TILE][HELD] = {};
    for (int64_t s = first; s <= last; s++) {
        const float* value = context.slot(context.values, s);
        if (s + context.block_size <= last) prefetch(context.slot(context.values, s + context.block_size), vecs * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < vecs; i++) {
            const Vec part = load(value + i * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < TILE; t++) mixed[t][i] += part * scores[t * pitch + s - first];
        }
    }
    for (int t = 0; t < TILE; t++)
        for (int i = 0; i < vecs; i++) store(queries[t].out + i * LANES, mixed[t][i] * norm[t]);
}

template <int VECS>
void attend_tile(int tile, const Context& c, const Query* q, float scaling, float softcap, float* scores, int64_t pitch) {
    switch (tile) {
        case 1: return attend<1, VECS>(c, q, scaling, softcap, scores, pitch);
        case 2: return attend<2, VECS>(c, q, scaling, softcap, scores, pitch);
        case 3: return attend<3, VECS>(c, q, scaling, softcap, scores, pitch);
        default: return attend<4, VECS>(c, q, scaling, softcap, scores, pitch);
    }
}

using AttendTile = void (*)(int, const Context&, const Query*, float, float, float*, int64_t);

AttendTile attend_for(int64_t head_dim) {
    switch (head_dim) {
        case 16: return attend_tile<1>;
        case 32: return attend_tile<2>;
        case 64: return attend_tile<4>;
        case 128: return attend_tile<8>;
        default: return attend_tile<0>;
    }
}

}  // namespace

extern "C" {

void rms_norm(const float* x, const float* weight, float eps, int64_t num_tokens, int64_t size, float* out) {
#pragma omp parallel for if (num_tokens * size >= PARALLEL_WORK)
    for (int64_t n = 0; n < num_tokens; n++) normalise(x + n * size, weight, eps, size, out + n * size);
}

int64_t packed_size(int64_t size, int64_t num_outputs) { return atlas::packed_size(size, num_outputs); }

void pack(const float* weight, int64_t num_outputs, int64_t size, int64_t first_output, float* panels) {
    atlas::pack(weight, num_outputs, size, first_output, panels);
}

void packed_linear(const atlas::Weight* weight, const float* x, int64_t num_tokens, const float* residual, float* out) {
#pragma omp parallel if (std::max<int64_t>(4, num_tokens) * weight->in * weight->out >= 16 * PARALLEL_WORK)
    {
        const auto [first, last] = atlas::share_of(atlas::num_panels(weight->out), omp_get_thread_num(), omp_get_num_threads());
        atlas::product(*weight, first, last, x, weight->in, num_tokens, out, weight->out, residual);
    }
}

void silu_mul(const float* gate_up, int64_t num_tokens, int64_t size, float* out) {
#pragma omp parallel for if (num_tokens * size >= PARALLEL_WORK / 4)
    for (int64_t n = 0; n < num_tokens; n++) {
        const float *gate = gate_up + 2 * n * size, *up = gate + size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[n * size + i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
    }
}

void rope_and_store(float* qkv, const float* query_norm, const float* key_norm, float eps, const float* cos, const float* sin,
                    const int64_t* positions, const int64_t* slots, float* keys, float* values, int64_t num_tokens,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size) {
    const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim, half = head_dim / 2;
#pragma omp parallel for if (num_tokens * width >= PARALLEL_WORK / 4)
    for (int64_t n = 0; n < num_tokens; n++) {
        float* head = qkv + n * width;
        const int64_t block = slots[n] / block_size, offset = slots[n] % block_size;
        const int64_t place = (block * num_kv_heads * block_size + offset) * head_dim, head_stride = block_size * head_dim;
        for (int64_t h = 0; h < num_kv_heads; h++) {  // fetched while the heads are rotated
            prefetch<1>(keys + place + h * head_stride, head_dim);
            prefetch<1>(values + place + h * head_stride, head_dim);
        }
        const float *cos_n = cos + positions[n] * half, *sin_n = sin + positions[n] * half;
        for (int64_t h = 0; h < num_heads + num_kv_heads; h++, head += head_dim) {
            const float* weight = h < num_heads ? query_norm : key_norm;
            if (weight) normalise(head, weight, eps, head_dim, head);
            rotate(head, cos_n, sin_n, half);
        }
        const float *key = head - num_kv_heads * head_dim, *value = head;
        for (int64_t h = 0; h < num_kv_heads; h++) {
            std::memcpy(keys + place + h * head_stride, key + h * head_dim, head_dim * sizeof(float));
            std::memcpy(values + place + h * head_stride, value + h * head_dim, head_dim * sizeof(float));
        }
    }
}

void paged_attention(const float* query, int64_t token_stride, int64_t head_stride, const float* keys, const float* values,
                     const int64_t* block_tables, const int64_t* starts, const int64_t* query_lens, int64_t num_rows,
                     int64_t max_blocks, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                     float scaling, float softcap, int64_t window, float* out) {
    const AttendTile tile_fn = attend_for(head_dim);
    const int64_t groups = num_heads / num_kv_heads, pitch = max_blocks * block_size;
    std::vector<int64_t> first_token(num_rows + 1, 0);
    for (int64_t r = 0; r < num_rows; r++) first_token[r + 1] = first_token[r] + query_lens[r];
#pragma omp parallel if (first_token[num_rows] * num_heads * pitch >= PARALLEL_WORK / 16)
    {
        std::vector<float> scores(MAX_TILE * pitch);
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < num_rows * num_kv_heads; item++) {
            const int64_t r = item / num_kv_heads, h = item % num_kv_heads, block_stride = num_kv_heads * block_size * head_dim;
            const int64_t head_offset = h * block_size * head_dim;
            const Context context{keys + head_offset, values + head_offset, block_tables + r * max_blocks,
                                  block_stride,       block_size,           head_dim};
            const int64_t num_queries = query_lens[r] * groups;
            for (int64_t done = 0; done < num_queries; done += MAX_TILE) {
                Query tile[MAX_TILE];
                const int size = (int)std::min<int64_t>(MAX_TILE, num_queries - done);
                for (int t = 0; t < size; t++) {
                    const int64_t place = (done + t) / groups, token = first_token[r] + place;
                    const int64_t head = h * groups + (done + t) % groups, last = starts[r] + place;
                    tile[t] = {query + token * token_stride + head * head_stride, out + (token * num_heads + head) * head_dim,
                               window > 0 ? std::max<int64_t>(0, last - window + 1) : 0, last};
                }
                tile_fn(size, context, tile, scaling, softcap, scores.data(), pitch);
            }
        }
    }
}

void store_kv(const float* key, const float* value, int64_t token_stride, int64_t head_stride, const int64_t* slots, float* keys,
              float* values, int64_t num_tokens, int64_t num_kv_heads, int64_t head_dim, int64_t block_size) {
#pragma omp parallel for if (num_tokens * num_kv_heads * head_dim >= PARALLEL_WORK)
    for (int64_t n = 0; n < num_tokens; n++)
        for (int64_t h = 0; h < num_kv_heads; h++) {
            const int64_t block = slots[n] / block_size, offset = slots[n] % block_size;
            const int64_t place = ((block * num_kv_heads + h) * block_size + offset) * head_dim;
            const int64_t source = n * token_stride + h * head_stride;
            std::memcpy(keys + place, key + source, head_dim * sizeof(float));
            std::memcpy(values + place, value + source, head_dim * sizeof(float));
        }
}

// The winner of argmax(x + g) is that of argmin(e / p), e = -log1p(-v), p = exp(x - max). As e >= v, a token with
// v / p above the best e / p has lost: two comparisons spare nearly all tokens their logarithms, exactly.
void coupled_sample(const float* logits, int64_t num_rows, int64_t vocab_size, float temperature, const uint32_t* offsets,
                    const uint32_t* strides, int64_t* tokens, float* logprobs) {
#pragma omp parallel if (num_rows * vocab_size >= PARALLEL_WORK / 2)
    {
        std::vector<float> probs(vocab_size);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < num_rows; n++) {
            const float* row = logits + n * vocab_size;
            float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
            for (int64_t i = 0; i < vocab_size; i++) highest = row[i] > highest ? row[i] : highest;
            const float top = highest / temperature;
            double total = 0;
            for (int64_t start = 0; start < vocab_size; start += 1024) {
                float part = 0;
                const int64_t end = std::min(vocab_size, start + 1024);
#pragma omp simd reduction(+ : part)
                for (int64_t i = start; i < end; i++) part += probs[i] = fast_exp(row[i] / temperature - top);
                total += part;
            }
            int64_t winner = 0;
            if (!offsets) {
                while (winner < vocab_size - 1 && row[winner] != highest) winner++;
            } else {
                float best = -std::numeric_limits<float>::infinity(), race = std::numeric_limits<float>::infinity();
                const atlas::RowKeys keys{offsets[n], strides[n]};
                for (int64_t start = 0; start < vocab_size; start += 64) {
                    const int64_t end = std::min(vocab_size, start + 64);
                    int open = 0;
                    // a margin for the roundings on either side of the comparison
#pragma omp simd reduction(| : open)
                    for (int64_t i = start; i < end; i++)
                        open |= atlas::uniform(atlas::noise_bits((uint32_t)i, keys)) <= probs[i] * race * 1.001f;
                    if (!open) continue;
                    for (int64_t i = start; i < end; i++) {
                        const float v = atlas::uniform(atlas::noise_bits((uint32_t)i, keys));
                        if (!(v <= probs[i] * race * 1.001f)) continue;
                        const float e = -std::log1p(-v), score = row[i] / temperature - std::log(e);
                        if (score > best) best = score, winner = i, race = e / probs[i];
                    }
                }
            }
            tokens[n] = winner;
            logprobs[n] = (float)((double)(row[winner] / temperature) - top - std::log(total));
        }
    }
}

}  // extern "C"
