// x86 with AVX-512 and its products of bytes (VNNI: Cascade Lake, Zen 4, and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include "packed_level.h"

namespace seekvl {
namespace {

struct Vnni {
    static constexpr int few = 8, many = 3, tiles = 4;  // 24 of the 32 registers are sums
    static constexpr int32_t byte_zero = 128;
    using Ints = __m512i;
    using Floats = __m512;
    using Line = __m512i;
    using HalfLine = __m512i;

    static Ints all(int32_t value) { return _mm512_set1_epi32(value); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
    static Floats bf16(const uint8_t* from) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static Floats scaled(Floats value, float scale) { return _mm512_mul_ps(value, _mm512_set1_ps(scale)); }
    static Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats accumulate(Floats total, Ints sum, Floats scale) {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total);
    }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

    static Line bytes(const uint8_t* from) { return kept(from); }
    static HalfLine kept(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static void nibbles(const uint8_t* from, HalfLine& low, HalfLine& high) {
        const __m512i line = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
        low = _mm512_and_si512(line, mask);
        high = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
    }
    static void keep(uint8_t* to, HalfLine line) { _mm512_storeu_si512(to, line); }
    static __m512i four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, sizeof bits);
        return _mm512_set1_epi32(bits);
    }
    // The instruction itself and not its intrinsic: GCC 12 copies each sum before it adds to it.
    static Ints dot(Ints sum, Line line, __m512i four) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(line), "v"(four));
        return sum;
    }
    // A value that is loaded here and now, once.
    static __m512i loaded(__m512i value) {
        asm volatile("" : "+v"(value));
        return value;
    }
};

}  // namespace

const PackedLevel packed_vnni = packed_level_of<Vnni>();

}  // namespace seekvl

#endif
