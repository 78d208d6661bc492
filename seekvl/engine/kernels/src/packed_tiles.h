// Products with quantised tiles, written once for vectors of any machine; packed.h says how tiles lie.
//
// One function does a few tiles with a few inputs and serves decoding and prompts alike: with few inputs the
// stream from memory is the limit, with many it is the multiplier, and then each weight loaded meets `many`
// inputs and each input `tiles` weights.
//
// `Machine` gives `Ints` and `Floats`, one number for each row of a tile: `all`, `add`, `load`, `store`, `bf16`,
// `scaled(v, number)`, `product(v, w)`, `accumulate(v, ints, scale)`; and lines of weights: `bytes(p)`,
// `nibbles(p, low, high)`, `four(x)` (four values for every row) and `dot(sum, line, four)`. `few` and `many` inputs
// fill its registers, the latter with `tiles` tiles. `byte_zero` is what its bytes have too much: 128, or 0 where it
// reads a sign.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "packed.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace seekvl {
namespace {

constexpr int64_t kPage = 4096;          // bytes
constexpr int64_t kAhead = 2 * kPage;
constexpr int64_t kNear = 384 << 10;     // bytes of inputs that stay near
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: in a sum with it the last bit is worth 1

// Bring near what is read later than these bytes. One input leaves the processor idle enough to read ahead by itself,
// and it is enough to touch every page once (machine.h says why); with more inputs it falls behind, and every line is
// asked for. An address and no pointer: it may lie behind the matrix, where a prefetch does nothing.
template <int inputs>
inline void prefetch(const uint8_t* at, int64_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    if (inputs > 1) {
        UNROLL for (int64_t line = 0; line < bytes; line += 64)
            __builtin_prefetch(reinterpret_cast<const void*>(address + kAhead + line));
    } else if (address % kPage < static_cast<uint64_t>(bytes)) {
        __builtin_prefetch(reinterpret_cast<const void*>(address + kAhead));
    }
}

template <class Machine>
struct Bytes {
    static constexpr Dtype kind = INT8;
    static constexpr int32_t zero = Machine::byte_zero;
    template <bool stream>
    static constexpr int64_t step = stream ? 16 : 4;  // inputs; a line is 4

    template <bool stream, int T, int B>
    static void add(const uint8_t* const (&tile)[T], const int8_t* const (&x)[B], int64_t i,
                    typename Machine::Ints (&sum)[T][B]) {
        if (stream) UNROLL for (int t = 0; t < T; ++t) prefetch<B>(tile[t] + 64 + i * kTile, step<stream> * kTile);
        UNROLL for (int line = 0; line < step<stream> / 4; ++line) {
            typename Machine::Line weights[T];
            UNROLL for (int t = 0; t < T; ++t) weights[t] = Machine::bytes(tile[t] + 64 + (i + 4 * line) * kTile);
            UNROLL for (int b = 0; b < B; ++b) {
                const auto four = Machine::four(x[b] + i + 4 * line);
                UNROLL for (int t = 0; t < T; ++t) sum[t][b] = Machine::dot(sum[t][b], weights[t], four);
            }
        }
    }

    static typename Machine::Floats scale(const uint8_t*, int64_t) { return Machine::all(1.0f); }
    static typename Machine::Floats scale_of_rows(const uint8_t* tile) {
        return Machine::load(reinterpret_cast<const float*>(tile));
    }
};

template <class Machine>
struct Nibbles {
    static constexpr Dtype kind = INT4;
    static constexpr int32_t zero = 8;
    template <bool stream>
    static constexpr int64_t step = kInt4Group;

