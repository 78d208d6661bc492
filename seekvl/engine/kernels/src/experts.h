// Experts for any number of tokens, as experts.cpp computes them, for who has the sums already.
//
// Letters: n tokens, k experts a token, E experts, m width of an expert, d width.
#pragma once

#include <cstdint>

#include "many.h"
#include "packed.h"

namespace seekvl {

struct Stacks {
    Dtype kind;
    const void *gate, *up;      // [E, m, d], row after row or packed
    const void* down;           // [E, d, m]
    int64_t width, channels;    // m, d
};

// Tokens and what the router decided about them.
struct Routed {
    const int64_t* experts;     // [n, k]
    const float* weights;       // [n, k]
    const void* x;              // [n, d] of `dtype`: F32, or BF16 where the level multiplies pairs of it
    Dtype dtype;
    int64_t count, k;           // n
};

// sums[n, d] += what the experts make of x[n, d], weighted, in the order of the experts.
void add_experts(const Many& machine, int threads, const Stacks& stacks, const Routed& routed, float* sums);

// The same choice without the tokens.
struct Chosen {
    const int64_t* experts;     // [n, k]
    const float* weights;       // [n, k]
    int64_t count, k;
};

// The same with packed stacks, quantised tokens x[n] and sums[n], each [d].
void add_packed_experts(const PackedLevel& level, int threads, const Stacks& stacks, const QuantizedRow* x,
                        const Chosen& chosen, float* const* sums);

}  // namespace seekvl
