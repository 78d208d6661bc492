// The functions Python calls for quantised matrices: plain C on raw pointers that Python has checked.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "experts.h"
#include "jobs.h"
#include "numbers.h"
#include "packed.h"
#include "pool.h"
#include "product.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace seekvl {
namespace {

// In the order of Python's LEVELS.
enum LevelIndex { PORTABLE, NEON, AVX2, AVX512, AVX512_BF16 };

// Not every processor with AVX-512 multiplies bytes, and not every one that does has bfloat16.
bool has_vnni() {
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
#else
    return false;
#endif
}

// Whether an ARM processor multiplies four bytes; all that macOS runs on do.
bool has_dotprod() {
#if defined(__aarch64__) && defined(__APPLE__)
    return true;
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which older headers do not name
    return getauxval(AT_HWCAP) & kAsimdDp;
#else
    return false;
#endif
}

// The level that widens and rounds what goes in and out; pairs of bfloat16 are of no use here.
const Level& float_level_at(int32_t index) {
#if defined(__x86_64__)
    if (index >= AVX512) return avx512;
    if (index >= AVX2) return avx2;
#elif defined(__aarch64__)
    if (index == NEON) return neon;
#endif
    return portable;
}

constexpr int64_t kAlone = 8;          // up to here memory is the limit, and one thread quantises the inputs
constexpr int64_t kTokens = 512;       // that go through experts at once: bounds the memory between the products

// Inputs to be quantised, and their places.
struct Quantization {
    const Level* level;
    const PackedLevel* packed;
    Dtype kind;
    Dtype dtype;
    const void* x;             // [count, width]
    int64_t width;
    std::vector<QuantizedRow> inputs;
};

void quantize_some(const void* pointer, int64_t begin, int64_t end) {
    const Quantization& q = *static_cast<const Quantization*>(pointer);
    Scratch scratch(Scratch::rounded(q.width), Scratch::WIDENED);
    float* wide = scratch.take(q.width);
    for (int64_t row = begin; row < end; ++row) {
        const void* from = shifted(q.x, row * q.width, q.dtype);
        if (q.dtype != F32) q.level->widen(q.dtype, from, wide, q.width);
        q.packed->quantize(q.kind, q.dtype == F32 ? static_cast<const float*>(from) : wide, q.width, q.inputs[row]);
    }
}

void quantize_all(Quantization& q, int64_t count, int threads, Scratch& memory) {
    q.inputs.resize(count);
    rows_in(memory, q.width, count, q.inputs.data());
    run(count > kAlone ? threads : 1, count, 4, quantize_some, &q);
}

// Matrices of one shape, each with inputs of its own. With `up` the rows of both are joined, see PackedLevel.
struct Tiling {
    const PackedLevel* level;
    int64_t tiles;
    std::vector<Packed> matrices, up;
    std::vector<Meeting> meetings;
};

void work(const void* pointer, int64_t begin, int64_t end) {
    const Tiling& job = *static_cast<const Tiling*>(pointer);
    Scratch memory(kSumRoom, Scratch::SUMS);
    float* const room = memory.take(kSumRoom);
    while (begin < end) {
        const int64_t index = begin / job.tiles, first = begin % job.tiles;
        const int64_t last = std::min(job.tiles, first + end - begin);
        Meeting meeting = job.meetings[index];
        meeting.room = room;
        if (job.up.empty()) job.level->tiles(job.matrices[index], meeting, first, last);
        else job.level->gated(job.matrices[index], job.up[index], meeting, first, last);
        begin += last - first;
    }
}

// Where inputs are many a thread takes a quarter of its share at a time, so that inputs stay near.
void run_job(const Tiling& job, int threads) {
    if (job.matrices.empty()) return;
    const Packed& matrix = job.matrices[0];
    const int64_t total = job.tiles * static_cast<int64_t>(job.matrices.size());
    const int64_t bytes = tile_bytes(matrix.kind, matrix.width) * (job.up.empty() ? 1 : 2);
    int64_t most = 0;
    for (const Meeting& meeting : job.meetings) most = std::max(most, meeting.count);
    int64_t piece = std::clamp<int64_t>(total / (4 * threads) / 2 * 2, 2, 32);
    if (most <= kAlone)
        piece = rows_a_piece(total * bytes, bytes, threads);
    run(threads, total, piece, work, &job);
}

Packed matrix_of(Dtype kind, const void* stack, int64_t expert, int64_t rows, int64_t width) {
    const int64_t bytes = tiles_of(rows) * tile_bytes(kind, width);
    return {kind, static_cast<const uint8_t*>(stack) + expert * bytes, rows, width};
}

// Tiles of all matrices at once: what they add to is one thread's, which goes through them in their order.
void add_tiles(const void* pointer, int64_t begin, int64_t end) {
    const Tiling& job = *static_cast<const Tiling*>(pointer);
    Scratch memory(kSumRoom, Scratch::SUMS);
    float* const room = memory.take(kSumRoom);
    for (size_t index = 0; index < job.matrices.size(); ++index) {
        Meeting meeting = job.meetings[index];
        meeting.room = room;
        job.level->tiles(job.matrices[index], meeting, begin, end);
    }
}

// The slots of some tokens, sorted by expert.
struct Slots {
    std::vector<QuantizedRow> x;
    std::vector<void*> hidden, sums;
    std::vector<float> shares;
    std::vector<int64_t> experts;   // those that are asked
    std::vector<int64_t> counts;    // slots of each
};

Slots sort_slots(const QuantizedRow* x, const Chosen& chosen, int64_t first, int64_t count, float* hidden, int64_t m,
                 float* const* sums) {
    const int64_t* const experts = chosen.experts + first * chosen.k;
    Slots slots;
    for (const int64_t slot : by_expert(experts, count * chosen.k)) {
        const int64_t token = first + slot / chosen.k;
        if (slots.experts.empty() || slots.experts.back() != experts[slot])
            slots.experts.push_back(experts[slot]), slots.counts.push_back(0);
        ++slots.counts.back();
        slots.hidden.push_back(hidden + static_cast<int64_t>(slots.x.size()) * m);
        slots.x.push_back(x[token]);
        slots.sums.push_back(sums[token]);
        slots.shares.push_back(chosen.weights[first * chosen.k + slot]);
    }
    return slots;
}

// What `add_packed_experts` does, for at most kTokens tokens.
void add_slots(const PackedLevel& level, int threads, const Stacks& s, const Slots& slots, float* hidden,
               Scratch memory) {
    Tiling first{&level, tiles_of(s.width), {}, {}, {}}, second{&level, tiles_of(s.channels), {}, {}, {}};
    Quantization between{nullptr, &level, s.kind, F32, hidden, s.width, {}};
    between.inputs.resize(slots.x.size());
    for (size_t index = 0, at = 0; index < slots.experts.size(); at += slots.counts[index++]) {
        const int64_t expert = slots.experts[index], count = slots.counts[index];
        first.matrices.push_back(matrix_of(s.kind, s.gate, expert, s.width, s.channels));
        first.up.push_back(matrix_of(s.kind, s.up, expert, s.width, s.channels));
        first.meetings.push_back({count, &slots.x[at], &slots.hidden[at], F32, nullptr, nullptr, nullptr});
        second.matrices.push_back(matrix_of(s.kind, s.down, expert, s.channels, s.width));
        second.meetings.push_back(
            {count, &between.inputs[at], &slots.sums[at], F32, nullptr, &slots.shares[at], nullptr});
    }
    run_job(first, threads);
    quantize_all(between, static_cast<int64_t>(slots.x.size()), threads, memory);
    run(threads, second.tiles, 4, add_tiles, &second);
}

}  // namespace

