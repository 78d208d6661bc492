#include "step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "attend.h"
#include "jobs.h"
#include "pool.h"
#include "rotary.h"
#include "router.h"

namespace seekvl {
namespace {

Dtype dtype_of(int64_t kind) { return static_cast<Dtype>(kind); }

// Rows of float32 as the products with a kind of weight take them: the one place where an input is made.
class Input {
  public:
    // Numbers of float32 that rows take beside themselves, whatever kinds of weights they meet.
    static int64_t room(int64_t count, int64_t width) {
        const int64_t rows = Scratch::rounded<QuantizedRow>(count);
        return Scratch::rounded(count * width) + 2 * (rows + room_of_rows(count, width));
    }

    Input(const Level& level, const PackedLevel& packed, const float* rows, int64_t count, int64_t width, float* room)
        : level_(level), packed_(packed), rows_(rows), count_(count), width_(width), room_(room) {}

    Dtype dtype(int64_t kind) const {
        if (is_packed(dtype_of(kind))) return dtype_of(kind);
        return level_.pairs && kind == BF16 ? BF16 : F32;
    }

    const void* row(int64_t index, int64_t kind) {
        const Dtype taken = dtype(kind);
        if (taken == F32) return rows_ + index * width_;
        if (is_packed(taken)) return quantized(taken) + index;
        if (!narrowed_) {
            narrowed_ = room_.take(count_ * width_);
            level_.narrow(BF16, rows_, narrowed_, count_ * width_);
        }
        return shifted(narrowed_, index * width_, BF16);
    }

  private:
    const QuantizedRow* quantized(Dtype kind) {
        QuantizedRow*& rows = quantized_[kind == INT4];
        if (rows) return rows;
        rows = room_.take<QuantizedRow>(count_);
        rows_in(room_, width_, count_, rows);
        for (int64_t index = 0; index < count_; ++index)
            packed_.quantize(kind, rows_ + index * width_, width_, rows[index]);
        return rows;
    }

    const Level& level_;
    const PackedLevel& packed_;
    const float* rows_;
    int64_t count_, width_;
    Scratch room_;
    float* narrowed_ = nullptr;
    QuantizedRow* quantized_[2] = {};  // in int8, in int4
};

// y[b] = W x[b] of n inputs, whose rows lie one after the other; input and output of float32.
Part part_of(const Matrix& matrix, Input& x, int64_t n, float* y) {
    Part part{{dtype_of(matrix.kind), x.dtype(matrix.kind), F32, matrix.width}, matrix.rows, {}, {}};
    Operand& m = part.matrix;
    m.weight = matrix.weight, m.bias = matrix.bias, m.batch = n;
    for (int64_t b = 0; b < n; ++b) m.x[b] = x.row(b, matrix.kind), m.y[b] = y + b * matrix.rows;
    return part;
}

Part gated_part_of(const Matrix& gate, const Matrix& up, Input& x, int64_t n, float* y) {
    Part part = part_of(gate, x, n, y);
    part.up = part.matrix;
    part.up.weight = up.weight, part.up.bias = up.bias;
    return part;
}

void add(const float* from, float* to, int64_t count) {
    for (int64_t at = 0; at < count; ++at) to[at] += from[at];
}

// The widest of each kind of activation in any layer.
struct Widths {
    int64_t query, key, mixed, hidden = 0, input;

    explicit Widths(const Network& net)
        : query(net.heads * (net.nope + net.rotary)),
          key(net.latent ? net.latent + net.rotary : net.kv_heads * net.rotary),
          mixed(net.heads * std::max(net.latent, net.value)) {
        for (int64_t index = 0; index < net.layer_count; ++index)
            hidden = std::max(hidden, net.layers[index].gate.rows);
        input = std::max({net.width, mixed, hidden});
    }
};

// Where activations are: numbers of float32 for each of the n tokens.
struct Buffers {
    float *x, *y, *normed, *q, *q_latent, *k, *v, *mixed, *values, *cos, *sin, *turned, *hidden, *input;
    float *logits, *ranking, *bias, *weights, *slots_hidden, *slots_input, *slots, *blocks;