    template <bool stream, int T, int B>
    static void add(const uint8_t* const (&tile)[T], const int8_t* const (&x)[B], int64_t i,
                    typename Machine::Ints (&sum)[T][B]) {
        constexpr bool two_chains = stream && B <= 4;  // hides the latency of a product where inputs are few
        typename Machine::Ints other[T][B];
        if (two_chains) UNROLL for (int t = 0; t < T; ++t)
            UNROLL for (int b = 0; b < B; ++b) other[t][b] = Machine::all(0);
        const int64_t lines = i / kUnit * kInt4Unit + 64 + i % kUnit * 8;
        if (stream) UNROLL for (int t = 0; t < T; ++t) prefetch<B>(tile[t] + lines - 64, 5 * 64);  // scales, too
        for (int line = 0; line < 4; ++line) {
            typename Machine::HalfLine low[T], high[T];
            UNROLL for (int t = 0; t < T; ++t) Machine::nibbles(tile[t] + lines + 64 * line, low[t], high[t]);
            UNROLL for (int b = 0; b < B; ++b) {
                const auto first = Machine::four(x[b] + i + 4 * line);
                UNROLL for (int t = 0; t < T; ++t) sum[t][b] = Machine::dot(sum[t][b], low[t], first);
            }
            UNROLL for (int b = 0; b < B; ++b) {
                const auto second = Machine::four(x[b] + i + 16 + 4 * line);
                UNROLL for (int t = 0; t < T; ++t) {
                    auto& to = two_chains ? other[t][b] : sum[t][b];
                    to = Machine::dot(to, high[t], second);
                }
            }
        }
        if (two_chains) UNROLL for (int t = 0; t < T; ++t)
            UNROLL for (int b = 0; b < B; ++b) sum[t][b] = Machine::add(sum[t][b], other[t][b]);
    }

    static typename Machine::Floats scale(const uint8_t* tile, int64_t i) {
        return Machine::bf16(tile + i / kUnit * kInt4Unit + i % kUnit);
    }
    static typename Machine::Floats scale_of_rows(const uint8_t*) { return Machine::all(1.0f); }
};

// y[t * B + b] = what the rows of tile t give with input b. With few inputs the sums stay in registers; with many
// all of these belong to the whole numbers, and the sums wait in memory from group to group.
template <class Machine, class Format, bool stream, int T, int B>
inline void block(const uint8_t* const (&tile)[T], const QuantizedRow* inputs, int64_t width, float (*y)[kTile]) {
    constexpr int64_t group = group_of(Format::kind), step = Format::template step<stream>;
    const int8_t* x[B];
    typename Machine::Floats total[stream ? T * B : 1];
    UNROLL for (int b = 0; b < B; ++b) x[b] = inputs[b].values;
    if (stream) UNROLL for (int n = 0; n < T * B; ++n) total[n] = Machine::all(0.0f);
    else for (int n = 0; n < T * B; ++n) Machine::store(y[n], Machine::all(0.0f));
    for (int64_t begin = 0; begin < width; begin += group) {
        const int64_t end = begin + group < width ? begin + group : width, g = begin / group;
        typename Machine::Ints sum[T][B];
        UNROLL for (int b = 0; b < B; ++b) {
            const auto start = Machine::all(inputs[b].starts[g]);
            UNROLL for (int t = 0; t < T; ++t) sum[t][b] = start;
        }
        for (int64_t i = begin; i < end; i += step) Format::template add<stream, T, B>(tile, x, i, sum);
        UNROLL for (int t = 0; t < T; ++t) {
            const auto weight = Format::scale(tile[t], begin);
            UNROLL for (int b = 0; b < B; ++b) {
                const auto scale = Machine::scaled(weight, inputs[b].scales[g]);
                const int n = t * B + b;
                if (stream) total[n] = Machine::accumulate(total[n], sum[t][b], scale);
                else Machine::store(y[n], Machine::accumulate(Machine::load(y[n]), sum[t][b], scale));
            }
        }
    }
    UNROLL for (int t = 0; t < T; ++t) {
        const auto rows = Format::scale_of_rows(tile[t]);
        UNROLL for (int b = 0; b < B; ++b) {
            const int n = t * B + b;
            Machine::store(y[n], Machine::product(stream ? total[n] : Machine::load(y[n]), rows));
        }
    }
}

template <class Machine, class Format, int T>
inline void few(int64_t count, const uint8_t* const (&tile)[T], const QuantizedRow* x, int64_t width,
                float (*y)[kTile]) {
    static_assert(Machine::few == 4 || Machine::few == 8);
    if (count == 1) block<Machine, Format, true, T, 1>(tile, x, width, y);
    else if (count == 2) block<Machine, Format, true, T, 2>(tile, x, width, y);
    else if (count == 3) block<Machine, Format, true, T, 3>(tile, x, width, y);
    else if (count == 4) block<Machine, Format, true, T, 4>(tile, x, width, y);
    else if constexpr (Machine::few == 8) {
        if (count == 5) block<Machine, Format, true, T, 5>(tile, x, width, y);
        else if (count == 6) block<Machine, Format, true, T, 6>(tile, x, width, y);
        else if (count == 7) block<Machine, Format, true, T, 7>(tile, x, width, y);
        else block<Machine, Format, true, T, 8>(tile, x, width, y);
    }
}

// Call done(first input, inputs, y) for all inputs, a few at a time; y[t * inputs + b] is what tile t gives with b.
template <class Machine, class Format, class Done>
inline void two_tiles(const uint8_t* one, const uint8_t* two, const Meeting& m, int64_t width, const Done& done) {
    alignas(64) float y[2 * Machine::many][kTile];
    int64_t from = 0;
    if constexpr (Machine::tiles == 2) {
        const uint8_t* const both[2] = {one, two};
        for (; from + Machine::many <= m.count; from += Machine::many) {
            block<Machine, Format, false, 2, Machine::many>(both, m.x + from, width, y);
            done(from, Machine::many, y);
        }
    }
    const uint8_t *const first[1] = {one}, *const second[1] = {two};
    for (; from < m.count; from += Machine::few) {
        const int64_t count = m.count - from < Machine::few ? m.count - from : Machine::few;
        few<Machine, Format, 1>(count, first, m.x + from, width, y);
        few<Machine, Format, 1>(count, second, m.x + from, width, y + count);
        done(from, count, y);
    }
}

// e^x to a few units of the last place, in a shape that compilers turn into vectors; NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float rounded = x * 1.44269504f + kRounder, n = rounded - kRounder;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float power = 1.98756915e-4f;  // minimax polynomial of e^r for |r| <= ln 2 / 2
    power = power * r + 1.39819995e-3f;
    power = power * r + 8.33345194e-3f;
    power = power * r + 4.16657959e-2f;
    power = power * r + 1.66666655e-1f;
    power = power * r + 5.00000012e-1f;
    power = power * r * r + r + 1.0f;
    return power * float_of((bits_of(rounded) - bits_of(kRounder) + 127) << 23);
}

