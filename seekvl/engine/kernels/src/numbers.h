// Half-precision numbers to float32 and back, rounding to nearest, ties to even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

#include "product.h"

namespace seekvl {
namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bf16(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // rounding could turn a NaN into infinity
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t value) {
    const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fff) << 13;
    const float scaled = float_of(magnitude) * float_of(0x77800000);  // 2^112, the difference of the biases
    const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits_of(scaled);
    return float_of(bits | static_cast<uint32_t>(value & 0x8000) << 16);
}

inline uint16_t to_f16(float value) {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000;
    uint32_t bits = bits_of(value) & 0x7fffffff;
    if (bits >= 0x47800000) return static_cast<uint16_t>(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits < 0x38800000) {  // below 2^-14: in 0.5 + x the last bit is worth 2^-24, the smallest step
        bits = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
        return static_cast<uint16_t>(sign | bits);
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
}

inline float get(Dtype dtype, const void* from, int64_t at) {
    if (dtype == F32) return static_cast<const float*>(from)[at];
    const uint16_t half = static_cast<const uint16_t*>(from)[at];
    return dtype == F16 ? from_f16(half) : from_bf16(half);
}

inline void put(Dtype dtype, void* to, int64_t at, float value) {
    if (dtype == F32)
        static_cast<float*>(to)[at] = value;
    else
        static_cast<uint16_t*>(to)[at] = dtype == F16 ? to_f16(value) : to_bf16(value);
}

}  // namespace
}  // namespace seekvl
