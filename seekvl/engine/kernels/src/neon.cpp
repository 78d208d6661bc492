// 64-bit ARM: NEON is part of every such machine.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "attend_lanes.h"
#include "blocks.h"
#include "gradient_blocks.h"
#include "rows.h"
#include "tower_lanes.h"

namespace seekvl {
namespace {

struct Neon {
    template <class Stored> static constexpr int lanes = 4;
    static constexpr int chains = 4, batch = 4, rows = 1;  // 16 of the 32 registers are sums
    static constexpr bool pairs = false;
    using Vector = float32x4_t;

    static Vector zero() { return vdupq_n_f32(0.0f); }
    static Vector spread(float x) { return vdupq_n_f32(x); }

    static Vector load(const float* from) { return vld1q_f32(from); }
    static Vector load(const F16Bits* from) { return vcvt_f32_f16(vreinterpret_f16_u16(four(from))); }
    static Vector load(const Bf16* from) { return vreinterpretq_f32_u32(vshll_n_u16(four(from), 16)); }

    template <class Stored>
    static Vector load(const Stored* from, int n) { return load(Padded<Stored, 4>(from, n).values); }

    static Vector fma(Vector a, Vector b, Vector sum) { return vfmaq_f32(sum, a, b); }
    static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
    static Vector max(Vector a, Vector b) { return vmaxq_f32(a, b); }
    static Vector scaled(Vector a, Vector n) {
        const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
        return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    }
    static float sum(Vector a) { return vaddvq_f32(a); }
    static void store(float* to, Vector a) { vst1q_f32(to, a); }

    static uint16x4_t four(const void* from) { return vld1_u16(static_cast<const uint16_t*>(from)); }
};

struct NeonLanes : WholeVectors<Neon> {
    static constexpr int lanes = 4, rows = 8, vectors = 3;  // 24 of the 32 registers are sums

    static Vector broadcast(const float* weight) { return vdupq_n_f32(*weight); }
};

}  // namespace

const Level neon = level_of<Neon>();
const Many neon_many = many_of<Neon, NeonLanes>();
const Gradients neon_gradients = gradients_of<Neon, NeonLanes>();
const AttendTile neon_attend = attend<Neon, NeonLanes>;
const TowerLevel neon_tower = tower_of<Neon, NeonLanes>();

}  // namespace seekvl

#endif