inline void swiglu(float* gate, const float* up) {
    for (int row = 0; row < kTile; ++row) gate[row] = gate[row] / (1.0f + exponential(-gate[row])) * up[row];
}

// Round 16 numbers, a loop for each dtype so that it becomes vectors.
inline void round_tile(Dtype dtype, const float* y, uint16_t* halves) {
    if (dtype == BF16) for (int row = 0; row < kTile; ++row) halves[row] = to_bf16(y[row]);
    else for (int row = 0; row < kTile; ++row) halves[row] = to_f16(y[row]);
}

inline void put_tile(const Meeting& m, int64_t b, int64_t tile, int64_t rows, float* y) {
    const int64_t first = tile * kTile, count = rows - first < kTile ? rows - first : kTile;
    if (m.bias) for (int64_t row = 0; row < count; ++row) y[row] += get(m.output, m.bias, first + row);
    if (m.output == F32) {
        std::memcpy(static_cast<float*>(m.y[b]) + first, y, count * sizeof(float));
        return;
    }
    uint16_t halves[kTile];
    round_tile(m.output, y, halves);
    std::memcpy(static_cast<uint16_t*>(m.y[b]) + first, halves, count * sizeof(uint16_t));
}

// Call done(part) for the inputs of a meeting in parts that stay in the cache of a core while tiles pass by.
template <class Machine, class Done>
inline void parts(const Meeting& m, int64_t width, const Done& done) {
    const int64_t fit = kNear / width / Machine::many * Machine::many, most = fit > Machine::many ? fit : Machine::many;
    for (int64_t from = 0; from < m.count; from += most) {
        const int64_t count = m.count - from < most ? m.count - from : most;
        done(Meeting{count, m.x + from, m.y + from, m.output, m.bias});
    }
}

