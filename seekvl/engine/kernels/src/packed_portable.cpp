// Any machine: plain C++ in the shape that compilers turn into vectors.
#include "packed_level.h"

namespace seekvl {
namespace {

struct Portable {
    static constexpr int few = 4, many = 4, tiles = 1;
    static constexpr int32_t byte_zero = 128;
    struct Ints { int32_t v[16]; };
    struct Floats { float v[16]; };
    struct Line { uint8_t v[64]; };
    using HalfLine = Line;
    struct Four { int8_t v[4]; };

    static Ints all(int32_t value) {
        Ints out;
        for (int32_t& v : out.v) v = value;
        return out;
    }
    static Floats all(float value) {
        Floats out;
        for (float& v : out.v) v = value;
        return out;
    }
    static Floats load(const float* from) {
        Floats out;
        std::memcpy(out.v, from, sizeof out.v);
        return out;
    }
    static void store(float* to, const Floats& value) { std::memcpy(to, value.v, sizeof value.v); }
    static Floats bf16(const uint8_t* from) {
        Floats out;
        for (int row = 0; row < 16; ++row) out.v[row] = get(BF16, from, row);
        return out;
    }
    static Floats scaled(Floats value, float scale) {
        for (float& v : value.v) v *= scale;
        return value;
    }
    static Floats product(Floats a, const Floats& b) {
        for (int row = 0; row < 16; ++row) a.v[row] *= b.v[row];
        return a;
    }
    static Floats accumulate(Floats total, const Ints& sum, const Floats& scale) {
        for (int row = 0; row < 16; ++row) total.v[row] += static_cast<float>(sum.v[row]) * scale.v[row];
        return total;
    }
    static Ints add(Ints a, const Ints& b) {
        for (int row = 0; row < 16; ++row) a.v[row] += b.v[row];
        return a;
    }

    static Line bytes(const uint8_t* from) {
        Line out;
        std::memcpy(out.v, from, sizeof out.v);
        return out;
    }
    static void nibbles(const uint8_t* from, Line& low, Line& high) {
        for (int byte = 0; byte < 64; ++byte) low.v[byte] = from[byte] & 15, high.v[byte] = from[byte] >> 4;
    }
    static void keep(uint8_t* to, const HalfLine& line) { std::memcpy(to, line.v, sizeof line.v); }
    static HalfLine kept(const uint8_t* from) { return bytes(from); }
    static Four four(const int8_t* x) {
        Four out;
        std::memcpy(out.v, x, sizeof out.v);
        return out;
    }
    template <class Value>
    static const Value& loaded(const Value& value) {
        return value;
    }
    static Ints dot(Ints sum, const Line& line, Four four) {
        for (int row = 0; row < 16; ++row)
            for (int i = 0; i < 4; ++i) sum.v[row] += line.v[4 * row + i] * four.v[i];
        return sum;
    }
};

}  // namespace

const PackedLevel packed_portable = packed_level_of<Portable>();

}  // namespace seekvl