void add_packed_experts(const PackedLevel& level, int threads, const Stacks& stacks, const QuantizedRow* x,
                        const Chosen& chosen, float* const* sums) {
    const int64_t most = std::min(chosen.count, kTokens) * chosen.k;
    Scratch memory(Scratch::rounded(most * stacks.width) + room_of_rows(most, stacks.width), Scratch::PACKED);
    float* const hidden = memory.take(most * stacks.width);
    for (int64_t first = 0; first < chosen.count; first += kTokens) {
        const int64_t count = std::min(kTokens, chosen.count - first);
        add_slots(level, threads, stacks, sort_slots(x, chosen, first, count, hidden, stacks.width, sums), hidden,
                  memory);
    }
}

const PackedLevel& packed_level_at(int32_t index) {
#if defined(__x86_64__)
    static const bool vnni = has_vnni();
    if (index >= AVX512 && vnni) return packed_vnni;
    if (index >= AVX2) return packed_avx2;
#elif defined(__aarch64__)
    static const bool dotprod = has_dotprod();
    if (index == NEON) return dotprod ? packed_dotprod : packed_neon;
#endif
    return packed_portable;
}

}  // namespace seekvl

using namespace seekvl;

// Bytes of a packed matrix [rows, width].
EXPORT int64_t seekvl_packed_bytes(int32_t kind, int64_t rows, int64_t width) {
    return tiles_of(rows) * tile_bytes(static_cast<Dtype>(kind), width);
}

