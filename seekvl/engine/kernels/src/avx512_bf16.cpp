// x86 with AVX-512 and its products of bfloat16 (Cooper Lake, Zen 4, and later).
//
// Two products a lane and instruction: half the work where several inputs meet each weight. The products are
// exact and summed in float32, but numbers below 2^-126 count as zero.
#if defined(__x86_64__)

#include "attend_lanes.h"
#include "avx512.h"
#include "tower_lanes.h"

namespace seekvl {
namespace {

struct Avx512Bf16 : Avx512 {
    struct Pair { uint16_t bits; };
    template <class Stored> static constexpr int lanes = 16;
    static constexpr bool pairs = true;
    using Avx512::fma;
    using Avx512::load;

    static __m512bh load(const Pair* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static __m512bh load(const Pair* from, int n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, from);
    }
    static Vector fma(__m512bh a, __m512bh b, Vector sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

template <> constexpr int Avx512Bf16::lanes<Avx512Bf16::Pair> = 32;

struct Avx512Pairs : Avx512Lanes {
    using Weight = uint16_t;
    using Number = uint32_t;  // two numbers of a row
    static constexpr int step = 2;
    using Avx512Lanes::load;
    using Avx512Lanes::load_half;

    static __m512i load(const uint32_t* from) { return _mm512_loadu_si512(from); }
    static __m256i load_half(const uint32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static __m512i broadcast(const uint16_t* weight) {
        int32_t both;
        std::memcpy(&both, weight, sizeof both);
        return _mm512_set1_epi32(both);
    }
    static void store_rounded(uint16_t* to, Vector a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(a));
    }
    // Numbers of two rows side by side, in each lane.
    static void store_pairs(uint32_t* to, Vector first, Vector second) {
        alignas(64) static constexpr uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
    }
    static Vector fma(__m512i weight, __m512i x, Vector sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
    }
    static Half fma_half(__m512i weight, __m256i x, Half sum) {
        return _mm256_dpbf16_ps(sum, (__m256bh)_mm512_castsi512_si256(weight), (__m256bh)x);
    }
};

}  // namespace

const Level avx512_bf16 = level_of<Avx512Bf16>();
const Many avx512_bf16_many = many_of<Avx512Bf16, Avx512Lanes, Avx512Pairs>();
const Gradients avx512_bf16_gradients = gradients_of<Avx512Bf16, Avx512Pairs>();
const AttendTile avx512_bf16_attend = attend<Avx512Bf16, Avx512Lanes, Avx512Pairs>;
const TowerLevel avx512_bf16_tower = tower_of<Avx512Bf16, Avx512Lanes, Avx512Pairs>();

}  // namespace seekvl

#endif
