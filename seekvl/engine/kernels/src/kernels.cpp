// The functions Python calls: plain C on raw pointers. Python has checked shapes, dtypes and memory.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "many.h"
#include "numbers.h"
#include "pool.h"
#include "product.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace seekvl {
namespace {

// In the order of Python's LEVELS.
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

int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

// Rows a thread takes at a time: a 32nd of its share, so that all end together, within what hides the handing
// out (32 KiB) and what a stalled thread may hold up (512 KiB).
int64_t rows_a_piece(int64_t rows, int64_t row_bytes, int threads) {
    row_bytes = std::max<int64_t>(row_bytes, 1);
    const int64_t bytes = std::clamp<int64_t>(rows * row_bytes / (32 * threads), 32 << 10, 512 << 10);
    const int64_t piece = std::max<int64_t>(bytes / row_bytes, 1);
    return piece + piece % 2;
}

// Memory of a thread that outlives the call, so that decoding does not ask for it again and again.
class Scratch {
    static constexpr int64_t kLine = 16;  // numbers of a cache line

  public:
    explicit Scratch(int64_t count) {
        static thread_local std::vector<float> kept;
        if (static_cast<int64_t>(kept.size()) < count + kLine) kept.resize(count + kLine);
        const auto address = reinterpret_cast<uintptr_t>(kept.data());
        next_ = kept.data() + (kLine - address / sizeof(float) % kLine) % kLine;  // vectors within a line
    }
    float* take(int64_t count) {
        float* taken = next_;
        next_ += count;
        return taken;
    }

  private:
    float* next_;
};

// Matrices of one shape, each with inputs of its own. With `up` the rows of both are joined, see Level::gated.
struct Job {
    const Level* level;
    Product product;
    int64_t rows;
    std::vector<Operand> matrices, up;
};

void work(const void* pointer, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(pointer);
    while (begin < end) {
        const int64_t index = begin / job.rows, first = begin % job.rows;
        const int64_t last = std::min(job.rows, first + end - begin);
        if (job.up.empty()) job.level->rows(job.product, job.matrices[index], first, last);
        else job.level->gated(job.product, job.matrices[index], job.up[index], first, last);
        begin += last - first;
    }
}

void run_job(const Job& job, int threads) {
    const int64_t matrices = job.up.empty() ? 1 : 2, total = job.rows * job.matrices.size();
    const int64_t row_bytes = matrices * job.product.width * size_of(job.product.weight);
    run(threads, total, rows_a_piece(total, row_bytes, threads), work, &job);
}

const char* shifted(const void* from, int64_t count, Dtype dtype) {
    return static_cast<const char*>(from) + count * size_of(dtype);
}

// The order of slots by expert; a run of one expert's slots is cut where it exceeds kMaxBatch.
struct Group {
    int64_t expert;
    std::vector<int64_t> slots;
};

std::vector<Group> group_by_expert(const int64_t* experts, int64_t slots) {
    std::vector<int64_t> order(slots);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return experts[a] < experts[b]; });
    std::vector<Group> groups;
    for (const int64_t slot : order) {
        if (groups.empty() || groups.back().expert != experts[slot] || groups.back().slots.size() == kMaxBatch)
            groups.push_back({experts[slot], {}});
        groups.back().slots.push_back(slot);
    }
    return groups;
}

// Where slots find their inputs, which `shared` neighbours have in common, and leave their results.
struct Slots {
    const void* x;
    int64_t shared;
    float* y;
};

// A group's matrix of the stack [E, rows, width] with the group's inputs.
Operand operand_of(const Group& group, const void* stack, const Slots& slots, const Job& job) {
    const Product& product = job.product;
    Operand m{};
    m.weight = shifted(stack, group.expert * job.rows * product.width, product.weight);
    m.batch = static_cast<int64_t>(group.slots.size());
    for (int64_t b = 0; b < m.batch; ++b) {
        m.x[b] = shifted(slots.x, group.slots[b] / slots.shared * product.width, product.input);
        m.y[b] = slots.y + group.slots[b] * job.rows;
    }
    return m;
}

constexpr int64_t kLineBytes = 64;

struct Reading {
    const char* from;
    mutable std::atomic<uint64_t> sum;
};

void read(const void* pointer, int64_t begin, int64_t end) {
    const Reading& reading = *static_cast<const Reading*>(pointer);
    uint64_t sums[8] = {}, words[8];
    for (int64_t line = begin; line < end; ++line) {
        const char* at = reading.from + line * kLineBytes;
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + 8192));
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
    Job job{&level_at(level), {kind, F32, outer, i}, o, std::vector<Operand>(1), {}};
    const bool as_is = outer == F32 || (outer == BF16 && kind == BF16 && job.level->pairs);
    if (as_is) job.product.input = outer;
    Scratch scratch(as_is ? 0 : b * i);
    if (!as_is) {
        float* wide = scratch.take(b * i);
        job.level->widen(outer, x, wide, b * i);
        x = wide;
    }
    Operand& m = job.matrices[0];
    m.weight = weight, m.bias = bias, m.batch = b;
    for (int64_t row = 0; row < b; ++row) {
        m.x[row] = shifted(x, row * i, job.product.input);
        m.y[row] = const_cast<char*>(shifted(y, row * o, outer));
    }
    run_job(job, threads);
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
    Scratch scratch(n * d + slots * (2 * m + d));
    float *wide = scratch.take(n * d), *hidden = scratch.take(slots * m), *out = scratch.take(slots * d);
    void* narrow = scratch.take(slots * m);
    if (input != kind) machine.widen(kind, x, wide, n * d);
    const Slots in{input == kind ? x : wide, k, hidden}, between{input == F32 ? hidden : narrow, 1, out};
    Job first{&machine, {kind, input, F32, d}, m, {}, {}};
    Job second{&machine, {kind, input, F32, m}, d, {}, {}};
    for (const Group& group : group_by_expert(experts, slots)) {
        first.matrices.push_back(operand_of(group, gate, in, first));
        first.up.push_back(operand_of(group, up, in, first));
        second.matrices.push_back(operand_of(group, down, between, second));
    }
    run_job(first, threads);
    if (input == BF16)
        for (int64_t at = 0; at < slots * m; ++at) put(BF16, narrow, at, hidden[at]);
    run_job(second, threads);
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
    run(threads, bytes / kLineBytes, rows_a_piece(bytes / kLineBytes, kLineBytes, threads), read, &reading);
    return reading.sum;
}

EXPORT void seekvl_release() { release(); }

EXPORT int32_t seekvl_workers() { return workers(); }
