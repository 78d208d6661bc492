// The products of gradients.h, written once for vectors of any machine, in terms of the lanes of blocks.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "blocks.h"
#include "gradients.h"

namespace seekvl {
namespace {

constexpr int64_t kSoon = 8;  // rows from what is packed to what is asked for

template <class Machine, class Lanes>
struct GradientBlocks {
    using Weight = typename Lanes::Weight;
    using Number = typename Lanes::Number;
    static constexpr bool pairs = Lanes::step == 2;
    static constexpr int lane = Lanes::lanes, R = Lanes::rows;
    static constexpr int64_t unit = lane < kStrip ? kStrip : lane;
    static constexpr int64_t most = lane * Lanes::vectors / unit * unit;
    static constexpr int vectors = most / lane;

    static int64_t lanes_of(int64_t columns) { return (columns + unit - 1) / unit * unit; }

    static void numbers(Dtype from, const void* row, int64_t width, void* to) {
        if constexpr (pairs) {
            std::memcpy(to, row, width * sizeof(uint16_t));
            if (width % 2) static_cast<uint16_t*>(to)[width] = 0;
        } else {
            widen<Machine>(from, row, static_cast<float*>(to), width);
        }
    }

    // Two rows as one, the second of zeros where there is none.
    static void join(const void* one, const void* other, int64_t columns, int64_t lanes, uint32_t* to) {
        const auto *low = static_cast<const uint16_t*>(one), *high = static_cast<const uint16_t*>(other);
        int64_t at = 0;
        if (other && columns == most)
            for (int l = 0; l < most; ++l) to[l] = low[l] | static_cast<uint32_t>(high[l]) << 16;
        else
            for (; at < columns; ++at) to[at] = low[at] | (other ? static_cast<uint32_t>(high[at]) << 16 : 0);
        if (columns < lanes) std::memset(to + columns, 0, (lanes - columns) * sizeof *to);
    }

    // Lanes::step rows as one row of a panel; those from the count-th on are zeros.
    template <class Row>
    static void pack_step(Dtype from, Row row, int64_t at, int64_t count, int64_t column, int64_t columns, Number* to) {
        const int64_t lanes = lanes_of(columns), start = column * (from == F32 ? 4 : 2);
        if constexpr (pairs) {
            join(row(at) + start, at + 1 < count ? row(at + 1) + start : nullptr, columns, lanes, to);
        } else {
            widen<Machine>(from, row(at) + start, to, columns);
            for (int64_t l = columns; l < lanes; ++l) to[l] = 0.0f;
        }
    }

    // Reading runs over several panels, and so over whole lines and fewer pages; what comes next is asked for, as
    // processors do not see it coming from so far.
    static void pack(Dtype from, const Rows& rows, int64_t count, int64_t begin, int64_t end, void* packed,
                     int64_t apart) {
        const int64_t size = from == F32 ? 4 : 2, ahead = kSoon * rows.bytes;
        const auto row = [&](int64_t at) { return rows.first + at * rows.bytes; };
        Number* const to = static_cast<Number*>(packed);
        for (int64_t at = 0, step = 0; at < count; at += Lanes::step, ++step) {
            for (int r = 0; r < Lanes::step; ++r)
                for (int64_t byte = begin * size; byte < end * size; byte += kLine) prefetch(row(at + r) + byte, ahead);
            for (int64_t column = begin; column < end; column += most) {
                const int64_t columns = end - column < most ? end - column : most;
                Number* panel = to + (column - begin) / most * apart;
                pack_step(from, row, at, count, column, columns, panel + step * lanes_of(columns));
            }
        }
    }

    static void gather(Dtype from, const void* const* rows, int64_t count, int64_t column, int64_t columns,
                       void* packed) {
        const auto row = [&](int64_t at) { return static_cast<const char*>(rows[at]); };
        Number* to = static_cast<Number*>(packed);
        for (int64_t at = 0; at < count; at += Lanes::step, to += lanes_of(columns))
            pack_step(from, row, at, count, column, columns, to);
    }

    // Sums of kStrip rows with V vectors of a panel.
    template <int V>
    __attribute__((noinline)) static void by_rows(const void* const* numbers, const Panel& panel, Sums& sums) {
        for (int first = 0; first < kStrip; first += R) {
            const Weight* rows[R];
            typename Lanes::Vector sum[R][V];
            UNROLL for (int r = 0; r < R; ++r) {
                rows[r] = static_cast<const Weight*>(numbers[first + r]);
                UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Lanes::zero();
            }
            const Number* x = static_cast<const Number*>(panel.packed);
            for (int64_t i = 0; i < panel.steps; ++i, x += V * lane) {
                decltype(Lanes::load(x)) at[V];
                UNROLL for (int v = 0; v < V; ++v) at[v] = Lanes::load(x + v * lane);
                UNROLL for (int r = 0; r < R; ++r) {
                    const auto weight = Lanes::broadcast(rows[r] + i * Lanes::step);
                    UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Lanes::fma(weight, at[v], sum[r][v]);
                }
            }
            UNROLL for (int r = 0; r < R; ++r)
                UNROLL for (int v = 0; v < V; ++v) Lanes::store(sums[first + r] + v * lane, sum[r][v]);
        }
    }