    // `take` gives memory for a count of numbers.
    template <class Take>
    Buffers(const Network& net, const Router& router, int64_t expert_width, int64_t n, int64_t room, Take take) {
        const Widths widths(net);
        const int64_t chosen = n * router.active;
        for (float** wide : {&x, &y, &normed}) *wide = take(n * net.width);
        q = take(n * widths.query);
        q_latent = take(n * net.heads * net.latent);
        k = take(n * widths.key), v = take(n * widths.key);
        mixed = take(n * widths.mixed), values = take(n * widths.mixed);
        cos = take(n * net.rotary), sin = take(n * net.rotary), turned = take(net.rotary);
        hidden = take(n * widths.hidden), input = take(Input::room(n, widths.input));
        logits = take(n * router.experts), ranking = take(router.experts), bias = take(router.experts);
        weights = take(chosen);
        slots_hidden = take(chosen * expert_width), slots_input = take(Input::room(chosen, expert_width));
        slots = take(chosen * net.width);
        blocks = take(room);
    }
};

class Step {
  public:
    Step(const Level& level, const PackedLevel& packed, int threads, const Network& net, const Cache& cache,
         const Tokens& tokens)
        : level_(level), packed_(packed), threads_(threads), net_(net), cache_(cache), tokens_(tokens), n_(tokens.n),
          job_(level, threads, &packed),
          attender_(level, threads, tokens, net.heads, net.latent ? 1 : net.kv_heads, net.latent > 0),
          experts_(n_ * net.router.active),
          scratch_(needed()),
          b_(lay_out([this](int64_t count) { return scratch_.take(count); })) {}

    void run(float* logits) {
        embed();
        turn();
        for (int64_t layer = 0; layer < net_.layer_count; ++layer) {
            const Layer& part = net_.layers[layer];
            norm(part.attn_norm, b_.x, b_.normed, net_.width);
            if (net_.latent) attend_latent(part, layer);
            else attend_plain(part, layer);
            norm(part.mlp_norm, b_.x, b_.normed, net_.width);
            if (part.router.weight) feed_experts(part);
            else feed(part);
        }
        norm(net_.norm, b_.x, b_.normed, net_.width);
        multiply(net_.head, b_.normed, logits);
    }

  private:
    template <class Take>
    Buffers lay_out(Take take) const {
        int64_t expert_width = 0;
        for (int64_t layer = 0; layer < net_.layer_count; ++layer)
            expert_width = std::max(expert_width, net_.layers[layer].expert_gate.rows);
        const int64_t room = attender_.room(net_.latent ? net_.latent : net_.value);
        return Buffers(net_, net_.router, expert_width, n_, room, take);
    }

    int64_t needed() const {
        int64_t count = 0;
        lay_out([&count](int64_t more) -> float* {
            count += Scratch::rounded(more);
            return nullptr;
        });
        return count;
    }

    void embed() {
        const Dtype kind = dtype_of(net_.embed.kind);
        for (int64_t token = 0; token < n_; ++token)
            level_.widen(kind, shifted(net_.embed.weight, tokens_.ids[token] * net_.width, kind),
                         b_.x + token * net_.width, net_.width);
    }

    // Cosine and sine of every token's position.
    void turn() {
        const int64_t half = net_.rotary / 2;
        for (int64_t token = 0; token < n_; ++token)
            for (int64_t i = 0; i < half; ++i) {
                const float angle = static_cast<float>(tokens_.positions[token]) / net_.divisors[i];
                b_.cos[token * half + i] = cosf(angle);
                b_.sin[token * half + i] = sinf(angle);
            }
    }

    void norm(const Norm& norm, const float* from, float* to, int64_t width) {
        for (int64_t token = 0; token < n_; ++token)
            level_.norm(dtype_of(norm.kind), norm.weight, static_cast<float>(norm.eps), from + token * width,
                        to + token * width, width);
    }

    void multiply(const Matrix& matrix, const float* x, float* y) {
        Input input(level_, packed_, x, n_, matrix.width, b_.input);
        job_.add(part_of(matrix, input, n_, y));
        job_.run();
    }

    // Write one head's numbers of a token to its column of a cache buffer [rows, k, capacity, width].
    void keep(void* buffer, int64_t token, int64_t head, int64_t heads, const float* from, int64_t width) {
        const int64_t row = tokens_.slots[token] * heads + head;
        const int64_t column = row * cache_.capacity + tokens_.positions[token];
        const Dtype kind = dtype_of(cache_.kind);
        level_.narrow(kind, from, const_cast<char*>(shifted(buffer, column * width, kind)), width);
    }

