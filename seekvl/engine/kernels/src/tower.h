// The blocks of a vision tower, described by pointers and sizes.
//
// Python writes the same structures (structures.py) and has checked shapes, dtypes and memory.
//
// Letters: n pictures, g patches along a side of a picture, t = g * g patches, c width, h heads, e width of a head.
#pragma once

#include <cstdint>

#include "step.h"
#include "tower_level.h"

namespace seekvl {

struct LayerNorm {
    const void *weight, *bias;  // [c] each; null where there is no such norm
    double eps;
};

struct TowerBlock {
    LayerNorm norm1, norm2;
    Matrix qkv, proj, fc1, fc2;
    const void *rows, *columns; // [2 side - 1, e]: learned distances of models/sam.py, or null
    int64_t side;               // of the squares within which patches see each other: `grid` or `window`
    int64_t curve;              // a Curve, of the MLP
};

// Every one of qkv, proj, fc1 and fc2 may be quantised; all other weights are of one kind.
struct Tower {
    int64_t kind;               // a Dtype, of biases, too
    int64_t width, heads, hidden;
    int64_t grid, window;       // g; w of those blocks that do not see the whole picture
    int64_t block_count;
    const TowerBlock* blocks;
    LayerNorm norm;             // after the last block
};

// Embedded patches, and where the results go, all of the kind of a tower.
struct Views {
    int64_t n;
    const void* x;              // [n, t, c]
    void* y;                    // [n, t, c]
    void* branch;               // [n, t, c]: gets what block `branch_block` gives, unless it is null
    int64_t branch_block;
};

// What a level gives to a tower.
struct TowerMachinery {
    const Level& level;
    const Many& many;
    const TowerLevel& tower;
    const PackedLevel& packed;
};

// Write what becomes of the pictures. What a picture gives depends on the level alone: not on the other pictures or on
// the number of threads. Throws std::bad_alloc.
void see(const TowerMachinery& machine, int threads, const Tower& tower, const Views& views);

}  // namespace seekvl
