// Products of a few rows with weights packed into panels.
//
// A panel holds PANEL outputs of a Linear, [in][PANEL], so that a tile of up to MAX_ROWS rows times one panel is nothing but
// broadcasts of x times vectors of the panel, added up in registers; every weight is read once per tile. Each result is one
// chain of multiply-adds over the inputs in order: a row's results are the same to the last bit however many rows there are.
//
// How to call it: allocate `packed_size(in, out)` floats, all zero, `pack` one or several weights into them side by side, make a
// `Weight`, and share its `num_panels(out)` panels among the threads of a parallel region (no barrier inside):
//
//     #pragma omp parallel
//     {
//         const auto [first, last] = share_of(num_panels(weight.out), omp_get_thread_num(), omp_get_num_threads());
//         product(weight, first, last, x, x_stride, rows, out, out_stride);
//     }
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace atlas {

#ifdef __AVX512F__
constexpr int REGISTER = 16, MAX_ROWS = 12;  // floats per register; 24 of 32 registers hold a tile
#else
constexpr int REGISTER = 8, MAX_ROWS = 6;  // 12 of 16
#endif
constexpr int PANEL = 2 * REGISTER;
constexpr int AHEAD = 4096;  // floats between what is read and what is prefetched

struct Weight {
    const float* panels;
    int64_t in, out;
    const float* bias = nullptr;  // [out]
};

inline int64_t num_panels(int64_t out) { return (out + PANEL - 1) / PANEL; }
inline int64_t packed_size(int64_t in, int64_t out) { return num_panels(out) * PANEL * in; }

// The row-major weight [out, in] as the outputs from `column` on.
inline void pack(const float* weight, int64_t out, int64_t in, int64_t column, float* panels) {
#pragma omp parallel for if (out * in >= 1 << 16)
    for (int64_t p = column / PANEL; p <= (column + out - 1) / PANEL; p++) {
        const int64_t first = std::max<int64_t>(0, p * PANEL - column), last = std::min(out, (p + 1) * PANEL - column);
        float* panel = panels + p * PANEL * in + (column + first) % PANEL;
        for (int64_t k = 0; k < in; k++)
            for (int64_t o = first; o < last; o++) panel[k * PANEL + o - first] = weight[o * in + k];
    }
}

inline std::pair<int64_t, int64_t> share_of(int64_t count, int64_t thread, int64_t num_threads) {
    return {count * thread / num_threads, count * (thread + 1) / num_threads};
}

namespace panels_detail {

typedef float Vec __attribute__((vector_size(4 * REGISTER)));
typedef float VecU __attribute__((vector_size(4 * REGISTER), aligned(4)));  // for unaligned memory

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

// ROWS rows of x times one panel.
template <int ROWS>
void tile(const Weight& weight, int64_t panel, const float* x, int64_t x_stride, float* out, int64_t out_stride,
          const float* residual) {
    const float* w = weight.panels + panel * PANEL * weight.in;
    Vec total[ROWS][2] = {};
    for (int64_t k = 0; k < weight.in; k++, w += PANEL) {
        // with fewer rows the processor's own prefetching keeps up, and ours would only take its load slots
        if (ROWS > MAX_ROWS / 2)
            for (int v = 0; v < 2; v++) __builtin_prefetch(w + AHEAD + v * REGISTER, 0, 2);
        Vec part[2] = {load(w), load(w + REGISTER)};
#ifdef __AVX__
        if (ROWS > 1) asm("" : "+v"(part[0]), "+v"(part[1]));  // GCC would read them again for each of up to four rows
#endif
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const float xk = x[r * x_stride + k];
            total[r][0] += part[0] * xk;
            total[r][1] += part[1] * xk;
        }
    }
    const int64_t column = panel * PANEL, count = std::min<int64_t>(PANEL, weight.out - column);
    const float* bias = weight.bias ? weight.bias + column : nullptr;
    for (int r = 0; r < ROWS; r++) {
        float* to = out + r * out_stride + column;
        const float* more = residual ? residual + r * out_stride + column : nullptr;
        if (count == PANEL) {
            for (int v = 0; v < 2; v++) {
                if (bias) total[r][v] += load(bias + v * REGISTER);
                if (more) total[r][v] += load(more + v * REGISTER);
                store(to + v * REGISTER, total[r][v]);
            }
        } else {
            for (int64_t i = 0; i < count; i++)
                to[i] = total[r][i / REGISTER][i % REGISTER] + (bias ? bias[i] : 0.0f) + (more ? more[i] : 0.0f);
        }
    }
}

using Tile = void (*)(const Weight&, int64_t, const float*, int64_t, float*, int64_t, const float*);

template <int... I>
static Tile tile_of(int64_t rows, std::integer_sequence<int, I...>) {
    static constexpr Tile all[] = {tile<I + 1>...};
    return all[rows - 1];
}

}  // namespace panels_detail

// out[r, o] = x[r] · weight[o] + bias[o] + residual[r, o] for the outputs o of panels [first, last). x and out are where row 0
// and output 0 lie; residual, if any, has out's stride and may be out.
inline void product(const Weight& weight, int64_t first, int64_t last, const float* x, int64_t x_stride, int64_t rows, float* out,
                    int64_t out_stride, const float* residual = nullptr) {
    using namespace panels_detail;
    const int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t b = 0; b < blocks; b++) {
            const auto [from, to] = share_of(rows, b, blocks);  // blocks as even as can be
            tile_of(to - from, std::make_integer_sequence<int, MAX_ROWS>())(
                weight, panel, x + from * x_stride, x_stride, out + from * out_stride, out_stride,
                residual ? residual + from * out_stride : nullptr);
        }
}

}  // namespace atlas
