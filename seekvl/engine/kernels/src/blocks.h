// The product of packed rows, written once for vectors of any machine; see many.h.
//
// Eight rows of a matrix, or four of each of two, meet a block of up to 48 lanes. The sums stay in registers from the
// first number to the last: per step as many loads as there are vectors, and a weight of each row broadcast.
//
// `Lanes` gives vectors of float32: `Vector`, `lanes`, `zero`, `load`, `store`, `broadcast(weight)` and
// `fma(weight, x, sum)`. `Weight` and `Number` are what a matrix and a lane consist of, `step` says how many weights
// a lane takes at a time. `rows` and `vectors` say how much fits into the registers, `halves` whether a block may end
// in half a vector. `transpose` turns [8, 8] sums so that the results of one row stand side by side.
#pragma once

#include <cstdint>

#include "many.h"
#include "numbers.h"
#include "rows.h"

namespace seekvl {
namespace {

constexpr int64_t kLine = 64;       // bytes
constexpr int64_t kWidened = 512;  // numbers of a row that are widened at a time: kStrip such rows fit into a cache

using Sums = float[kStrip][kMostLanes];

// What lies `ahead` bytes behind, into the second cache: the first is full of what is computed with. An address and
// no pointer, as it may lie behind the matrix.
inline void prefetch(const void* at, int64_t ahead) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + ahead), 0, 2);
}

