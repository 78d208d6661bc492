// The transpose of 8 times 8 numbers in registers of AVX, for every level that has them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace seekvl {
namespace {

// to[l][row] = from[row * stride + l].
inline void transpose8(const float* from, int64_t stride, float (*to)[8]) {
    __m256 a[8], b[8];
    for (int row = 0; row < 8; ++row) a[row] = _mm256_loadu_ps(from + row * stride);
    for (int row = 0; row < 8; row += 2) {
        b[row] = _mm256_unpacklo_ps(a[row], a[row + 1]);
        b[row + 1] = _mm256_unpackhi_ps(a[row], a[row + 1]);
    }
    for (int row = 0; row < 8; row += 4)
        for (int half = 0; half < 2; ++half) {
            a[row + 2 * half] = _mm256_shuffle_ps(b[row + half], b[row + 2 + half], 0x44);
            a[row + 2 * half + 1] = _mm256_shuffle_ps(b[row + half], b[row + 2 + half], 0xee);
        }
    for (int row = 0; row < 4; ++row) {
        _mm256_storeu_ps(to[row], _mm256_permute2f128_ps(a[row], a[row + 4], 0x20));
        _mm256_storeu_ps(to[row + 4], _mm256_permute2f128_ps(a[row], a[row + 4], 0x31));
    }
}

}  // namespace
}  // namespace seekvl
