// x86 with AVX2, FMA and F16C (Haswell, Zen, and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include "attend_lanes.h"
#include "blocks.h"
#include "gradient_blocks.h"
#include "rows.h"
#include "tower_lanes.h"
#include "turn.h"

namespace seekvl {
namespace {

struct Avx2 {
    template <class Stored> static constexpr int lanes = 8;
    static constexpr int chains = 4, batch = 2, rows = 1;  // 8 of the 16 registers are sums
    static constexpr bool pairs = false;
    using Vector = __m256;

    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector spread(float x) { return _mm256_set1_ps(x); }

    static Vector load(const float* from) { return _mm256_loadu_ps(from); }
    static Vector load(const F16Bits* from) { return _mm256_cvtph_ps(eight(from)); }
    static Vector load(const Bf16* from) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(from)), 16));
    }

    template <class Stored>
    static Vector load(const Stored* from, int n) { return load(Padded<Stored, 8>(from, n).values); }

    static Vector fma(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
    static Vector scaled(Vector a, Vector n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }

    static float sum(Vector a) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }

    static void store(float* to, Vector a) { _mm256_storeu_ps(to, a); }

    static __m128i eight(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
};

struct Avx2Lanes : WholeVectors<Avx2> {
    static constexpr int lanes = 8, rows = 4, vectors = 3;  // 12 of the 16 registers are sums

    static Vector broadcast(const float* weight) { return _mm256_broadcast_ss(weight); }
    static void transpose(const float* from, int64_t stride, float (*to)[kStrip]) { transpose8(from, stride, to); }
};

}  // namespace

const Level avx2 = level_of<Avx2>();
const Many avx2_many = many_of<Avx2, Avx2Lanes>();
const Gradients avx2_gradients = gradients_of<Avx2, Avx2Lanes>();
const AttendTile avx2_attend = attend<Avx2, Avx2Lanes>;
const TowerLevel avx2_tower = tower_of<Avx2, Avx2Lanes>();

}  // namespace seekvl

#endif
