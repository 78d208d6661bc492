#include "tower.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "attend_many.h"
#include "jobs.h"
#include "numbers.h"
#include "shared_rows.h"

namespace seekvl {
namespace {

constexpr int64_t kPieceBytes = 1 << 17;    // of the rows of a matrix a thread takes at a time,
constexpr int64_t kMostRows = 32;           // but no more rows than these
constexpr int64_t kWave = 768;              // lanes that go through products together: what is hidden stays in a cache
constexpr int64_t kGrain = 16;              // patches of what is no product
constexpr int64_t kLineNumbers = 32;        // of a cache line, in half precision
constexpr int64_t kTiles = 8;               // of a quantised matrix a thread takes at a time

// So many numbers that rows of them lie an odd number of cache lines apart, or twice one in float32. Rows a power of two
// apart would share a few places of a cache.
int64_t apart(int64_t numbers) { return (rounded_up(numbers, kLineNumbers) / kLineNumbers | 1) * kLineNumbers; }

// Patches that see each other. They are neighbours in the stream; padding stands behind them among the keys.
struct Square {
    int64_t first, rows;        // patches of the stream
    int64_t columns, stride;    // keys, and how far the turned values of two channels are apart
    int64_t keys, values;       // columns and strides of the squares in front of it
    std::vector<Place> places;  // [columns]
};

// All squares of a picture.
struct Squares {
    std::vector<Square> all;
    std::vector<Place> places;  // [t], of each patch in its square
    int64_t keys = 0, values = 0;

    // `patches` have places, and so has the padding behind them.
    void add(const std::vector<Place>& patches, const std::vector<Place>& padding) {
        const int64_t rows = patches.size(), columns = rows + padding.size();
        all.push_back({static_cast<int64_t>(places.size()), rows, columns, apart(columns + columns % 2), keys, values,
                       patches});
        Square& square = all.back();
        square.places.insert(square.places.end(), padding.begin(), padding.end());
        places.insert(places.end(), patches.begin(), patches.end());
        keys += columns, values += square.stride;
    }
};

// The windows of a map of grid * grid patches, row by row, padded at the bottom and on the right. The stream has the
// patches in their order; `whole` gets them as one square, in the same order.
Squares windows_of(int64_t grid, int64_t side, Squares& whole) {
    Squares windows;
    std::vector<Place> map;
    for (int64_t top = 0; top < grid; top += side)
        for (int64_t left = 0; left < grid; left += side) {
            std::vector<Place> patches, padding;
            for (int64_t row = 0; row < side; ++row)
                for (int64_t column = 0; column < side; ++column) {
                    const Place place{static_cast<int32_t>(row), static_cast<int32_t>(column)};
                    const int64_t y = top + row, x = left + column;
                    if (y >= grid || x >= grid) {
                        padding.push_back(place);
                        continue;
                    }
                    patches.push_back(place);
                    map.push_back({static_cast<int32_t>(y), static_cast<int32_t>(x)});
                }
            windows.add(patches, padding);
        }
    whole.add(map, {});
    return windows;
}

// Rows of numbers, packed as their cuts say.
struct PackedRows {
    char* at;
    int64_t width;
    Dtype input;

    Block block(const Cut& cut) const {
        return {cut.rows, cut.lanes, at + cut.before * rounded_up(width, 2) * size_of(input)};
    }
};

// Cuts that go through products together.
struct Wave {
    int64_t first, count;       // among all cuts
    int64_t before;             // lanes of the cuts in front of it
};

// Patches are cut where a window ends, and go in waves as equal as their cuts allow.
struct Plan {
    std::vector<Cut> cuts;
    std::vector<int64_t> windows;   // that the cuts are parts of
    std::vector<Wave> waves;
    int64_t lanes = 0, most = 0;    // of all cuts, and of a wave

    const Cut& first_of(const Wave& wave) const { return cuts[wave.first]; }
    int64_t rows_of(const Wave& wave) const {
        const Cut& last = cuts[wave.first + wave.count - 1];
        return last.first + last.rows - first_of(wave).first;
    }