    void attend_plain(const Layer& layer, int64_t index) {
        const int64_t e = net_.rotary, half = e / 2;
        Input input(level_, packed_, b_.normed, n_, net_.width, b_.input);
        job_.add(part_of(layer.q, input, n_, b_.q));
        job_.add(part_of(layer.k, input, n_, b_.k));
        job_.add(part_of(layer.v, input, n_, b_.v));
        job_.run();
        scale_queries();
        for (int64_t token = 0; token < n_; ++token) {
            const float *cos = b_.cos + token * half, *sin = b_.sin + token * half;
            for (int64_t head = 0; head < net_.heads; ++head)
                rotate_halves(b_.q + (token * net_.heads + head) * e, cos, sin, half);
            for (int64_t head = 0; head < net_.kv_heads; ++head) {
                const int64_t at = (token * net_.kv_heads + head) * e;
                rotate_halves(b_.k + at, cos, sin, half);
                keep(cache_.keys[index], token, head, net_.kv_heads, b_.k + at, e);
                keep(cache_.values[index], token, head, net_.kv_heads, b_.v + at, e);
            }
        }
        attender_.run({dtype_of(cache_.kind), cache_.capacity, cache_.keys[index], cache_.values[index], e, e,
                       b_.q, e, nullptr, b_.mixed}, b_.blocks);
        finish_attention(layer, b_.mixed);
    }

    // The queries meet the latent itself: the key half of kv_b moves to them, its value half behind the attention.
    void attend_latent(const Layer& layer, int64_t index) {
        const int64_t rank = net_.latent, half = net_.rotary / 2, query = net_.nope + net_.rotary;
        Input input(level_, packed_, b_.normed, n_, net_.width, b_.input);
        job_.add(part_of(layer.q, input, n_, b_.q));
        job_.add(part_of(layer.kv_a, input, n_, b_.k));
        job_.run();
        scale_queries();
        for (int64_t token = 0; token < n_; ++token) {
            const float *cos = b_.cos + token * half, *sin = b_.sin + token * half;
            for (int64_t head = 0; head < net_.heads; ++head)
                rotate_pairs(b_.q + (token * net_.heads + head) * query + net_.nope, cos, sin, half, b_.turned);
            float *latent = b_.k + token * (rank + net_.rotary), *key = latent + rank;
            rotate_pairs(key, cos, sin, half, b_.turned);
            level_.norm(dtype_of(layer.latent_norm.kind), layer.latent_norm.weight,
                        static_cast<float>(layer.latent_norm.eps), latent, latent, rank);
            keep(cache_.keys[index], token, 0, 1, key, net_.rotary);
            keep(cache_.values[index], token, 0, 1, latent, rank);
        }
        absorb(layer.kv_b);
        attender_.run({dtype_of(cache_.kind), cache_.capacity, cache_.keys[index], cache_.values[index],
                       net_.rotary, rank, b_.q + net_.nope, query, b_.q_latent, b_.mixed}, b_.blocks);
        expand(layer.kv_b);
        finish_attention(layer, b_.values);
    }

    void scale_queries() {
        const int64_t count = n_ * net_.heads * (net_.nope + net_.rotary);
        for (int64_t at = 0; at < count; ++at) b_.q[at] *= static_cast<float>(net_.scale);
    }

    // A head's rows of kv_b: `nope` of the key, then `value` of the value.
    const void* rows_of_head(const Matrix& kv_b, int64_t head, int64_t row) const {
        return shifted(kv_b.weight, (head * (net_.nope + net_.value) + row) * kv_b.width, dtype_of(kv_b.kind));
    }

    // q_latent[n, h, r] = q[n, h, nope] times the key rows of kv_b.
    void absorb(const Matrix& kv_b) {
        struct Task { Step* step; const Matrix* kv_b; } task{this, &kv_b};
        const auto work = [](const void* pointer, int64_t begin, int64_t end) {
            const Task& task = *static_cast<const Task*>(pointer);
            for (int64_t head = begin; head < end; ++head) task.step->absorb(*task.kv_b, head);
        };
        seekvl::run(threads_, net_.heads, 1, work, &task);
    }

    void absorb(const Matrix& kv_b, int64_t head) {
        Operand m{};
        m.weight = rows_of_head(kv_b, head, 0), m.batch = n_;
        for (int64_t token = 0; token < n_; ++token) {
            const int64_t at = token * net_.heads + head;
            m.x[token] = b_.q + at * (net_.nope + net_.rotary);
            m.y[token] = b_.q_latent + at * net_.latent;
        }
        level_.mix({dtype_of(kv_b.kind), F32, F32, kv_b.width}, m, net_.nope);
    }

    // values[n, h, w] = the value rows of kv_b times mixed[n, h, r].
    void expand(const Matrix& kv_b) {
        Input input(level_, packed_, b_.mixed, n_ * net_.heads, net_.latent, b_.input);
        for (int64_t head = 0; head < net_.heads; ++head) {
            Part part{{dtype_of(kv_b.kind), input.dtype(kv_b.kind), F32, kv_b.width}, net_.value, {}, {}};
            Operand& m = part.matrix;
            m.weight = rows_of_head(kv_b, head, net_.nope), m.batch = n_;
            for (int64_t token = 0; token < n_; ++token) {
                const int64_t at = token * net_.heads + head;
                m.x[token] = input.row(at, kv_b.kind);
                m.y[token] = b_.values + at * net_.value;
            }
            job_.add(part);
        }
        job_.run();
    }

