// What a decoding step does between its products, written once for vectors of any machine.
#pragma once

#include <cmath>
#include <cstdint>

#include "machine.h"

namespace seekvl {
namespace {

template <class Machine, class Stored>
inline typename Machine::Vector load_some(const Stored* from, int64_t left) {
    constexpr int lanes = Machine::template lanes<Stored>;
    return left >= lanes ? Machine::load(from) : Machine::load(from, static_cast<int>(left));
}

template <class Machine>
inline void store_some(float* to, typename Machine::Vector a, int64_t left) {
    constexpr int lanes = Machine::template lanes<float>;
    if (left >= lanes) return Machine::store(to, a);
    float all[lanes];
    Machine::store(all, a);
    for (int64_t i = 0; i < left; ++i) to[i] = all[i];
}

// C vectors of columns from `column` on, of B weighted sums of rows.
template <class Machine, class Stored, int B, int C>
inline void mix_columns(const Product& product, const Operand& m, int64_t rows, int64_t from, int64_t column) {
    constexpr int lanes = Machine::template lanes<Stored>;
    const Stored* weight = static_cast<const Stored*>(m.weight) + column;
    const float* x[B];
    typename Machine::Vector sum[B][C], w[C];
    UNROLL for (int b = 0; b < B; ++b) {
        x[b] = static_cast<const float*>(m.x[from + b]);
        UNROLL for (int c = 0; c < C; ++c) sum[b][c] = Machine::zero();
    }
    for (int64_t row = 0; row < rows; ++row, weight += product.width) {
        prefetch(weight);
        UNROLL for (int c = 0; c < C; ++c) {
            if constexpr (C == 1) w[c] = load_some<Machine>(weight, product.width - column);
            else w[c] = Machine::load(weight + c * lanes);
        }
        UNROLL for (int b = 0; b < B; ++b) {
            const auto factor = Machine::spread(x[b][row]);
            UNROLL for (int c = 0; c < C; ++c) sum[b][c] = Machine::fma(w[c], factor, sum[b][c]);
        }
    }
    UNROLL for (int b = 0; b < B; ++b) {
        float* y = static_cast<float*>(m.y[from + b]) + column;
        UNROLL for (int c = 0; c < C; ++c)
            store_some<Machine>(y + c * lanes, sum[b][c], product.width - column - c * lanes);
    }
}

// All columns from `column` on, as many at a time as fit into the registers.
template <class Machine, class Stored, int B, int C>
inline void mix_some(const Product& product, const Operand& m, int64_t rows, int64_t from, int64_t column) {
    constexpr int64_t step = C * Machine::template lanes<Stored>;
    for (; column + (C == 1 ? 1 : step) <= product.width; column += step)
        mix_columns<Machine, Stored, B, C>(product, m, rows, from, column);
    if constexpr (C > 1) mix_some<Machine, Stored, B, C / 2>(product, m, rows, from, column);
}

template <class Machine, class Stored>
inline void mix_rows(const Product& product, const Operand& m, int64_t rows) {
    constexpr int most = Machine::batch, sums = Machine::chains * Machine::batch * Machine::rows;
    for (int64_t from = 0; from < m.batch; from += most) {
        const int64_t left = m.batch - from;
        if (left >= most) mix_some<Machine, Stored, most, sums / most>(product, m, rows, from, 0);
        else if (left == 1) mix_some<Machine, Stored, 1, (sums < 8 ? sums : 8)>(product, m, rows, from, 0);
        else if constexpr (most > 2) {
            if (left == 2) mix_some<Machine, Stored, 2, sums / 2>(product, m, rows, from, 0);
            else mix_some<Machine, Stored, 3, sums / 4>(product, m, rows, from, 0);
        }
    }
}

template <class Machine>
void mix(const Product& product, const Operand& m, int64_t rows) {
    if (product.weight == F32) mix_rows<Machine, float>(product, m, rows);
    else if (product.weight == F16) mix_rows<Machine, F16Bits>(product, m, rows);
    else mix_rows<Machine, Bf16>(product, m, rows);
}

template <class Machine, class Stored>
inline void norm_by(const Stored* weight, float eps, const float* x, float* y, int64_t width) {
    constexpr int lanes = Machine::template lanes<float>;
    auto squares = Machine::zero();
    for (int64_t at = 0; at < width; at += lanes) {
        const auto v = load_some<Machine>(x + at, width - at);
        squares = Machine::fma(v, v, squares);
    }
    const float mean = Machine::sum(squares) / static_cast<float>(width);
    const auto factor = Machine::spread(1.0f / sqrtf(mean + eps));
    for (int64_t at = 0; at < width; at += lanes) {
        const auto v = Machine::fma(load_some<Machine>(x + at, width - at), factor, Machine::zero());
        const auto w = load_some<Machine>(weight + at, width - at);
        store_some<Machine>(y + at, Machine::fma(v, w, Machine::zero()), width - at);
    }
}

template <class Machine>
void norm(Dtype dtype, const void* weight, float eps, const float* x, float* y, int64_t width) {
    if (dtype == F32) norm_by<Machine>(static_cast<const float*>(weight), eps, x, y, width);
    else if (dtype == F16) norm_by<Machine>(static_cast<const F16Bits*>(weight), eps, x, y, width);
    else norm_by<Machine>(static_cast<const Bf16*>(weight), eps, x, y, width);
}

// e^x for x <= 0, to the last two bits; below -87, where float32 ends, what it is there.
//
// x = n ln 2 + rest with |rest| <= ln 2 / 2, and e^x = 2^n e^rest: the series ends where its terms no longer count.
// Four `terms` behind the first are right to 4e-5, seven to all bits.
template <class Machine, int terms = 7>
inline typename Machine::Vector exponential(typename Machine::Vector x) {
    constexpr float kSeries[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f};
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: numbers added to it lose their fraction
    x = Machine::max(Machine::spread(-87.0f), x);
    auto n = Machine::fma(x, Machine::spread(1.44269504f), Machine::spread(kWhole));
    n = Machine::add(n, Machine::spread(-kWhole));
    x = Machine::fma(n, Machine::spread(-0.693359375f), x);  // ln 2 in two parts, the first of few bits
    x = Machine::fma(n, Machine::spread(2.12194440e-4f), x);
    auto sum = Machine::spread(terms < 7 ? kSeries[6 - terms] : 1.0f / 5040);
    UNROLL for (int i = 7 - terms; i < 7; ++i) sum = Machine::fma(sum, x, Machine::spread(kSeries[i]));
    return Machine::scaled(sum, n);
}

template <class Machine>
float exponentials(float* x, int64_t count, float* greatest) {
    constexpr int lanes = Machine::template lanes<float>;
    static_assert(kExponentials % lanes == 0);
    for (int64_t at = count; at % lanes != 0; ++at) x[at] = -INFINITY;
    auto most = Machine::spread(-INFINITY);
    for (int64_t at = 0; at < count; at += lanes) most = Machine::max(most, Machine::load(x + at));
    float all[lanes];
    Machine::store(all, most);
    *greatest = all[0];
    for (int i = 1; i < lanes; ++i) *greatest = all[i] > *greatest ? all[i] : *greatest;
    const auto shift = Machine::spread(-*greatest);
    auto sum = Machine::zero();
    for (int64_t at = 0; at < count; at += lanes) {
        const auto e = exponential<Machine>(Machine::add(Machine::load(x + at), shift));
        Machine::store(x + at, e);
        sum = Machine::add(sum, e);
    }
    return Machine::sum(sum);
}

// A plain loop, compiled for the level.
void narrow(Dtype dtype, const float* from, void* to, int64_t count) {
    if (dtype == BF16) for (int64_t at = 0; at < count; ++at) put(BF16, to, at, from[at]);
    else if (dtype == F16) for (int64_t at = 0; at < count; ++at) put(F16, to, at, from[at]);
    else for (int64_t at = 0; at < count; ++at) put(F32, to, at, from[at]);
}

}  // namespace
}  // namespace seekvl