    Plan(const Many& many, const Squares& squares) {
        for (const Square& square : squares.all)
            for (Cut part : Cuts(many, square.first, square.rows).all) {
                part.before = lanes, lanes += part.lanes;
                cuts.push_back(part), windows.push_back(&square - squares.all.data());
            }
        const int64_t share = lanes / ((lanes + kWave - 1) / kWave);
        for (const Cut& part : cuts) {
            if (waves.empty() || part.before >= share * static_cast<int64_t>(waves.size()))
                waves.push_back({&part - cuts.data(), 0, part.before});
            Wave& wave = waves.back();
            ++wave.count, most = std::max(most, part.before + part.lanes - wave.before);
        }
    }
};

bool is_packed(const Matrix& matrix) { return is_packed(static_cast<Dtype>(matrix.kind)); }

bool any_packed(const Tower& tower) {
    for (const TowerBlock *block = tower.blocks, *end = block + tower.block_count; block < end; ++block)
        if (is_packed(block->qkv) || is_packed(block->proj) || is_packed(block->fc1) || is_packed(block->fc2)) return true;
    return false;
}

class Seeing {
  public:
    Seeing(const TowerMachinery& machine, int threads, const Tower& tower, const Views& views)
        : level_(machine.level), many_(machine.many), by_(machine.tower), packed_level_(machine.packed),
          threads_(threads), tower_(tower), packs_(any_packed(tower)),
          views_(views), kind_(static_cast<Dtype>(tower.kind)), input_(many_.pairs && kind_ == BF16 ? BF16 : F32),
          t_(tower.grid * tower.grid), c_(tower.width), e_(tower.width / tower.heads),
          windows_(windows_of(tower.grid, tower.window, whole_)), plan_(many_, windows_), scratch_(needed()) {
        lay_out([this](int64_t count) { return scratch_.take(count); });
        for (int64_t patch = 0; patch < t_; ++patch) x_rows_.push_back(x_ + patch * apart(c_));
        std::fill(ones_, ones_ + t_, 1.0f);
        if (!packs_) return;
        for (int64_t row = 0; row < plan_.most; ++row) wide_rows_.push_back(wide_ + row * apart(widest()));
        give_places(x_slices_, c_, x_quantized_);
        give_places(hidden_slices_, tower_.hidden, hidden_quantized_);
    }

    void run() {
        for (int64_t picture = 0; picture < views_.n; ++picture) {
            enter(picture);
            for (int64_t index = 0; index < tower_.block_count; ++index) {
                pass(tower_.blocks[index]);
                if (views_.branch && index == views_.branch_block) leave(views_.branch, picture, {});
            }
            leave(views_.y, picture, tower_.norm);
        }
    }

  private:
    // Give every buffer its memory; `take` gives memory for a count of numbers.
    template <class Take>
    void lay_out(Take take) {
        const int64_t size = size_of(input_);
        x_ = take(t_ * apart(c_)), ones_ = take(t_), bias_ = take(c_);
        packed_ = take(plan_.most * c_ * size / 4);
        hidden_ = take(plan_.most * rounded_up(tower_.hidden, 2) * size / 4);
        seeing_ = take(plan_.lanes * c_ * size / 4);
        keys_ = take(std::max(whole_.keys, windows_.keys) * c_ * size / 4 + 1);
        values_ = take(std::max(whole_.values, windows_.values) * c_ * size / 4);
        const int64_t side = std::max(tower_.grid, tower_.window);
        room_ = Scratch::rounded(std::max(sight_room(e_, side), kMostLanes * (packs_ ? apart(widest()) : c_ * 2)));
        rooms_ = take(room_ * threads_);
        if (!packs_) return;
        wide_ = take(plan_.most * apart(widest())), wide_bias_ = take(widest());
        x_slices_ = take(room_of_rows(plan_.most, c_));
        hidden_slices_ = take(room_of_rows(plan_.most, tower_.hidden));
    }

    // Numbers of a row that a quantised matrix gives, at most.
    int64_t widest() const { return std::max(3 * c_, tower_.hidden); }

    void give_places(float* from, int64_t width, std::vector<QuantizedRow>& rows) const {
        Scratch memory(from);
        rows.resize(plan_.most);
        rows_in(memory, width, plan_.most, rows.data());
    }

    int64_t needed() {
        int64_t count = 0;
        lay_out([&count](int64_t more) -> float* {
            count += Scratch::rounded(more);
            return nullptr;
        });
        return count;
    }

    // Call task(index, room) for each index below `count`.
    template <class Task>
    void each_in_room(int64_t count, const Task& task) {
        Rooms rooms(rooms_, room_, threads_);
        each(threads_, count, [&](int64_t index) {
            const int room = rooms.take();
            task(index, rooms.at(room));
            rooms.give_back(room);
        });
    }