    void finish_attention(const Layer& layer, const float* mixed) {
        multiply(layer.o, mixed, b_.y);
        add(b_.y, b_.x, n_ * net_.width);
    }

    void feed(const Layer& layer) {
        Input input(level_, packed_, b_.normed, n_, net_.width, b_.input);
        job_.add(gated_part_of(layer.gate, layer.up, input, n_, b_.hidden));
        job_.run();
        multiply(layer.down, b_.hidden, b_.y);
        add(b_.y, b_.x, n_ * net_.width);
    }

    // The shared experts run beside the router first and beside the chosen experts then.
    void feed_experts(const Layer& layer) {
        const int64_t active = net_.router.active, m = layer.expert_gate.rows;
        const Dtype kind = dtype_of(layer.expert_gate.kind);
        Input input(level_, packed_, b_.normed, n_, net_.width, b_.input);
        Part router{{dtype_of(layer.router.kind), F32, F32, net_.width}, layer.router.rows, {}, {}};
        router.matrix.weight = layer.router.weight, router.matrix.batch = n_;
        for (int64_t token = 0; token < n_; ++token) {  // in float32, whatever the weights are stored in
            router.matrix.x[token] = b_.normed + token * net_.width;
            router.matrix.y[token] = b_.logits + token * net_.router.experts;
        }
        job_.add(router);
        if (layer.gate.weight) job_.add(gated_part_of(layer.gate, layer.up, input, n_, b_.hidden));
        job_.run();
        choose(layer);

        const Dtype taken = input.dtype(kind);
        const Slots first{input.row(0, kind), active, b_.slots_hidden};
        for (const Group& group : groups_)
            job_.add(seekvl::part_of({kind, taken, F32, net_.width}, m, group, first, layer.expert_gate.weight,
                                     layer.expert_up.weight));
        job_.run();

        Input hidden(level_, packed_, b_.slots_hidden, n_ * active, m, b_.slots_input);
        const Slots second{hidden.row(0, kind), 1, b_.slots};
        for (const Group& group : groups_)
            job_.add(seekvl::part_of({kind, taken, F32, m}, net_.width, group, second, layer.expert_down.weight));
        Input shared(level_, packed_, b_.hidden, n_, layer.down.width, b_.input);
        if (layer.down.weight) job_.add(part_of(layer.down, shared, n_, b_.y));
        job_.run();
        join(layer.down.weight != nullptr);
    }

    void choose(const Layer& layer) {
        const Router& router = net_.router;
        if (layer.router_bias) level_.widen(dtype_of(layer.router_bias_kind), layer.router_bias, b_.bias, router.experts);
        for (int64_t token = 0; token < n_; ++token)
            route(router, b_.logits + token * router.experts, layer.router_bias ? b_.bias : nullptr, b_.ranking,
                  experts_.data() + token * router.active, b_.weights + token * router.active);
        group_by_expert(experts_.data(), n_ * router.active, groups_);
    }

    // Add the chosen experts, weighted, and the shared ones to the stream.
    void join(bool shared) {
        const int64_t active = net_.router.active, width = net_.width;
        for (int64_t token = 0; token < n_; ++token) {
            float *x = b_.x + token * width, *y = b_.y + token * width;
            if (!shared) std::fill(y, y + width, 0.0f);
            for (int64_t slot = token * active; slot < (token + 1) * active; ++slot) {
                const float weight = b_.weights[slot], *from = b_.slots + slot * width;
                for (int64_t at = 0; at < width; ++at) y[at] += weight * from[at];
            }
            add(y, x, width);
        }
    }

    const Level& level_;
    const PackedLevel& packed_;
    int threads_;
    const Network& net_;
    const Cache& cache_;
    const Tokens& tokens_;
    int64_t n_;
    Job job_;
    Attender attender_;
    std::vector<int64_t> experts_;
    std::vector<Group> groups_;
    Scratch scratch_;
    Buffers b_;
};

}  // namespace

void step(const Level& level, const PackedLevel& packed, int threads, const Network& network, const Cache& cache,
          const Tokens& tokens, float* logits) {
    Step(level, packed, threads, network, cache, tokens).run(logits);
}

}  // namespace seekvl
