// What a level computes of a vision tower, written once for vectors of any machine; see tower_level.h.
#pragma once

#include "attend_lanes.h"
#include "tower_level.h"

namespace seekvl {
namespace {

// x times the share of a normal distribution that lies below x. The share of what lies beyond |x| is a polynomial of
// 1 / (1 + p |x|) times e^(-x^2 / 2), to 1e-7 (Abramowitz and Stegun 7.1.26).
inline float gelu_erf(float x) {
    const float z = (x < 0.0f ? -x : x) * 0.707106781f, t = 1.0f / (1.0f + 0.3275911f * z);
    float beyond = 0.5f * 1.061405429f;
    beyond = beyond * t - 0.5f * 1.453152027f;
    beyond = beyond * t + 0.5f * 1.421413741f;
    beyond = beyond * t - 0.5f * 0.284496736f;
    beyond = beyond * t + 0.5f * 0.254829592f;
    beyond = beyond * t * exp_of(-z * z);
    return x * (x < 0.0f ? beyond : 1.0f - beyond);
}

// The form with a tangent: (1 + tanh u) / 2 is 1 / (1 + e^(-2u)).
inline float gelu_tanh(float x) { return x / (1.0f + exp_of(-1.59576912f * (x + 0.044715f * x * x * x))); }

// Lanes in use, and up to a vector more.
template <class Function>
inline void bend_with(Function function, float* lanes, int64_t count) {
    constexpr int vector = 16;
    for (int64_t from = 0; from < count; from += vector)
        for (int l = 0; l < vector; ++l) lanes[from + l] = function(lanes[from + l]);
}

inline void bend(Curve curve, float factor, float* lanes, int64_t count) {
    if (curve == GELU_ERF) bend_with([=](float x) { return gelu_erf(x) * factor; }, lanes, count);
    else if (curve == GELU_TANH) bend_with([=](float x) { return gelu_tanh(x) * factor; }, lanes, count);
    else bend_with([=](float x) { return x * factor; }, lanes, count);
}

template <class Machine, class Lanes, class Pairs>
void packed_product(const Product& product, const Block& x, const void* weight, const void* bias, Curve curve,
                    float factor, const Block& y, const Range& range) {
    alignas(kLine) Sums sums;
    for (int64_t o = range.begin; o < range.end; o += kStrip) {
        sum_strip<Machine, Lanes, Pairs>(product, strip_of(product, weight, range, o, kStrip), x, sums);
        const int64_t count = range.end - o < kStrip ? range.end - o : kStrip;
        if (bias) add_bias(product.weight, bias, o, count, x.lanes, sums);
        for (int64_t r = 0; r < count; ++r) bend(curve, factor, sums[r], x.lanes);
        if (count % 2) std::memset(sums[count], 0, sizeof sums[count]);
        put_packed<Machine, Pairs>(product.input, sums, count, o, y);
    }
}

inline void put_lanes(Dtype dtype, void* to, int64_t at, const float* lanes, int64_t count) {
    if (dtype == F32) {
        std::memcpy(static_cast<float*>(to) + at, lanes, count * sizeof(float));
        return;
    }
    uint16_t narrow[kMostLanes];
    for (int l = 0; l < kMostLanes; ++l) narrow[l] = static_cast<uint16_t>(rounded_bf16(lanes[l]) >> 16);
    std::memcpy(static_cast<uint16_t*>(to) + at, narrow, count * sizeof *narrow);
}

template <class Machine, class Lanes, class Pairs>
void turned_product(const Product& product, const Block& x, const void* weight, const void* bias, void* to,
                    int64_t stride, const Range& range) {
    alignas(kLine) Sums sums;
    for (int64_t o = range.begin; o < range.end; o += kStrip) {
        sum_strip<Machine, Lanes, Pairs>(product, strip_of(product, weight, range, o, kStrip), x, sums);
        const int64_t count = range.end - o < kStrip ? range.end - o : kStrip;
        if (bias) add_bias(product.weight, bias, o, count, x.lanes, sums);
        for (int64_t r = 0; r < count; ++r) put_lanes(product.output, to, (o + r) * stride, sums[r], x.rows);
    }
}

template <class Machine, class Stored>
inline void centre_by(const Stored* weight, const Stored* bias, float eps, const float* x, float* y, int64_t width) {
    constexpr int lanes = Machine::template lanes<float>;
    auto sum = Machine::zero();
    for (int64_t at = 0; at < width; at += lanes) sum = Machine::add(sum, load_some<Machine>(x + at, width - at));
    const auto down = Machine::spread(-Machine::sum(sum) / static_cast<float>(width));
    for (int64_t at = 0; at < width; at += lanes)
        store_some<Machine>(y + at, Machine::add(load_some<Machine>(x + at, width - at), down), width - at);
    auto squares = Machine::zero();
    for (int64_t at = 0; at < width; at += lanes) {
        const auto v = load_some<Machine>(y + at, width - at);
        squares = Machine::fma(v, v, squares);
    }
    const auto factor = Machine::spread(1.0f / sqrtf(Machine::sum(squares) / static_cast<float>(width) + eps));
    for (int64_t at = 0; at < width; at += lanes) {
        const auto v = Machine::fma(load_some<Machine>(y + at, width - at), factor, Machine::zero());
        const auto w = load_some<Machine>(weight + at, width - at), b = load_some<Machine>(bias + at, width - at);
        store_some<Machine>(y + at, Machine::fma(v, w, b), width - at);
    }
}

template <class Machine>
void centre(Dtype dtype, const void* weight, const void* bias, float eps, const float* x, float* y, int64_t width) {
    const auto by = [&](auto stored) {
        using Stored = decltype(stored);
        centre_by<Machine>(static_cast<const Stored*>(weight), static_cast<const Stored*>(bias), eps, x, y, width);
    };
    if (dtype == F32) by(float{});
    else if (dtype == F16) by(F16Bits{});
    else by(Bf16{});
}

using Lane = float[kMostLanes];

// What rows of a table add to the scores: to[s][lane] for a key at place s and the query in a lane, whose own place is
// `place(lane)`. Of the table only distances that occur are multiplied.
template <class Machine, class Lanes, class Pairs, class At>
void distance_scores(const Sight& sight, const void* table, At place, Lane* products, Lane* to) {
    const Distances& d = sight.distances;
    const int64_t rows = sight.queries.rows, bytes = sight.width * (d.kind == F32 ? 4 : 2);
    int64_t least = d.side, most = 0;
    for (int64_t lane = 0; lane < rows; ++lane) {
        least = place(lane) < least ? place(lane) : least;
        most = place(lane) > most ? place(lane) : most;
    }
    const int64_t end = most + d.side;  // row `place - s + side - 1` of the table, for 0 <= s < side
    for (int64_t row = least; row < end; row += kStrip) {
        Strip strip{{}, 0};
        for (int r = 0; r < kStrip; ++r)
            strip.rows[r] = static_cast<const char*>(table) + (row + r < end ? row + r : end - 1) * bytes;
        sum_strip<Machine, Lanes, Pairs>({d.kind, sight.input, F32, sight.width}, strip, sight.queries,
                                         *reinterpret_cast<Sums*>(products + row - least));
    }
    for (int64_t s = 0; s < d.side; ++s)
        for (int64_t lane = 0; lane < kMostLanes; ++lane)
            to[s][lane] = d.factor * products[place(lane < rows ? lane : 0) - s + d.side - 1 - least][lane];
}

inline void add_distances(const Distances& d, int64_t start, int64_t columns, int64_t lanes, const Lane* rows,
                          const Lane* cols, Softmax& softmax) {
    for (int64_t column = 0; column < columns; ++column) {
        const Place& key = d.keys[start + column];
        float* __restrict score = softmax.scores[column / kStrip][column % kStrip];
        const float *__restrict row = rows[key.row], *__restrict col = cols[key.column];
        for (int64_t from = 0; from < lanes; from += kStrip)
            for (int l = 0; l < kStrip; ++l) score[from + l] += row[from + l] + col[from + l];
    }
}

template <class Machine, class Lanes, class Pairs>
void put_looks(const Sight& sight, const Softmax& softmax, Sums* results) {
    const Block out{sight.queries.rows, sight.queries.lanes, sight.out};
    Lane factors;
    for (int64_t lane = 0; lane < out.lanes; ++lane) factors[lane] = 1.0f / softmax.sums[lane];
    for (int64_t channel = 0; channel < sight.width; channel += kStrip) {
        Sums& sums = results[channel / kStrip];
        for (auto& row : sums) scale_lanes(row, factors, out.lanes);
        const int64_t count = sight.width - channel < kStrip ? sight.width - channel : kStrip;
        put_packed<Machine, Pairs>(sight.input, sums, count, channel, out);
    }
}

template <class Machine, class Lanes, class Pairs = Lanes>
void look(const Sight& sight, float* room) {
    const bool pairs = Machine::pairs && sight.input == BF16, far = sight.distances.rows;
    const int64_t lanes = sight.queries.lanes, results_bytes = (sight.width + kStrip - 1) / kStrip * sizeof(Sums);
    char* at = reinterpret_cast<char*>(room);
    Softmax& softmax = *static_cast<Softmax*>(taken(at, sizeof(Softmax)));
    Sums* const results = static_cast<Sums*>(taken(at, results_bytes));
    void* const shares = taken(at, kColumns * sizeof(Lane));
    Lane *rows = nullptr, *cols = nullptr;
    if (far) {
        const Distances& d = sight.distances;
        rows = static_cast<Lane*>(taken(at, d.side * sizeof(Lane)));
        cols = static_cast<Lane*>(taken(at, d.side * sizeof(Lane)));
        Lane* const products = reinterpret_cast<Lane*>(at);
        distance_scores<Machine, Lanes, Pairs>(
            sight, d.rows, [&](int64_t lane) { return d.queries[lane].row; }, products, rows);
        distance_scores<Machine, Lanes, Pairs>(
            sight, d.columns, [&](int64_t lane) { return d.queries[lane].column; }, products, cols);
    }
    Tile tile{};
    tile.kind = tile.input = sight.input, tile.key_width = tile.value_width = sight.width;
    tile.keys = sight.keys, tile.values = sight.values, tile.stride = sight.stride;
    tile.rows = sight.queries.rows, tile.first = sight.columns;  // nobody is in front of a column
    const Product product{sight.input, sight.input, F32, sight.width};
    for (int64_t start = 0; start < sight.columns; start += kColumns) {
        const int64_t last = start + kColumns < sight.columns ? start + kColumns : sight.columns;
        const int64_t columns = last - start;
        score_columns<Machine, Lanes, Pairs>(tile, product, sight.queries, start, last, softmax);
        if (far) add_distances(sight.distances, start, columns, lanes, rows, cols, softmax);
        exponentiate<Machine>(columns, lanes, start > 0, softmax);
        pack_shares<Machine, Pairs>(softmax, columns, {tile.rows, lanes, shares}, sight.input);
        if (pairs)
            mix_columns_of<Pairs>(tile, static_cast<typename Pairs::Number*>(shares), lanes, start, columns, softmax,
                                  results);
        else
            mix_columns_of<Lanes>(tile, static_cast<typename Lanes::Number*>(shares), lanes, start, columns, softmax,
                                  results);
    }
    put_looks<Machine, Lanes, Pairs>(sight, softmax, results);
}

template <class Machine, class Lanes, class Pairs = Lanes>
constexpr TowerLevel tower_of() {
    return {packed_product<Machine, Lanes, Pairs>, turned_product<Machine, Lanes, Pairs>, centre<Machine>,
            look<Machine, Lanes, Pairs>};
}

}  // namespace
}  // namespace seekvl