    // Call task(patch, room) for each patch.
    template <class Task>
    void each_patch(const Task& task) {
        each_in_room(rounded_up(t_, kGrain) / kGrain, [&](int64_t grain, float* room) {
            const int64_t begin = grain * kGrain, end = std::min(begin + kGrain, t_);
            for (int64_t patch = begin; patch < end; ++patch) task(patch, room);
        });
    }

    // Numbers in front of a patch of the stream, in the pictures of `views_`.
    int64_t outside(int64_t picture, int64_t patch) const {
        const Place& place = whole_.places[patch];
        return (picture * t_ + place.row * tower_.grid + place.column) * c_;
    }

    void enter(int64_t picture) {
        each_patch([&](int64_t patch, float*) {
            level_.widen(kind_, shifted(views_.x, outside(picture, patch), kind_), x_rows_[patch], c_);
        });
    }

    void leave(void* to, int64_t picture, const LayerNorm& norm) {
        each_patch([&](int64_t patch, float* room) {
            const float* from = x_rows_[patch];
            if (norm.weight) normed(norm, from, room), from = room;
            level_.narrow(kind_, from, const_cast<char*>(shifted(to, outside(picture, patch), kind_)), c_);
        });
    }

    void normed(const LayerNorm& norm, const float* from, float* to) const {
        by_.norm(kind_, norm.weight, norm.bias, static_cast<float>(norm.eps), from, to, c_);
    }

    void pass(const TowerBlock& block) {
        const Squares& squares = block.side == tower_.grid ? whole_ : windows_;
        for (const Wave& wave : plan_.waves) {
            normalise(wave, block.norm1, block.qkv, block.proj);
            if (is_packed(block.qkv)) project_packed(wave, squares, block.qkv);
            else project(wave, squares, block.qkv);
        }
        pad(squares, block.qkv);
        look(squares, block);
        for (const Wave& wave : plan_.waves) {
            if (is_packed(block.proj)) quantize_lanes(wave, seen(), block.proj, x_quantized_);
            add_product(wave, seen(), block.proj, x_quantized_);
            normalise(wave, block.norm2, block.fc1, block.fc2);
            bend(wave, block);
            add_product(wave, here(wave, hidden_, tower_.hidden), block.fc2, hidden_quantized_);
        }
    }

    static char* bytes(float* numbers) { return reinterpret_cast<char*>(numbers); }

    // Packed rows of all cuts: the queries, and in their place what they have seen.
    PackedRows seen() const { return {bytes(seeing_), c_, input_}; }

    // Packed rows of the cuts of a wave, which begin where the buffer begins.
    PackedRows here(const Wave& wave, float* buffer, int64_t width) const {
        return {bytes(buffer) - wave.before * rounded_up(width, 2) * size_of(input_), width, input_};
    }

    Product product(int64_t width, Dtype output) const { return {kind_, input_, output, width}; }

    // Norm the stream and make it into what its reader takes. It gets the bias of what will be added to it next, as it
    // is at hand.
    void normalise(const Wave& wave, const LayerNorm& norm, const Matrix& reader, const Matrix& next) {
        const PackedRows to = here(wave, packed_, c_);
        const int64_t first = plan_.first_of(wave).first;
        level_.widen(kind_, next.bias, bias_, c_);
        each_in_room(wave.count, [&](int64_t index, float* room) {
            const Cut& cut = plan_.cuts[wave.first + index];
            uint16_t* const narrow = reinterpret_cast<uint16_t*>(room + kMostLanes * c_);
            const void* from[kMostLanes];
            for (int64_t row = 0; row < cut.rows; ++row) {
                float *const x = x_rows_[cut.first + row], *const y = room + row * c_;
                normed(norm, x, y);
                for (int64_t at = 0; at < c_; ++at) x[at] += bias_[at];
                if (is_packed(reader)) quantize(reader, y, x_quantized_[cut.first + row - first]);
                else if (input_ == BF16) level_.narrow(BF16, y, narrow + row * c_, c_);
                from[row] = input_ == BF16 ? narrow + row * c_ : static_cast<const void*>(y);
            }
            if (!is_packed(reader)) many_.pack(product(c_, F32), input_, from, to.block(cut));
        });
    }

    void quantize(const Matrix& reader, const float* row, const QuantizedRow& to) const {
        packed_level_.quantize(static_cast<Dtype>(reader.kind), row, reader.width, to);
    }

