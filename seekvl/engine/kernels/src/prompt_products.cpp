#include "prompt_products.h"

#include <algorithm>

#include "numbers.h"

namespace seekvl {
namespace {

constexpr int64_t kPiece = 32;      // rows of a plain matrix a thread takes at a time
constexpr int64_t kTiles = 8;       // tiles of a packed one, which slices of the inputs meet together

Dtype dtype_of(int64_t kind) { return static_cast<Dtype>(kind); }
bool is_packed(const Matrix& matrix) { return is_packed(dtype_of(matrix.kind)); }

// The rows begin <= o < end of a matrix, or its tiles.
struct Piece {
    const Target* target;
    int64_t begin, end;
};

void add_pieces(const Target& target, std::vector<Piece>& pieces) {
    const Matrix& matrix = *target.matrix;
    const int64_t units = is_packed(matrix) ? tiles_of(matrix.rows) : matrix.rows;
    const int64_t piece = is_packed(matrix) ? kTiles : kPiece;
    for (int64_t unit = 0; unit < units; unit += piece)
        pieces.push_back({&target, unit, std::min(unit + piece, units)});
}

std::vector<Piece> pieces_of(const std::vector<Target>& targets) {
    std::vector<Piece> pieces;
    for (const Target& target : targets) add_pieces(target, pieces);
    return pieces;
}

// This thread probably takes the piece `threads` further on next.
Range range_of(const std::vector<Piece>& pieces, int64_t index, int threads) {
    const Piece& piece = pieces[index];
    const Piece& next = pieces[std::min<int64_t>(index + threads, pieces.size() - 1)];
    return {piece.begin, piece.end, next.target == piece.target ? next.begin - piece.begin : 0};
}

Packed packed_of(const Matrix& matrix) {
    return {dtype_of(matrix.kind), static_cast<const uint8_t*>(matrix.weight), matrix.rows, matrix.width};
}

// All rows, with room for their sums.
Meeting meeting_of(const Prepared& x, int64_t kind, float* const* to, const float* shares, float* room) {
    const int64_t first = x.cuts.first;
    return {x.cuts.count, &x.forms.quantized(kind)[first], reinterpret_cast<void* const*>(to + first), F32, nullptr,
            shares ? shares + first : nullptr, room};
}

}  // namespace

Readers::Readers(std::initializer_list<const Matrix*> matrices) {
    for (const Matrix* matrix : matrices)
        if (matrix->weight) (matrix->kind == INT8 ? int8 : matrix->kind == INT4 ? int4 : plain) = true;
}

void Products::prepare(const float* rows, int64_t width, const Cuts& cuts, const Readers& readers,
                       const Forms& to) const {
    each(threads_, cuts.all.size(), [&](int64_t index) { prepare(rows, width, cuts.all[index], readers, to); });
}

void Products::prepare(const float* rows, int64_t width, const Cut& cut, const Readers& readers,
                       const Forms& to) const {
    const float* const first = rows + cut.first * width;
    if (readers.plain) {
        const void* from[kMostLanes];
        uint16_t* const narrow = to.narrow + cut.first * width;
        if (to.input == BF16) level_.narrow(BF16, first, narrow, cut.rows * width);
        for (int64_t row = 0; row < cut.rows; ++row)
            from[row] = to.input == BF16 ? narrow + row * width : static_cast<const void*>(first + row * width);
        many_.pack({to.input, to.input, F32, width}, to.input, from, to.block(cut, width));
    }
    for (int64_t row = 0; row < cut.rows; ++row) {
        if (readers.int8) packed_.quantize(INT8, first + row * width, width, to.int8[cut.first + row]);
        if (readers.int4) packed_.quantize(INT4, first + row * width, width, to.int4[cut.first + row]);
    }
}

void Products::multiply(const Prepared& x, const std::vector<Target>& targets, const float* shares) const {
    const std::vector<Piece> pieces = pieces_of(targets);
    each(threads_, pieces.size(), [&](int64_t index) {
        const Piece& piece = pieces[index];
        const Matrix& matrix = *piece.target->matrix;
        if (!is_packed(matrix)) return multiply_plain(x, *piece.target, shares, range_of(pieces, index, threads_));
        Scratch room(kSumRoom, Scratch::SUMS);
        packed_.tiles(packed_of(matrix), meeting_of(x, matrix.kind, piece.target->rows, shares, room.take(kSumRoom)),
                      piece.begin, piece.end);
    });
}

void Products::multiply_plain(const Prepared& x, const Target& target, const float* shares, const Range& range) const {
    const Matrix& matrix = *target.matrix;
    const Product by = product(matrix, x.forms.input);
    for (const Cut& cut : x.cuts.all) {
        float* const* const rows = target.rows + cut.first;
        const Block block = x.forms.block(cut, x.width);
        if (shares) many_.weighted(by, block, matrix.weight, shares + cut.first, rows, range);
        else many_.plain(by, block, matrix.weight, nullptr, reinterpret_cast<void* const*>(rows), range);
    }
}

void Products::gate(const Prepared& x, const Layer& layer, float* hidden, const Forms& to) const {
    const Readers down{&layer.down};
    const int64_t width = layer.gate.rows;
    std::vector<float*> rows;
    for (int64_t row = 0; hidden && row < x.cuts.first + x.cuts.count; ++row) rows.push_back(hidden + row * width);
    if (is_packed(layer.gate)) {
        gate_packed(x, layer, rows.data());
        prepare(hidden, width, x.cuts, down, to);
        return;
    }
    gate_plain(x, layer, to);
    if (!is_packed(layer.down)) return;
    each(threads_, x.cuts.all.size(), [&](int64_t index) {
        const Cut& cut = x.cuts.all[index];
        for (int64_t row = 0; row < cut.rows; ++row)
            unpack_row(to.block(cut, width), to.input, width, row, rows[cut.first + row]);
        prepare(hidden, width, cut, down, to);
    });
}

void Products::gate_plain(const Prepared& x, const Layer& layer, const Forms& to) const {
    const std::vector<Target> targets{{&layer.gate, nullptr}};
    const std::vector<Piece> pieces = pieces_of(targets);
    each(threads_, pieces.size(), [&](int64_t index) {
        const Range range = range_of(pieces, index, threads_);
        for (const Cut& cut : x.cuts.all)
            many_.gated(product(layer.gate, x.forms.input), x.forms.block(cut, x.width), layer.gate.weight,
                        layer.up.weight, to.block(cut, layer.gate.rows), nullptr, layer.gate.rows, range);
    });
}

void Products::gate_packed(const Prepared& x, const Layer& layer, float* const* rows) const {
    const std::vector<Target> targets{{&layer.gate, rows}};
    const std::vector<Piece> pieces = pieces_of(targets);
    each(threads_, pieces.size(), [&](int64_t index) {
        Scratch room(kSumRoom, Scratch::SUMS);
        packed_.gated(packed_of(layer.gate), packed_of(layer.up),
                      meeting_of(x, layer.gate.kind, rows, nullptr, room.take(kSumRoom)), pieces[index].begin,
                      pieces[index].end);
    });
}

}  // namespace seekvl
