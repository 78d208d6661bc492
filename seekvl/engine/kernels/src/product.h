// What a level of the machine computes, and the table by which it is called.
//
// A level is one source file compiled with flags of its own. Nothing with external linkage may be inline in it:
// the linker keeps one copy of such a function, which could be the one made of instructions that this machine
// does not have. Hence the unnamed namespaces, and no header of the C++ library but <cstdint>.
//
// Letters: b inputs, o rows of a matrix, i numbers of a row.
#pragma once

#include <cstdint>

namespace seekvl {

enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2, INT8 = 3, INT4 = 4 };  // the last two are packed.h's alone

constexpr int kMaxBatch = 8;

// A matrix and the inputs it meets.
struct Operand {
    const void* weight;         // [o, i], row after row
    const void* bias;           // [o] of the weight's dtype, or null
    int64_t batch;              // 1..kMaxBatch
    const void* x[kMaxBatch];   // [i] each, of Product::input
    void* y[kMaxBatch];         // [o - first] each, of Product::output
    int64_t first;              // the row that y[..][0] belongs to
};

struct Product {
    Dtype weight;
    Dtype input;                // F32, or BF16 where the level multiplies pairs of bfloat16
    Dtype output;
    int64_t width;              // i
};

struct Level {
    // y[b, o] = sum over i of x[b, i] W[o, i], plus bias, for the rows begin <= o < end. What a row gives does
    // not depend on the other inputs: a batch equals its rows alone, bit for bit.
    void (*rows)(const Product&, const Operand&, int64_t begin, int64_t end);
    // y[b, o] of `gate` becomes silu(gate) * up; its output must be F32.
    void (*gated)(const Product&, const Operand& gate, const Operand& up, int64_t begin, int64_t end);
    void (*widen)(Dtype, const void* from, float* to, int64_t count);
    bool pairs;                 // whether the input may be BF16 where the weight is
    // y[b, i] = sum over o of x[b, o] W[o, i], for `rows` rows of the matrix: the rows, weighted. x and y are F32;
    // here, too, a batch equals its rows alone.
    void (*mix)(const Product&, const Operand&, int64_t rows);
    // y = x / sqrt(mean of x^2 + eps) * weight.
    void (*norm)(Dtype, const void* weight, float eps, const float* x, float* y, int64_t width);
    // x becomes e^(x - greatest); the sum of it is returned. Up to the next multiple of kExponentials numbers behind
    // x are overwritten.
    float (*exponentials)(float* x, int64_t count, float* greatest);
    void (*narrow)(Dtype, const float* from, void* to, int64_t count);
};

constexpr int64_t kExponentials = 16;

const Level& level_at(int32_t index);  // in the order of Python's LEVELS

extern const Level portable, neon, avx2, avx512, avx512_bf16;

}  // namespace seekvl