    // Make packed rows of a wave into those of a quantised matrix.
    void quantize_lanes(const Wave& wave, const PackedRows& x, const Matrix& reader,
                        const std::vector<QuantizedRow>& to) {
        const int64_t first = plan_.first_of(wave).first;
        each_in_room(wave.count, [&](int64_t index, float* room) {
            const Cut& cut = plan_.cuts[wave.first + index];
            const Block block = x.block(cut);
            for (int64_t row = 0; row < cut.rows; ++row) {
                unpack_row(block, input_, x.width, row, room);
                quantize(reader, room, to[cut.first + row - first]);
            }
        });
    }

    // y[row] = x[row] W of a quantised matrix, for the rows of a wave; with `shares`, which are ones, it is added.
    void multiply_packed(const Wave& wave, const Matrix& matrix, const std::vector<QuantizedRow>& x, float* const* y,
                         const float* shares) {
        const seekvl::Packed packed{static_cast<Dtype>(matrix.kind), static_cast<const uint8_t*>(matrix.weight),
                                    matrix.rows, matrix.width};
        const int64_t tiles = tiles_of(matrix.rows);
        each(threads_, (tiles + kTiles - 1) / kTiles, [&](int64_t index) {
            Scratch room(kSumRoom, Scratch::SUMS);
            const Meeting meeting{plan_.rows_of(wave), x.data(), reinterpret_cast<void* const*>(y), F32, nullptr, shares,
                                  room.take(kSumRoom)};
            packed_level_.tiles(packed, meeting, index * kTiles, std::min((index + 1) * kTiles, tiles));
        });
    }

    // Call task(cut, rows, room) for what a quantised matrix gives with the cuts of a wave, its bias added.
    template <class Task>
    void each_wide(const Wave& wave, const Matrix& matrix, const Task& task) {
        multiply_packed(wave, matrix, x_quantized_, wide_rows_.data(), nullptr);
        level_.widen(kind_, matrix.bias, wide_bias_, matrix.rows);
        const int64_t first = plan_.first_of(wave).first;
        each_in_room(wave.count, [&](int64_t index, float* room) {
            const Cut& cut = plan_.cuts[wave.first + index];
            float* const* const rows = &wide_rows_[cut.first - first];
            for (int64_t row = 0; row < cut.rows; ++row)
                for (int64_t at = 0; at < matrix.rows; ++at) rows[row][at] += wide_bias_[at];
            task(cut, rows, room);
        });
    }

    // Pack rows of float32, which are narrowed in `room` where pairs are multiplied.
    void pack(float* const* rows, const Cut& cut, const PackedRows& to, float* room) const {
        uint16_t* const narrow = reinterpret_cast<uint16_t*>(room);
        const void* from[kMostLanes];
        for (int64_t row = 0; row < cut.rows; ++row) {
            if (input_ == BF16) level_.narrow(BF16, rows[row], narrow + row * to.width, to.width);
            from[row] = input_ == BF16 ? narrow + row * to.width : static_cast<const void*>(rows[row]);
        }
        many_.pack(product(to.width, F32), input_, from, to.block(cut));
    }

    // Rows begin <= o < end of a matrix.
    struct Piece {
        const Matrix* matrix;
        int64_t begin, end;
    };

    // Call task(matrix, cut, range) for pieces of the matrices and the cuts of a wave.
    template <class Task>
    void each_piece(const Wave& wave, const std::vector<Matrix>& matrices, const Task& task) {
        std::vector<Piece> pieces;
        for (const Matrix& matrix : matrices) {
            const int64_t fitting = kPieceBytes / (matrix.width * size_of(kind_)) / kStrip * kStrip;
            const int64_t rows = std::clamp<int64_t>(fitting, kStrip, kMostRows);
            for (int64_t row = 0; row < matrix.rows; row += rows)
                pieces.push_back({&matrix, row, std::min(row + rows, matrix.rows)});
        }
        each(threads_, pieces.size(), [&](int64_t index) {
            const Piece& piece = pieces[index];
            const Piece& next = pieces[std::min<int64_t>(index + threads_, pieces.size() - 1)];
            const Range range{piece.begin, piece.end, next.matrix == piece.matrix ? next.begin - piece.begin : 0};
            for (int64_t at = wave.first; at < wave.first + wave.count; ++at)
                task(piece.matrix - matrices.data(), plan_.cuts[at], range);
        });
    }

    Matrix part_of(const Matrix& matrix, int64_t first, int64_t rows) const {
        Matrix part = matrix;
        part.weight = shifted(matrix.weight, first * matrix.width, kind_);
        part.bias = shifted(matrix.bias, first, kind_), part.rows = rows;
        return part;
    }

