// Any machine: plain C++ in the shape that compilers turn into vectors.
#include "attend_lanes.h"
#include "blocks.h"
#include "gradient_blocks.h"
#include "rows.h"
#include "tower_lanes.h"

namespace seekvl {
namespace {

struct Portable {
    template <class Stored> static constexpr int lanes = 8;
    static constexpr int chains = 2, batch = 2, rows = 1;
    static constexpr bool pairs = false;
    struct Vector { float v[8]; };

    static Vector zero() { return {}; }

    static Vector spread(float x) {
        Vector out;
        for (int i = 0; i < 8; ++i) out.v[i] = x;
        return out;
    }

    template <class Stored>
    static Vector load(const Stored* from) {
        Vector out;
        for (int i = 0; i < 8; ++i) out.v[i] = wide(from[i]);
        return out;
    }

    template <class Stored>
    static Vector load(const Stored* from, int n) { return load(Padded<Stored, 8>(from, n).values); }

    static Vector fma(Vector a, Vector b, Vector sum) {
        for (int i = 0; i < 8; ++i) sum.v[i] += a.v[i] * b.v[i];
        return sum;
    }

    static Vector add(Vector a, Vector b) {
        for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
        return a;
    }

    static Vector max(Vector a, Vector b) {
        for (int i = 0; i < 8; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return b;
    }

    static Vector scaled(Vector a, Vector n) {
        for (int i = 0; i < 8; ++i) {
            const int exponent = n.v[i] > -127.0f ? static_cast<int>(n.v[i]) : -127;  // also where n is NaN
            a.v[i] *= float_of(static_cast<uint32_t>(exponent + 127) << 23);
        }
        return a;
    }

    static float sum(Vector a) {
        for (int half = 4; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
        return a.v[0];
    }

    static void store(float* to, Vector a) { std::memcpy(to, a.v, sizeof a.v); }

    static float wide(float value) { return value; }
    static float wide(F16Bits value) { return from_f16(value.bits); }
    static float wide(Bf16 value) { return from_bf16(value.bits); }
};

struct PortableLanes : WholeVectors<Portable> {
    static constexpr int lanes = 8, rows = 4, vectors = 1;

    static Vector broadcast(const float* weight) {
        Vector out;
        for (float& number : out.v) number = *weight;
        return out;
    }
};

}  // namespace

const Level portable = level_of<Portable>();
const Many portable_many = many_of<Portable, PortableLanes>();
const Gradients portable_gradients = gradients_of<Portable, PortableLanes>();
const AttendTile portable_attend = attend<Portable, PortableLanes>;
const TowerLevel portable_tower = tower_of<Portable, PortableLanes>();

}  // namespace seekvl
