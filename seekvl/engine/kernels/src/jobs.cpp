#include "jobs.h"

#include <algorithm>
#include <numeric>

#include "pool.h"

namespace seekvl {

int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

const char* shifted(const void* from, int64_t count, Dtype dtype) {
    return static_cast<const char*>(from) + count * size_of(dtype);
}

int64_t rows_a_piece(int64_t bytes, int64_t row_bytes, int threads) {
    row_bytes = std::max<int64_t>(row_bytes, 1);
    const int64_t share = std::clamp<int64_t>(bytes / (32 * threads), 32 << 10, 512 << 10);
    const int64_t piece = std::max<int64_t>(share / row_bytes, 1);
    return piece + piece % 2;
}

void Job::run() {
    const auto row_bytes = [](const Part& part) {
        return (part.up.weight ? 2 : 1) * part.product.width * size_of(part.product.weight);
    };
    int64_t bytes = 0;
    for (const Part& part : parts_) bytes += part.rows * row_bytes(part);
    pieces_.clear();
    for (const Part& part : parts_) {
        const int64_t step = rows_a_piece(bytes, row_bytes(part), threads_), index = &part - parts_.data();
        for (int64_t row = 0; row < part.rows; row += step)
            pieces_.push_back({index, row, std::min(row + step, part.rows)});
    }
    seekvl::run(threads_, static_cast<int64_t>(pieces_.size()), 1, work, this);
    parts_.clear();
}

void Job::work(const void* pointer, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(pointer);
    for (int64_t index = begin; index < end; ++index) {
        const Piece& piece = job.pieces_[index];
        const Part& part = job.parts_[piece.part];
        if (part.up.weight) job.level_.gated(part.product, part.matrix, part.up, piece.begin, piece.end);
        else job.level_.rows(part.product, part.matrix, piece.begin, piece.end);
    }
}

void group_by_expert(const int64_t* experts, int64_t slots, std::vector<Group>& groups) {
    std::vector<int64_t> order(slots);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return experts[a] < experts[b]; });
    groups.clear();
    for (const int64_t slot : order) {
        if (groups.empty() || groups.back().expert != experts[slot] || groups.back().count == kMaxBatch)
            groups.push_back({experts[slot], 0, {}});
        Group& group = groups.back();
        group.slots[group.count++] = slot;
    }
}

Part part_of(const Product& product, int64_t rows, const Group& group, const Slots& slots, const void* stack,
             const void* up) {
    Part part{product, rows, {}, {}};
    Operand& m = part.matrix;
    const int64_t start = group.expert * rows * product.width;
    m.weight = shifted(stack, start, product.weight);
    m.batch = group.count;
    for (int64_t b = 0; b < group.count; ++b) {
        m.x[b] = shifted(slots.x, group.slots[b] / slots.shared * product.width, product.input);
        m.y[b] = slots.y + group.slots[b] * rows;
    }
    if (up) part.up = m, part.up.weight = shifted(up, start, product.weight);
    return part;
}

Scratch::Scratch(int64_t count) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < count + kLine) kept.resize(count + kLine);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    next_ = kept.data() + (kLine - address / sizeof(float) % kLine) % kLine;
}

}  // namespace seekvl
