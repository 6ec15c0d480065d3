// Attention of a few query vectors over one row's keys and values, which lie in blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace atlas {

constexpr int MAX_TILE = 4;              // query vectors that share one pass over the keys and values
constexpr int64_t AHEAD_BLOCKS = 2;      // between what is read and what is prefetched

// What a tile of query vectors attends to: slots [first, last] of one row, for one KV head.
struct Context {
    const float *keys, *values;  // of this head in block 0
    const int64_t* blocks;       // the row's block table
    int64_t block_stride, block_size, head_dim;
    const float* block(const float* base, int64_t index) const { return base + blocks[index] * block_stride; }
};

struct Query {
    const float* vector;
    float* out;
    int64_t first, last;
};

// scores[t][s] = query t times the key of slot s, for SUMMED slots or fewer.
template <int VECS>
void score(const float* keys, int64_t count, const Query* queries, int tile, int vecs, float scaling, float* scores,
           int64_t pitch) {
    if (VECS) vecs = VECS;
    for (int t = 0; t < tile; t++) {
        const float* query = queries[t].vector;
        Vec total[SUMMED];
#pragma GCC unroll 8
        for (int s = 0; s < SUMMED; s++) {
            const float* key = keys + std::min<int64_t>(s, count - 1) * vecs * LANES;
            total[s] = load(query) * load(key);
            for (int i = 1; i < vecs; i++) total[s] += load(query + i * LANES) * load(key + i * LANES);
        }
        float summed[SUMMED];
        sums(total, summed);
        for (int s = 0; s < count; s++) scores[t * pitch + s] = summed[s] * scaling;
    }
}

// VECS = head_dim / LANES where it is a constant, else 0.
template <int TILE, int VECS>
void attend(const Context& context, const Query* queries, float scaling, float softcap, float* scores, int64_t pitch) {
    const int vecs = VECS ? VECS : context.head_dim / LANES;
    constexpr int HELD = VECS ? VECS : 16;  // head dims up to 256
    const int64_t size = context.block_size, dim = VECS ? VECS * LANES : context.head_dim;
    int64_t first = queries[0].first, last = queries[0].last;
    for (int t = 1; t < TILE; t++) first = std::min(first, queries[t].first), last = std::max(last, queries[t].last);
    const int64_t first_block = first / size, last_block = last / size;

    for (int64_t b = first_block; b <= last_block; b++) {
        const float* keys = context.block(context.keys, b);
        // the blocks of a row lie apart: the processor foresees nothing across them. After the last keys come the first values
        const int64_t next_block = b + AHEAD_BLOCKS, beyond = next_block - last_block - 1;
        const float* next = beyond < 0 ? context.block(context.keys, next_block)
                                       : context.block(context.values, std::min(last_block, first_block + beyond));
        const int64_t end = std::min(last + 1, (b + 1) * size);
        for (int64_t s = std::max(first, b * size); s < end; s += SUMMED) {
            const int64_t count = std::min<int64_t>(SUMMED, end - s);
            prefetch(next + (s - b * size) * dim, count * dim);
            score<VECS>(keys + (s - b * size) * dim, count, queries, TILE, vecs, scaling, scores + s - first, pitch);
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
    for (int64_t b = first_block; b <= last_block; b++) {
        const float* values = context.block(context.values, b);
        const float* next = context.block(context.values, std::min(last_block, b + AHEAD_BLOCKS));
        const int64_t end = std::min(last + 1, (b + 1) * size);
        for (int64_t s = std::max(first, b * size); s < end; s++) {
            const float* value = values + (s - b * size) * dim;
            prefetch(next + (s - b * size) * dim, dim);
#pragma GCC unroll 8
            for (int i = 0; i < vecs; i++) {
                const Vec part = load(value + i * LANES);
#pragma GCC unroll 4
                for (int t = 0; t < TILE; t++) mixed[t][i] += part * scores[t * pitch + s - first];
            }
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

// The rows of a batch, whose tokens lie back to back, and one layer of the cache [2 (keys, values), blocks, H, S, D].
struct Rows {
    const int64_t *block_tables, *starts, *query_lens;  // [R, max_blocks], [R], [R]
    int64_t num_rows, max_blocks;
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    int64_t pitch() const { return max_blocks * block_size; }  // scores of one query vector
};

// Rotates the queries of KV head h and its key, normalised if there are norms, in a token's [queries, keys, values], and stores
// the key and the value in the token's slot.
inline void rotate_and_store(const Rows& rows, const float* query_norm, const float* key_norm, float eps, const float* cos,
                             const float* sin, int64_t slot, int64_t h, float* qkv, float* keys, float* values) {
    const int64_t dim = rows.head_dim, groups = rows.num_heads / rows.num_kv_heads;
    const int64_t place = ((slot / rows.block_size * rows.num_kv_heads + h) * rows.block_size + slot % rows.block_size) * dim;
    prefetch<1>(keys + place, dim);  // fetched while the heads are rotated
    prefetch<1>(values + place, dim);
    for (int64_t i = 0; i < groups; i++) {
        float* query = qkv + (h * groups + i) * dim;
        if (query_norm) normalise(query, query_norm, eps, dim, query);
        rotate(query, cos, sin, dim / 2);
    }
    float *key = qkv + (rows.num_heads + h) * dim, *value = key + rows.num_kv_heads * dim;
    if (key_norm) normalise(key, key_norm, eps, dim, key);
    rotate(key, cos, sin, dim / 2);
    std::copy(key, key + dim, keys + place);
    std::copy(value, value + dim, values + place);
}

struct Attention {
    AttendTile tile_fn;
    float scaling, softcap;
    int64_t window;  // 0: none
};

// The queries of row r that share KV head h. token: the row's first; scores: room for MAX_TILE * pitch.
inline void attend_head(const Rows& rows, const Attention& how, int64_t r, int64_t h, int64_t token, const float* query,
                        int64_t token_stride, int64_t head_stride, const float* keys, const float* values, float* scores,
                        float* out) {
    const int64_t groups = rows.num_heads / rows.num_kv_heads, head_offset = h * rows.block_size * rows.head_dim;
    const Context context{keys + head_offset, values + head_offset, rows.block_tables + r * rows.max_blocks,
                          rows.num_kv_heads * rows.block_size * rows.head_dim, rows.block_size, rows.head_dim};
    const int64_t num_queries = rows.query_lens[r] * groups;
    for (int64_t done = 0; done < num_queries; done += MAX_TILE) {
        Query tile[MAX_TILE];
        const int size = (int)std::min<int64_t>(MAX_TILE, num_queries - done);
        for (int t = 0; t < size; t++) {
            const int64_t place = (done + t) / groups, n = token + place;
            const int64_t head = h * groups + (done + t) % groups, last = rows.starts[r] + place;
            tile[t] = {query + n * token_stride + head * head_stride, out + (n * rows.num_heads + head) * rows.head_dim,
                       how.window > 0 ? std::max<int64_t>(0, last - how.window + 1) : 0, last};
        }
        how.tile_fn(size, context, tile, how.scaling, how.softcap, scores, rows.pitch());
    }
}

// Place of each row's first token, and their number at the end.
inline std::vector<int64_t> first_tokens(const Rows& rows) {
    std::vector<int64_t> first(rows.num_rows + 1, 0);
    for (int64_t r = 0; r < rows.num_rows; r++) first[r + 1] = first[r] + rows.query_lens[r];
    return first;
}

}  // namespace atlas
