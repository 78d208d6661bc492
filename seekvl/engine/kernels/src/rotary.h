// Rotary positions: channels turned in pairs by the angle of a position.
#pragma once

#include <algorithm>
#include <cstdint>

namespace seekvl {
namespace {

// Turn channels i and i + count by the angle of i.
inline void rotate_halves(float* x, const float* cos, const float* sin, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float first = x[i], second = x[i + count];
        x[i] = first * cos[i] - second * sin[i];
        x[i + count] = second * cos[i] + first * sin[i];
    }
}

// Turn channels 2i and 2i + 1 by the angle of i; the even ones come out first. `room` has 2 * count numbers.
inline void rotate_pairs(float* x, const float* cos, const float* sin, int64_t count, float* room) {
    for (int64_t i = 0; i < count; ++i) room[i] = x[2 * i], room[i + count] = x[2 * i + 1];
    rotate_halves(room, cos, sin, count);
    std::copy(room, room + 2 * count, x);
}

}  // namespace
}  // namespace seekvl
