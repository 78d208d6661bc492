// x86 with AVX2 and FMA.
//
// Its product of bytes adds pairs in 16 bits and saturates. Of bytes with a sign it multiplies the magnitude of
// the weight, at most 128, with the input under the weight's sign, at most 127: 2 * 128 * 127 = 32,512 fits. So do
// pairs of nibbles, at most 2 * 15 * 127.
#if defined(__x86_64__)

#include <immintrin.h>

#include "packed_level.h"

namespace seekvl {
namespace {

struct Avx2 {
    static constexpr int few = 4, many = 4, tiles = 1;  // 8 of the 16 registers are sums
    static constexpr int32_t byte_zero = 0;
    struct Ints { __m256i rows[2]; };    // 0..7 and 8..15
    struct Floats { __m256 rows[2]; };
    struct Line { __m256i rows[2]; };
    struct HalfLine { __m256i rows[2]; };

    static Ints all(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
    static Floats all(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
    static Floats load(const float* from) { return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}}; }
    static void store(float* to, const Floats& value) {
        _mm256_storeu_ps(to, value.rows[0]);
        _mm256_storeu_ps(to + 8, value.rows[1]);
    }
    static Floats bf16(const uint8_t* from) { return {{eight(from), eight(from + 16)}}; }
    static Floats scaled(Floats value, float scale) {
        for (__m256& rows : value.rows) rows = _mm256_mul_ps(rows, _mm256_set1_ps(scale));
        return value;
    }
    static Floats product(const Floats& a, const Floats& b) {
        return {{_mm256_mul_ps(a.rows[0], b.rows[0]), _mm256_mul_ps(a.rows[1], b.rows[1])}};
    }
    static Floats accumulate(Floats total, const Ints& sum, const Floats& scale) {
        for (int half = 0; half < 2; ++half)
            total.rows[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.rows[half]), scale.rows[half], total.rows[half]);
        return total;
    }
    static Ints add(const Ints& a, const Ints& b) {
        return {{_mm256_add_epi32(a.rows[0], b.rows[0]), _mm256_add_epi32(a.rows[1], b.rows[1])}};
    }

    static Line bytes(const uint8_t* from) {
        const __m256i sign = _mm256_set1_epi8(-128);
        return {{_mm256_xor_si256(at(from), sign), _mm256_xor_si256(at(from + 32), sign)}};
    }
    static void nibbles(const uint8_t* from, HalfLine& low, HalfLine& high) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int half = 0; half < 2; ++half) {
            const __m256i line = at(from + 32 * half);
            low.rows[half] = _mm256_and_si256(line, mask);
            high.rows[half] = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
        }
    }
    static void keep(uint8_t* to, const HalfLine& line) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), line.rows[0]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), line.rows[1]);
    }
    static HalfLine kept(const uint8_t* from) { return {{at(from), at(from + 32)}}; }
    static __m256i four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, sizeof bits);
        return _mm256_set1_epi32(bits);
    }
    template <class Value>
    static const Value& loaded(const Value& value) {
        return value;
    }
    static Ints dot(Ints sum, const Line& line, __m256i four) {
        for (int half = 0; half < 2; ++half) {
            const __m256i size = _mm256_abs_epi8(line.rows[half]), x = _mm256_sign_epi8(four, line.rows[half]);
            sum.rows[half] = _mm256_add_epi32(sum.rows[half], pairs(size, x));
        }
        return sum;
    }
    static Ints dot(Ints sum, const HalfLine& line, __m256i four) {
        for (int half = 0; half < 2; ++half)
            sum.rows[half] = _mm256_add_epi32(sum.rows[half], pairs(line.rows[half], four));
        return sum;
    }

    static __m256i pairs(__m256i bytes, __m256i x) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x), _mm256_set1_epi16(1));
    }
    static __m256i at(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static __m256 eight(const uint8_t* from) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
};

}  // namespace

const PackedLevel packed_avx2 = packed_level_of<Avx2>();

}  // namespace seekvl

#endif