    const Square& square_of(const Squares& squares, const Cut& cut) const {
        return squares.all.size() == 1 ? squares.all[0] : squares.all[plan_.windows[&cut - plan_.cuts.data()]];
    }

    char* key_of(const Square& square, int64_t head, int64_t column) const {
        return bytes(keys_) + (square.keys * c_ + (head * square.columns + column) * e_) * size_of(input_);
    }

    // The values of a channel, of all heads.
    char* values_of(const Square& square, int64_t channel) const {
        return bytes(values_) + (square.values * c_ + channel * square.stride) * size_of(input_);
    }

    // Queries stay packed; keys go to their heads, values to their channels.
    void project(const Wave& wave, const Squares& squares, const Matrix& qkv) {
        const PackedRows x = here(wave, packed_, c_);
        std::vector<Matrix> matrices{part_of(qkv, 0, c_), part_of(qkv, 2 * c_, c_)};
        for (int64_t head = 0; head < tower_.heads; ++head) matrices.push_back(part_of(qkv, c_ + head * e_, e_));
        const float scale = 1.0f / sqrtf(static_cast<float>(e_));
        each_piece(wave, matrices, [&](int64_t index, const Cut& cut, const Range& range) {
            const Matrix& matrix = matrices[index];
            const Square& square = square_of(squares, cut);
            const int64_t column = cut.first - square.first;
            if (index == 0)
                return by_.packed(product(c_, F32), x.block(cut), matrix.weight, matrix.bias, STRAIGHT, scale,
                                  seen().block(cut), range);
            if (index == 1)
                return by_.turned(product(c_, input_), x.block(cut), matrix.weight, matrix.bias,
                                  values_of(square, 0) + column * size_of(input_), square.stride, range);
            void* keys[kMostLanes];
            for (int64_t row = 0; row < cut.rows; ++row) keys[row] = key_of(square, index - 2, column + row);
            many_.plain(product(c_, input_), x.block(cut), matrix.weight, matrix.bias, keys, range);
        });
    }

    // The same of a quantised matrix, which gives all three as rows.
    void project_packed(const Wave& wave, const Squares& squares, const Matrix& qkv) {
        const float scale = 1.0f / sqrtf(static_cast<float>(e_));
        each_wide(wave, qkv, [&](const Cut& cut, float* const* rows, float* room) {
            const Square& square = square_of(squares, cut);
            const int64_t column = cut.first - square.first;
            for (int64_t row = 0; row < cut.rows; ++row) {
                for (int64_t at = 0; at < c_; ++at) rows[row][at] *= scale;
                for (int64_t head = 0; head < tower_.heads; ++head)
                    level_.narrow(input_, rows[row] + c_ + head * e_, key_of(square, head, column + row), e_);
            }
            pack(rows, cut, seen(), room);
            char* const narrow = bytes(room);
            const int64_t size = size_of(input_);
            for (int64_t row = 0; row < cut.rows; ++row)
                level_.narrow(input_, rows[row] + 2 * c_, narrow + row * apart(c_) * size, c_);
            char* const values = values_of(square, 0) + column * size;
            if (input_ == F32) turn<float>(narrow, apart(c_), cut.rows, values, square.stride);
            else turn<uint16_t>(narrow, apart(c_), cut.rows, values, square.stride);
        });
    }

    // to[channel, row] = from[row, channel]; rows of both are so many numbers apart.
    template <class Number>
    void turn(const char* from, int64_t from_stride, int64_t rows, char* to, int64_t to_stride) const {
        const Number* const x = reinterpret_cast<const Number*>(from);
        Number* const y = reinterpret_cast<Number*>(to);
        for (int64_t channel = 0; channel < c_; ++channel)
            for (int64_t row = 0; row < rows; ++row) y[channel * to_stride + row] = x[row * from_stride + channel];
    }

    // Padding has the biases of keys and values: the weights were trained with zeros in front of the projection.
    void pad(const Squares& squares, const Matrix& qkv) {
        const auto bias = [&](int64_t at) { return get(kind_, qkv.bias, at); };
        each(threads_, squares.all.size(), [&](int64_t index) {
            const Square& square = squares.all[index];
            const int64_t end = square.columns + square.columns % 2;
            for (int64_t channel = 0; channel < c_; ++channel) {
                const float key = bias(c_ + channel), value = bias(2 * c_ + channel);
                char *const keys = key_of(square, channel / e_, 0), *const values = values_of(square, channel);
                for (int64_t column = square.rows; column < square.columns; ++column)
                    put(input_, keys, column * e_ + channel % e_, key), put(input_, values, column, value);
                if (square.columns < end) put(input_, values, square.columns, 0.0f);
            }
        });
    }

