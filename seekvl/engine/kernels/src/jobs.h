// Products of one phase: they do not wait for each other, and the threads take them in pieces.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "packed.h"
#include "product.h"

namespace seekvl {

// Rows a thread takes at a time: its share of the bytes in so many parts, so that all end together, within what hides
// the handing out (32 KiB) and what a stalled thread may hold up (512 KiB).
int64_t rows_a_piece(int64_t bytes, int64_t row_bytes, int threads, int parts = 32);

// A matrix of `rows` rows with its inputs. With `up` the rows of both are joined, see Level::gated. Where the matrix is
// packed, so is `up`; each input is a QuantizedRow of its kind then, the output F32, and there is no bias.
struct Part {
    Product product;
    int64_t rows;
    Operand matrix;
    Operand up;             // without a weight where there is none
};

class Job {
  public:
    // `packed` is needed for packed matrices alone.
    Job(const Level& level, int threads, const PackedLevel* packed = nullptr)
        : level_(level), packed_(packed), threads_(threads) {}
    void add(const Part& part) { parts_.push_back(part); }
    void run();             // compute what was added, and forget it

  private:
    struct Piece { int64_t part, begin, end; };
    static void work(const void* pointer, int64_t begin, int64_t end);
    void multiply(const Part& part, int64_t begin, int64_t end) const;
    void multiply_tiles(const Part& part, int64_t begin, int64_t end) const;

    const Level& level_;
    const PackedLevel* packed_;
    int threads_;
    std::vector<Part> parts_;
    std::vector<Piece> pieces_;
};

// Slots of tokens that want the same expert, at most kMaxBatch.
struct Group {
    int64_t expert, count;
    int64_t slots[kMaxBatch];
};

// Numbers of float32 that `rows_in` takes of memory.
int64_t room_of_rows(int64_t count, int64_t width);

// Give rows that are to be quantised their places.
void rows_in(Scratch& memory, int64_t width, int64_t count, QuantizedRow* rows);

// Slots in the order of their experts, each expert's in their own.
std::vector<int64_t> by_expert(const int64_t* experts, int64_t slots);

// The same, as groups.
void group_by_expert(const int64_t* experts, int64_t slots, std::vector<Group>& groups);

// Where slots find their inputs, which `shared` neighbours have in common, and leave their results.
struct Slots {
    const void* x;          // rows of Product::input, one behind the other
    int64_t shared;
    float* y;
};

// A group's matrix of the stack [E, rows, width], joined with that of `up` where there is one.
Part part_of(const Product& product, int64_t rows, const Group& group, const Slots& slots, const void* stack,
             const void* up = nullptr);

}  // namespace seekvl
