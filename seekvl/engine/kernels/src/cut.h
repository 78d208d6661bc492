// How many rows are shared out among blocks, see many.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "many.h"

namespace seekvl {
namespace {

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// What blocks cost that are as equal as lanes allow, or of which all but the last are full.
inline int64_t cost_of_blocks(const Many& machine, int64_t count, bool equal) {
    const auto cost = [&](int64_t rows) {
        return std::max(rounded_up(rows, machine.vector) / machine.vector, machine.least);
    };
    const int64_t blocks = (count + machine.most - 1) / machine.most, full = count / machine.most;
    if (equal) return blocks * cost((count + blocks - 1) / blocks);
    return full * cost(machine.most) + (count % machine.most ? cost(count % machine.most) : 0);
}

// Cut `count` rows of one matrix into blocks: equal ones, unless full ones and what is left of them take less time, as
// 196 rows do with blocks of up to 48 (13 vectors instead of 15). Calls add(first, rows, lanes).
template <class Add>
void cut(const Many& machine, int64_t count, Add add) {
    if (count == 0) return;
    const int64_t blocks = (count + machine.most - 1) / machine.most;
    const bool equal = cost_of_blocks(machine, count, true) <= cost_of_blocks(machine, count, false);
    for (int64_t index = 0, first = 0; index < blocks; ++index) {
        const int64_t left = count - first, share = (left + blocks - index - 1) / (blocks - index);
        const int64_t rows = std::min(equal ? rounded_up(share, machine.lanes) : machine.most, left);
        add(first, rows, rounded_up(rows, machine.lanes));
        first += rows;
    }
}

}  // namespace
}  // namespace seekvl
