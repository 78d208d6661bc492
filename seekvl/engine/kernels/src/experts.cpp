// Products of many rows that Python calls: a matrix with the rows of a prompt, and experts with the rows they drew.
//
// Rows are packed into blocks of one matrix each and go through in waves, so that what is packed stays in the caches
// and memory for it is asked for once. A wave is three runs of the threads, which need not know of each other:
//
//     pack        block after block
//     gated       pieces of gate and up with each block of their expert, into the block's hidden numbers
//     weighted    pieces of the output's channels: one thread adds up what all experts of the wave give to them, in
//                 the order of the experts, so no sum has two authors and the threads change no bit
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <numeric>
#include <vector>

#include "cut.h"
#include "experts.h"
#include "many.h"
#include "memory.h"
#include "numbers.h"
#include "pool.h"
#include "product.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace seekvl {
namespace {

constexpr int64_t kWave = 512;         // lanes of a wave for each thread, at the least one block
constexpr int64_t kTokens = 2048;      // rows of x whose sums are kept at a time
constexpr int64_t kPiece = 32;         // rows of a matrix a thread takes at a time

int64_t packed_numbers(int64_t lanes, int64_t width) { return Scratch::rounded(lanes * (width + 1)); }

// Rows that meet one matrix, and where their results go.
struct Group {
    int64_t expert;
    Block x, hidden;
    const void* const* from;    // [rows]
    float* const* sums;         // [rows], of experts
    const float* shares;        // [rows], of experts
    void* const* to;            // [rows], of a plain matrix
    void* const* kept;          // [rows], of experts whose backward is to come
};

// Some rows of a matrix and all groups of the wave that meet it, which stand side by side.
struct Piece {
    const Group *first, *last;  // last is behind the last one
    int64_t begin, end;
};

struct Job {
    const Many* machine;
    int threads;
    Product first, second;      // gate and up, or the one matrix; down
    Dtype dtype;                // of x
    int64_t rows, channels;     // of the matrices of `first` and `second`
    const void *gate, *up, *down, *bias;
    std::vector<Group> groups;
    std::vector<Piece> pieces;

