// What a level computes of the gradients of experts, and the table by which it is called.
//
// All of it are two products. Their right side is packed into panels of neighbouring columns, in which a row of a
// panel is a few vectors; where a level multiplies pairs of bfloat16, a lane holds the numbers of two rows:
//
//     matrix              panels of 4 columns, pairs
//     a0 a1 a2 a3 a4      a0b0 a1b1 a2b2 a3b3     a4b4
//     b0 b1 b2 b3 b4      c0-- c1-- c2-- c3--     c4--        -- is zero
//     c0 c1 c2 c3 c4
//
//     by rows       rows of tokens, number after number, meet a panel of a weight: the sum runs over the rows of the
//                   weight, so it is read as torch stores it and multiplied transposed
//     outer         the columns of one set of panels meet those of another: the sum runs over the tokens
//
// Sums stay in registers from the first number to the last. `Numbers` are float32, or bfloat16 where pairs of it are
// multiplied. Nothing with external linkage may be inline here, see product.h. Letters: d and m as in experts.cpp.
#pragma once

#include <cstdint>

#include "product.h"

namespace seekvl {

// Rows of a matrix, `bytes` apart.
struct Rows {
    const char* first;
    int64_t bytes;
};

// A panel of a weight, [steps, lanes].
struct Panel {
    const void* packed;
    int64_t steps, columns, column;     // columns in use, and where it begins in the matrix
};

// From the gradients of outputs to those of what stands before SwiGLU, for some tokens of an expert and m in a panel.
struct Hidden {
    Panel down;
    Dtype dtype;                    // of kept
    int64_t count, width;           // tokens; m
    const void* const* grads;       // [count]: numbers [d], of the outputs before they are weighted
    const void* const* kept;        // [count]: gate and up of the forward, [2, m]
    const float* shares;            // [count]: the weights of the outputs
    void* const* rows;              // [count]: gets numbers [2, m rounded up to whole steps], gradients of gate and up
    void *hidden, *gate, *up;       // get panels of tokens: the weighted hidden numbers, gradients of gate and up
    float* dots;                    // [count]: gets output times gradient, of these m
};

// Gradients of inputs: what some tokens of an expert get through a panel of gate and up.
struct Inputs {
    Panel both;
    int64_t count;
    const void* const* rows;        // [count]: numbers, as `Hidden` leaves them
    float* const* to;               // [count]: get [d]
};

// Panels of tokens with as many columns as a matrix has rows, or columns.
struct Panels {
    const char* packed;
    int64_t columns;
};

// Rows begin <= row < end of the gradient of a matrix; begin is a multiple of kStrip.
struct Outer {
    Panels rows, columns;
    int64_t steps, begin, end;
    Dtype dtype;
    void* to;                       // the whole matrix
};

struct Gradients {
    int64_t panel, unit;            // columns of a panel, and of what the last one has a multiple
    int64_t step;                   // rows that a lane of a panel holds
    // `width` numbers of a row, and zeros up to whole steps.
    void (*numbers)(Dtype from, const void* row, int64_t width, void* to);
    // Panels of the columns begin <= column < end of `count` rows of a matrix, `apart` numbers of 4 bytes from one to
    // the next; begin is a multiple of `panel`.
    void (*pack)(Dtype from, const Rows&, int64_t count, int64_t begin, int64_t end, void* to, int64_t apart);
    // A panel of `columns` columns from `column` on of `count` rows, wherever they are.
    void (*gather)(Dtype from, const void* const* rows, int64_t count, int64_t column, int64_t columns, void* to);
    void (*hidden)(const Hidden&);
    void (*inputs)(const Inputs&);
    void (*outer)(const Outer&);
};

// The table of a level, by its index in Python's LEVELS, for weights and inputs of this dtype.
const Gradients& gradients_at(int32_t level, Dtype dtype);

extern const Gradients portable_gradients, neon_gradients, avx2_gradients, avx512_gradients;
extern const Gradients avx512_bf16_gradients;  // of pairs; for float32 and float16 the level takes those of avx512

}  // namespace seekvl
