// What a level computes of a vision tower, written once for vectors of any machine; see tower_level.h.
#pragma once

#include "attend_lanes.h"
#include "tower_level.h"

namespace seekvl {
namespace {

// A function that rises from 0 to 1 around 0.5 at x = 0, as x times a quotient of polynomials of x^2; beyond the limit,
// where it is 0 or 1 to all bits that count, it is what it is there.
struct Rise {
    float limit, above[6], below[6];
};

// The share of a normal distribution below x, and the form of it with a tangent, 1 / (1 + e^(-2 u)) for
// u = sqrt(2 / pi) (x + 0.044715 x^3). Fitted to 1e-8; x times one of them is right to 3e-7 of the larger of 1 and |x|.
constexpr Rise kNormal{
    5.4f,
    {0.398942232f, 3.33722346e-2f, 4.65085171e-3f, 1.64321813e-4f, 6.36002369e-6f, 2.33867521e-8f},
    {1.0f, 0.250317872f, 2.83786934e-2f, 1.85898214e-3f, 7.24002384e-5f, 1.21659173e-6f}};
constexpr Rise kTangent{
    5.2f,
    {0.398942322f, 3.02962437e-2f, 3.63099715e-3f, 1.32868372e-4f, 7.06945139e-6f, 2.42768898e-8f},
    {1.0f, 0.243433803f, 2.43014805e-2f, 1.295844e-3f, 7.56620284e-5f, 1.3236662e-6f}};

inline float polynomial(const float (&c)[6], float u) {
    return c[0] + u * (c[1] + u * (c[2] + u * (c[3] + u * (c[4] + u * c[5]))));
}

inline float gelu(const Rise& rise, float x) {
    x = x < -rise.limit ? -rise.limit : x;  // what is left of it there is nothing
    const float at = x > rise.limit ? rise.limit : x, u = at * at;
    return x * (0.5f + at * polynomial(rise.above, u) / polynomial(rise.below, u));
}

// Lanes in use, and up to a vector more.
template <class Function>
inline void bend_with(Function function, float* lanes, int64_t count) {
    constexpr int vector = 16;
    for (int64_t from = 0; from < count; from += vector)
        for (int l = 0; l < vector; ++l) lanes[from + l] = function(lanes[from + l]);
}

inline void bend(Curve curve, float factor, float* lanes, int64_t count) {
    if (curve == GELU_ERF) bend_with([=](float x) { return gelu(kNormal, x) * factor; }, lanes, count);
    else if (curve == GELU_TANH) bend_with([=](float x) { return gelu(kTangent, x) * factor; }, lanes, count);
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

// What the places of some columns add to their scores.
template <class Machine>
struct Added {
    static constexpr bool adds = true;
    const Place* keys;
    Lane *rows, *columns;

    typename Machine::Vector operator()(int64_t column, int64_t lane, typename Machine::Vector score) const {
        const Place& key = keys[column];
        score = Machine::add(score, Machine::load(rows[key.row] + lane));
        return Machine::add(score, Machine::load(columns[key.column] + lane));
    }
};

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

// `Shares` are the lanes in which shares meet values, `terms` those of their exponentials, see `exponential`.
template <class Machine, class Lanes, class Pairs, class Shares, int terms>
void look_with(const Sight& sight, float* room) {
    const int64_t lanes = sight.queries.lanes, results_bytes = (sight.width + kStrip - 1) / kStrip * sizeof(Sums);
    const Distances& far = sight.distances;
    char* at = reinterpret_cast<char*>(room);
    Softmax& softmax = *static_cast<Softmax*>(taken(at, sizeof(Softmax)));
    Sums* const results = static_cast<Sums*>(taken(at, results_bytes));
    auto* const shares = static_cast<typename Shares::Number*>(taken(at, kColumns * sizeof(Lane)));
    Added<Machine> added{far.keys, static_cast<Lane*>(taken(at, far.side * sizeof(Lane))),
                         static_cast<Lane*>(taken(at, far.side * sizeof(Lane)))};
    if (far.rows) {
        Lane* const products = reinterpret_cast<Lane*>(at);
        distance_scores<Machine, Lanes, Pairs>(
            sight, far.rows, [&](int64_t lane) { return far.queries[lane].row; }, products, added.rows);
        distance_scores<Machine, Lanes, Pairs>(
            sight, far.columns, [&](int64_t lane) { return far.queries[lane].column; }, products, added.columns);
    }
    Tile tile{};
    tile.kind = tile.input = sight.input, tile.key_width = tile.value_width = sight.width;
    tile.keys = sight.keys, tile.values = sight.values, tile.stride = sight.stride;
    tile.rows = sight.queries.rows, tile.first = sight.columns;  // nobody is in front of a column
    const Product product{sight.input, sight.input, F32, sight.width};
    for (int64_t start = 0; start < sight.columns; start += kColumns, added.keys += kColumns) {
        const int64_t last = start + kColumns < sight.columns ? start + kColumns : sight.columns;
        const int64_t columns = last - start;
        score_columns<Machine, Lanes, Pairs>(tile, product, sight.queries, start, last, softmax);
        if (far.rows) exponentiate<Machine, terms>(columns, lanes, start > 0, softmax, added);
        else exponentiate<Machine, terms>(columns, lanes, start > 0, softmax);
        pack_shares<Machine, Pairs>(softmax, columns, {tile.rows, lanes, shares}, sight.input);
        mix_columns_of<Shares>(tile, shares, lanes, start, columns, softmax, results);
    }
    put_looks<Machine, Lanes, Pairs>(sight, softmax, results);
}

// Shares that are rounded to bfloat16 need no more than four terms.
template <class Machine, class Lanes, class Pairs = Lanes>
void look(const Sight& sight, float* room) {
    if constexpr (Machine::pairs)
        if (sight.input == BF16) return look_with<Machine, Lanes, Pairs, Pairs, 4>(sight, room);
    look_with<Machine, Lanes, Pairs, Lanes, 7>(sight, room);
}

template <class Machine, class Lanes, class Pairs = Lanes>
constexpr TowerLevel tower_of() {
    return {packed_product<Machine, Lanes, Pairs>, turned_product<Machine, Lanes, Pairs>, centre<Machine>, bend,
            look<Machine, Lanes, Pairs>};
}

}  // namespace
}  // namespace seekvl
