// Where numbers lie, and memory for those that a call needs between its products.
#pragma once

#include <cstdint>

#include "product.h"

namespace seekvl {

// Bytes of a number of F32, F16 or BF16.
int64_t size_of(Dtype dtype);

// The address of number `count` behind `from`.
const char* shifted(const void* from, int64_t count, Dtype dtype);

// Memory of a thread that outlives the call: fresh pages cost more than what is computed in them. It is counted in
// numbers of float32, whatever is kept in it.
class Scratch {
    static constexpr int64_t kLine = 16;  // numbers of a cache line

  public:
    // Each has memory of its own, so that one may be at work inside of another.
    enum Use { STEP, MANY, PACKED, WIDENED, SUMS, kUses };

    // What `take` takes of memory: whole lines, so that vectors lie within them.
    template <class Number = float>
    static int64_t rounded(int64_t count) {
        const int64_t numbers = (count * static_cast<int64_t>(sizeof(Number)) + 3) / 4;
        return (numbers + kLine - 1) / kLine * kLine;
    }

    explicit Scratch(int64_t count, Use use = STEP);
    explicit Scratch(float* taken) : next_(taken) {}  // cuts up what was taken as one

    template <class Number = float>
    Number* take(int64_t count) {
        float* taken = next_;
        next_ += rounded<Number>(count);
        return reinterpret_cast<Number*>(taken);
    }

  private:
    float* next_;
};

}  // namespace seekvl
