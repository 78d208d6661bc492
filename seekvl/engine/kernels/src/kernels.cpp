// The functions Python calls: plain C on raw pointers. Python has checked shapes, dtypes and memory.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "attend_many.h"
#include "gradients.h"
#include "jobs.h"
#include "many.h"
#include "numbers.h"
#include "pool.h"
#include "product.h"
#include "prompt.h"
#include "step.h"
#include "tower.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace seekvl {

enum LevelIndex { PORTABLE, NEON, AVX2, AVX512, AVX512_BF16 };

const Level& level_at(int32_t index) {
#if defined(__x86_64__)
    if (index == AVX2) return avx2;
    if (index == AVX512) return avx512;
    if (index == AVX512_BF16) return avx512_bf16;
#elif defined(__aarch64__)
    if (index == NEON) return neon;
#endif
    return portable;
}

namespace {

#if defined(__x86_64__)
bool has(uint32_t word, int bit) { return word >> bit & 1; }

// What processor and operating system both can do: the latter must save the wide registers.
int32_t x86_levels() {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 27)) return 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool fma = has(c, 12), avx = has(c, 28), f16c = has(c, 29);
    if (!fma || !avx || !f16c || (low & 0x06) != 0x06) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, 5)) return 0;
    const uint32_t subleaves = a;
    int32_t levels = 1 << AVX2;
    const bool wide = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // F, DQ, BW, VL
    if (!wide || (low & 0xe6) != 0xe6) return levels;
    levels |= 1 << AVX512;
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5)) levels |= 1 << AVX512_BF16;
    return levels;
}
#endif

constexpr int64_t kLineBytes = 64, kPageBytes = 4096, kLinesOfPage = kPageBytes / kLineBytes;

struct Reading {
    const char* from;
    mutable std::atomic<uint64_t> sum;
};

void read(const void* pointer, int64_t begin, int64_t end) {
    const Reading& reading = *static_cast<const Reading*>(pointer);
    uint64_t sums[8] = {}, words[8];
    for (int64_t line = begin; line < end; ++line) {
        const char* at = reading.from + line * kLineBytes;
        if (line % kLinesOfPage == 0)
            __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + 2 * kPageBytes));
        std::memcpy(words, at, sizeof words);
        for (int word = 0; word < 8; ++word) sums[word] += words[word];
    }
    for (const uint64_t sum : sums) reading.sum.fetch_add(sum, std::memory_order_relaxed);
}

}  // namespace

const Many& many_at(int32_t index) {
#if defined(__x86_64__)
    if (index == AVX2) return avx2_many;
    if (index == AVX512) return avx512_many;
    if (index == AVX512_BF16) return avx512_bf16_many;
#elif defined(__aarch64__)
    if (index == NEON) return neon_many;
#endif
    return portable_many;
}

const Gradients& gradients_at(int32_t index, Dtype dtype) {
#if defined(__x86_64__)
    if (index == AVX2) return avx2_gradients;
    if (index == AVX512_BF16 && dtype == BF16) return avx512_bf16_gradients;
    if (index == AVX512 || index == AVX512_BF16) return avx512_gradients;
#elif defined(__aarch64__)
    if (index == NEON) return neon_gradients;
#endif
    return portable_gradients;
}

const TowerLevel& tower_at(int32_t index) {
#if defined(__x86_64__)
    if (index == AVX2) return avx2_tower;
    if (index == AVX512) return avx512_tower;
    if (index == AVX512_BF16) return avx512_bf16_tower;
#elif defined(__aarch64__)
    if (index == NEON) return neon_tower;
#endif
    return portable_tower;
}

AttendTile attend_at(int32_t index) {
#if defined(__x86_64__)
    if (index == AVX2) return avx2_attend;
    if (index == AVX512) return avx512_attend;
    if (index == AVX512_BF16) return avx512_bf16_attend;
#elif defined(__aarch64__)
    if (index == NEON) return neon_attend;
#endif
    return portable_attend;
}

}  // namespace seekvl

using namespace seekvl;

// Bit n is set where level n runs on this machine.
EXPORT int32_t seekvl_levels() {
    int32_t levels = 1 << PORTABLE;
#if defined(__x86_64__)
    levels |= x86_levels();
#elif defined(__aarch64__)
    levels |= 1 << NEON;
#endif
    return levels;
}

