// The product of streamed rows, written once for vectors of any machine.
//
// Decoding reads every weight once, so the order of reading is what counts: row after row as torch stores them,
// and a touch of the pages to come. The sum over a row runs in `chains` independent vectors, which hides the
// latency of the multiplication; the chains are the same whatever else is computed beside.
//
//     row o    | v0 v1 v2 v3 | v4 v5 v6 v7 | ... | tail
//     chain      0  1  2  3    0  1  2  3          0 ..
#pragma once

#include <cmath>
#include <cstdint>

#include "machine.h"
#include "vectors.h"

namespace seekvl {
namespace {

constexpr int64_t kGatedRows = 16;   // rows of `gate` after which as many of `up` follow

// Sums of R rows from `weight` on with B inputs.
template <class Machine, class Weight, class Input, int R, int B>
inline void dot(const Weight* weight, const Input* const (&x)[B], int64_t width, float (&sums)[R][B]) {
    constexpr int lanes = Machine::template lanes<Weight>;
    constexpr int chains = Machine::chains;
    typename Machine::Vector sum[R][B][chains];
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b)
            UNROLL for (int c = 0; c < chains; ++c) sum[r][b][c] = Machine::zero();
    int64_t i = 0;
    for (; i + chains * lanes <= width; i += chains * lanes) {
        if (i * sizeof(Weight) % kPage == 0) UNROLL for (int r = 0; r < R; ++r) prefetch(weight + r * width + i);
        UNROLL for (int c = 0; c < chains; ++c) {
            const int64_t at = i + c * lanes;
            UNROLL for (int r = 0; r < R; ++r) {
                const auto w = Machine::load(weight + r * width + at);
                UNROLL for (int b = 0; b < B; ++b)
                    sum[r][b][c] = Machine::fma(w, Machine::load(x[b] + at), sum[r][b][c]);
            }
        }
    }
    UNROLL for (int c = 0; c < chains; ++c) {
        if (i < width) {
            const int left = width - i < lanes ? static_cast<int>(width - i) : lanes;
            UNROLL for (int r = 0; r < R; ++r) {
                const auto w = Machine::load(weight + r * width + i, left);
                UNROLL for (int b = 0; b < B; ++b)
                    sum[r][b][c] = Machine::fma(w, Machine::load(x[b] + i, left), sum[r][b][c]);
            }
            i += lanes;
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int b = 0; b < B; ++b) {
            UNROLL for (int c = 1; c < chains; ++c) sum[r][b][0] = Machine::add(sum[r][b][0], sum[r][b][c]);
            sums[r][b] = Machine::sum(sum[r][b][0]);
        }
}

// R rows from `row` on with the B inputs from `from` on, to where the results belong.
template <class Machine, class Weight, class Input, int R, int B>
inline void some(const Product& product, const Operand& m, int64_t row, int64_t from) {
    const Input* x[B];
    for (int b = 0; b < B; ++b) x[b] = static_cast<const Input*>(m.x[from + b]);
    float sums[R][B];
    dot<Machine, Weight, Input, R, B>(
        static_cast<const Weight*>(m.weight) + row * product.width, x, product.width, sums);
    for (int r = 0; r < R; ++r) {
        const float bias = m.bias ? get(product.weight, m.bias, row + r) : 0.0f;
        for (int b = 0; b < B; ++b) put(product.output, m.y[from + b], row + r - m.first, sums[r][b] + bias);
    }
}

template <class Machine, class Weight, class Input, int R>
inline void all_inputs(const Product& product, const Operand& m, int64_t row) {
    constexpr int most = Machine::batch;
    for (int64_t from = 0; from < m.batch; from += most) {
        const int64_t left = m.batch - from;
        if (left >= most) some<Machine, Weight, Input, R, most>(product, m, row, from);
        else if (left == 1) some<Machine, Weight, Input, R, 1>(product, m, row, from);
        else if constexpr (most > 2) {
            if (left == 2) some<Machine, Weight, Input, R, 2>(product, m, row, from);
            else some<Machine, Weight, Input, R, 3>(product, m, row, from);
        }
    }
}

template <class Machine, class Weight, class Input>
void rows_of(const Product& product, const Operand& m, int64_t begin, int64_t end) {
    static_assert(Machine::batch == 2 || Machine::batch == 4);
    int64_t row = begin;
    if (m.batch > 1 && Machine::rows > 1)
        for (; row + Machine::rows <= end; row += Machine::rows)
            all_inputs<Machine, Weight, Input, Machine::rows>(product, m, row);
    for (; row < end; ++row) all_inputs<Machine, Weight, Input, 1>(product, m, row);
}

template <class Machine>
void rows(const Product& product, const Operand& m, int64_t begin, int64_t end) {
    if constexpr (Machine::pairs)
        if (product.input == BF16) return rows_of<Machine, typename Machine::Pair, typename Machine::Pair>(
            product, m, begin, end);
    if (product.weight == F32) rows_of<Machine, float, float>(product, m, begin, end);
    else if (product.weight == F16) rows_of<Machine, F16Bits, float>(product, m, begin, end);
    else rows_of<Machine, Bf16, float>(product, m, begin, end);
}

template <class Machine>
void gated(const Product& product, const Operand& gate, const Operand& up, int64_t begin, int64_t end) {
    float held[kMaxBatch][kGatedRows];
    Operand part = up;
    for (int64_t b = 0; b < up.batch; ++b) part.y[b] = held[b];
    for (int64_t row = begin; row < end; row += kGatedRows) {
        const int64_t last = row + kGatedRows < end ? row + kGatedRows : end;
        part.first = row;
        rows<Machine>(product, gate, row, last);
        rows<Machine>(product, part, row, last);
        for (int64_t b = 0; b < up.batch; ++b) {
            float* y = static_cast<float*>(gate.y[b]) - gate.first;
            for (int64_t o = row; o < last; ++o) y[o] = y[o] / (1.0f + expf(-y[o])) * held[b][o - row];
        }
    }
}

template <class Machine, class Stored>
void widen_from(const Stored* from, float* to, int64_t count) {
    constexpr int lanes = Machine::template lanes<Stored>;
    int64_t at = 0;
    for (; at + lanes <= count; at += lanes) Machine::store(to + at, Machine::load(from + at));
    float rest[lanes];
    Machine::store(rest, Machine::load(from + at, static_cast<int>(count - at)));
    for (int64_t i = at; i < count; ++i) to[i] = rest[i - at];
}

template <class Machine>
void widen(Dtype dtype, const void* from, float* to, int64_t count) {
    if (dtype == F32) widen_from<Machine>(static_cast<const float*>(from), to, count);
    else if (dtype == F16) widen_from<Machine>(static_cast<const F16Bits*>(from), to, count);
    else widen_from<Machine>(static_cast<const Bf16*>(from), to, count);
}

template <class Machine>
constexpr Level level_of() {
    return {rows<Machine>, gated<Machine>, widen<Machine>, Machine::pairs,
            mix<Machine>, norm<Machine>, exponentials<Machine>, narrow};
}

}  // namespace
}  // namespace seekvl
