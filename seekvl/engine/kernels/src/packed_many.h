// Products of quantised tiles with many inputs, written once for vectors of any machine; packed_tiles.h says what
// `Machine` gives.
//
// With many inputs it is the multiplier that takes the time, not memory. So weights are cut into slices of kSlice
// inputs, which stay in the first cache while all inputs pass by, a few at a time; nibbles are spread to bytes when
// their slice begins, once for all. Sums of whole numbers and of groups both stay in registers, the latter wait in
// memory from slice to slice:
//
//     for each slice of the width        the slice of all inputs stays in the second cache
//         for each band of tiles         16 KiB of weights stay in the first
//             for each block of inputs   3 with 4 tiles: 12 vectors of whole numbers and 12 of floats
//
// A result is made of the same operations in the same order as that of few inputs, so it has the same bits.
#pragma once

#include <cstdint>

#include "packed_tiles.h"

namespace seekvl {
namespace {

constexpr int64_t kBeside = 4;       // tiles of a band
constexpr int64_t kBands = 2;        // that the inputs of a slice meet before those of the next

static_assert(kSumRoom == kBands * kBeside * kTile * kMostInputs);

// The slice of T tiles as it is multiplied: lines in the order of inputs, and scales of groups of nibbles, each of one
// tile behind that of the other.
template <int T>
struct Spread {
    alignas(64) uint8_t lines[kSlice / 4][T][64];
    alignas(64) float scales[kSlice / kInt4Group][T][kTile];
};

template <class Machine>
struct ByteSlices {
    using Format = Bytes<Machine>;
    static constexpr int64_t bytes = kSlice * kTile;
    template <int T>
    static void spread(const uint8_t* tile, int64_t begin, int64_t end, int t, Spread<T>& to) {
        const uint8_t* const from = Format::lines_of(tile, begin);
        for (int64_t line = 0; 4 * line < end - begin; ++line)
            Machine::keep(to.lines[line][t], Machine::kept(from + 64 * line));
    }
    static typename Machine::Line line(const uint8_t* at) { return Machine::bytes(at); }
    static typename Machine::Floats scale(const float*) { return Machine::all(1.0f); }
};

template <class Machine>
struct NibbleSlices {
    using Format = Nibbles<Machine>;
    static constexpr int64_t bytes = kSlice / kUnit * kInt4Unit;
    template <int T>
    static void spread(const uint8_t* tile, int64_t begin, int64_t end, int t, Spread<T>& to) {
        for (int64_t i = begin; i < end; i += kInt4Group) {
            const uint8_t* const from = Format::lines_of(tile, i);
            const int64_t first = (i - begin) / 4;
            for (int line = 0; line < 4; ++line) {
                typename Machine::HalfLine low, high;
                Machine::nibbles(from + 64 * line, low, high);
                Machine::keep(to.lines[first + line][t], low), Machine::keep(to.lines[first + 4 + line][t], high);
            }
            Machine::store(to.scales[(i - begin) / kInt4Group][t], Format::scale(tile, i));
        }
    }
    static typename Machine::HalfLine line(const uint8_t* at) { return Machine::kept(at); }
    static typename Machine::Floats scale(const float* at) { return Machine::load(at); }
};

// Add the first `count` inputs of a slice to sums[t * B + b], or begin them.
template <class Machine, class Slices>
__attribute__((noinline)) void add_slice(const Spread<Machine::tiles>& slice, const InputSlice* const* inputs,
                                         int64_t count, bool begin, float (*sums)[kTile]) {
    constexpr int T = Machine::tiles, B = Machine::many, lines = T > 1 ? 8 : 1;  // that are unrolled
    constexpr int64_t group = group_of(Slices::Format::kind);
    const InputSlice* x[B];
    typename Machine::Floats total[T][B];
    UNROLL for (int b = 0; b < B; ++b) {
        x[b] = inputs[b];
        UNROLL for (int t = 0; t < T; ++t)
            total[t][b] = begin ? Machine::all(0.0f) : Machine::load(sums[t * B + b]);
    }
    const uint8_t (*weights)[T][64] = slice.lines;
    for (int64_t i = 0, g = 0; i < count; ++g) {
        const int64_t last = i + group < count ? i + group : count;
        typename Machine::Ints sum[T][B];
        UNROLL for (int b = 0; b < B; ++b) {
            const auto start = Machine::all(x[b]->groups[g].start);
            UNROLL for (int t = 0; t < T; ++t) sum[t][b] = start;
        }
        for (; i < last; i += 4 * lines, weights += lines)
            UNROLL for (int line = 0; line < lines; ++line) {
                decltype(Slices::line(weights[0][0])) of[T];
                UNROLL for (int t = 0; t < T; ++t) of[t] = Machine::loaded(Slices::line(weights[line][t]));
                UNROLL for (int b = 0; b < B; ++b) {
                    const auto four = Machine::loaded(Machine::four(x[b]->values + i + 4 * line));
                    UNROLL for (int t = 0; t < T; ++t) sum[t][b] = Machine::dot(sum[t][b], of[t], four);
                }
            }
        UNROLL for (int t = 0; t < T; ++t) {
            const auto weight = Slices::scale(slice.scales[g][t]);
            UNROLL for (int b = 0; b < B; ++b)
                total[t][b] =
                    Machine::accumulate(total[t][b], sum[t][b], Machine::scaled(weight, x[b]->groups[g].scale));
        }
    }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int b = 0; b < B; ++b) Machine::store(sums[t * B + b], total[t][b]);
}

// Up to kBeside tiles that inputs meet together.
struct Band {
    const uint8_t* tiles[kBeside];
    int64_t count;
};

// The slices of a band; where a level takes more tiles at a time than there are, the last one is repeated.
template <class Machine, class Slices>
struct BandSlices {
    static constexpr int T = Machine::tiles;
    Spread<T> all[kBeside / T];

