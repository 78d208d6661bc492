// Attention with tokens as lanes, written once for vectors of any machine; see attend_many.h.
#pragma once

#include "attend_many.h"
#include "blocks.h"

namespace seekvl {
namespace {

inline void* taken(char*& room, int64_t bytes) {
    void* const from = room;
    room += (bytes + kLine - 1) / kLine * kLine;
    return from;
}

// Pack the queries, which are narrowed into `narrowed` where the keys are multiplied in pairs.
template <class Machine, class Lanes>
void pack_queries(const Tile& tile, const Product& product, const Block& block, uint16_t* narrowed) {
    const void* rows[kMostLanes];
    for (int64_t row = 0; row < tile.rows; ++row) {
        const float* q = tile.q + row * tile.q_stride;
        rows[row] = q;
        if (product.input != BF16) continue;
        narrow(BF16, q, narrowed + row * tile.key_width, tile.key_width);
        rows[row] = narrowed + row * tile.key_width;
    }
    pack<Machine, Lanes>(product, product.input, rows, block);
}

// Scores of columns start <= column < end, strip by strip; a token does not see what lies behind it.
template <class Machine, class Lanes, class Pairs>
void score_columns(const Tile& tile, const Product& product, const Block& queries, int64_t start, int64_t end,
                   Softmax& softmax) {
    const int64_t bytes = tile.key_width * (tile.kind == F32 ? 4 : 2);
    for (int64_t column = start; column < end; column += kStrip) {
        Strip strip{{}, kStrip * bytes};
        for (int r = 0; r < kStrip; ++r)
            strip.rows[r] = static_cast<const char*>(tile.keys) + (column + r < end ? column + r : end - 1) * bytes;
        sum_strip<Machine, Lanes, Pairs>(product, strip, queries, softmax.scores[(column - start) / kStrip]);
    }
    for (int64_t column = start > tile.first ? start : tile.first + 1; column < end; ++column) {
        float* score = softmax.scores[(column - start) / kStrip][(column - start) % kStrip];
        for (int64_t lane = 0; lane < column - tile.first && lane < kMostLanes; ++lane) score[lane] = -INFINITY;
    }
}

// Scores as they are.
struct Nothing {
    static constexpr bool adds = false;
};

// Exponentials of the scores of so many columns, and what they change of what is carried. Where a token sees none of
// the columns its factor is 1 and its sum stays: the least of e^x, which is what these columns give, is nothing
// beside a sum of at least 1. `terms` as of `exponential`; `more` is added to the scores before, more(column, lane, v).
template <class Machine, int terms, class More = Nothing>
void exponentiate(int64_t columns, int64_t lanes, bool begun, Softmax& softmax, const More& more = {}) {
    constexpr int step = Machine::template lanes<float>;
    for (int64_t lane = 0; lane < lanes; lane += step) {
        const auto score = [&](int64_t column) { return softmax.scores[column / kStrip][column % kStrip] + lane; };
        const auto before = begun ? Machine::load(softmax.greatest + lane) : Machine::spread(-INFINITY);
        auto most = before;
        for (int64_t column = 0; column < columns; ++column) {
            auto found = Machine::load(score(column));
            if constexpr (More::adds) {
                found = more(column, lane, found);
                Machine::store(score(column), found);
            }
            most = Machine::max(most, found);
        }
        Machine::store(softmax.greatest + lane, most);
        float shift[step];
        Machine::store(shift, most);
        for (float& number : shift) number = -number;
        const auto down = Machine::load(shift);
        const auto factor = exponential<Machine>(Machine::add(before, down));
        auto sum = Machine::zero();
        for (int64_t column = 0; column < columns; ++column) {
            const auto e = exponential<Machine, terms>(Machine::add(Machine::load(score(column)), down));
            Machine::store(score(column), e);
            sum = Machine::add(sum, e);
        }
        Machine::store(softmax.factors + lane, factor);
        if (begun) sum = Machine::fma(Machine::load(softmax.sums + lane), factor, sum);
        Machine::store(softmax.sums + lane, sum);
    }
}

// Nothing of what a token does not see reaches its results.
inline void forget_unseen(const Tile& tile, int64_t start, int64_t end, Softmax& softmax) {
    for (int64_t column = start > tile.first ? start : tile.first + 1; column < end; ++column) {
        float* score = softmax.scores[(column - start) / kStrip][(column - start) % kStrip];
        for (int64_t lane = 0; lane < column - tile.first && lane < kMostLanes; ++lane) score[lane] = 0.0f;
    }
}

inline void scale_lanes(float* numbers, const float* factors, int64_t lanes) {
    for (int64_t from = 0; from < lanes; from += kStrip)
        for (int lane = 0; lane < kStrip; ++lane) numbers[from + lane] *= factors[from + lane];
}

// Results, scaled down to the greatest score so far, get the values of the block, weighted.
template <class Lanes>
void mix_columns_of(const Tile& tile, const typename Lanes::Number* weights, int64_t lanes, int64_t start,
                    int64_t columns, const Softmax& softmax, Sums* results) {
    using Weight = typename Lanes::Weight;
    const auto* values = static_cast<const Weight*>(tile.values) + start;
    for (int64_t channel = 0; channel < tile.value_width; channel += kStrip) {
        Sums& sums = results[channel / kStrip];
        if (start > 0)
            for (auto& row : sums) scale_lanes(row, softmax.factors, lanes);
        const Weight* rows[kStrip];
        for (int r = 0; r < kStrip; ++r)
            rows[r] = values + (channel + r < tile.value_width ? channel + r : tile.value_width - 1) * tile.stride;
        const int64_t ahead = kStrip * tile.stride * static_cast<int64_t>(sizeof(Weight));
        sum_steps<Lanes>(rows, weights, lanes, (columns + Lanes::step - 1) / Lanes::step, ahead, start > 0, sums);
    }
}

// Shares as the product with the values takes them; a column behind the last of an odd number counts for nothing.
template <class Machine, class Pairs>
inline void pack_shares(Softmax& softmax, int64_t columns, const Block& shares, Dtype input) {
    if (columns % 2)
        for (float& share : softmax.scores[columns / kStrip][columns % kStrip]) share = 0.0f;
    for (int64_t column = 0; column < columns; column += kStrip) {
        const int64_t count = columns - column < kStrip ? columns - column : kStrip;
        put_packed<Machine, Pairs>(input, softmax.scores[column / kStrip], count, column, shares);
    }
}

template <class Lanes>
void put_mixed(const Tile& tile, const Block& block, const Softmax& softmax, Sums* results) {
    for (int64_t channel = 0; channel < tile.value_width; channel += kStrip) {
        Sums& sums = results[channel / kStrip];
        for (auto& row : sums)
            for (int64_t lane = 0; lane < block.lanes; ++lane) row[lane] /= softmax.sums[lane];
        const int64_t count = tile.value_width - channel < kStrip ? tile.value_width - channel : kStrip;
        by_row<Lanes>(sums, block, [&](int64_t row, int64_t rows, const Turned& turned) {
            for (int64_t at = 0; at < rows; ++at) copy(tile.out + (row + at) * tile.out_stride, channel, turned[at], count);
        });
    }
}

template <class Machine, class Lanes, class Pairs = Lanes>
void attend(const Tile& tile, float* room) {
    constexpr int64_t unit = Pairs::halves ? Pairs::lanes / 2 : Lanes::lanes;
    const bool pairs = Machine::pairs && tile.input == BF16;
    const int64_t lanes = (tile.rows + unit - 1) / unit * unit, end = tile.first + tile.rows;
    const Product product{tile.kind, tile.input, F32, tile.key_width};
    char* at = reinterpret_cast<char*>(room);
    Softmax& softmax = *static_cast<Softmax*>(taken(at, sizeof(Softmax)));
    Sums* results = static_cast<Sums*>(taken(at, (tile.value_width + kStrip - 1) / kStrip * sizeof(Sums)));
    const Block queries{tile.rows, lanes, taken(at, (tile.key_width + 1) * kMostLanes * sizeof(float))};
    void* shares = at;
    pack_queries<Machine, Lanes>(tile, product, queries, static_cast<uint16_t*>(shares));
    for (int64_t start = 0; start < end; start += kColumns) {
        const int64_t last = start + kColumns < end ? start + kColumns : end, columns = last - start;
        score_columns<Machine, Lanes, Pairs>(tile, product, queries, start, last, softmax);
        exponentiate<Machine, 7>(columns, lanes, start > 0, softmax);
        forget_unseen(tile, start, last, softmax);
        pack_shares<Machine, Pairs>(softmax, columns, {tile.rows, lanes, shares}, tile.input);
        if (pairs)
            mix_columns_of<Pairs>(tile, static_cast<typename Pairs::Number*>(shares), lanes, start, columns, softmax,
                                  results);
        else
            mix_columns_of<Lanes>(tile, static_cast<typename Lanes::Number*>(shares), lanes, start, columns, softmax,
                                  results);
    }
    put_mixed<Lanes>(tile, queries, softmax, results);
}

}  // namespace
}  // namespace seekvl
