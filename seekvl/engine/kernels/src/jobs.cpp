#include "jobs.h"

#include <algorithm>
#include <numeric>

#include "pool.h"

namespace seekvl {

namespace {

// Pieces of what is left that make up a thread's share: long ones come first, since each begins a stream that nothing
// has brought near, and the last are short, so that all end together.
constexpr int kParts = 4;

// What threads take of a part: rows of a matrix, or tiles of a packed one.
struct Units { int64_t count, bytes; };

Units units_of(const Part& part) {
    const Product& product = part.product;
    const int64_t matrices = part.up.weight ? 2 : 1;
    if (is_packed(product.weight))
        return {tiles_of(part.rows), matrices * tile_bytes(product.weight, product.width)};
    return {part.rows, matrices * product.width * size_of(product.weight)};
}

int64_t matrix_bytes(Dtype kind, int64_t rows, int64_t width) {
    return is_packed(kind) ? tiles_of(rows) * tile_bytes(kind, width) : rows * width * size_of(kind);
}

int64_t input_bytes(Dtype kind, int64_t width) {
    return is_packed(kind) ? static_cast<int64_t>(sizeof(QuantizedRow)) : width * size_of(kind);
}

}  // namespace

int64_t rows_a_piece(int64_t bytes, int64_t row_bytes, int threads, int parts) {
    row_bytes = std::max<int64_t>(row_bytes, 1);
    const int64_t share = std::clamp<int64_t>(bytes / (parts * threads), 32 << 10, 512 << 10);
    const int64_t piece = std::max<int64_t>(share / row_bytes, 1);
    return piece + piece % 2;
}

void Job::run() {
    int64_t bytes = 0;
    for (const Part& part : parts_) bytes += units_of(part).count * units_of(part).bytes;
    pieces_.clear();
    for (const Part& part : parts_) {
        const Units units = units_of(part);
        const int64_t index = &part - parts_.data();
        for (int64_t unit = 0, end; unit < units.count; unit = end) {
            end = std::min(unit + rows_a_piece(bytes, units.bytes, threads_, kParts), units.count);
            pieces_.push_back({index, unit, end});
            bytes -= (end - unit) * units.bytes;
        }
    }
    seekvl::run(threads_, static_cast<int64_t>(pieces_.size()), 1, work, this);
    parts_.clear();
}

void Job::work(const void* pointer, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(pointer);
    for (int64_t index = begin; index < end; ++index) {
        const Piece& piece = job.pieces_[index];
        const Part& part = job.parts_[piece.part];
        if (is_packed(part.product.weight)) job.multiply_tiles(part, piece.begin, piece.end);
        else job.multiply(part, piece.begin, piece.end);
    }
}

void Job::multiply(const Part& part, int64_t begin, int64_t end) const {
    if (part.up.weight) level_.gated(part.product, part.matrix, part.up, begin, end);
    else level_.rows(part.product, part.matrix, begin, end);
}

void Job::multiply_tiles(const Part& part, int64_t begin, int64_t end) const {
    const Operand& m = part.matrix;
    QuantizedRow x[kMaxBatch];
    for (int64_t b = 0; b < m.batch; ++b) x[b] = *static_cast<const QuantizedRow*>(m.x[b]);
    const Meeting meeting{m.batch, x, m.y, F32, nullptr, nullptr, nullptr};
    const auto packed_of = [&](const void* weight) {
        return Packed{part.product.weight, static_cast<const uint8_t*>(weight), part.rows, part.product.width};
    };
    const Packed matrix = packed_of(m.weight);
    if (part.up.weight) packed_->gated(matrix, packed_of(part.up.weight), meeting, begin, end);
    else packed_->tiles(matrix, meeting, begin, end);
}

int64_t room_of_rows(int64_t count, int64_t width) { return Scratch::rounded<InputSlice>(count * slices_of(width)); }

void rows_in(Scratch& memory, int64_t width, int64_t count, QuantizedRow* rows) {
    auto* const slices = memory.take<InputSlice>(count * slices_of(width));
    for (int64_t row = 0; row < count; ++row) rows[row] = {slices + row, count};
}

std::vector<int64_t> by_expert(const int64_t* experts, int64_t slots) {
    std::vector<int64_t> order(slots);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return experts[a] < experts[b]; });
    return order;
}

void group_by_expert(const int64_t* experts, int64_t slots, std::vector<Group>& groups) {
    groups.clear();
    for (const int64_t slot : by_expert(experts, slots)) {
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
    const int64_t start = group.expert * matrix_bytes(product.weight, rows, product.width);
    const int64_t input = input_bytes(product.input, product.width);
    m.weight = static_cast<const char*>(stack) + start;
    m.batch = group.count;
    for (int64_t b = 0; b < group.count; ++b) {
        m.x[b] = static_cast<const char*>(slots.x) + group.slots[b] / slots.shared * input;
        m.y[b] = slots.y + group.slots[b] * rows;
    }
    if (up) part.up = m, part.up.weight = static_cast<const char*>(up) + start;
    return part;
}

}  // namespace seekvl
