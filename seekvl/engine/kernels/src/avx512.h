// Vectors of AVX-512 (F, BW, DQ, VL), for the two levels that have it.
#pragma once

#include <immintrin.h>

#include "blocks.h"
#include "gradient_blocks.h"
#include "rows.h"
#include "turn.h"

namespace seekvl {
namespace {

struct Avx512 {
    template <class Stored> static constexpr int lanes = 16;
    static constexpr int chains = 2, batch = 4, rows = 2;  // 16 of the 32 registers are sums
    static constexpr bool pairs = false;
    using Vector = __m512;

    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector spread(float x) { return _mm512_set1_ps(x); }

    static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static Vector load(const F16Bits* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(sixteen(from))); }
    static Vector load(const Bf16* from) { return wide(_mm256_loadu_si256(sixteen(from))); }

    static Vector load(const float* from, int n) { return _mm512_maskz_loadu_ps(first(n), from); }
    static Vector load(const F16Bits* from, int n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), from));
    }
    static Vector load(const Bf16* from, int n) { return wide(_mm256_maskz_loadu_epi16(first(n), from)); }

    static Vector fma(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
    static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
    static Vector scaled(Vector a, Vector n) { return _mm512_scalef_ps(a, n); }
    static float sum(Vector a) { return _mm512_reduce_add_ps(a); }
    static void store(float* to, Vector a) { _mm512_storeu_ps(to, a); }

    static Vector wide(__m256i halves) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static const __m256i* sixteen(const void* from) { return static_cast<const __m256i*>(from); }
    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
};

// Lanes of 16 rows, and of 8 in half a register.
struct Avx512Lanes {
    using Weight = float;
    using Number = float;
    using Vector = __m512;
    using Half = __m256;
    static constexpr int lanes = 16, step = 1, rows = 8, vectors = 3;  // 24 of the 32 registers are sums
    static constexpr bool halves = true;

    static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static Vector zero() { return _mm512_setzero_ps(); }
    static Half zero_half() { return _mm256_setzero_ps(); }
    static Half load_half(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Vector a) { _mm512_storeu_ps(to, a); }
    static void store_half(float* to, Half a) { _mm256_storeu_ps(to, a); }
    static Vector broadcast(const float* weight) { return _mm512_set1_ps(*weight); }
    static Vector fma(Vector weight, Vector x, Vector sum) { return _mm512_fmadd_ps(weight, x, sum); }
    static Half fma_half(Vector weight, Half x, Half sum) {
        return _mm256_fmadd_ps(_mm512_castps512_ps256(weight), x, sum);
    }
    static void transpose(const float* from, int64_t stride, float (*to)[kStrip]) { transpose8(from, stride, to); }
};

}  // namespace
}  // namespace seekvl