// y[b, o] = x[b, i] W[o, i]^T + bias[o]; y has the dtype of x, b is 1..8.
EXPORT void seekvl_linear(int32_t level, int32_t threads, int32_t weight_dtype, int32_t x_dtype,
                          const void* weight, const void* bias, const void* x, void* y,
                          int64_t b, int64_t o, int64_t i) {
    const auto kind = static_cast<Dtype>(weight_dtype), outer = static_cast<Dtype>(x_dtype);
    const Level& machine = level_at(level);
    Part part{{kind, F32, outer, i}, o, {}, {}};
    const bool as_is = outer == F32 || (outer == BF16 && kind == BF16 && machine.pairs);
    if (as_is) part.product.input = outer;
    Scratch scratch(as_is ? 0 : b * i);
    if (!as_is) {
        float* wide = scratch.take(b * i);
        machine.widen(outer, x, wide, b * i);
        x = wide;
    }
    Operand& m = part.matrix;
    m.weight = weight, m.bias = bias, m.batch = b;
    for (int64_t row = 0; row < b; ++row) {
        m.x[row] = shifted(x, row * i, part.product.input);
        m.y[row] = const_cast<char*>(shifted(y, row * o, outer));
    }
    Job job(machine, threads);
    job.add(part);
    job.run();
}

// y[n, d] = sum over k of weights[n, k] * (SwiGLU of expert experts[n, k])(x[n, d]); gate and up are [E, m, d],
// down is [E, d, m], all of one dtype with x and y. Hidden numbers stay in float32, or are rounded to bfloat16
// where the level multiplies pairs of it.
EXPORT void seekvl_experts(int32_t level, int32_t threads, int32_t dtype, const void* gate, const void* up,
                           const void* down, const int64_t* experts, const float* weights, const void* x,
                           void* y, int64_t n, int64_t k, int64_t d, int64_t m) {
    const auto kind = static_cast<Dtype>(dtype);
    const Level& machine = level_at(level);
    const int64_t slots = n * k;
    const Dtype input = machine.pairs && kind == BF16 ? BF16 : F32;
    Scratch scratch(Scratch::rounded(n * d) + 2 * Scratch::rounded(slots * m) + Scratch::rounded(slots * d));
    float *wide = scratch.take(n * d), *hidden = scratch.take(slots * m), *out = scratch.take(slots * d);
    void* narrow = scratch.take(slots * m);
    if (input != kind) machine.widen(kind, x, wide, n * d);
    const Slots in{input == kind ? x : wide, k, hidden}, between{input == F32 ? hidden : narrow, 1, out};
    std::vector<Group> groups;
    group_by_expert(experts, slots, groups);
    Job job(machine, threads);
    for (const Group& group : groups) job.add(part_of({kind, input, F32, d}, m, group, in, gate, up));
    job.run();
    if (input == BF16) machine.narrow(BF16, hidden, narrow, slots * m);
    for (const Group& group : groups) job.add(part_of({kind, input, F32, m}, d, group, between, down));
    job.run();
    for (int64_t token = 0; token < n; ++token)
        for (int64_t channel = 0; channel < d; ++channel) {
            float sum = 0.0f;
            for (int64_t slot = token * k; slot < token * k + k; ++slot)
                sum += weights[slot] * out[slot * d + channel];
            put(kind, y, token * d + channel, sum);
        }
}

// Read memory and do next to nothing with it: the ceiling the products are measured against.
EXPORT uint64_t seekvl_read(int32_t threads, const void* from, int64_t bytes) {
    Reading reading{static_cast<const char*>(from), {0}};
    run(threads, bytes / kLineBytes, rows_a_piece(bytes, kLineBytes, threads), read, &reading);
    return reading.sum;
}

// One decoding step: what the structures mean stands in step.h.
EXPORT void seekvl_step(int32_t level, int32_t threads, const Network* network, const Cache* cache,
                        const Tokens* tokens, float* logits) {
    step(level_at(level), packed_level_at(level), threads, *network, *cache, *tokens, logits);
}

// A piece of a prompt: what the structures mean stands in step.h and prompt.h. Returns 0, or 1 where there was no
// memory.
EXPORT int32_t seekvl_prompt(int32_t level, int32_t threads, const Network* network, const Cache* cache,
                             const Prompt* prompt) {
    try {
        fill({level_at(level), many_at(level), packed_level_at(level), attend_at(level)}, threads, *network, *cache, *prompt);
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// Pictures through the blocks of a tower: what the structures mean stands in tower.h. Returns 0, or 1 where there was
// no memory.
EXPORT int32_t seekvl_tower(int32_t level, int32_t threads, const Tower* tower, const Views* views) {
    try {
        see({level_at(level), many_at(level), tower_at(level), packed_level_at(level)}, threads, *tower, *views);
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// Bytes of what describes a step, a prompt or a tower: Python writes the same structures.
EXPORT int64_t seekvl_structures() {
    return sizeof(Network) + sizeof(Layer) + sizeof(Cache) + sizeof(Tokens) + sizeof(Prompt) + sizeof(Tower) +
           sizeof(TowerBlock) + sizeof(Views);
}

EXPORT void seekvl_release() { release(); }

EXPORT int32_t seekvl_workers() { return workers(); }