    const void* matrix(const void* stack, int64_t expert) const {
        return shifted(stack, expert * rows * first.width, first.weight);
    }
};

void pack_groups(const void* pointer, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(pointer);
    for (int64_t at = begin; at < end; ++at) {
        const Group& group = job.groups[at];
        job.machine->pack(job.first, job.dtype, group.from, group.x);
    }
}

// The piece's rows with those that this thread probably takes next: the others take one each meanwhile.
Range range_of(const Job& job, int64_t at) {
    const Piece& piece = job.pieces[at];
    const Piece& next = job.pieces[std::min<int64_t>(at + job.threads, job.pieces.size() - 1)];
    const int64_t matrices = next.first->expert - piece.first->expert;
    return {piece.begin, piece.end, matrices * job.rows + next.begin - piece.begin};
}

void gate_pieces(const void* pointer, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(pointer);
    for (int64_t at = begin; at < end; ++at) {
        const Piece& piece = job.pieces[at];
        const Range range = range_of(job, at);
        for (const Group* group = piece.first; group < piece.last; ++group)
            job.machine->gated(job.first, group->x, job.matrix(job.gate, group->expert),
                               job.matrix(job.up, group->expert), group->hidden, group->kept, job.rows, range);
    }
}

void weigh_channels(const void* pointer, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(pointer);
    for (size_t at = 0; at < job.groups.size(); ++at) {
        const Group& group = job.groups[at];
        const int64_t next = job.groups[std::min(at + 1, job.groups.size() - 1)].expert;
        job.machine->weighted(job.second, group.hidden, job.matrix(job.down, group.expert), group.shares, group.sums,
                              {begin, end, (next - group.expert) * job.channels});
    }
}

void plain_pieces(const void* pointer, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(pointer);
    for (int64_t at = begin; at < end; ++at) {
        const Piece& piece = job.pieces[at];
        const Range range = range_of(job, at);
        for (const Group* group = piece.first; group < piece.last; ++group)
            job.machine->plain(job.first, group->x, job.gate, job.bias, group->to, range);
    }
}

void make_pieces(Job& job) {
    job.pieces.clear();
    const Group *from = job.groups.data(), *const end = from + job.groups.size();
    for (const Group* to; from < end; from = to) {
        for (to = from; to < end && to->expert == from->expert;) ++to;
        for (int64_t row = 0; row < job.rows; row += kPiece)
            job.pieces.push_back({from, to, row, std::min(row + kPiece, job.rows)});
    }
}

Job job_of(const Many& machine, int threads, Dtype weight, Dtype x, int64_t rows, int64_t width, int64_t channels) {
    const Dtype input = machine.pairs && weight == BF16 && x == BF16 ? BF16 : F32;
    return {&machine, threads, {weight, input, x, width}, {weight, input, F32, rows}, x, rows, channels,
            nullptr, nullptr, nullptr, nullptr, {}, {}};
}

// x[b, i] through one matrix.
struct Rows {
    const void* x;
    void* y;
    int64_t count;
};

void multiply(Job& job, const Rows& rows) {
    const int threads = job.threads;
    const int64_t block = job.machine->most, wave = std::max(kWave * threads / block, int64_t{1}) * block;
    const int64_t most = std::min(wave, rounded_up(rows.count, block));
    const int64_t numbers = packed_numbers(most + most / block * job.machine->lanes, job.first.width);
    Scratch scratch(numbers, Scratch::MANY);
    char* packed = reinterpret_cast<char*>(scratch.take(numbers));
    std::vector<const void*> from(most);
    std::vector<void*> to(most);
    for (int64_t start = 0; start < rows.count; start += most) {
        const int64_t count = std::min(most, rows.count - start);
        for (int64_t row = 0; row < count; ++row) {
            from[row] = shifted(rows.x, (start + row) * job.first.width, job.dtype);
            to[row] = const_cast<char*>(shifted(rows.y, (start + row) * job.rows, job.dtype));
        }
        job.groups.clear();
        char* next = packed;
        cut(*job.machine, count, [&](int64_t first, int64_t held, int64_t lanes) {
            job.groups.push_back({0, {held, lanes, next}, {}, &from[first], nullptr, nullptr, &to[first], nullptr});
            next += lanes * rounded_up(job.first.width, 2) * size_of(job.first.input);
        });
        make_pieces(job);
        run(threads, static_cast<int64_t>(job.groups.size()), 1, pack_groups, &job);
        run(threads, static_cast<int64_t>(job.pieces.size()), 1, plain_pieces, &job);
    }
}

// Tokens and what the router decided about them.
struct Tokens {
    const int64_t* experts;     // [count, k]
    const float* weights;       // [count, k]
    const void* x;              // [count, d]
    void* y;                    // [count, d]
    void* kept;                 // [count, k, 2, m], or null
    int64_t count, k;
};

struct Sum {
    const float* from;
    void* to;
    Dtype dtype;
    int64_t width;
};

void round_sums(const void* pointer, int64_t begin, int64_t end) {
    const Sum& sum = *static_cast<const Sum*>(pointer);
    begin *= sum.width, end *= sum.width;
    if (sum.dtype == F32)
        std::memcpy(static_cast<float*>(sum.to) + begin, sum.from + begin, (end - begin) * sizeof(float));
    else if (sum.dtype == F16)
        for (int64_t at = begin; at < end; ++at) put(F16, sum.to, at, sum.from[at]);
    else
        for (int64_t at = begin; at < end; ++at) put(BF16, sum.to, at, sum.from[at]);
}

// The slots of all tokens, k each, sorted by expert.
struct Slots {
    std::vector<int64_t> experts;
    std::vector<const void*> from;
    std::vector<float*> to;
    std::vector<float> shares;
    std::vector<void*> kept;
};

Slots sort_slots(const Job& job, const Tokens& tokens, float* sums) {
    const int64_t count = tokens.count * tokens.k, d = job.channels;
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return tokens.experts[a] < tokens.experts[b]; });
    Slots slots;
    for (const int64_t slot : order) {
        const int64_t token = slot / tokens.k;
        slots.experts.push_back(tokens.experts[slot]);
        slots.from.push_back(shifted(tokens.x, token * d, job.dtype));
        slots.to.push_back(sums + token * d);
        slots.shares.push_back(tokens.weights[slot]);
        if (tokens.kept) slots.kept.push_back(const_cast<char*>(shifted(tokens.kept, slot * 2 * job.rows, job.dtype)));
    }
    return slots;
}

// The wave of groups at hand, and then room for the next.
void run_wave(Job& job) {
    make_pieces(job);
    run(job.threads, static_cast<int64_t>(job.groups.size()), 1, pack_groups, &job);
    run(job.threads, static_cast<int64_t>(job.pieces.size()), 1, gate_pieces, &job);
    run(job.threads, job.channels, kPiece, weigh_channels, &job);
    job.groups.clear();
}

// Lanes of a wave, at most.
int64_t wave_lanes(const Job& job, const Tokens& tokens) {
    return std::min(std::max(kWave * job.threads, job.machine->most), tokens.count * tokens.k * job.machine->lanes);
}

// What a wave needs of memory, in numbers of float32.
int64_t wave_numbers(const Job& job, const Tokens& tokens) {
    const int64_t most = wave_lanes(job, tokens);
    return packed_numbers(most, job.channels) + packed_numbers(most, job.rows);
}