// e^x for all lanes of a vector at once: 2^n times e^r with |r| <= ln(2) / 2, to 2 units of the last place.
inline float exp_of(float x) {
    x = x > 104.0f ? 104.0f : x < -104.0f ? -104.0f : x;  // beyond it is infinity or 0; a NaN stays
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer n
    const float n = shifted - 12582912.0f;
    const float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float power = 1.0f / 5040;
    power = power * r + 1.0f / 720;
    power = power * r + 1.0f / 120;
    power = power * r + 1.0f / 24;
    power = power * r + 1.0f / 6;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    const uint32_t whole = bits_of(shifted) - bits_of(12582912.0f) + 512, half = whole >> 1;  // 2^n in two factors
    return power * float_of((half - 256 + 127) << 23) * float_of((whole - half - 256 + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + exp_of(-x)); }

// A number rounded to bfloat16, which are the upper bits; as to_bf16, in words as wide as those of vectors.
inline uint32_t rounded_bf16(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : rounded;
}

// Lanes of vectors that are not halved, in terms of the machine of rows.h.
template <class Machine>
struct WholeVectors {
    using Weight = float;
    using Number = float;
    using Vector = typename Machine::Vector;
    using Half = Vector;
    static constexpr int step = 1;
    static constexpr bool halves = false;

    static Vector zero() { return Machine::zero(); }
    static Vector zero_half() { return zero(); }  // the halves are never called
    static Vector load(const float* from) { return Machine::load(from); }
    static Vector load_half(const float* from) { return Machine::load(from); }
    static void store(float* to, Vector a) { Machine::store(to, a); }
    static Vector fma(Vector weight, Vector x, Vector sum) { return Machine::fma(weight, x, sum); }
    static void transpose(const float* from, int64_t stride, float (*to)[kStrip]) {
        for (int row = 0; row < kStrip; ++row)
            for (int l = 0; l < kStrip; ++l) to[l][row] = from[row * stride + l];
    }
};

// Sum up `steps` steps of R rows, in V vectors of lanes and half a one if `half`, from zero or from what is in sums
// where there is `more` than one such part; `ahead` bytes behind what is read lies what comes next.
template <class Lanes, int R, int V, bool half>
__attribute__((noinline)) void tile(const typename Lanes::Weight* const* rows, const typename Lanes::Number* x,
                                    int64_t lanes, int64_t steps, int64_t ahead, bool more,
                                    float (*sums)[kMostLanes]) {
    constexpr int lane = Lanes::lanes, line = kLine / sizeof(typename Lanes::Weight);
    typename Lanes::Vector sum[R][V > 0 ? V : 1];
    typename Lanes::Half rest[R];
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) sum[r][v] = more ? Lanes::load(sums[r] + v * lane) : Lanes::zero();
        if constexpr (half) rest[r] = more ? Lanes::load_half(sums[r] + V * lane) : Lanes::zero_half();
    }
    const int64_t width = steps * Lanes::step;
    for (int64_t begin = 0; begin < width; begin += line) {
        UNROLL for (int r = 0; r < R; ++r) prefetch(rows[r] + begin, ahead);
        const int64_t end = begin + line < width ? begin + line : width;
        for (int64_t i = begin; i < end; i += Lanes::step, x += lanes) {
            decltype(Lanes::load(x)) at[V > 0 ? V : 1];
            decltype(Lanes::load_half(x)) last;
            UNROLL for (int v = 0; v < V; ++v) at[v] = Lanes::load(x + v * lane);
            if constexpr (half) last = Lanes::load_half(x + V * lane);
            UNROLL for (int r = 0; r < R; ++r) {
                const auto weight = Lanes::broadcast(rows[r] + i);
                UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Lanes::fma(weight, at[v], sum[r][v]);
                if constexpr (half) rest[r] = Lanes::fma_half(weight, last, rest[r]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) Lanes::store(sums[r] + v * lane, sum[r][v]);
        if constexpr (half) Lanes::store_half(sums[r] + V * lane, rest[r]);
    }
}

template <class Lanes>
void sum_steps(const typename Lanes::Weight* const* rows, const typename Lanes::Number* x, int64_t lanes,
               int64_t steps, int64_t ahead, bool more, Sums& sums) {
    constexpr int R = Lanes::rows, most = Lanes::vectors;
    const int64_t vectors = lanes / Lanes::lanes;
    for (int r = 0; r < kStrip; r += R) {
        if constexpr (Lanes::halves)
            if (lanes % Lanes::lanes) {
                if (vectors == 0) tile<Lanes, R, 0, true>(rows + r, x, lanes, steps, ahead, more, sums + r);
                else if (vectors == 1) tile<Lanes, R, 1, true>(rows + r, x, lanes, steps, ahead, more, sums + r);
                else tile<Lanes, R, 2, true>(rows + r, x, lanes, steps, ahead, more, sums + r);
                continue;
            }
        if (vectors == 1) tile<Lanes, R, 1, false>(rows + r, x, lanes, steps, ahead, more, sums + r);
        else if (vectors == 2) tile<Lanes, R, most < 2 ? 1 : 2, false>(rows + r, x, lanes, steps, ahead, more, sums + r);
        else tile<Lanes, R, most < 3 ? 1 : 3, false>(rows + r, x, lanes, steps, ahead, more, sums + r);
    }
}

// Eight rows of weights, of one matrix or of two; rows behind the end repeat the last one.
struct Strip {
    const char* rows[kStrip];
    int64_t ahead;  // bytes from a row to the one that is read in its place next
};

// The strip from row `o` on; the one after the range's last is `range.after` rows behind the range's first.
inline Strip strip_of(const Product& product, const void* weight, const Range& range, int64_t o, int64_t rows) {
    const int64_t bytes = product.width * (product.weight == F32 ? 4 : 2);
    Strip strip{{}, bytes * (o + rows < range.end ? rows : range.begin + range.after - o)};
    for (int r = 0; r < rows; ++r) {
        const int64_t row = o + r < range.end ? o + r : range.end - 1;
        strip.rows[r] = static_cast<const char*>(weight) + row * bytes;
    }
    return strip;
}

// Sums of rows that are multiplied as they are stored.
template <class Lanes>
void sum_stored(const Strip& strip, const Block& x, int64_t width, Sums& sums) {
    using Weight = typename Lanes::Weight;
    const int64_t steps = width / Lanes::step;
    const auto* from = static_cast<const typename Lanes::Number*>(x.packed);
    const Weight* rows[kStrip];
    for (int r = 0; r < kStrip; ++r) rows[r] = reinterpret_cast<const Weight*>(strip.rows[r]);
    sum_steps<Lanes>(rows, from, x.lanes, steps, strip.ahead, false, sums);
    if (steps * Lanes::step == width) return;
    Weight last[kStrip][Lanes::step] = {};  // behind the last number of a row is another row, or nothing
    for (int r = 0; r < kStrip; ++r) {
        last[r][0] = rows[r][width - 1];
        rows[r] = last[r];
    }
    sum_steps<Lanes>(rows, from + steps * x.lanes, x.lanes, 1, 0, true, sums);
}

// Sums of rows in half precision that are widened first, for all lanes at once.
template <class Machine, class Lanes, class Stored>
void sum_widened(const Strip& strip, const Block& x, int64_t width, Sums& sums) {
    alignas(kLine) float wide[kStrip][kWidened];
    const float* rows[kStrip];
    for (int r = 0; r < kStrip; ++r) rows[r] = wide[r];
    const auto* from = static_cast<const float*>(x.packed);
    for (int64_t at = 0; at == 0 || at < width; at += kWidened) {
        const int64_t count = width - at < kWidened ? width - at : kWidened;
        for (int r = 0; r < kStrip; ++r)
            widen_from<Machine>(reinterpret_cast<const Stored*>(strip.rows[r]) + at, wide[r], count);
        sum_steps<Lanes>(rows, from + at * x.lanes, x.lanes, count, 0, at > 0, sums);
    }
}

template <class Machine, class Lanes, class Pairs>
__attribute__((noinline)) void sum_strip(const Product& product, const Strip& strip, const Block& x, Sums& sums) {
    if constexpr (Machine::pairs)
        if (product.input == BF16) return sum_stored<Pairs>(strip, x, product.width, sums);
    if (product.weight == F32) sum_stored<Lanes>(strip, x, product.width, sums);
    else if (product.weight == F16) sum_widened<Machine, Lanes, F16Bits>(strip, x, product.width, sums);
    else sum_widened<Machine, Lanes, Bf16>(strip, x, product.width, sums);
}

// Sums of up to kStrip rows of x, the results of each side by side.
using Turned = float[kStrip][kStrip];

// Call put(row, rows, results) with the sums of a strip, for `rows` rows of x from `row` on.
template <class Lanes, class Put>
inline void by_row(const Sums& sums, const Block& x, Put put) {
    alignas(kLine) Turned turned;
    for (int64_t row = 0; row < x.rows; row += kStrip) {
        Lanes::transpose(&sums[0][row], kMostLanes, turned);
        put(row, x.rows - row < kStrip ? x.rows - row : kStrip, turned);
    }
}

// Copy the first `count` of kStrip numbers; a whole strip is one instruction.
template <class Stored>
inline void copy(void* to, int64_t at, const Stored* from, int64_t count) {
    Stored* into = static_cast<Stored*>(to) + at;
    if (count == kStrip) std::memcpy(into, from, kStrip * sizeof *from);
    else std::memcpy(into, from, count * sizeof *from);
}

// All results in half precision.
inline void narrow_all(Dtype dtype, const Turned& results, uint16_t* to) {
    constexpr int all = kStrip * kStrip;
    const float* wide = results[0];
    if (dtype == F16)
        for (int at = 0; at < all; ++at) to[at] = to_f16(wide[at]);
    else
        for (int at = 0; at < all; ++at) to[at] = static_cast<uint16_t>(rounded_bf16(wide[at]) >> 16);
}

void put_results(Dtype dtype, void* const* y, int64_t rows, int64_t o, const Turned& results, int64_t count) {
    uint16_t narrow[kStrip][kStrip];
    if (dtype != F32) narrow_all(dtype, results, narrow[0]);
    for (int64_t row = 0; row < rows; ++row)
        if (dtype == F32) copy(y[row], o, results[row], count);
        else copy(y[row], o, narrow[row], count);
}

inline void add_bias(Dtype kind, const void* bias, int64_t o, int64_t count, int64_t lanes, Sums& sums) {
    for (int64_t r = 0; r < count; ++r) {
        const float added = get(kind, bias, o + r);
        for (int64_t l = 0; l < lanes; ++l) sums[r][l] += added;
    }
}

template <class Machine, class Lanes, class Pairs>
void plain(const Product& product, const Block& x, const void* weight, const void* bias, void* const* y,
           const Range& range) {
    alignas(kLine) Sums sums;
    for (int64_t o = range.begin; o < range.end; o += kStrip) {
        sum_strip<Machine, Lanes, Pairs>(product, strip_of(product, weight, range, o, kStrip), x, sums);
        const int64_t count = range.end - o < kStrip ? range.end - o : kStrip;
        if (bias) add_bias(product.weight, bias, o, count, x.lanes, sums);
        by_row<Lanes>(sums, x, [&](int64_t row, int64_t rows, const Turned& results) {
            put_results(product.output, y + row, rows, o, results, count);
        });
    }
}

template <class Machine, class Lanes, class Pairs>
void weighted(const Product& product, const Block& x, const void* weight, const float* share, float* const* to,
              const Range& range) {
    alignas(kLine) Sums sums;
    for (int64_t o = range.begin; o < range.end; o += kStrip) {
        for (int64_t row = 0; row < x.rows; ++row) __builtin_prefetch(to[row] + o, 1);  // a line of each, far apart
        sum_strip<Machine, Lanes, Pairs>(product, strip_of(product, weight, range, o, kStrip), x, sums);
        const int64_t count = range.end - o < kStrip ? range.end - o : kStrip;
        by_row<Lanes>(sums, x, [&](int64_t row, int64_t rows, const Turned& results) {
            for (const int64_t last = row + rows, first = row; row < last; ++row) {
                float* __restrict into = to[row] + o;
                const float* __restrict added = results[row - first];
                const float factor = share[row];
                if (count == kStrip)
                    for (int r = 0; r < kStrip; ++r) into[r] += factor * added[r];
                else
                    for (int r = 0; r < count; ++r) into[r] += factor * added[r];
            }
        });
    }
}

constexpr int kFour = kStrip / 2;  // rows of gate, and as many of up

// silu(gate) * up in the place of gate, for the lanes in use and up to a vector more; rows behind `count` are zeros.
inline void gate_sums(Sums& sums, int64_t lanes, int64_t count) {
    constexpr int vector = 16;
    for (int r = 0; r < kFour; ++r)
        for (int64_t from = 0; from < lanes; from += vector) {
            float* __restrict gate = sums[r] + from;
            const float* __restrict up = sums[kFour + r] + from;
            if (r < count)
                for (int l = 0; l < vector; ++l) gate[l] = silu(gate[l]) * up[l];
            else
                for (int l = 0; l < vector; ++l) gate[l] = 0.0f;
        }
}

// Neighbouring rows of sums as pairs of bfloat16.
template <class Pairs>
inline void put_pairs(const Sums& sums, int64_t lanes, int64_t count, uint32_t* to) {
    constexpr int vector = Pairs::lanes, half = vector / 2;
    for (int r = 0; r < count; r += 2, to += lanes) {
        const auto join = [&](int64_t lane, uint32_t* at) {
            Pairs::store_pairs(at, Pairs::load(sums[r] + lane), Pairs::load(sums[r + 1] + lane));
        };
        int64_t lane = 0;
        for (; lane + vector <= lanes; lane += vector) join(lane, to + lane);
        if (lane == lanes) continue;
        uint32_t rest[vector];
        join(lane, rest);
        std::memcpy(to + lane, rest, half * sizeof *to);
    }
}

// Rows of sums as the numbers o, o + 1, ... of packed rows. In pairs an odd count is followed by zeros in `sums`, and o
// is even.
template <class Machine, class Pairs>
inline void put_packed(Dtype input, const Sums& sums, int64_t count, int64_t o, const Block& y) {
    if constexpr (Machine::pairs)
        if (input == BF16)
            return put_pairs<Pairs>(sums, y.lanes, count, static_cast<uint32_t*>(y.packed) + o / 2 * y.lanes);
    float* to = static_cast<float*>(y.packed) + o * y.lanes;
    for (int r = 0; r < count; ++r) std::memcpy(to + r * y.lanes, sums[r], y.lanes * sizeof *to);
}

// What gate and up gave to some rows, for the backward.
void keep(Dtype dtype, void* const* kept, int64_t rows, int64_t o, int64_t m, const Turned& results, int64_t count) {
    const int64_t size = dtype == F32 ? 4 : 2, bytes = count * size;
    uint16_t narrow[kStrip * kStrip];
    if (dtype != F32) narrow_all(dtype, results, narrow);
    const char* from = dtype == F32 ? reinterpret_cast<const char*>(results) : reinterpret_cast<const char*>(narrow);
    for (int64_t row = 0; row < rows; ++row, from += kStrip * size) {
        char* to = static_cast<char*>(kept[row]) + o * size;
        if (count == kFour && size == 2) {  // a copy is one instruction where its length is known
            std::memcpy(to, from, kFour * 2);
            std::memcpy(to + m * 2, from + kFour * 2, kFour * 2);
        } else {
            std::memcpy(to, from, bytes);
            std::memcpy(to + m * size, from + kFour * size, bytes);
        }
    }
}

template <class Machine, class Lanes, class Pairs>
void gated(const Product& product, const Block& x, const void* gate, const void* up, const Block& y,
           void* const* kept, int64_t m, const Range& range) {
    alignas(kLine) Sums sums;
    for (int64_t o = range.begin; o < range.end; o += kFour) {
        Strip strip = strip_of(product, gate, range, o, kFour);
        const Strip other = strip_of(product, up, range, o, kFour);
        for (int r = 0; r < kFour; ++r) strip.rows[kFour + r] = other.rows[r];
        sum_strip<Machine, Lanes, Pairs>(product, strip, x, sums);
        const int64_t count = range.end - o < kFour ? range.end - o : kFour;
        if (kept)
            by_row<Lanes>(sums, x, [&](int64_t row, int64_t rows, const Turned& results) {
                keep(product.output, kept + row, rows, o, m, results, count);
            });
        gate_sums(sums, y.lanes, count);
        put_packed<Machine, Pairs>(product.input, sums, count, o, y);
    }
}

constexpr int64_t kTogether = 16;  // numbers of a row, or pairs, that are packed at a time: a cache line or two

// Rows as lanes; those behind the last repeat the first. A line of a row is used up at once: where rows are as far
// apart as pages it would not stay in the cache until its next number is due.
template <class Read, class Number>
void pack_with(Read read, const void* const* x, const Block& block, int64_t steps, Number* to) {
    const int64_t lanes = block.lanes;
    for (int64_t start = 0; start < steps; start += kTogether, to += kTogether * lanes) {
        const int64_t count = steps - start < kTogether ? steps - start : kTogether;
        for (int64_t l = 0; l < lanes; ++l) {
            const void* row = x[l < block.rows ? l : 0];
            for (int64_t step = 0; step < count; ++step) to[step * lanes + l] = read(row, start + step);
        }
    }
}

// The same of words that are packed as they are, turned in squares; as many of them as squares take, and the number is
// returned.
template <class Lanes>
int64_t pack_squares(const void* const* x, const Block& block, int64_t steps) {
    const int64_t lanes = block.lanes, whole = steps / kStrip * kStrip;
    if (lanes % kStrip) return 0;
    alignas(kLine) Turned square, turned;
    auto* const to = static_cast<float*>(block.packed);
    for (int64_t start = 0; start < whole; start += kTogether)
        for (int64_t lane = 0; lane < lanes; lane += kStrip)
            for (int64_t step = start; step < start + kTogether && step < whole; step += kStrip) {
                for (int l = 0; l < kStrip; ++l) {
                    const void* row = x[lane + l < block.rows ? lane + l : 0];
                    std::memcpy(square[l], static_cast<const uint32_t*>(row) + step, sizeof square[l]);
                }
                Lanes::transpose(square[0], kStrip, turned);
                for (int s = 0; s < kStrip; ++s) std::memcpy(to + (step + s) * lanes + lane, turned[s], sizeof turned[s]);
            }
    return whole;
}

inline uint32_t pair(const void* row, int64_t at) {
    uint32_t both;
    std::memcpy(&both, static_cast<const uint16_t*>(row) + 2 * at, sizeof both);
    return both;
}

template <class Machine, class Lanes>
void pack(const Product& product, Dtype from, const void* const* x, const Block& block) {
    const int64_t width = product.width;
    if (Machine::pairs && product.input == BF16) {
        auto* to = static_cast<uint32_t*>(block.packed);
        const int64_t done = pack_squares<Lanes>(x, block, width / 2);
        const auto next = [&](const void* row, int64_t at) { return pair(row, done + at); };
        pack_with(next, x, block, width / 2 - done, to + done * block.lanes);
        const auto last = [&](const void* row, int64_t) -> uint32_t {
            return static_cast<const uint16_t*>(row)[width - 1];
        };
        if (width % 2) pack_with(last, x, block, 1, to + width / 2 * block.lanes);
        return;
    }
    auto* to = static_cast<float*>(block.packed);
    const auto wide = [&](auto read) { pack_with(read, x, block, width, to); };
    if (from == F32) {
        const int64_t done = pack_squares<Lanes>(x, block, width);
        const auto next = [&](const void* row, int64_t at) { return get(F32, row, done + at); };
        pack_with(next, x, block, width - done, to + done * block.lanes);
    } else if (from == F16) {
        wide([](const void* row, int64_t at) { return get(F16, row, at); });
    } else {
        wide([](const void* row, int64_t at) { return get(BF16, row, at); });
    }
}

template <class Machine, class Lanes, class Pairs = Lanes>
constexpr Many many_of() {
    static_assert(Lanes::lanes * Lanes::vectors <= kMostLanes && kStrip % Lanes::rows == 0);
    constexpr int64_t lanes = Pairs::halves ? Pairs::lanes / 2 : Lanes::lanes;
    constexpr int64_t chains = 8;  // sums that hide each other's latency
    constexpr int64_t least = (chains + Lanes::rows - 1) / Lanes::rows;
    return {lanes, Lanes::lanes * Lanes::vectors, Lanes::lanes, least, Machine::pairs, pack<Machine, Lanes>, plain<Machine, Lanes, Pairs>,
            weighted<Machine, Lanes, Pairs>, gated<Machine, Lanes, Pairs>};
}

}  // namespace
}  // namespace seekvl
