// Gradients of experts that Python calls: what the outputs of many tokens ask of matrices, inputs and weights.
//
// With h = silu(g) * u and y = share * (down h) of one slot, a token at one expert, and t the gradient of y:
//
//     hidden numbers     down^T t            gives the gradients of g, of u and of the share
//     inputs             gate^T dg + up^T du
//     matrices           dg x^T, du x^T and t (share * h)^T, summed over the tokens of an expert
//
// Sorted are sorted by expert and go in waves that fit the caches. A wave is two runs of the threads:
//
//     pack, hide       x and t into panels of tokens; hidden numbers, some panels of `down` at a time
//     take, multiply   gradients of inputs by slot, added up afterwards by token in the order of the experts; those of
//                      matrices in pieces of some rows
//
// Every number has one author and every sum one order, so the threads change no bit.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <vector>

#include "cut.h"
#include "gradients.h"
#include "jobs.h"
#include "many.h"
#include "numbers.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace seekvl {
namespace {

constexpr int64_t kWave = 512;      // slots of a wave, or one expert with more
constexpr int64_t kTokens = 256;    // slots that meet a panel of `down` at a time
constexpr int64_t kPanels = 4;      // panels of a weight that are packed together: they fit into the second cache
constexpr int64_t kChannels = 64;   // of inputs that a thread adds up at a time
constexpr int64_t kPiece = 32;      // rows of a matrix whose gradients a thread computes at a time
constexpr int64_t kLineNumbers = 16;
constexpr int64_t kSlack = 64;      // numbers behind a buffer that a vector may read

// Memory that threads work in, one each at a time.
class Desks {
  public:
    Desks(float* memory, int64_t numbers, int count)
        : memory_(memory), numbers_(numbers), taken_(new std::atomic<bool>[count]), count_(count) {
        for (int at = 0; at < count; ++at) taken_[at].store(false);
    }
    // At most `count` threads ask, so one is free.
    int take() {
        for (int at = 0;; at = (at + 1) % count_)
            if (!taken_[at].exchange(true, std::memory_order_acquire)) return at;
    }
    void leave(int desk) { taken_[desk].store(false, std::memory_order_release); }
    float* memory(int desk) const { return memory_ + desk * numbers_; }

  private:
    float* memory_;
    int64_t numbers_;
    std::unique_ptr<std::atomic<bool>[]> taken_;
    int count_;
};

// What Python gives; a gradient that is null is not asked for.
struct Given {
    const void *gate, *up, *down;   // [E, m, d] twice, [E, d, m]
    const int64_t* experts;         // [n, k]
    const float* weights;           // [n, k]
    const void *x, *kept, *grads;   // [n, d]; [n, k, 2, m]; [n, d], of y
    void *d_gate, *d_up, *d_down, *d_x;
    float* d_weights;
    int64_t n, k, d, m, count;      // count is E
};

// All slots, sorted by expert.
struct Sorted {
    std::vector<int64_t> order;
    std::vector<const void*> x, grads, kept;
    std::vector<const void*> numbers;   // of grads, see gradients.h
    std::vector<void*> rows;            // in the wave at hand: numbers [2, m], gradients of gate and up
    std::vector<float*> inputs;         // in the wave at hand: [d], what the slot adds to the gradient of its token
    std::vector<float*> sums;           // [d], the gradient of its token
    std::vector<float> shares;
};

// The slots of an expert in the wave at hand, and their panels.
struct Bundle {
    int64_t expert, begin, end, steps;
    float *x, *grads, *hidden, *gate, *up;
};

enum Kind { PACK, HIDE, TAKE, GATE, UP, DOWN };

// What a thread takes at a time.
struct Task {
    Kind kind;
    int64_t bundle;
    int64_t begin, end;             // rows of GATE, UP and DOWN; else `begin` is a column
    int64_t from, to;               // slots of HIDE
};

struct Backward {
    const Gradients* machine;
    Dtype dtype;
    int threads;
    Given given;
    Sorted slots;
    std::vector<Bundle> bundles;
    std::vector<Task> tasks;
    float *numbers, *sums, *dots;   // of grads; of inputs; of weights, a row for each panel of `down`
    float *wave, *rows;             // memory for a wave, and the part of it that is free
    Desks* desks;