    BandSlices(const Band& band, int64_t begin, int64_t end) {
        for (int64_t t = 0; t < rounded_tiles(band.count); ++t)
            Slices::spread(band.tiles[t < band.count ? t : band.count - 1], begin, end, t % T, all[t / T]);
    }
    static int64_t rounded_tiles(int64_t count) { return (count + T - 1) / T * T; }
};

// Blocks of inputs; the last one begins early enough to be full.
template <class Machine>
struct InputBlocks {
    int64_t inputs;
    int64_t count() const { return (inputs + Machine::many - 1) / Machine::many; }
    int64_t first(int64_t block) const {
        const int64_t at = block * Machine::many, last = inputs - Machine::many;
        return at < last ? at : last;
    }
};

// Bring near a share of the weights that a band multiplies next, for the block at hand.
template <class Slices>
inline void prefetch_share(const Band& band, int64_t i, int64_t block, int64_t blocks) {
    constexpr int64_t line = 64, lines = Slices::bytes / line;
    const int64_t share = (lines + blocks - 1) / blocks * line;
    for (int64_t t = 0; t < band.count; ++t) {
        const auto address = reinterpret_cast<uintptr_t>(Slices::Format::lines_of(band.tiles[t], i));
        for (int64_t at = block * share; at < (block + 1) * share && at < Slices::bytes; at += line)
            __builtin_prefetch(reinterpret_cast<const void*>(address + at), 0, 2);
    }
}

template <class Machine, class Slices>
inline void scale_rows(const Band& band, float (*y)[kTile]) {
    for (int64_t t = 0; t < band.count; ++t) {
        const auto rows = Slices::Format::scale_of_rows(band.tiles[t]);
        for (int b = 0; b < Machine::many; ++b, ++y) Machine::store(*y, Machine::product(Machine::load(*y), rows));
    }
}

// The inputs of a block that are not those of the block before, and what each tile gives with them, from sums.
template <class Machine, class Slices, class Done>
inline void finish(const Band& band, const InputBlocks<Machine>& blocks, int64_t block, float (*sums)[kTile],
                   const Done& done) {
    constexpr int64_t B = Machine::many;
    scale_rows<Machine, Slices>(band, sums);
    for (int64_t input = block * B; input < blocks.inputs && input < block * B + B; ++input) {
        float* results[kBeside];
        for (int64_t t = 0; t < kBeside; ++t) results[t] = sums[t * B + input - blocks.first(block)];
        done(input, results);
    }
}

// What bands give with a part of the inputs, see `many`.
template <class Machine, class Slices, class Done>
void part(const Band* bands, int64_t count, const QuantizedRow* inputs, const InputBlocks<Machine>& blocks,
          int64_t width, float (*sums)[kTile], const Done& done) {
    constexpr int64_t B = Machine::many, T = Machine::tiles;
    for (int64_t begin = 0; begin < width; begin += kSlice) {
        const int64_t end = begin + kSlice < width ? begin + kSlice : width;
        for (int64_t band = 0; band < count; ++band) {
            const BandSlices<Machine, Slices> weights(bands[band], begin, end);
            const bool last = band + 1 == count;
            for (int64_t block = 0; block < blocks.count(); ++block) {
                if (!last || end < width)
                    prefetch_share<Slices>(bands[last ? 0 : band + 1], last ? end : begin, block, blocks.count());
                const InputSlice* x[B];
                for (int64_t b = 0; b < B; ++b) {
                    const QuantizedRow& row = inputs[blocks.first(block) + b];
                    x[b] = row.slices + begin / kSlice * row.stride;
                }
                float (*const to)[kTile] = sums + (band * blocks.count() + block) * kBeside * B;
                for (int64_t t = 0; t < bands[band].count; t += T)
                    add_slice<Machine, Slices>(weights.all[t / T], x, end - begin, begin == 0, to + t * B);
                if (end == width)
                    finish<Machine, Slices>(bands[band], blocks, block, to, [&](int64_t input, float* const* results) {
                        done(band, input, results);
                    });
            }
        }
    }
}

// Call done(band, input, results) for at most kBands bands and all inputs, which are more than Machine::many:
// results[t] is what tile t of the band gives with the input.
template <class Machine, class Slices, class Done>
inline void many(const Band* bands, int64_t count, const Meeting& m, int64_t width, const Done& done) {
    static_assert(kMostInputs % Machine::many == 0 && Machine::many <= kFewInputs);
    static_assert(kBeside % Machine::tiles == 0);
    const int64_t parts = (m.count + kMostInputs - 1) / kMostInputs, most = (m.count + parts - 1) / parts;
    for (int64_t from = 0; from < m.count; from += most) {
        const InputBlocks<Machine> blocks{m.count - from < most ? m.count - from : most};
        part<Machine, Slices>(bands, count, m.x + from, blocks, width, reinterpret_cast<float (*)[kTile]>(m.room),
                              [&](int64_t band, int64_t input, float* const* results) {
                                  done(band, from + input, results);
                              });
    }
}

}  // namespace
}  // namespace seekvl
