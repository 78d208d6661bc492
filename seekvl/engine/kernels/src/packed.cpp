// The functions Python calls for quantised matrices: plain C on raw pointers that Python has checked.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

// Three stacks of matrices: gate and up are [E, m, d], down is [E, d, m].
struct Stacks {
    Dtype kind;
    const uint8_t *gate, *up, *down;
    int64_t d, m;

    Packed at(const uint8_t* stack, int64_t expert, int64_t rows, int64_t width) const {
        return {kind, stack + expert * tiles_of(rows) * tile_bytes(kind, width), rows, width};
    }
};

// out[slot, d] = what the slot's expert makes of its token, for slots of at most kTokens tokens x[n, d].
void run_slots(const Stacks& s, Quantization& tokens, const int64_t* experts, int64_t n, int64_t k, float* hidden,
               float* out, int threads, const Scratch& after) {
    const int64_t slots = n * k;
    Scratch memory = after;
    quantize_all(tokens, n, threads, memory);
    const std::vector<int64_t> order = by_expert(experts, slots);
    std::vector<QuantizedRow> x(slots);
    std::vector<void*> to_hidden(slots), to_out(slots);
    for (int64_t at = 0; at < slots; ++at) {
        x[at] = tokens.inputs[order[at] / k];
        to_hidden[at] = hidden + at * s.m;  // in the order of experts, as the second product reads it
        to_out[at] = out + order[at] * s.d;
    }
    Tiling first{tokens.packed, tiles_of(s.m), {}, {}, {}}, second{tokens.packed, tiles_of(s.d), {}, {}, {}};
    for (int64_t at = 0, next; at < slots; at = next) {
        const int64_t expert = experts[order[at]];
        for (next = at; next < slots && experts[order[next]] == expert; ++next) {}
        first.matrices.push_back(s.at(s.gate, expert, s.m, s.d));
        first.up.push_back(s.at(s.up, expert, s.m, s.d));
        first.meetings.push_back({next - at, &x[at], &to_hidden[at], F32, nullptr, nullptr, nullptr});
        second.matrices.push_back(s.at(s.down, expert, s.d, s.m));
        second.meetings.push_back({next - at, nullptr, &to_out[at], F32, nullptr, nullptr, nullptr});
    }
    run_job(first, threads);
    Quantization between{tokens.level, tokens.packed, s.kind, F32, hidden, s.m, {}};
    quantize_all(between, slots, threads, memory);
    int64_t at = 0;
    for (Meeting& meeting : second.meetings) {
        meeting.x = &between.inputs[at];
        at += meeting.count;
    }
    run_job(second, threads);
}

}  // namespace

const PackedLevel& packed_level_at(int32_t index) {
#if defined(__x86_64__)
    static const bool vnni = has_vnni();
    if (index >= AVX512 && vnni) return packed_vnni;
    if (index >= AVX2) return packed_avx2;
#elif defined(__aarch64__)
    if (index == NEON) return packed_neon;
#endif
    return packed_portable;
}

}  // namespace seekvl

using namespace seekvl;

// Bytes of a packed matrix [rows, width].
EXPORT int64_t seekvl_packed_bytes(int32_t kind, int64_t rows, int64_t width) {
    return tiles_of(rows) * tile_bytes(static_cast<Dtype>(kind), width);
}

// Whether the levels of AVX-512 multiply bytes by VNNI.
EXPORT int32_t seekvl_vnni() { return has_vnni(); }

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
    run_job({&machine, tiles_of(o), {matrix}, {}, {{b, q.inputs.data(), to.data(), outer, bias, nullptr, nullptr}}}, threads);
}

// y[n, d] = sum over k of weights[n, k] * (SwiGLU of expert experts[n, k])(x[n, d]); x and y have one dtype,
// hidden numbers stay in float32 until they are quantised.
EXPORT void seekvl_packed_experts(int32_t level, int32_t threads, int32_t kind, int32_t dtype, const uint8_t* gate,
                                  const uint8_t* up, const uint8_t* down, const int64_t* experts,
                                  const float* weights, const void* x, void* y, int64_t n, int64_t k, int64_t d,
                                  int64_t m) {
    const Stacks stacks{static_cast<Dtype>(kind), gate, up, down, d, m};
    const auto outer = static_cast<Dtype>(dtype);
    const int64_t most = std::min(n, kTokens), slots = most * k;
    Scratch memory(Scratch::rounded(slots * m) + Scratch::rounded(slots * d) + room_of_rows(most, d) +
                       room_of_rows(slots, m),
                   Scratch::PACKED);
    float *hidden = memory.take(slots * m), *out = memory.take(slots * d);
    for (int64_t first = 0; first < n; first += kTokens) {
        const int64_t some = std::min(kTokens, n - first);
        Quantization q{&float_level_at(level), &packed_level_at(level), stacks.kind, outer,
                       shifted(x, first * d, outer), d, {}};
        run_slots(stacks, q, experts + first * k, some, k, hidden, out, threads, memory);
        for (int64_t token = 0; token < some; ++token)
            for (int64_t channel = 0; channel < d; ++channel) {
                float sum = 0.0f;
                for (int64_t slot = token * k; slot < token * k + k; ++slot)
                    sum += weights[first * k + slot] * out[slot * d + channel];
                put(outer, y, (first + token) * d + channel, sum);
            }
    }
}
