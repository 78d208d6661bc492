// Products of one phase: they do not wait for each other, and the threads take them in pieces.
#pragma once

#include <cstdint>
#include <vector>

#include "product.h"

namespace seekvl {

int64_t size_of(Dtype dtype);

// The address of number `count` behind `from`.
const char* shifted(const void* from, int64_t count, Dtype dtype);

// Rows a thread takes at a time: a 32nd of its share, so that all end together, within what hides the handing
// out (32 KiB) and what a stalled thread may hold up (512 KiB).
int64_t rows_a_piece(int64_t bytes, int64_t row_bytes, int threads);

// A matrix of `rows` rows with its inputs. With `up` the rows of both are joined, see Level::gated.
struct Part {
    Product product;
    int64_t rows;
    Operand matrix;
    Operand up;             // without a weight where there is none
};

class Job {
  public:
    Job(const Level& level, int threads) : level_(level), threads_(threads) {}
    void add(const Part& part) { parts_.push_back(part); }
    void run();             // compute what was added, and forget it

  private:
    struct Piece { int64_t part, begin, end; };
    static void work(const void* pointer, int64_t begin, int64_t end);

    const Level& level_;
    int threads_;
    std::vector<Part> parts_;
    std::vector<Piece> pieces_;
};

// Slots of tokens that want the same expert, at most kMaxBatch.
struct Group {
    int64_t expert, count;
    int64_t slots[kMaxBatch];
};

// Sort slots by expert, each expert's in their order.
void group_by_expert(const int64_t* experts, int64_t slots, std::vector<Group>& groups);

// Where slots find their inputs, which `shared` neighbours have in common, and leave their results.
struct Slots {
    const void* x;          // rows of Product::input
    int64_t shared;
    float* y;
};

// A group's matrix of the stack [E, rows, width], joined with that of `up` where there is one.
Part part_of(const Product& product, int64_t rows, const Group& group, const Slots& slots, const void* stack,
             const void* up = nullptr);

// Memory of a thread that outlives the call, so that decoding does not ask for it again and again.
class Scratch {
    static constexpr int64_t kLine = 16;  // numbers of a cache line

  public:
    // What `take` takes of memory: whole lines, so that vectors lie within them.
    static int64_t rounded(int64_t count) { return (count + kLine - 1) / kLine * kLine; }

    explicit Scratch(int64_t count);
    float* take(int64_t count) {
        float* taken = next_;
        next_ += rounded(count);
        return taken;
    }

  private:
    float* next_;
};

}  // namespace seekvl