    // Call put(row, rows, sums) for strips of the rows; rows behind the last repeat it.
    template <class Put>
    static void each_strip(const void* const* numbers, int64_t count, const Panel& panel, Put put) {
        alignas(kLine) Sums sums;
        const int64_t used = lanes_of(panel.columns) / lane;
        for (int64_t row = 0; row < count; row += kStrip) {
            const void* rows[kStrip];
            for (int64_t r = 0; r < kStrip; ++r) rows[r] = numbers[row + r < count ? row + r : count - 1];
            if (used == 1) by_rows<1>(rows, panel, sums);
            else if (used == 2) by_rows<(vectors < 2 ? vectors : 2)>(rows, panel, sums);
            else by_rows<vectors>(rows, panel, sums);
            put(row, count - row < kStrip ? count - row : kStrip, sums);
        }
    }

    // Weighted hidden numbers, gradients of gate and of up, for kStrip tokens; tokens behind the last have zeros.
    struct Parts { alignas(kLine) float hidden[kStrip][most], gate[kStrip][most], up[kStrip][most]; };

    // One token through the derivative of silu(gate) * up; returns its output times the gradient of that.
    static float differentiate(const Hidden& job, int64_t row, const float* grads, int64_t r, Parts& parts) {
        alignas(kLine) float gate[most] = {}, up[most] = {}, products[most];
        const char* kept = static_cast<const char*>(job.kept[row]);
        const int64_t size = job.dtype == F32 ? 4 : 2;
        widen<Machine>(job.dtype, kept + job.down.column * size, gate, job.down.columns);
        widen<Machine>(job.dtype, kept + (job.width + job.down.column) * size, up, job.down.columns);
        const float share = job.shares[row];
        for (int l = 0; l < most; ++l) {
            const float sigmoid = 1.0f / (1.0f + exp_of(-gate[l])), silu = gate[l] * sigmoid;
            const float hidden = silu * up[l], grad = share * grads[l];
            products[l] = l < job.down.columns ? hidden * grads[l] : 0.0f;
            parts.hidden[r][l] = share * hidden;
            parts.gate[r][l] = grad * up[l] * (sigmoid + silu * (1.0f - sigmoid));
            parts.up[r][l] = grad * silu;
        }
        float sums[kStrip] = {};
        for (int from = 0; from < most; from += kStrip)
            for (int l = 0; l < kStrip; ++l) sums[l] += products[from + l];
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }

    // The gradients of a token's gate and up into its row.
    static void put_row(const Hidden& job, void* row, const float* gate, const float* up) {
        const int64_t rounded = job.width + job.width % Lanes::step, column = job.down.column;
        if constexpr (pairs) {
            uint16_t halves[2][most], *to = static_cast<uint16_t*>(row) + column;
            for (int l = 0; l < most; ++l) halves[0][l] = static_cast<uint16_t>(rounded_bf16(gate[l]) >> 16);
            for (int l = 0; l < most; ++l) halves[1][l] = static_cast<uint16_t>(rounded_bf16(up[l]) >> 16);
            const bool last = column + job.down.columns == job.width && rounded != job.width;
            for (int half = 0; half < 2; ++half, to += rounded) {
                if (job.down.columns == most) std::memcpy(to, halves[half], most * sizeof *to);
                else std::memcpy(to, halves[half], job.down.columns * sizeof *to);
                if (last) to[job.down.columns] = 0;
            }
        } else {
            float* to = static_cast<float*>(row) + column;
            std::memcpy(to, gate, job.down.columns * sizeof *to);
            std::memcpy(to + rounded, up, job.down.columns * sizeof *to);
        }
    }

    // kStrip rows into a panel of tokens.
    static void put_panel(const float (*from)[most], int64_t rows, int64_t lanes, Number* to) {
        for (int64_t r = 0; r < rows; r += Lanes::step, to += lanes) {
            if constexpr (pairs) {
                alignas(kLine) uint32_t both[most];
                for (int l = 0; l < most; ++l) both[l] = rounded_bf16(from[r][l]) >> 16 | rounded_bf16(from[r + 1][l]);
                if (lanes == most) std::memcpy(to, both, most * sizeof *to);
                else std::memcpy(to, both, lanes * sizeof *to);
            } else {
                std::memcpy(to, from[r], lanes * sizeof *to);
            }
        }
    }

