// What a level computes with many rows at a time, and the table by which it is called.
//
// Decoding is as fast as weights are read; from some ten rows on it is the arithmetic that counts. Rows of x are
// then packed into blocks, in which the same number of all rows stands side by side. A vector holds one number of
// several rows, a weight is broadcast to it, and a sum stays in one place until it is complete:
//
//     x            packed, 4 lanes         W             sums
//     a0 a1 a2     a0 b0 c0 d0             p0 p1 p2      lanes of p . a, b, c, d
//     b0 b1 b2     a1 b1 c1 d1             q0 q1 q2      lanes of q . a, b, c, d
//     c0 c1 c2     a2 b2 c2 d2
//     d0 d1 d2
//
// So weights are read as torch stores them, and what a row gives depends on no other row. Where a level multiplies
// pairs of bfloat16, a lane holds two neighbouring numbers of its row, the last of an odd width and zero.
//
// Nothing with external linkage may be inline here, see product.h. Letters: o rows of a matrix, i numbers of a row,
// l lanes of a block.
#pragma once

#include <cstdint>

#include "product.h"

namespace seekvl {

constexpr int kStrip = 8;       // rows of matrices that are computed together
constexpr int kMostLanes = 48;  // of a block, at every level

// Rows of x, packed; lanes behind the last row hold whatever numbers.
struct Block {
    int64_t rows;       // 1..lanes
    int64_t lanes;      // a multiple of Many::lanes, at most Many::most
    void* packed;       // [i, l] float32, or [i / 2 rounded up, l] pairs of bfloat16
};

// Rows begin <= o < end of a matrix; begin is a multiple of kStrip. What is read next, which the product has brought
// near meanwhile, begins `after` rows behind `begin`, in this matrix or in another one of the same stack.
struct Range {
    int64_t begin, end, after;
};

struct Many {
    int64_t lanes, most;
    int64_t vector;     // lanes that take the time of one
    int64_t least;      // vectors: a block takes no less time than one of so many
    bool pairs;         // whether Product::input may be BF16 where the weight is

    // Pack the rows x[row] of dtype `from` for `product`.
    void (*pack)(const Product& product, Dtype from, const void* const* x, const Block& block);

    // The three products below compute some rows of matrices [o, i].

    // y[row][o] = sum over i of x[row, i] W[o, i], plus bias[o] unless that is null; y of Product::output.
    void (*plain)(const Product&, const Block& x, const void* weight, const void* bias, void* const* y,
                  const Range&);
    // sums[row][o] += share[row] * sum over i of x[row, i] W[o, i].
    void (*weighted)(const Product&, const Block& x, const void* weight, const float* share, float* const* sums,
                     const Range&);
    // y, packed as x is, gets silu(gate) * up as its numbers begin <= o < end. Unless `kept` is null, kept[row] gets
    // what the products with gate and up were, [2, m] of Product::output.
    void (*gated)(const Product&, const Block& x, const void* gate, const void* up, const Block& y, void* const* kept,
                  int64_t m, const Range&);
};

// The table of a level, by its index in Python's LEVELS.
const Many& many_at(int32_t level);

extern const Many portable_many, neon_many, avx2_many, avx512_many, avx512_bf16_many;

}  // namespace seekvl
