// Quantised tiles on 64-bit ARM, for the sources of two levels: with the product of four bytes (dotprod) where the
// compiler may use it.
#pragma once

#include <arm_neon.h>

#include "packed_level.h"

namespace seekvl {
namespace {

struct Neon {
    static constexpr int few = 4, many = 4, tiles = 1;  // 16 of the 32 registers are sums
    static constexpr int32_t byte_zero = 0;
    struct Ints { int32x4_t rows[4]; };
    struct Floats { float32x4_t rows[4]; };
    struct Line { int8x16_t rows[4]; };
    using HalfLine = Line;

    static Ints all(int32_t value) {
        const int32x4_t v = vdupq_n_s32(value);
        return {{v, v, v, v}};
    }
    static Floats all(float value) {
        const float32x4_t v = vdupq_n_f32(value);
        return {{v, v, v, v}};
    }
    static Floats load(const float* from) {
        return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
    }
    static void store(float* to, const Floats& value) {
        for (int part = 0; part < 4; ++part) vst1q_f32(to + 4 * part, value.rows[part]);
    }
    static Floats bf16(const uint8_t* from) {
        Floats out;
        for (int part = 0; part < 4; ++part) {
            const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(from + 8 * part));
            out.rows[part] = vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
        }
        return out;
    }
    static Floats scaled(Floats value, float scale) {
        for (float32x4_t& rows : value.rows) rows = vmulq_n_f32(rows, scale);
        return value;
    }
    static Floats product(Floats a, const Floats& b) {
        for (int part = 0; part < 4; ++part) a.rows[part] = vmulq_f32(a.rows[part], b.rows[part]);
        return a;
    }
    static Floats accumulate(Floats total, const Ints& sum, const Floats& scale) {
        for (int part = 0; part < 4; ++part)
            total.rows[part] = vfmaq_f32(total.rows[part], vcvtq_f32_s32(sum.rows[part]), scale.rows[part]);
        return total;
    }
    static Ints add(Ints a, const Ints& b) {
        for (int part = 0; part < 4; ++part) a.rows[part] = vaddq_s32(a.rows[part], b.rows[part]);
        return a;
    }

    static Line bytes(const uint8_t* from) {
        Line out;
        for (int part = 0; part < 4; ++part)
            out.rows[part] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from + 16 * part), vdupq_n_u8(128)));
        return out;
    }
    static void nibbles(const uint8_t* from, Line& low, Line& high) {
        for (int part = 0; part < 4; ++part) {
            const uint8x16_t line = vld1q_u8(from + 16 * part);
            low.rows[part] = vreinterpretq_s8_u8(vandq_u8(line, vdupq_n_u8(15)));
            high.rows[part] = vreinterpretq_s8_u8(vshrq_n_u8(line, 4));
        }
    }
    static void keep(uint8_t* to, const HalfLine& line) {
        for (int part = 0; part < 4; ++part) vst1q_u8(to + 16 * part, vreinterpretq_u8_s8(line.rows[part]));
    }
    static HalfLine kept(const uint8_t* from) {
        HalfLine out;
        for (int part = 0; part < 4; ++part) out.rows[part] = vreinterpretq_s8_u8(vld1q_u8(from + 16 * part));
        return out;
    }
    static int8x16_t four(const int8_t* x) {
        int32_t bits;
        std::memcpy(&bits, x, sizeof bits);
        return vreinterpretq_s8_s32(vdupq_n_s32(bits));
    }
    template <class Value>
    static const Value& loaded(const Value& value) {
        return value;
    }
    static Ints dot(Ints sum, const Line& line, int8x16_t four) {
        for (int part = 0; part < 4; ++part) sum.rows[part] = dot(sum.rows[part], line.rows[part], four);
        return sum;
    }

    static int32x4_t dot(int32x4_t sum, int8x16_t line, int8x16_t four) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, line, four);
#else
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(line), vget_low_s8(four)));
        const int32x4_t high = vpaddlq_s16(vmull_high_s8(line, four));
        return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
    }
};

}  // namespace
}  // namespace seekvl
