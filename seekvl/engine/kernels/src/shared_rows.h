// Rows of one matrix as blocks of lanes, see many.h, and how threads share the work with them.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cut.h"
#include "memory.h"
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
