// Linear layers of a prompt: rows of float32 are made into what matrices take, once for all that read them, and meet
// matrices of any kind.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "jobs.h"
#include "many.h"
#include "memory.h"
#include "packed.h"
#include "shared_rows.h"
#include "step.h"

namespace seekvl {

// Kinds of matrices that read the same rows.
struct Readers {
    bool plain = false, int8 = false, int4 = false;

    Readers(std::initializer_list<const Matrix*> matrices);
    void join(const Readers& other) { plain |= other.plain, int8 |= other.int8, int4 |= other.int4; }
};

// What rows become for their readers.
struct Forms {
    Dtype input;                // of lanes: F32, or BF16 where the level multiplies pairs of it
    char* lanes;                // blocks of all rows
    uint16_t* narrow;           // [n, width], where lanes are BF16
    std::vector<QuantizedRow> int8, int4;   // [n]

    Block block(const Cut& cut, int64_t width) const {
        return {cut.rows, cut.lanes, lanes + cut.before * rounded_up(width, 2) * size_of(input)};
    }
    const std::vector<QuantizedRow>& quantized(int64_t kind) const { return kind == INT8 ? int8 : int4; }
};

// Numbers of float32 that lanes of rows take.
inline int64_t packed_numbers(const Cuts& cuts, int64_t width, Dtype input) {
    return cuts.lanes * rounded_up(width, 2) * size_of(input) / 4;
}

// Make room for what readers of rows of up to `width` numbers take; `take` gives memory for a count of numbers, or null
// where it only counts.
template <class Take>
Forms make_forms(const Cuts& cuts, int64_t width, Dtype input, const Readers& readers, Take take) {
    Forms forms{input, nullptr, nullptr, {}, {}};
    if (readers.plain) {
        forms.lanes = reinterpret_cast<char*>(take(packed_numbers(cuts, width, input)));
        if (input == BF16) forms.narrow = reinterpret_cast<uint16_t*>(take((cuts.count * width + 1) / 2));
    }
    const auto rows = [&](std::vector<QuantizedRow>& of) {
        float* const taken = take(room_of_rows(cuts.count, width));
        of.resize(cuts.count);
        Scratch memory(taken);
        if (taken) rows_in(memory, width, cuts.count, of.data());
    };
    if (readers.int8) rows(forms.int8);
    if (readers.int4) rows(forms.int4);
    return forms;
}

// Rows that have been prepared.
struct Prepared {
    const Forms& forms;
    const Cuts& cuts;
    int64_t width;
};

// A matrix and where the rows of its results begin, one for each row of the input.
struct Target {
    const Matrix* matrix;
    float* const* rows;
};

class Products {
  public:
    Products(const Level& level, const Many& many, const PackedLevel& packed, int threads)
        : level_(level), many_(many), packed_(packed), threads_(threads) {}

    // Make some rows f32[n, width] into what their readers take.
    void prepare(const float* rows, int64_t width, const Cut& cut, const Readers& readers, const Forms& to) const;
    void prepare(const float* rows, int64_t width, const Cuts& cuts, const Readers& readers, const Forms& to) const;

    // Multiply with each of the matrices. With `shares`, one for each row, results are added to what is there.
    void multiply(const Prepared& x, const std::vector<Target>& targets, const float* shares = nullptr) const;

    // silu(gate) * up, as `down` takes it. `hidden` f32[n, m] is between where one of them is packed, or null.
    void gate(const Prepared& x, const Layer& layer, float* hidden, const Forms& to) const;

  private:
    void multiply_plain(const Prepared& x, const Target& target, const float* shares, const Range& range) const;
    void gate_plain(const Prepared& x, const Layer& layer, const Forms& to) const;
    void gate_packed(const Prepared& x, const Layer& layer, float* const* rows) const;
    Product product(const Matrix& matrix, Dtype input) const {
        return {static_cast<Dtype>(matrix.kind), input, F32, matrix.width};
    }

    const Level& level_;
    const Many& many_;
    const PackedLevel& packed_;
    int threads_;
};

}  // namespace seekvl
