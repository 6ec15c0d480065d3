// A Llama-like decoder over a few tokens of each row, from embeddings to the last hidden states, in one parallel region: calling
// its parts one by one, and waking the threads for each, takes longer than a small model computes.
//
// Each part computes what the function of its name in cpu_ops.cpp computes, to the last bit.
#pragma once

#include <omp.h>

#include "attention.h"
#include "panels.h"
#include "vectors.h"

namespace atlas {

struct Layer {
    const float *input_norm, *query_norm, *key_norm, *post_norm;  // queries and keys may have none
    const Weight *qkv, *out, *gate_up, *down;
    float* tapped;         // [N, D] where the layer's output goes as well, or nullptr
    float scaling;
    int64_t window;
};

struct Decoder {
    const Layer* layers;
    int64_t num_layers, hidden_size;
    float eps;
    const float* final_norm;
    const float *cos, *sin;  // [positions, head_dim / 2]
    float* cache;            // [layers, 2 (keys, values), blocks, H, S, D]
    int64_t layer_stride, value_stride;
};

struct Tokens {
    const int64_t *positions, *slots;  // [N]
    int64_t num_tokens;
};

// Rows and KV heads [first, last) of R * H such that all threads have about as much to read.
inline std::pair<int64_t, int64_t> share_of_heads(const Rows& rows, int64_t thread, int64_t num_threads) {
    const int64_t groups = rows.num_heads / rows.num_kv_heads, heads = rows.num_kv_heads;
    const auto cost = [&](int64_t r) {
        const int64_t tiles = (rows.query_lens[r] * groups + MAX_TILE - 1) / MAX_TILE;
        return tiles * (rows.starts[r] + rows.query_lens[r] + 16);  // 16: about what a tile costs beside its slots
    };
    int64_t total = 0;
    for (int64_t r = 0; r < rows.num_rows; r++) total += cost(r);
    const auto place = [&](int64_t part) {  // where that part of the whole ends
        int64_t left = part * total / num_threads, r = 0;
        while (r < rows.num_rows && left >= cost(r)) left -= cost(r++);
        return r == rows.num_rows ? r * heads : r * heads + left * heads / cost(r);
    };
    return {place(thread), thread + 1 == num_threads ? rows.num_rows * heads : place(thread + 1)};
}

// x: [N, D] embeddings, overwritten by the last hidden states, after the final norm. workspace: room for N times the inputs of
// qkv (gate_up's lie there later), out and down, and the outputs of qkv and gate_up.
inline void decode(const Decoder& model, const Rows& rows, const Tokens& tokens, float* workspace, float* x) {
    const int64_t N = tokens.num_tokens, D = model.hidden_size;
    const Layer& any = model.layers[0];
    const int64_t inner_size = any.down->in, width = any.qkv->out;
    float *normed = workspace, *qkv = normed + N * D, *mixed = qkv + N * width;
    float *gate_up = mixed + N * any.out->in, *inner = gate_up + N * any.gate_up->out;
    const std::vector<int64_t> first_token = first_tokens(rows);
    const AttendTile tile_fn = attend_for(rows.head_dim);
    const int64_t half = rows.head_dim / 2, num_weights = D * (width + any.out->in + 3 * inner_size);

#pragma omp parallel if (std::max<int64_t>(4, N) * num_weights >= 1 << 20)
    {
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        const auto [first_n, last_n] = share_of(N, thread, num_threads);
        const auto [first_item, last_item] = share_of_heads(rows, thread, num_threads);
        std::vector<float> scores(MAX_TILE * rows.pitch());
        const auto norm = [&](const float* weight, float* out) {
            for (int64_t n = first_n; n < last_n; n++) normalise(x + n * D, weight, model.eps, D, out + n * D);
        };
        const auto multiply = [&](const Weight& weight, const float* in, float* out, const float* residual = nullptr) {
            const auto [first, last] = share_of(num_panels(weight.out), thread, num_threads);
            if (first < last) product(weight, first, last, in, weight.in, N, out, weight.out, residual);
        };
        for (int64_t l = 0; l < model.num_layers; l++) {
            const Layer& layer = model.layers[l];
            norm(layer.input_norm, normed);
#pragma omp barrier
            multiply(*layer.qkv, normed, qkv);
#pragma omp barrier
            const Attention how{tile_fn, layer.scaling, 0.0f, layer.window};
            float *keys = model.cache + l * model.layer_stride, *values = keys + model.value_stride;
            for (int64_t item = first_item; item < last_item; item++) {
                const int64_t r = item / rows.num_kv_heads, h = item % rows.num_kv_heads;
                for (int64_t n = first_token[r]; n < first_token[r + 1]; n++)
                    rotate_and_store(rows, layer.query_norm, layer.key_norm, model.eps, model.cos + tokens.positions[n] * half,
                                     model.sin + tokens.positions[n] * half, tokens.slots[n], h, qkv + n * width, keys,
                                     values);
                attend_head(rows, how, r, h, first_token[r], qkv, width, rows.head_dim, keys, values, scores.data(), mixed);
            }
#pragma omp barrier
            multiply(*layer.out, mixed, x, x);
#pragma omp barrier
            norm(layer.post_norm, normed);
#pragma omp barrier
            multiply(*layer.gate_up, normed, gate_up);
#pragma omp barrier
            const auto [first_i, last_i] = share_of(inner_size, thread, num_threads);
            for (int64_t n = 0; n < N; n++)
                gate(gate_up + 2 * n * inner_size, inner_size, first_i, last_i, inner + n * inner_size);
#pragma omp barrier
            multiply(*layer.down, inner, x, x);
#pragma omp barrier
            if (layer.tapped) std::copy(x + first_n * D, x + last_n * D, layer.tapped + first_n * D);
        }
        norm(model.final_norm, x);
    }
}

}  // namespace atlas
