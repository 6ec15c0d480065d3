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

#include "attention.h"
#include "decoder.h"
#include "noise.h"
#include "panels.h"
#include "vectors.h"

using namespace atlas;

constexpr int64_t PARALLEL_WORK = 1 << 15;  // elements from which waking the other threads pays

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
    for (int64_t n = 0; n < num_tokens; n++) gate(gate_up + 2 * n * size, size, 0, size, out + n * size);
}

void rope_and_store(float* qkv, const float* query_norm, const float* key_norm, float eps, const float* cos, const float* sin,
                    const int64_t* positions, const int64_t* slots, float* keys, float* values, int64_t num_tokens,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size) {
    const Rows rows{nullptr, nullptr, nullptr, 0, 0, num_heads, num_kv_heads, head_dim, block_size};
    const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim, half = head_dim / 2;
#pragma omp parallel for if (num_tokens * width >= PARALLEL_WORK / 4)
    for (int64_t n = 0; n < num_tokens; n++)
        for (int64_t h = 0; h < num_kv_heads; h++)
            rotate_and_store(rows, query_norm, key_norm, eps, cos + positions[n] * half, sin + positions[n] * half, slots[n], h,
                             qkv + n * width, keys, values);
}

void paged_attention(const float* query, int64_t token_stride, int64_t head_stride, const float* keys, const float* values,
                     const int64_t* block_tables, const int64_t* starts, const int64_t* query_lens, int64_t num_rows,
                     int64_t max_blocks, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                     float scaling, float softcap, int64_t window, float* out) {
    const Rows rows{block_tables, starts, query_lens, num_rows, max_blocks, num_heads, num_kv_heads, head_dim, block_size};
    const Attention how{attend_for(head_dim), scaling, softcap, window};
    const std::vector<int64_t> first = first_tokens(rows);
#pragma omp parallel if (first[num_rows] * num_heads * rows.pitch() >= PARALLEL_WORK / 16)
    {
        std::vector<float> scores(MAX_TILE * rows.pitch());
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < num_rows * num_kv_heads; item++) {
            const int64_t r = item / num_kv_heads, h = item % num_kv_heads;
            attend_head(rows, how, r, h, first[r], query, token_stride, head_stride, keys, values, scores.data(), out);
        }
    }
}

void decode(const Decoder* model, const Rows* rows, const int64_t* positions, const int64_t* slots, int64_t num_tokens,
            float* workspace, float* x) {
    decode(*model, *rows, Tokens{positions, slots, num_tokens}, workspace, x);
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

void row_keys(const int64_t* seeds, const int64_t* positions, int64_t num_rows, uint32_t* keys) {
    for (int64_t n = 0; n < num_rows; n++) {
        const RowKeys made = row_keys(seeds[n], positions[n]);
        keys[n] = made.offset, keys[num_rows + n] = made.stride;
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