// sums[n, d] += what the experts make of the tokens.
void add_through_experts(Job& job, const Tokens& tokens, float* sums, Scratch& scratch) {
    const Many& machine = *job.machine;
    const int64_t count = tokens.count * tokens.k, d = job.channels, m = job.rows, most = wave_lanes(job, tokens);
    char* const packed = reinterpret_cast<char*>(scratch.take(packed_numbers(most, d)));
    char* const hidden = reinterpret_cast<char*>(scratch.take(packed_numbers(most, m)));
    const Slots slots = sort_slots(job, tokens, sums);
    int64_t used = 0;  // lanes of the wave
    for (int64_t begin = 0, end; begin < count; begin = end) {
        const int64_t expert = slots.experts[begin];
        for (end = begin; end < count && slots.experts[end] == expert;) ++end;
        cut(machine, end - begin, [&](int64_t first, int64_t rows, int64_t lanes) {
            if (used + lanes > most) run_wave(job), used = 0;
            const int64_t size = size_of(job.first.input), at = begin + first;
            const Block x{rows, lanes, packed + used * rounded_up(d, 2) * size};
            const Block between{rows, lanes, hidden + used * rounded_up(m, 2) * size};
            void* const* kept = tokens.kept ? &slots.kept[at] : nullptr;
            job.groups.push_back(
                {expert, x, between, &slots.from[at], &slots.to[at], &slots.shares[at], nullptr, kept});
            used += lanes;
        });
    }
    run_wave(job);
}

void send_through_experts(Job& job, const Tokens& tokens) {
    const int64_t d = job.channels, numbers = packed_numbers(tokens.count, d);
    Scratch scratch(numbers + wave_numbers(job, tokens), Scratch::MANY);
    float* const sums = scratch.take(numbers);
    std::memset(sums, 0, tokens.count * d * sizeof(float));
    add_through_experts(job, tokens, sums, scratch);
    const Sum sum{sums, tokens.y, job.dtype, d};
    run(job.threads, tokens.count, 16, round_sums, &sum);
}

}  // namespace

void add_experts(const Many& machine, int threads, const Stacks& stacks, const Routed& routed, float* sums) {
    Job job = job_of(machine, threads, stacks.kind, routed.dtype, stacks.width, stacks.channels, stacks.channels);
    job.gate = stacks.gate, job.up = stacks.up, job.down = stacks.down;
    const Tokens tokens{routed.experts, routed.weights, routed.x, nullptr, nullptr, routed.count, routed.k};
    Scratch scratch(wave_numbers(job, tokens), Scratch::MANY);
    add_through_experts(job, tokens, sums, scratch);
}

}  // namespace seekvl

using namespace seekvl;

// y[b, o] = x[b, i] W[o, i]^T + bias[o], as seekvl_linear for any number of rows. Returns 0, or 1 where there was no
// memory.
EXPORT int32_t seekvl_linear_many(int32_t level, int32_t threads, int32_t weight_dtype, int32_t x_dtype,
                                  const void* weight, const void* bias, const void* x, void* y, int64_t b, int64_t o,
                                  int64_t i) {
    try {
        const auto kind = static_cast<Dtype>(weight_dtype), outer = static_cast<Dtype>(x_dtype);
        Job job = job_of(many_at(level), threads, kind, outer, o, i, 0);
        job.gate = weight, job.bias = bias;
        multiply(job, {x, y, b});
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// y[n, d] as that of seekvl_experts, for any number of tokens. Unless `kept` is null, kept[n, k, 2, m] of `dtype` gets
// what the backward wants to know: the products with gate and up. Returns 0, or 1 where there was no memory.
EXPORT int32_t seekvl_experts_kept(int32_t level, int32_t threads, int32_t dtype, const void* gate, const void* up,
                                   const void* down, const int64_t* experts, const float* weights, const void* x,
                                   void* y, void* kept, int64_t n, int64_t k, int64_t d, int64_t m) {
    try {
        const auto kind = static_cast<Dtype>(dtype);
        Job job = job_of(many_at(level), threads, kind, kind, m, d, d);
        job.gate = gate, job.up = up, job.down = down;
        for (int64_t start = 0; start < n; start += kTokens) {
            const Tokens tokens{experts + start * k, weights + start * k, shifted(x, start * d, kind),
                                const_cast<char*>(shifted(y, start * d, kind)),
                                kept ? const_cast<char*>(shifted(kept, start * k * 2 * m, kind)) : nullptr,
                                std::min(kTokens, n - start), k};
            send_through_experts(job, tokens);
        }
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// The same without anything kept.
EXPORT int32_t seekvl_experts_many(int32_t level, int32_t threads, int32_t dtype, const void* gate, const void* up,
                                   const void* down, const int64_t* experts, const float* weights, const void* x,
                                   void* y, int64_t n, int64_t k, int64_t d, int64_t m) {
    return seekvl_experts_kept(level, threads, dtype, gate, up, down, experts, weights, x, y, nullptr, n, k, d, m);
}
