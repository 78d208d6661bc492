// Products of a quantised tile with few inputs, written once for vectors of any machine: the stream from memory is
// the limit. packed.h says how tiles lie, packed_many.h has what is done with many inputs.
//
// `Machine` gives `Ints` and `Floats`, one number for each row of a tile: `all`, `add`, `load`, `store`, `bf16`,
// `scaled(v, number)`, `product(v, w)`, `accumulate(v, ints, scale)`; and lines of weights: `bytes(p)`,
// `nibbles(p, low, high)`, which `keep(p, low)` stores as bytes for `kept(p)`, `four(x)` (four values for every row)
// and `dot(sum, line, four)`; `loaded(v)` is v, which a compiler shall load neither ahead nor twice. `few` inputs fill
// its registers, or `many` with `tiles` tiles. `byte_zero` is what its bytes have too much: 128, or 0 where it reads a
// sign.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "packed.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace seekvl {
namespace {

constexpr int64_t kAhead = 8192;  // bytes

// Bring near what is read later than these bytes, every line of it: a processor that reads ahead by itself has too few
// lines on their way, as what is computed with each leaves it little room to look ahead. `busy` is for where so much is
// computed that the second cache is near enough, and places for lines on their way to the first are worth more. An
// address and no pointer: it may lie behind the matrix, where a prefetch does nothing.
template <bool busy>
inline void prefetch(const uint8_t* at, int64_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    UNROLL for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(address + kAhead + line), 0, busy ? 2 : 3);
}

template <class Machine>
struct Bytes {
    static constexpr Dtype kind = INT8;
    static constexpr int32_t zero = Machine::byte_zero;
    static constexpr int64_t step = 16;  // inputs; a line is 4

    // Of the inputs from `i` on.
    static const uint8_t* lines_of(const uint8_t* tile, int64_t i) { return tile + 64 + i * kTile; }

    template <int B>
    static void add(const uint8_t* tile, const int8_t* const (&x)[B], int64_t i, typename Machine::Ints (&sum)[B]) {
        prefetch<(B > 4)>(lines_of(tile, i), step * kTile);
        UNROLL for (int line = 0; line < step / 4; ++line) {
            const auto weights = Machine::bytes(lines_of(tile, i + 4 * line));
            UNROLL for (int b = 0; b < B; ++b)
                sum[b] = Machine::dot(sum[b], weights, Machine::four(x[b] + i + 4 * line));
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
    static constexpr int64_t step = kInt4Group;

    // Of the group that begins with input `i`.
    static const uint8_t* lines_of(const uint8_t* tile, int64_t i) {
        return tile + i / kUnit * kInt4Unit + 64 + i % kUnit * 8;
    }

    template <int B>
    static void add(const uint8_t* tile, const int8_t* const (&x)[B], int64_t i, typename Machine::Ints (&sum)[B]) {
        constexpr bool two_chains = B < 4;  // hides the latency of a product where inputs are few
        typename Machine::Ints other[B];
        if (two_chains) UNROLL for (int b = 0; b < B; ++b) other[b] = Machine::all(0);
        const uint8_t* const lines = lines_of(tile, i);
        prefetch<(B > 1)>(lines - 64, 5 * 64);  // scales, too
        for (int line = 0; line < 4; ++line) {
            typename Machine::HalfLine low, high;
            Machine::nibbles(lines + 64 * line, low, high);
            UNROLL for (int b = 0; b < B; ++b) sum[b] = Machine::dot(sum[b], low, Machine::four(x[b] + i + 4 * line));
            UNROLL for (int b = 0; b < B; ++b) {
                auto& to = two_chains ? other[b] : sum[b];
                to = Machine::dot(to, high, Machine::four(x[b] + i + 16 + 4 * line));
            }
        }
        if (two_chains) UNROLL for (int b = 0; b < B; ++b) sum[b] = Machine::add(sum[b], other[b]);
    }

    static typename Machine::Floats scale(const uint8_t* tile, int64_t i) {
        return Machine::bf16(tile + i / kUnit * kInt4Unit + i % kUnit);
    }
    static typename Machine::Floats scale_of_rows(const uint8_t*) { return Machine::all(1.0f); }
};

// y[b] = what the rows of a tile give with input b.
template <class Machine, class Format, int B>
inline void block(const uint8_t* tile, const QuantizedRow* inputs, int64_t width, float (*y)[kTile]) {
    constexpr int64_t group = group_of(Format::kind);
    const InputSlice* slice[B];
    typename Machine::Floats total[B];
    UNROLL for (int b = 0; b < B; ++b) slice[b] = inputs[b].slices, total[b] = Machine::all(0.0f);
    for (int64_t begin = 0; begin < width; begin += kSlice) {
        const int64_t end = begin + kSlice < width ? begin + kSlice : width;
        const int8_t* x[B];
        UNROLL for (int b = 0; b < B; ++b) x[b] = slice[b]->values - begin;
        for (int64_t first = begin, g = 0; first < end; first += group, ++g) {
            const int64_t last = first + group < end ? first + group : end;
            typename Machine::Ints sum[B];
            UNROLL for (int b = 0; b < B; ++b) sum[b] = Machine::all(slice[b]->groups[g].start);
            for (int64_t i = first; i < last; i += Format::step) Format::template add<B>(tile, x, i, sum);
            const auto weight = Format::scale(tile, first);
            UNROLL for (int b = 0; b < B; ++b)
                total[b] = Machine::accumulate(total[b], sum[b], Machine::scaled(weight, slice[b]->groups[g].scale));
        }
        UNROLL for (int b = 0; b < B; ++b) slice[b] += inputs[b].stride;
    }
    const auto rows = Format::scale_of_rows(tile);
    UNROLL for (int b = 0; b < B; ++b) Machine::store(y[b], Machine::product(total[b], rows));
}

// The same for a number of inputs that is known at run time alone, up to Machine::few.
template <class Machine, class Format>
inline void few(int64_t count, const uint8_t* tile, const QuantizedRow* x, int64_t width, float (*y)[kTile]) {
    static_assert(Machine::few == 4 || Machine::few == 8);
    if (count == 1) block<Machine, Format, 1>(tile, x, width, y);
    else if (count == 2) block<Machine, Format, 2>(tile, x, width, y);
    else if (count == 3) block<Machine, Format, 3>(tile, x, width, y);
    else if (count == 4) block<Machine, Format, 4>(tile, x, width, y);
    else if constexpr (Machine::few == 8) {
        if (count == 5) block<Machine, Format, 5>(tile, x, width, y);
        else if (count == 6) block<Machine, Format, 6>(tile, x, width, y);
        else if (count == 7) block<Machine, Format, 7>(tile, x, width, y);
        else block<Machine, Format, 8>(tile, x, width, y);
    }
}

}  // namespace
}  // namespace seekvl
