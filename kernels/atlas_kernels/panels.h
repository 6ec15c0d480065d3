// Products of a few rows with weights packed into panels.
//
// A panel holds PANEL outputs of a Linear, [in][PANEL], so that a tile of up to MAX_ROWS rows times one panel is nothing but
// broadcasts of x times vectors of the panel, added up in registers; every weight is read once per tile. Each result is one
// chain of multiply-adds over the inputs in order: a row's results are the same to the last bit however many rows there are.
//
// How to call it: allocate `packed_size(in, out)` floats, `pack` one or several weights into them side by side, make a
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
#include <cstring>
#include <utility>

namespace atlas {

#ifdef __AVX512F__
constexpr int REGISTER = 16, MAX_ROWS = 12;  // floats per register; 24 of 32 registers hold a tile
#else
constexpr int REGISTER = 8, MAX_ROWS = 6;  // 12 of 16
#endif
constexpr int PANEL = 2 * REGISTER;

struct Weight {
    const float* panels;
    int64_t in, out;
    const float* bias = nullptr;  // [out]
};

inline int64_t num_panels(int64_t out) { return (out + PANEL - 1) / PANEL; }
inline int64_t packed_size(int64_t in, int64_t out) { return num_panels(out) * PANEL * in; }

// The row-major weight [out, in] as the outputs from `column` on. Outputs of the last panel that no weight fills must be zero.
inline void pack(const float* weight, int64_t out, int64_t in, int64_t column, float* panels) {
    for (int64_t o = 0; o < out;) {
        const int64_t lane = (column + o) % PANEL, count = std::min(PANEL - lane, out - o);
        float* panel = panels + (column + o) / PANEL * PANEL * in + lane;
        for (int64_t k = 0; k < in; k++)
            for (int64_t i = 0; i < count; i++) panel[k * PANEL + i] = weight[(o + i) * in + k];
        o += count;
    }
}

inline std::pair<int64_t, int64_t> share_of(int64_t count, int64_t thread, int64_t num_threads) {
    return {count * thread / num_threads, count * (thread + 1) / num_threads};
}

namespace panels_detail {

typedef float Vec __attribute__((vector_size(4 * REGISTER)));
typedef float VecU __attribute__((vector_size(4 * REGISTER), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

// ROWS rows of x times PANELS panels.
template <int ROWS, int PANELS>
void tile(const Weight& weight, int64_t panel, const float* x, int64_t x_stride, float* out, int64_t out_stride,
          const float* residual) {
    constexpr int VECS = 2 * PANELS;
    const int64_t pitch = PANEL * weight.in;
    const float* w = weight.panels + panel * pitch;
    Vec total[ROWS][VECS] = {};
    for (int64_t k = 0; k < weight.in; k++, w += PANEL) {
        Vec part[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) part[v] = load(w + v / 2 * pitch + v % 2 * REGISTER);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const float xk = x[r * x_stride + k];
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) total[r][v] += part[v] * xk;
        }
    }
    for (int v = 0; v < VECS; v++) {
        const int64_t column = panel * PANEL + v * REGISTER, count = std::min<int64_t>(REGISTER, weight.out - column);
        for (int r = 0; r < ROWS; r++) {
            float* to = out + r * out_stride + column;
            const float* more = residual ? residual + r * out_stride + column : nullptr;
            if (count == REGISTER) {
                Vec sum = total[r][v];
                if (weight.bias) sum += load(weight.bias + column);
                store(to, more ? sum + load(more) : sum);
            } else {
                for (int64_t i = 0; i < count; i++)
                    to[i] = total[r][v][i] + (weight.bias ? weight.bias[column + i] : 0.0f) + (more ? more[i] : 0.0f);
            }
        }
    }
}

// Fewer rows take more panels at once: a multiply-add's result can be added to only four cycles later.
template <int ROWS>
void tiles(const Weight& weight, int64_t first, int64_t last, const float* x, int64_t x_stride, float* out,
           int64_t out_stride, const float* residual) {
    constexpr int AT_ONCE = ROWS == 1 ? 4 : ROWS <= MAX_ROWS / 3 ? 2 : 1;
    int64_t panel = first;
    for (; panel + AT_ONCE <= last; panel += AT_ONCE)
        tile<ROWS, AT_ONCE>(weight, panel, x, x_stride, out, out_stride, residual);
    for (; panel < last; panel++) tile<ROWS, 1>(weight, panel, x, x_stride, out, out_stride, residual);
}

using Tiles = void (*)(const Weight&, int64_t, int64_t, const float*, int64_t, float*, int64_t, const float*);

template <int... I>
Tiles tiles_of(int rows, std::integer_sequence<int, I...>) {
    static constexpr Tiles all[] = {tiles<I + 1>...};
    return all[rows - 1];
}

}  // namespace panels_detail

// out[r, o] = x[r] · weight[o] + bias[o] + residual[r, o] for the outputs o of panels [first, last). x and out are where row 0
// and output 0 lie; residual, if any, has out's stride and may be out.
inline void product(const Weight& weight, int64_t first, int64_t last, const float* x, int64_t x_stride, int64_t rows, float* out,
                    int64_t out_stride, const float* residual = nullptr) {
    using namespace panels_detail;
    const int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;  // as even as can be
    for (int64_t panel = first; panel < last; panel = blocks > 1 ? panel + 1 : last)
        for (int64_t b = 0; b < blocks; b++) {
            const auto [from, to] = share_of(rows, b, blocks);
            tiles_of((int)(to - from), std::make_integer_sequence<int, MAX_ROWS>())(
                weight, panel, blocks > 1 ? panel + 1 : last, x + from * x_stride, x_stride, out + from * out_stride,
                out_stride, residual ? residual + from * out_stride : nullptr);
        }
}

}  // namespace atlas
