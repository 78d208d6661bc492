// What a level does with quantised tiles, put together: few inputs or many, and what becomes of their results.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "packed_many.h"
#include "packed_tiles.h"

namespace seekvl {
namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: in a sum with it the last bit is worth 1

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

// The first `count` of 16 numbers; a whole tile is a few instructions.
template <class Number>
inline void copy_tile(const Number* from, int64_t count, Number* to) {
    if (count == kTile) std::memcpy(to, from, kTile * sizeof *to);
    else std::memcpy(to, from, count * sizeof *to);
}

// Give the results of a tile to input b.
inline void put_tile(const Meeting& m, int64_t b, int64_t tile, int64_t rows, float* y) {
    const int64_t first = tile * kTile, count = rows - first < kTile ? rows - first : kTile;
    float* const to = static_cast<float*>(m.y[b]) + first;
    if (m.shares) {
        for (int64_t row = 0; row < kTile; ++row) y[row] *= m.shares[b];
        for (int64_t row = 0; row < count; ++row) to[row] += y[row];
        return;
    }
    if (m.bias) for (int64_t row = 0; row < count; ++row) y[row] += get(m.output, m.bias, first + row);
    if (m.output == F32) return copy_tile(y, count, to);
    uint16_t halves[kTile];
    round_tile(m.output, y, halves);
    copy_tile(halves, count, static_cast<uint16_t*>(m.y[b]) + first);
}

// Call done(band, input, results) for all bands and inputs: results[t] is what tile t of the band gives with the input.
template <class Machine, class Slices, class Done>
inline void meet(const Band* bands, int64_t count, const Meeting& m, int64_t width, const Done& done) {
    if (m.count > kFewInputs) return many<Machine, Slices>(bands, count, m, width, done);
    alignas(64) float y[kBeside][Machine::few][kTile];
    const int64_t turns = (m.count + Machine::few - 1) / Machine::few;
    for (int64_t band = 0; band < count; ++band)
        for (int64_t turn = 0, from = 0, some; turn < turns; ++turn, from += some) {
            some = (m.count - from + turns - turn - 1) / (turns - turn);
            for (int64_t t = 0; t < bands[band].count; ++t)
                few<Machine, typename Slices::Format>(some, bands[band].tiles[t], m.x + from, width, y[t]);
            for (int64_t b = 0; b < some; ++b) {
                float* const results[kBeside] = {y[0][b], y[1][b], y[2][b], y[3][b]};
                done(band, from + b, results);
            }
        }
}

// Call done(input, tile, results) for the tiles begin..end; results[n] is what the tile of matrix n gives.
template <class Machine, class Slices, int matrices, class Done>
inline void meet_tiles(const Packed* const (&of)[matrices], const Meeting& m, int64_t begin, int64_t end,
                       const Done& done) {
    constexpr int64_t beside = kBeside / matrices;
    const int64_t bytes = tile_bytes(of[0]->kind, of[0]->width);
    for (int64_t first = begin; first < end; first += kBands * beside) {
        Band bands[kBands] = {};
        int64_t count = 0;
        for (int64_t tile = first; count < kBands && tile < end; tile += beside, ++count)
            for (int64_t at = tile; at < tile + beside && at < end; ++at)
                for (const Packed* matrix : of)
                    bands[count].tiles[bands[count].count++] = matrix->weight + at * bytes;
        meet<Machine, Slices>(bands, count, m, padded(of[0]->width),
                              [&](int64_t band, int64_t input, float* const* results) {
                                  const int64_t tile = first + band * beside;
                                  for (int64_t t = 0; t < bands[band].count; t += matrices)
                                      done(input, tile + t / matrices, results + t);
                              });
    }
}

template <class Machine, class Slices>
void tiles_of_format(const Packed& matrix, const Meeting& m, int64_t begin, int64_t end) {
    meet_tiles<Machine, Slices, 1>({&matrix}, m, begin, end, [&](int64_t input, int64_t tile, float* const* results) {
        put_tile(m, input, tile, matrix.rows, results[0]);
    });
}

template <class Machine>
void tiles(const Packed& matrix, const Meeting& m, int64_t begin, int64_t end) {
    if (matrix.kind == INT8) tiles_of_format<Machine, ByteSlices<Machine>>(matrix, m, begin, end);
    else tiles_of_format<Machine, NibbleSlices<Machine>>(matrix, m, begin, end);
}

template <class Machine, class Slices>
void gated_of_format(const Packed& gate, const Packed& up, const Meeting& m, int64_t begin, int64_t end) {
    const auto done = [&](int64_t input, int64_t tile, float* const* results) {
        swiglu(results[0], results[1]);
        put_tile(m, input, tile, gate.rows, results[0]);
    };
    meet_tiles<Machine, Slices, 2>({&gate, &up}, m, begin, end, done);
}

template <class Machine>
void gated(const Packed& gate, const Packed& up, const Meeting& m, int64_t begin, int64_t end) {
    if (gate.kind == INT8) gated_of_format<Machine, ByteSlices<Machine>>(gate, up, m, begin, end);
    else gated_of_format<Machine, NibbleSlices<Machine>>(gate, up, m, begin, end);
}

constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
constexpr uint32_t kSmallest = 0x0d800000;  // 2^-100: a group below it counts as zero

// One group: n numbers, and zeros up to `filled`.
inline InputGroup quantize_group(const float* x, int64_t n, int64_t filled, int32_t zero, int8_t* values) {
    uint32_t most = 0;  // magnitudes are ordered as their bits are
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const bool finite = most < kInfinity, some = finite && most >= kSmallest;
    const float inverse = some ? 127.0f / float_of(most) : 0.0f;
    int32_t total = 0;
    const int64_t kept = some ? n : 0;
    for (int64_t i = 0; i < kept; ++i) {
        const auto value = static_cast<int32_t>(bits_of(x[i] * inverse + kRounder) - bits_of(kRounder));
        values[i] = static_cast<int8_t>(value);
        total += value;
    }
    for (int64_t i = kept; i < filled; ++i) values[i] = 0;
    return {some ? float_of(most) / 127.0f : finite ? 0.0f : float_of(kNaN), -zero * total};
}

template <class Machine>
void quantize(Dtype kind, const float* x, int64_t width, const QuantizedRow& to) {
    const int64_t group = group_of(kind), full = padded(width);
    const int32_t zero = kind == INT8 ? Bytes<Machine>::zero : Nibbles<Machine>::zero;
    for (int64_t begin = 0; begin < full; begin += group) {
        const int64_t filled = full - begin < group ? full - begin : group;
        const int64_t left = width - begin, n = left < 0 ? 0 : left < filled ? left : filled;
        InputSlice& slice = to.slices[begin / kSlice * to.stride];
        const int64_t at = begin % kSlice;
        slice.groups[at / group] = quantize_group(x + begin, n, filled, zero, slice.values + at);
    }
}

template <class Machine>
constexpr PackedLevel packed_level_of() {
    return {quantize<Machine>, tiles<Machine>, gated<Machine>};
}

}  // namespace
}  // namespace seekvl