    int64_t steps(int64_t count) const { return (count + machine->step - 1) / machine->step; }
    int64_t lanes(int64_t columns) const {
        const int64_t whole = columns / machine->panel * machine->panel;
        return whole + rounded_up(columns - whole, machine->unit);
    }
    const char* matrix(const void* stack, int64_t expert) const {
        return shifted(stack, expert * given.m * given.d, dtype);
    }
    bool matrices() const { return given.d_gate || given.d_up || given.d_down; }
};

int64_t columns_of(const Backward& job, int64_t column, int64_t width) {
    return std::min(job.machine->panel, width - column);
}

void number_rows(const void* pointer, int64_t begin, int64_t end) {
    const Backward& job = *static_cast<const Backward*>(pointer);
    const int64_t d = job.given.d, steps = job.steps(d);
    for (int64_t token = begin; token < end; ++token)
        job.machine->numbers(job.dtype, shifted(job.given.grads, token * d, job.dtype), d, job.numbers + token * steps);
}

void pack_tokens(const Backward& job, const Task& task) {
    const Bundle& bundle = job.bundles[task.bundle];
    const int64_t columns = columns_of(job, task.begin, job.given.d), at = task.begin * bundle.steps;
    const int64_t count = bundle.end - bundle.begin;
    job.machine->gather(job.dtype, &job.slots.x[bundle.begin], count, task.begin, columns, bundle.x + at);
    job.machine->gather(job.dtype, &job.slots.grads[bundle.begin], count, task.begin, columns, bundle.grads + at);
}

void hide(const Backward& job, const Task& task, float* desk) {
    const Bundle& bundle = job.bundles[task.bundle];
    const int64_t d = job.given.d, m = job.given.m, panel = job.machine->panel, apart = job.steps(d) * panel;
    const int64_t last = std::min(task.begin + kPanels * panel, m), from = task.from, count = task.to - from;
    const Rows down{job.matrix(job.given.down, bundle.expert), m * size_of(job.dtype)};
    job.machine->pack(job.dtype, down, d, task.begin, last, desk, apart);
    for (int64_t column = task.begin; column < last; column += panel, desk += apart) {
        const int64_t columns = columns_of(job, column, m);
        const int64_t at = column * bundle.steps + (from - bundle.begin) / job.machine->step * job.lanes(columns);
        float* const dots = job.dots + column / panel * job.given.n * job.given.k + from;
        job.machine->hidden({{desk, job.steps(d), columns, column}, job.dtype, count, m, &job.slots.numbers[from],
                             &job.slots.kept[from], &job.slots.shares[from], &job.slots.rows[from], bundle.hidden + at,
                             bundle.gate + at, bundle.up + at, dots});
    }
}

// Behind the steps of gate in a panel stand those of up: one sum over both.
void take_inputs(const Backward& job, const Task& task, float* desk) {
    const Bundle& bundle = job.bundles[task.bundle];
    const int64_t d = job.given.d, m = job.given.m, panel = job.machine->panel, steps = job.steps(m);
    const int64_t last = std::min(task.begin + kPanels * panel, d), apart = 2 * steps * panel;
    const Rows gate{job.matrix(job.given.gate, bundle.expert), d * size_of(job.dtype)};
    const Rows up{job.matrix(job.given.up, bundle.expert), gate.bytes};
    const int64_t whole = (last - task.begin) / panel * panel, rest = last - task.begin - whole;
    job.machine->pack(job.dtype, gate, m, task.begin, last, desk, apart);
    float* const behind = desk + whole / panel * apart + steps * job.lanes(rest);
    if (whole) job.machine->pack(job.dtype, up, m, task.begin, task.begin + whole, desk + steps * panel, apart);
    if (rest) job.machine->pack(job.dtype, up, m, last - rest, last, behind, apart);
    for (int64_t column = task.begin; column < last; column += panel, desk += apart)
        job.machine->inputs({{desk, 2 * steps, columns_of(job, column, d), column}, bundle.end - bundle.begin,
                             &job.slots.rows[bundle.begin], &job.slots.inputs[bundle.begin]});
}

void multiply(const Backward& job, const Task& task) {
    const Bundle& bundle = job.bundles[task.bundle];
    const auto panels = [](const float* packed, int64_t columns) -> Panels {
        return {reinterpret_cast<const char*>(packed), columns};
    };
    const Panels x = panels(bundle.x, job.given.d), grads = panels(bundle.grads, job.given.d);
    const Panels hidden = panels(bundle.hidden, job.given.m);
    const auto outer = [&](const Panels& rows, const Panels& columns, void* stack) {
        void* to = const_cast<char*>(job.matrix(stack, bundle.expert));
        job.machine->outer({rows, columns, bundle.steps, task.begin, task.end, job.dtype, to});
    };
    if (task.kind == GATE) outer(panels(bundle.gate, job.given.m), x, job.given.d_gate);
    else if (task.kind == UP) outer(panels(bundle.up, job.given.m), x, job.given.d_up);
    else outer(grads, hidden, job.given.d_down);
}

void do_tasks(const void* pointer, int64_t begin, int64_t end) {
    const Backward& job = *static_cast<const Backward*>(pointer);
    const int desk = job.desks->take();
    for (int64_t at = begin; at < end; ++at) {
        const Task& task = job.tasks[at];
        if (task.kind == PACK) pack_tokens(job, task);
        else if (task.kind == HIDE) hide(job, task, job.desks->memory(desk));
        else if (task.kind == TAKE) take_inputs(job, task, job.desks->memory(desk));
        else multiply(job, task);
    }
    job.desks->leave(desk);
}

void run_tasks(Backward& job) {
    run(job.threads, static_cast<int64_t>(job.tasks.size()), 1, do_tasks, &job);
    job.tasks.clear();
}

// What the slots of the wave found, added up by token in the order of the experts.
void add_inputs(const void* pointer, int64_t begin, int64_t end) {
    const Backward& job = *static_cast<const Backward*>(pointer);
    for (const Bundle& bundle : job.bundles)
        for (int64_t slot = bundle.begin; slot < bundle.end; ++slot) {
            float* __restrict to = job.slots.sums[slot];
            const float* __restrict from = job.slots.inputs[slot];
            for (int64_t at = begin; at < end; ++at) to[at] += from[at];
        }
}

void add_pieces(Backward& job, Kind kind, const void* wanted, int64_t rows) {
    if (!wanted) return;
    for (size_t bundle = 0; bundle < job.bundles.size(); ++bundle)
        for (int64_t row = 0; row < rows; row += kPiece)
            job.tasks.push_back({kind, static_cast<int64_t>(bundle), row, std::min(row + kPiece, rows), 0, 0});
}

void run_wave(Backward& job) {
    const int64_t d = job.given.d, m = job.given.m, panel = job.machine->panel;
    for (size_t at = 0; at < job.bundles.size(); ++at) {
        const Bundle& bundle = job.bundles[at];
        const auto index = static_cast<int64_t>(at);
        for (int64_t column = 0; job.matrices() && column < d; column += panel)
            job.tasks.push_back({PACK, index, column, 0, 0, 0});
        for (int64_t column = 0; column < m; column += kPanels * panel)
            for (int64_t slot = bundle.begin; slot < bundle.end; slot += kTokens)
                job.tasks.push_back({HIDE, index, column, 0, slot, std::min(slot + kTokens, bundle.end)});
    }
    run_tasks(job);
    for (size_t bundle = 0; bundle < job.bundles.size(); ++bundle)
        for (int64_t column = 0; job.given.d_x && column < d; column += kPanels * panel)
            job.tasks.push_back({TAKE, static_cast<int64_t>(bundle), column, 0, 0, 0});
    add_pieces(job, GATE, job.given.d_gate, m);
    add_pieces(job, UP, job.given.d_up, m);
    add_pieces(job, DOWN, job.given.d_down, d);
    run_tasks(job);
    if (job.given.d_x) run(job.threads, d, kChannels, add_inputs, &job);
    job.bundles.clear();
}

// Numbers of 4 bytes that a step of slots takes: panels of x, t, h, gate and up, rows of gate and up, and inputs.
int64_t step_numbers(const Backward& job) {
    const int64_t panels = 2 * job.lanes(job.given.d) + 3 * job.lanes(job.given.m);
    return panels + (2 * job.steps(job.given.m) + job.given.d) * job.machine->step;
}

// Sorted of whole steps that an expert's panels need.
int64_t room_of(const Backward& job, int64_t slots) { return job.steps(slots) * job.machine->step; }

void add_bundle(Backward& job, int64_t expert, int64_t begin, int64_t end) {
    if (job.bundles.empty()) job.rows = job.wave;
    const int64_t steps = job.steps(end - begin), row = 2 * job.steps(job.given.m);
    Bundle bundle{expert, begin, end, steps, nullptr, nullptr, nullptr, nullptr, nullptr};
    for (int64_t slot = begin; slot < end; ++slot, job.rows += row) job.slots.rows[slot] = job.rows;
    for (int64_t slot = begin; slot < end; ++slot, job.rows += job.given.d) job.slots.inputs[slot] = job.rows;
    job.rows = job.wave + rounded_up(job.rows - job.wave, kLineNumbers);
    const auto take = [&](int64_t columns) {
        float* taken = job.rows;
        job.rows += steps * job.lanes(columns);
        return taken;
    };
    bundle.x = take(job.given.d), bundle.grads = take(job.given.d);
    bundle.hidden = take(job.given.m), bundle.gate = take(job.given.m), bundle.up = take(job.given.m);
    job.bundles.push_back(bundle);
}

// The ends of the experts' slots; `end` of expert e is ends[e + 1].
std::vector<int64_t> sort_slots(Backward& job) {
    const Given& given = job.given;
    const int64_t count = given.n * given.k, d_steps = job.steps(given.d);
    Sorted& slots = job.slots;
    slots.order.resize(count);
    std::iota(slots.order.begin(), slots.order.end(), 0);
    std::stable_sort(slots.order.begin(), slots.order.end(),
                     [&](int64_t a, int64_t b) { return given.experts[a] < given.experts[b]; });
    std::vector<int64_t> ends(given.count + 1);
    for (const int64_t slot : slots.order) {
        const int64_t token = slot / given.k;
        ++ends[given.experts[slot] + 1];
        slots.x.push_back(shifted(given.x, token * given.d, job.dtype));
        slots.grads.push_back(shifted(given.grads, token * given.d, job.dtype));
        slots.numbers.push_back(job.numbers + token * d_steps);
        slots.kept.push_back(shifted(given.kept, slot * 2 * given.m, job.dtype));
        slots.sums.push_back(job.sums + token * given.d);
        slots.shares.push_back(given.weights[slot]);
    }
    slots.rows.resize(count), slots.inputs.resize(count);
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    return ends;
}

void round_inputs(const void* pointer, int64_t begin, int64_t end) {
    const Backward& job = *static_cast<const Backward*>(pointer);
    for (int64_t at = begin * job.given.d; at < end * job.given.d; ++at)
        put(job.dtype, job.given.d_x, at, job.sums[at]);
}

// Experts without tokens have gradients of zeros.
void forget(const Backward& job, int64_t expert) {
    for (void* stack : {job.given.d_gate, job.given.d_up, job.given.d_down})
        if (stack) std::memset(const_cast<char*>(job.matrix(stack, expert)), 0,
                               job.given.m * job.given.d * size_of(job.dtype));
}

void add_dots(const Backward& job) {
    const int64_t count = job.given.n * job.given.k, panel = job.machine->panel;
    const int64_t panels = (job.given.m + panel - 1) / panel;
    for (int64_t at = 0; at < count; ++at) {
        float sum = 0.0f;
        for (int64_t index = 0; index < panels; ++index) sum += job.dots[index * count + at];
        job.given.d_weights[job.slots.order[at]] = sum;
    }
}

// How many slots the largest wave holds, a whole number of steps for every expert.
int64_t largest_wave(const Backward& job) {
    std::vector<int64_t> counts(job.given.count);
    for (int64_t slot = 0; slot < job.given.n * job.given.k; ++slot) ++counts[job.given.experts[slot]];
    const int64_t most = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
    return std::max(kWave, room_of(job, most));
}

void differentiate(Backward& job) {
    const Given& given = job.given;
    const int64_t slots = given.n * given.k, panels = (given.m + job.machine->panel - 1) / job.machine->panel;
    const int64_t desk = std::max(job.steps(given.d), 2 * job.steps(given.m)) * job.machine->panel * kPanels;
    const int64_t wave = largest_wave(job), padding = kLineNumbers * given.count + kSlack;
    const int64_t sizes[] = {given.n * job.steps(given.d) + kSlack, given.n * given.d, slots * panels,
                             wave / job.machine->step * step_numbers(job) + padding, job.threads * desk + kSlack};
    int64_t total = 0;
    for (const int64_t size : sizes) total += Scratch::rounded(size);
    Scratch scratch(total);
    job.numbers = scratch.take(sizes[0]), job.sums = scratch.take(sizes[1]), job.dots = scratch.take(sizes[2]);
    job.wave = scratch.take(sizes[3]);
    Desks desks(scratch.take(sizes[4]), desk, job.threads);
    job.desks = &desks;
    std::memset(job.sums, 0, given.n * given.d * sizeof(float));
    run(job.threads, given.n, 16, number_rows, &job);
    const std::vector<int64_t> ends = sort_slots(job);
    int64_t used = 0;
    for (int64_t expert = 0; expert < given.count; ++expert) {
        const int64_t begin = ends[expert], end = ends[expert + 1], room = room_of(job, end - begin);
        if (begin == end) {
            forget(job, expert);
            continue;
        }
        if (used > 0 && used + room > kWave) run_wave(job), used = 0;
        add_bundle(job, expert, begin, end);
        used += room;
    }
    run_wave(job);
    if (given.d_weights) add_dots(job);
    if (given.d_x) run(job.threads, given.n, 16, round_inputs, &job);
}

}  // namespace
}  // namespace seekvl

using namespace seekvl;

// Gradients of what seekvl_experts_kept computed, from that of y. A gradient whose address is null is not computed.
// d_gate, d_up [E, m, d], d_down [E, d, m] and d_x [n, d] are of `dtype`, d_weights [n, k] is float32. Returns 0, or 1
// where there was no memory.
EXPORT int32_t seekvl_experts_backward(int32_t level, int32_t threads, int32_t dtype, const void* gate, const void* up,
                                       const void* down, const int64_t* experts, const float* weights, const void* x,
                                       const void* kept, const void* grads, void* d_gate, void* d_up, void* d_down,
                                       void* d_x, float* d_weights, int64_t count, int64_t n, int64_t k, int64_t d,
                                       int64_t m) {
    try {
        const auto kind = static_cast<Dtype>(dtype);
        Backward job{};
        job.machine = &gradients_at(level, kind), job.dtype = kind, job.threads = threads;
        job.given = {gate, up, down, experts, weights, x, kept, grads, d_gate, d_up, d_down, d_x, d_weights,
                     n, k, d, m, count};
        differentiate(job);
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}
