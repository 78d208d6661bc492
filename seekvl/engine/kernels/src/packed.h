// Quantised matrices, how they lie in memory, and the table by which their products are called.
//
// 16 rows make a tile, and a tile is one stream: what one vector multiplies lies together. A width is filled up
// with zeros to a multiple of kUnit, the last tile with rows that are never written out. `[16][4]` is a line of
// 64 bytes: four inputs of each of the 16 rows. Numbers are stored without a sign, as value + zero.
//
//     INT8   float32[16] scales, then of every four inputs a line of bytes (zero 128)
//     INT4   of every 64 inputs: bfloat16[2][16] scales, then for both halves four lines; the low four bits of
//            line l are the inputs 4 l.., the high ones the inputs 16 + 4 l.. of the half (zero 8)
//
// An input is quantised when it arrives, group by group: scale = largest of the group / 127, value = nearest of
// x / scale. Sums of a group are whole numbers and exact; groups are added in float32, from the first to the last.
// So a result does not depend on the rows or inputs computed beside it.
//
// The kinds are INT8 and INT4 of Dtype. Letters: b inputs, o rows of a matrix, i numbers of a row.
#pragma once

#include <cstdint>

#include "product.h"

namespace seekvl {

constexpr int64_t kTile = 16;                 // rows
constexpr int64_t kUnit = 64;                 // inputs
constexpr int64_t kInt4Unit = 64 + 512;       // bytes
constexpr int64_t kFewInputs = 96;            // up to here a tile meets them in turns, see packed_tiles.h
constexpr int64_t kMostInputs = 672;          // that a slice of weights meets at a time, see packed_many.h
constexpr int64_t kSumRoom = 8 * kTile * kMostInputs;
constexpr int64_t kSlice = 256;               // inputs that lie together, whole groups of either kind
constexpr int64_t kInt8Group = 128, kInt4Group = 32;  // inputs with one scale; the last group may be shorter

namespace {

constexpr bool is_packed(Dtype kind) { return kind == INT8 || kind == INT4; }
constexpr int64_t padded(int64_t width) { return (width + kUnit - 1) / kUnit * kUnit; }
constexpr int64_t group_of(Dtype kind) { return kind == INT8 ? kInt8Group : kInt4Group; }
constexpr int64_t slices_of(int64_t width) { return (padded(width) + kSlice - 1) / kSlice; }
constexpr int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
constexpr int64_t tile_bytes(Dtype kind, int64_t width) {
    return kind == INT8 ? 64 + kTile * padded(width) : padded(width) / kUnit * kInt4Unit;
}

}  // namespace

struct Packed {
    Dtype kind;
    const uint8_t* weight;
    int64_t rows, width;     // o, i
};

// Of a group of inputs: the scale, and what sums begin with, minus the values times the zero of the weights.
struct InputGroup {
    float scale;
    int32_t start;
};

// kSlice numbers of a quantised input; the last slice may be less than full.
struct alignas(64) InputSlice {
    int8_t values[kSlice];
    InputGroup groups[kSlice / kInt4Group];
};

// A quantised input. Where many stand together, a slice of all lies together, and then the next.
struct QuantizedRow {
    InputSlice* slices;
    int64_t stride;          // from one to the next, in slices
};

// The inputs a matrix meets, and where results go.
struct Meeting {
    int64_t count;           // b
    const QuantizedRow* x;          // [b]
    void* const* y;          // [b], each [o]
    Dtype output;
    const void* bias;        // [o] of `output`, or null
    const float* shares;     // [b], or null; with it y of float32 gets its share of the result added
    float* room;             // [kSumRoom] where more than kFewInputs leave their sums
};

struct PackedLevel {
    // Numbers that are not finite make the scale of their group NaN, so that no result hides them.
    void (*quantize)(Dtype, const float* x, int64_t width, const QuantizedRow&);
    // y[b, o] = sum over i of x[b, i] W[o, i], plus bias, for the rows of tiles begin..end.
    void (*tiles)(const Packed&, const Meeting&, int64_t begin, int64_t end);
    // y[b, o] = silu(gate) * up, as float32; both have the same kind and shape.
    void (*gated)(const Packed& gate, const Packed& up, const Meeting&, int64_t begin, int64_t end);
};

// What a level, by its index in Python's LEVELS, does with quantised matrices on this machine.
const PackedLevel& packed_level_at(int32_t index);

extern const PackedLevel packed_portable, packed_neon, packed_dotprod, packed_avx2, packed_vnni;

}  // namespace seekvl
