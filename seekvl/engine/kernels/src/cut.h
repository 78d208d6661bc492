// How many rows are shared out among blocks, see many.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "many.h"

namespace seekvl {
namespace {

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Cut `count` rows of one matrix into blocks as equal as lanes allow; calls add(first, rows, lanes).
template <class Add>
void cut(const Many& machine, int64_t count, Add add) {
    const int64_t blocks = (count + machine.most - 1) / machine.most;
    for (int64_t index = 0, first = 0; index < blocks; ++index) {
        const int64_t rows = std::min(rounded_up((count - first + blocks - index - 1) / (blocks - index), machine.lanes),
                                      count - first);
        add(first, rows, rounded_up(rows, machine.lanes));
        first += rows;
    }
}

}  // namespace
}  // namespace seekvl