    // One head after the other, so that its keys and values stay near.
    void look(const Squares& squares, const TowerBlock& block) {
        const int64_t cuts = plan_.cuts.size();
        each_in_room(tower_.heads * cuts, [&](int64_t index, float* room) {
            const Cut& cut = plan_.cuts[index % cuts];
            by_.look(sight_of(squares, square_of(squares, cut), block, cut, index / cuts), room);
        });
    }

    Sight sight_of(const Squares& squares, const Square& square, const TowerBlock& block, const Cut& cut,
                   int64_t head) const {
        const Block all = seen().block(cut);
        char* const queries = static_cast<char*>(all.packed) + head * e_ * cut.lanes * size_of(input_);
        const Distances distances{block.rows, block.columns, kind_, block.side, sqrtf(static_cast<float>(e_)),
                                  squares.places.data() + cut.first, square.places.data()};
        return {input_, e_, key_of(square, head, 0), values_of(square, head * e_), square.columns, square.stride,
                {cut.rows, cut.lanes, queries}, queries, distances};
    }

    void bend(const Wave& wave, const TowerBlock& block) {
        const PackedRows x = here(wave, packed_, c_), y = here(wave, hidden_, tower_.hidden);
        const Matrix& fc1 = block.fc1;
        const Curve curve = static_cast<Curve>(block.curve);
        if (is_packed(fc1)) return bend_packed(wave, block, curve, y);
        each_piece(wave, {fc1}, [&](int64_t, const Cut& cut, const Range& range) {
            by_.packed(product(c_, F32), x.block(cut), fc1.weight, fc1.bias, curve, 1.0f, y.block(cut), range);
        });
        if (is_packed(block.fc2)) quantize_lanes(wave, y, block.fc2, hidden_quantized_);
    }

    void bend_packed(const Wave& wave, const TowerBlock& block, Curve curve, const PackedRows& y) {
        const int64_t first = plan_.first_of(wave).first;
        each_wide(wave, block.fc1, [&](const Cut& cut, float* const* rows, float* room) {
            for (int64_t row = 0; row < cut.rows; ++row) {
                by_.bend(curve, 1.0f, rows[row], tower_.hidden);
                if (is_packed(block.fc2)) quantize(block.fc2, rows[row], hidden_quantized_[cut.first + row - first]);
            }
            if (!is_packed(block.fc2)) pack(rows, cut, y, room);
        });
    }

    // The stream gets what the matrix makes of packed rows, or of quantised ones; it has its bias already.
    void add_product(const Wave& wave, const PackedRows& x, const Matrix& matrix,
                     const std::vector<QuantizedRow>& quantized) {
        if (is_packed(matrix))
            return multiply_packed(wave, matrix, quantized, &x_rows_[plan_.first_of(wave).first], ones_);
        each_piece(wave, {matrix}, [&](int64_t, const Cut& cut, const Range& range) {
            many_.weighted(product(x.width, F32), x.block(cut), matrix.weight, ones_, &x_rows_[cut.first], range);
        });
    }

    const Level& level_;
    const Many& many_;
    const TowerLevel& by_;
    const PackedLevel& packed_level_;
    int threads_;
    const Tower& tower_;
    bool packs_;                // whether any matrix is quantised
    const Views& views_;
    Dtype kind_, input_;        // of weights that are not quantised, and of what they are multiplied with
    int64_t t_, c_, e_;
    Squares whole_, windows_;
    Plan plan_;
    Scratch scratch_;
    std::vector<float*> x_rows_;
    std::vector<float*> wide_rows_;
    std::vector<QuantizedRow> x_quantized_, hidden_quantized_;
    float *x_, *ones_, *bias_, *packed_, *hidden_, *seeing_, *keys_, *values_, *rooms_;
    float *wide_ = nullptr, *wide_bias_ = nullptr, *x_slices_ = nullptr, *hidden_slices_ = nullptr;
    int64_t room_;
};

}  // namespace

int64_t sight_room(int64_t width, int64_t side) {
    constexpr int64_t softmax = sizeof(Softmax) / sizeof(float), line = 16;
    return softmax + (rounded_up(width, kStrip) + kColumns + 4 * side + kStrip) * kMostLanes + 5 * line;
}

void see(const TowerMachinery& machine, int threads, const Tower& tower, const Views& views) {
    Seeing(machine, threads, tower, views).run();
}

}  // namespace seekvl
