// A piece of a prompt through a whole language model, described by the structures of step.h.
#pragma once

#include <cstdint>

#include "attend_many.h"
#include "many.h"
#include "step.h"

namespace seekvl {

// New tokens of one row of the cache. They go to columns start, start + 1, ... and see the columns up to their own.
struct Prompt {
    int64_t n;                  // 1 or more
    int64_t slot, start;
    const void* embeds;         // [n, d]
    int64_t kind;               // of embeds, a Dtype
    float* hidden;              // [n, d] after the last norm, or null
    float* logits;              // [v] of what follows the last token, or null
};

// What a level gives to a prompt.
struct Machinery {
    const Level& level;
    const Many& many;
    const PackedLevel& packed;
    AttendTile attend;
};

// Append the tokens to the cache; write what is asked for, and compute no more than it takes.
//
// What a token gives depends on the level and on what it sees: not on the other tokens, on how a prompt is cut into
// pieces or on the number of threads. Throws std::bad_alloc.
void fill(const Machinery& machine, int threads, const Network& network, const Cache& cache, const Prompt& prompt);

}  // namespace seekvl