template <class Machine, class Format>
void tiles_of_format(const Packed& matrix, const Meeting& m, int64_t begin, int64_t end) {
    const int64_t bytes = tile_bytes(Format::kind, matrix.width), width = padded(matrix.width);
    int64_t tile = begin;
    for (; m.count >= Machine::many && tile + 2 <= end; tile += 2) {
        const uint8_t* at = matrix.weight + tile * bytes;
        two_tiles<Machine, Format>(at, at + bytes, m, width, [&](int64_t from, int64_t count, float (*y)[kTile]) {
            for (int64_t b = 0; b < count; ++b) {
                put_tile(m, from + b, tile, matrix.rows, y[b]);
                put_tile(m, from + b, tile + 1, matrix.rows, y[count + b]);
            }
        });
    }
    alignas(64) float y[Machine::few][kTile];
    for (; tile < end; ++tile) {
        const uint8_t* const at[1] = {matrix.weight + tile * bytes};
        for (int64_t from = 0; from < m.count; from += Machine::few) {
            const int64_t count = m.count - from < Machine::few ? m.count - from : Machine::few;
            few<Machine, Format, 1>(count, at, m.x + from, width, y);
            for (int64_t b = 0; b < count; ++b) put_tile(m, from + b, tile, matrix.rows, y[b]);
        }
    }
}

template <class Machine>
void tiles(const Packed& matrix, const Meeting& m, int64_t begin, int64_t end) {
    parts<Machine>(m, padded(matrix.width), [&](const Meeting& part) {
        if (matrix.kind == INT8) tiles_of_format<Machine, Bytes<Machine>>(matrix, part, begin, end);
        else tiles_of_format<Machine, Nibbles<Machine>>(matrix, part, begin, end);
    });
}

template <class Machine, class Format>
void gated_of_format(const Packed& gate, const Packed& up, const Meeting& m, int64_t begin, int64_t end) {
    const int64_t bytes = tile_bytes(Format::kind, gate.width), width = padded(gate.width);
    for (int64_t tile = begin; tile < end; ++tile)
        two_tiles<Machine, Format>(
            gate.weight + tile * bytes, up.weight + tile * bytes, m, width,
            [&](int64_t from, int64_t count, float (*y)[kTile]) {
                for (int64_t b = 0; b < count; ++b) {
                    swiglu(y[b], y[count + b]);
                    put_tile(m, from + b, tile, gate.rows, y[b]);
                }
            });
}

template <class Machine>
void gated(const Packed& gate, const Packed& up, const Meeting& m, int64_t begin, int64_t end) {
    parts<Machine>(m, padded(gate.width), [&](const Meeting& part) {
        if (gate.kind == INT8) gated_of_format<Machine, Bytes<Machine>>(gate, up, part, begin, end);
        else gated_of_format<Machine, Nibbles<Machine>>(gate, up, part, begin, end);
    });
}

constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
constexpr uint32_t kSmallest = 0x0d800000;  // 2^-100: a group below it counts as zero

// One group: n numbers, and zeros up to `filled`.
inline void quantize_group(const float* x, int64_t n, int64_t filled, int32_t zero, int8_t* values, float* scale,
                           int32_t* start) {
    uint32_t most = 0;  // magnitudes are ordered as their bits are
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const bool finite = most < kInfinity, some = finite && most >= kSmallest;
    const float inverse = some ? 127.0f / float_of(most) : 0.0f;
    *scale = some ? float_of(most) / 127.0f : finite ? 0.0f : float_of(kNaN);
    int32_t total = 0;
    const int64_t kept = some ? n : 0;
    for (int64_t i = 0; i < kept; ++i) {
        const auto value = static_cast<int32_t>(bits_of(x[i] * inverse + kRounder) - bits_of(kRounder));
        values[i] = static_cast<int8_t>(value);
        total += value;
    }
    for (int64_t i = kept; i < filled; ++i) values[i] = 0;
    *start = -zero * total;
}

template <class Machine>
void quantize(Dtype kind, const float* x, int64_t width, const QuantizedRow& to) {
    const int64_t group = group_of(kind), full = padded(width);
    const int32_t zero = kind == INT8 ? Bytes<Machine>::zero : Nibbles<Machine>::zero;
    for (int64_t begin = 0; begin < full; begin += group) {
        const int64_t filled = full - begin < group ? full - begin : group;
        const int64_t left = width - begin, n = left < 0 ? 0 : left < filled ? left : filled;
        const int64_t g = begin / group;
        quantize_group(x + begin, n, filled, zero, to.values + begin, to.scales + g, to.starts + g);
    }
}

template <class Machine>
constexpr PackedLevel packed_level_of() {
    return {quantize<Machine>, tiles<Machine>, gated<Machine>};
}

}  // namespace
}  // namespace seekvl