// Whether the levels of AVX-512 multiply bytes by VNNI, and that of ARM by dotprod.
EXPORT int32_t seekvl_vnni() { return has_vnni(); }
EXPORT int32_t seekvl_dotprod() { return has_dotprod(); }

// y[b, o] = x[b, i] W[o, i]^T + bias[o]; x, y and bias have one dtype.
EXPORT void seekvl_packed_linear(int32_t level, int32_t threads, int32_t kind, int32_t dtype, const uint8_t* weight,
                                 const void* bias, const void* x, void* y, int64_t b, int64_t o, int64_t i) {
    const Packed matrix{static_cast<Dtype>(kind), weight, o, i};
    const auto outer = static_cast<Dtype>(dtype);
    const PackedLevel& machine = packed_level_at(level);
    Scratch memory(room_of_rows(b, i), Scratch::PACKED);
    Quantization q{&float_level_at(level), &machine, matrix.kind, outer, x, i, {}};
    quantize_all(q, b, threads, memory);
    std::vector<void*> to(b);
    for (int64_t row = 0; row < b; ++row) to[row] = const_cast<char*>(shifted(y, row * o, outer));
    const Meeting meeting{b, q.inputs.data(), to.data(), outer, bias, nullptr, nullptr};
    run_job({&machine, tiles_of(o), {matrix}, {}, {meeting}}, threads);
}

// y[n, d] = sum over k of weights[n, k] * (SwiGLU of expert experts[n, k])(x[n, d]); x and y have one dtype,
// hidden numbers stay in float32 until they are quantised.
EXPORT void seekvl_packed_experts(int32_t level, int32_t threads, int32_t kind, int32_t dtype, const uint8_t* gate,
                                  const uint8_t* up, const uint8_t* down, const int64_t* experts,
                                  const float* weights, const void* x, void* y, int64_t n, int64_t k, int64_t d,
                                  int64_t m) {
    const Stacks stacks{static_cast<Dtype>(kind), gate, up, down, m, d};
    const auto outer = static_cast<Dtype>(dtype);
    const Level& machine = float_level_at(level);
    Scratch memory(Scratch::rounded(n * d) + room_of_rows(n, d));
    float* const sums = memory.take(n * d);
    std::memset(sums, 0, n * d * sizeof(float));
    Quantization q{&machine, &packed_level_at(level), stacks.kind, outer, x, d, {}};
    quantize_all(q, n, threads, memory);
    std::vector<float*> to(n);
    for (int64_t token = 0; token < n; ++token) to[token] = sums + token * d;
    add_packed_experts(*q.packed, threads, stacks, q.inputs.data(), {experts, weights, n, k}, to.data());
    if (outer == F32) std::memcpy(y, sums, n * d * sizeof(float));
    else machine.narrow(outer, sums, y, n * d);
}
