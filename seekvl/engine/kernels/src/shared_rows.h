// Rows of one matrix as blocks of lanes, see many.h, and how threads share the work with them.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cut.h"
#include "memory.h"
#include "numbers.h"
#include "pool.h"

namespace seekvl {

// Call task(index) for each index below `count`.
template <class Task>
void each(int threads, int64_t count, const Task& task) {
    const auto work = [](const void* pointer, int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) (*static_cast<const Task*>(pointer))(index);
    };
    run(threads, count, 1, work, &task);
}

// Neighbouring rows that share a block.
struct Cut {
    int64_t first, rows, lanes;
    int64_t before;             // lanes of the blocks in front of it
};

struct Cuts {
    std::vector<Cut> all;
    int64_t first, count, lanes = 0;

    // Of `count` rows from `first` on.
    Cuts(const Many& many, int64_t first, int64_t count) : first(first), count(count) {
        cut(many, count, [&](int64_t at, int64_t rows, int64_t held) {
            all.push_back({first + at, rows, held, lanes});
            lanes += held;
        });
    }
};

// to[i] = what the lanes of a row hold, float32 or pairs of bfloat16.
inline void unpack_row(const Block& block, Dtype input, int64_t width, int64_t row, float* to) {
    const float* const wide = static_cast<const float*>(block.packed) + row;
    const uint16_t* const pairs = static_cast<const uint16_t*>(block.packed) + 2 * row;
    for (int64_t i = 0; i < width; ++i)
        to[i] = input == F32 ? wide[i * block.lanes] : from_bf16(pairs[i / 2 * 2 * block.lanes + i % 2]);
}

// Memory for as many threads as compute at once.
class Rooms {
  public:
    Rooms(float* from, int64_t size, int threads) : from_(from), size_(size), taken_(threads) {}

    int take() {
        for (int room = 0;; room = (room + 1) % static_cast<int>(taken_.size()))
            if (!taken_[room].exchange(true, std::memory_order_acquire)) return room;
    }
    void give_back(int room) { taken_[room].store(false, std::memory_order_release); }
    float* at(int room) const { return from_ + room * size_; }

  private:
    float* from_;
    int64_t size_;
    std::vector<std::atomic<bool>> taken_;
};

}  // namespace seekvl
