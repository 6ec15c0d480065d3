// Vectors of sixteen floats, and what a decoder does to a token besides products and attention.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace atlas {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float VecU __attribute__((vector_size(4 * LANES), aligned(4)));  // for unaligned memory

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

constexpr int SUMMED = 8;  // vectors that are summed together

// out[i] = the sum of v[i]: added up by a tree of shuffles, a third of the work of one at a time. Each sum is of the same order
// of additions, so that it does not depend on its neighbours.
inline void sums(const Vec* v, float* out) {
#if defined(__AVX__) && !defined(__clang__)
    typedef float Half __attribute__((vector_size(2 * LANES)));
    typedef int32_t Places __attribute__((vector_size(2 * LANES)));
    Half half[SUMMED];
    for (int i = 0; i < SUMMED; i++) {
        Half parts[2];
        std::memcpy(parts, v + i, sizeof parts);
        half[i] = parts[0] + parts[1];
    }
    const Places evens1{0, 8, 1, 9, 4, 12, 5, 13}, odds1{2, 10, 3, 11, 6, 14, 7, 15};
    const Places evens2{0, 1, 8, 9, 4, 5, 12, 13}, odds2{2, 3, 10, 11, 6, 7, 14, 15};
    const Places low{0, 1, 2, 3, 8, 9, 10, 11}, high{4, 5, 6, 7, 12, 13, 14, 15};
    for (int i = 0; i < 4; i++)
        half[i] = __builtin_shuffle(half[2 * i], half[2 * i + 1], evens1) + __builtin_shuffle(half[2 * i], half[2 * i + 1], odds1);
    for (int i = 0; i < 2; i++)
        half[i] = __builtin_shuffle(half[2 * i], half[2 * i + 1], evens2) + __builtin_shuffle(half[2 * i], half[2 * i + 1], odds2);
    half[0] = __builtin_shuffle(half[0], half[1], low) + __builtin_shuffle(half[0], half[1], high);
    std::memcpy(out, half, sizeof half[0]);
#else
    for (int i = 0; i < SUMMED; i++) out[i] = sum(v[i]);
#endif
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

// silu(gate) * up over the columns [first, last); gate and up lie side by side, each of this size.
inline void gate(const float* gate_up, int64_t size, int64_t first, int64_t last, float* out) {
    const float *gate = gate_up, *up = gate + size;
#pragma omp simd
    for (int64_t i = first; i < last; i++) out[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
}

inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

}  // namespace atlas
