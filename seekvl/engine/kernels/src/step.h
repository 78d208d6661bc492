// One decoding step of a whole language model, described by pointers and sizes.
//
// Python writes the same structures (structures.py) and has checked shapes, dtypes and memory.
//
// Letters: n tokens of the step, d width, h heads, k key-value heads, e width of a head, r latent width, p rotary
// width, w value width of a head, E experts, m width of an expert, v vocabulary.
#pragma once

#include <cstdint>

#include "packed.h"
#include "product.h"

namespace seekvl {

// A matrix [rows, width], row after row or packed; of experts a stack of them, one behind the other.
struct Matrix {
    const void* weight;         // null where there is no such matrix
    const void* bias;           // [rows] of the weight's kind, with a packed weight of a tower's; or null
    int64_t rows, width;
    int64_t kind;               // a Dtype
};

struct Norm {
    const void* weight;
    int64_t kind;               // a Dtype
    double eps;
};

struct Layer {
    Norm attn_norm, mlp_norm;
    Matrix q, k, v, o;          // k and v of plain attention only
    Matrix kv_a, kv_b;          // of latent attention only, as in models/mla.py
    Norm latent_norm;
    Matrix gate, up, down;      // the SwiGLU, or the shared experts
    Matrix router;              // [E, d], of a layer with experts
    const void* router_bias;    // [E] of noaux_tc
    int64_t router_bias_kind;
    Matrix expert_gate, expert_up, expert_down;
};

enum Choice : int64_t { GREEDY = 0, GROUP_LIMITED = 1, NOAUX_TC = 2 };

// models/moe.py: MoeConfig.
struct Router {
    int64_t experts, active, groups, kept_groups;
    int64_t choice, sigmoid, normalise;
    double scale;
};

struct Network {
    int64_t width, layer_count, heads, kv_heads;
    int64_t rotary;             // p; of plain attention it is e
    int64_t nope;               // channels of a latent query without position; 0 of plain attention
    int64_t latent;             // r; 0 of plain attention
    int64_t value;              // w; of plain attention it is e
    double scale;               // of the scores
    const float* divisors;      // [p / 2]: what a position is divided by to be an angle
    Router router;
    const Layer* layers;
    Norm norm;
    Matrix embed, head;
};

// Buffers of each layer, [rows, k, capacity, e] and [rows, k, capacity, w], or with a latent [rows, 1, capacity, p]
// and [rows, 1, capacity, r].
struct Cache {
    int64_t kind, capacity;
    void* const* keys;
    void* const* values;
};

// New tokens. One goes to column `position` of row `slot` of the cache and sees the columns up to there; tokens of
// one slot stand at different positions.
struct Tokens {
    int64_t n;                  // 1..kMaxBatch
    const int64_t *ids, *slots, *positions;
};

// Append the tokens to the cache and write the logits f32[n, v] of the next.
//
// What a token gives depends on the level and on what it sees, not on the other tokens or the number of threads.
// `packed` multiplies those matrices that are packed; embedding, norms, router and kv_b are not.
void step(const Level& level, const PackedLevel& packed, int threads, const Network& network, const Cache& cache,
          const Tokens& tokens, float* logits);

}  // namespace seekvl
