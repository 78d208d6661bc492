// What a level computes of a vision tower, and the table by which it is called.
//
// The products are those of many.h with other ends: what they give is left where the next one wants it. Queries and the
// hidden numbers of an MLP stay packed, with tokens as lanes; values stay turned, a channel after the other; a head's
// results come out packed again. Only the norms see tokens as rows.
//
// Nothing with external linkage may be inline here, see product.h. Letters: o rows of a matrix, e width of a head.
#pragma once

#include <cstdint>

#include "many.h"

namespace seekvl {

// What becomes of the numbers of a product.
enum Curve : int64_t { STRAIGHT = 0, GELU_ERF = 1, GELU_TANH = 2 };

// Where a patch lies in its square.
struct Place {
    int32_t row, column;
};

// Learned biases for distances of rows and of columns: a query adds its product with row `distance + side - 1` of a
// table, where a distance is the query's place less that of the key.
struct Distances {
    const void *rows, *columns;     // [2 side - 1, e], or null where places add nothing
    Dtype kind;
    int64_t side;
    float factor;                   // undoes the scale of the queries
    const Place* queries;
    const Place* keys;
};

// Some queries of a head, and the keys of their square, all of which they see.
struct Sight {
    Dtype input;                    // of all numbers here: F32, or BF16 where the level multiplies pairs of it
    int64_t width;                  // e
    const void* keys;               // [columns, e]
    const void* values;             // [e, stride], 0 behind an odd number of columns
    int64_t columns, stride;
    Block queries;                  // [e], scaled
    void* out;                      // packed as the queries, and perhaps in their place
    Distances distances;
};

struct TowerLevel {
    // y, packed as x is, gets curve(x W + bias) * factor as its numbers begin <= o < end.
    void (*packed)(const Product&, const Block& x, const void* weight, const void* bias, Curve, float factor,
                   const Block& y, const Range&);
    // to[o, row] = x W + bias, of Product::output; rows of `to` are `stride` numbers apart.
    void (*turned)(const Product&, const Block& x, const void* weight, const void* bias, void* to, int64_t stride,
                   const Range&);
    // y = (x - mean of x) / sqrt(variance of x + eps) * weight + bias; y is not x.
    void (*norm)(Dtype, const void* weight, const void* bias, float eps, const float* x, float* y, int64_t width);
    // numbers = curve(numbers) * factor, and up to a vector of 16 behind them.
    void (*bend)(Curve, float factor, float* numbers, int64_t count);
    // Write `out`; `room` has room for `sight_room` numbers and begins with a cache line.
    void (*look)(const Sight&, float* room);
};

int64_t sight_room(int64_t width, int64_t side);

// The table of a level, by its index in Python's LEVELS.
const TowerLevel& tower_at(int32_t level);

extern const TowerLevel portable_tower, neon_tower, avx2_tower, avx512_tower, avx512_bf16_tower;

}  // namespace seekvl
