// The noise of atlas_kernels.reference in C++: one value per (seed, position, token id), the same integers everywhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace atlas {

struct RowKeys {
    uint32_t offset, stride;
};

inline uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

inline RowKeys row_keys(int64_t seed, int64_t position) {
    const uint64_t mixed = splitmix64(splitmix64((uint64_t)seed) + (uint64_t)position * 0x9E3779B97F4A7C15u);
    return {(uint32_t)mixed, (uint32_t)(mixed >> 32) | 1u};
}

inline uint32_t noise_bits(uint32_t token, RowKeys keys) {
    uint32_t x = token * keys.stride + keys.offset;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return (x ^ (x >> 16)) >> 1;
}

inline float uniform(uint32_t bits) {
    return std::min(((float)(int32_t)bits + 0.5f) * 4.656612873077393e-10f, 0.99999994f);
}

}  // namespace atlas
