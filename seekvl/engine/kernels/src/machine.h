// What the templates of a level share: stored kinds, prefetching, and what they ask of a machine.
//
// `Machine` gives vectors of float32: `Vector`, `lanes`, `zero`, `spread(x)`, `add`, `max(a, b)`, which is NaN where
// b is, `fma(a, b, sum)`, `scaled(a, n)` = a * 2^n for whole n from -126 on, `sum(v)`, `store(p, v)`, and for
// each stored kind `load(const Kind*)` and `load(const Kind*, n)`, which reads n numbers only and fills up with
// zeros. `chains`, `batch` and `rows` say how much fits into its registers.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "product.h"

// A loop over sums must vanish whole: an index that is left at run time puts all of them into memory.
#define UNROLL _Pragma("GCC unroll 8")

namespace seekvl {
namespace {

struct Bf16 { uint16_t bits; };
struct F16Bits { uint16_t bits; };

constexpr int64_t kPage = 4096;         // bytes
constexpr int64_t kAhead = 2 * kPage;

// Touch the page after next. Processors read ahead by themselves, but not into a page whose address they have yet to
// look up; asking for every line instead keeps places occupied that the reading ahead needs (docs/performance.md).
inline void prefetch(const void* at) {
    // An address and no pointer: it may lie behind the matrix, where a prefetch does nothing.
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + kAhead));
}

// The first n numbers and zeros behind them, for machines that cannot load a part of a vector.
template <class Stored, int lanes>
struct Padded {
    Stored values[lanes];
    Padded(const Stored* from, int n) {
        for (int i = 0; i < lanes; ++i) values[i] = i < n ? from[i] : Stored{};
    }
};

}  // namespace
}  // namespace seekvl