    static void hidden(const Hidden& job) {
        Parts parts;
        const int64_t lanes = lanes_of(job.down.columns);
        each_strip(job.grads, job.count, job.down, [&](int64_t row, int64_t rows, Sums& sums) {
            std::memset(&parts, 0, sizeof parts);
            for (int64_t r = 0; r < rows; ++r) {
                job.dots[row + r] = differentiate(job, row + r, sums[r], r, parts);
                put_row(job, job.rows[row + r], parts.gate[r], parts.up[r]);
            }
            const int64_t at = row / Lanes::step * lanes;
            put_panel(parts.hidden, rows, lanes, static_cast<Number*>(job.hidden) + at);
            put_panel(parts.gate, rows, lanes, static_cast<Number*>(job.gate) + at);
            put_panel(parts.up, rows, lanes, static_cast<Number*>(job.up) + at);
        });
    }

    static void inputs(const Inputs& job) {
        const int64_t columns = job.both.columns;
        each_strip(job.rows, job.count, job.both, [&](int64_t row, int64_t rows, Sums& sums) {
            for (int64_t r = 0; r < rows; ++r) {
                float* to = job.to[row + r] + job.both.column;
                if (columns == most) std::memcpy(to, sums[r], most * sizeof *to);
                else std::memcpy(to, sums[r], columns * sizeof *to);
            }
        });
    }

    // A tile of the gradient of a matrix: what the panels of tokens hold from `a` and from `x` on, multiplied.
    template <int V>
    __attribute__((noinline)) static void outer_tile(const Outer& job, const Number* a, int64_t stride, const Number* x,
                                                     int64_t row, int64_t column) {
        const int64_t width = job.columns.columns, size = job.dtype == F32 ? 4 : 2;
        const int64_t columns = width - column < V * lane ? width - column : V * lane;
        char* const to = static_cast<char*>(job.to) + (row * width + column) * size;
        for (int first = 0; first < kStrip && row + first < job.end; first += R) {
            const int64_t rows = job.end - row - first;
            typename Lanes::Vector sum[R][V];
            UNROLL for (int r = 0; r < R; ++r) {
                if (r < rows) bring_to_write(to + ((first + r) * width + V * lane) * size, V * lane * size);
                UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Lanes::zero();
            }
            const Number *left = a + first, *right = x;
            for (int64_t step = 0; step < job.steps; ++step, left += stride, right += V * lane) {
                decltype(Lanes::load(x)) at[V];
                UNROLL for (int v = 0; v < V; ++v) at[v] = Lanes::load(right + v * lane);
                UNROLL for (int r = 0; r < R; ++r) {
                    const auto weight = Lanes::broadcast(reinterpret_cast<const Weight*>(left + r));
                    UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Lanes::fma(weight, at[v], sum[r][v]);
                }
            }
            UNROLL for (int r = 0; r < R; ++r)
                if (r < rows) put_sums<V>(job.dtype, sum[r], columns, to + (first + r) * width * size);
        }
    }

    // What a tile to the right writes. An address and no pointer: it may lie behind the matrix.
    static void bring_to_write(const char* at, int64_t bytes) {
        for (int64_t line = 0; line < bytes; line += kLine)
            __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + line), 1);
    }

    template <int V>
    static void put_sums(Dtype dtype, const typename Lanes::Vector (&sum)[V], int64_t columns, void* to) {
        if constexpr (pairs)
            if (columns == V * lane) {
                UNROLL for (int v = 0; v < V; ++v) Lanes::store_rounded(static_cast<uint16_t*>(to) + v * lane, sum[v]);
                return;
            }
        alignas(kLine) float all[most];
        UNROLL for (int v = 0; v < V; ++v) Lanes::store(all + v * lane, sum[v]);
        narrow(dtype, all, to, columns);
    }

    static const Number* panel_at(const Panels& panels, int64_t steps, int64_t column) {
        return reinterpret_cast<const Number*>(panels.packed) + column * steps;
    }

    static void outer(const Outer& job) {
        for (int64_t row = job.begin; row < job.end; row += kStrip) {
            const int64_t start = row / most * most, left = job.rows.columns - start;
            const Number* a = panel_at(job.rows, job.steps, start) + (row - start);
            const int64_t stride = left < most ? lanes_of(left) : most;
            for (int64_t column = 0; column < job.columns.columns; column += most) {
                const Number* x = panel_at(job.columns, job.steps, column);
                const int64_t rest = job.columns.columns - column, used = rest < most ? lanes_of(rest) / lane : vectors;
                if (used == 1) outer_tile<1>(job, a, stride, x, row, column);
                else if (used == 2) outer_tile<(vectors < 2 ? vectors : 2)>(job, a, stride, x, row, column);
                else outer_tile<vectors>(job, a, stride, x, row, column);
            }
        }
    }
};

template <class Machine, class Lanes>
constexpr Gradients gradients_of() {
    using Blocks = GradientBlocks<Machine, Lanes>;
    static_assert(Blocks::vectors <= 3 && Blocks::most <= kMostLanes && kStrip % Lanes::rows == 0);
    return {Blocks::most, Blocks::unit, Lanes::step, Blocks::numbers, Blocks::pack, Blocks::gather,
            Blocks::hidden, Blocks::inputs, Blocks::outer};
}

}  // namespace
}  // namespace seekvl
