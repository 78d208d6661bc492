// Attention of a prompt's tokens over the cache: what a level computes of it, and the table by which it is called.
//
// Neighbouring tokens of a head are lanes, as rows are in many.h. Their queries, packed, meet the keys as they lie in
// the cache, a row of them after the other, and their scores come out with a token in each lane. So softmax needs no
// sum across lanes, and what it leaves is packed for the product with the values, whose channels are the rows then:
//
//     keys            scores              values, turned     results
//     column 0        tokens a b c        channel 0          tokens a b c
//     column 1        tokens a b c        channel 1          tokens a b c
//
// Columns go in blocks of kColumns that begin at column 0, from left to right. A token's greatest score, its sum and
// its results are carried from block to block; a block that lies behind it changes none of them by a bit. So what a
// token gives depends on nothing but what it sees: not on its neighbours, nor on where its prompt was cut.
//
// Nothing with external linkage may be inline here, see product.h.
#pragma once

#include <cstdint>

#include "many.h"

namespace seekvl {

constexpr int64_t kColumns = 128;

// Some tokens of one head, which follow each other, and what they see: columns 0 up to their own.
struct Tile {
    Dtype kind;                     // of the keys
    Dtype input;                    // F32, or BF16 where the keys are and the level multiplies pairs of it
    const void* keys;               // [columns, key_width]
    int64_t key_width, value_width;
    const void* values;             // of `input`, [value_width, stride]; 0 behind an odd number of columns
    int64_t stride;
    const float* q;                 // [rows, key_width], `q_stride` numbers apart, scaled
    float* out;                     // [rows, value_width], `out_stride` apart
    int64_t q_stride, out_stride;
    int64_t rows, first;            // tokens, at most Many::most, and the column of the first
};

// What is carried from block to block, and the scores of one. There is a place for every lane, in use or not.
struct Softmax {
    float greatest[kMostLanes], sums[kMostLanes], factors[kMostLanes];
    float scores[kColumns / kStrip][kStrip][kMostLanes];
};

// Write `out`; `room` has room for `attend_room` numbers and begins with a cache line.
using AttendTile = void (*)(const Tile&, float* room);

// Softmax, results, packed queries and packed shares.
int64_t attend_room(int64_t key_width, int64_t value_width);

// The function of a level, by its index in Python's LEVELS.
AttendTile attend_at(int32_t level);

extern const AttendTile portable_attend, neon_attend, avx2_attend, avx512_attend, avx512_bf16_attend;

}  // namespace seekvl
