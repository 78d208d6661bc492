#include "prompt.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "experts.h"
#include "jobs.h"
#include "numbers.h"
#include "prompt_products.h"
#include "rotary.h"
#include "router.h"
#include "shared_rows.h"

namespace seekvl {
namespace {

constexpr int64_t kGrain = 16;          // tokens, or columns of the cache, of what is no product
constexpr int64_t kExpanded = 1 << 23;  // numbers of keys and values that are expanded from a latent at a time

Dtype dtype_of(int64_t kind) { return static_cast<Dtype>(kind); }

// to[channel, column] = from[column, channel], converted.
template <class From, class To, class Convert>
void turn_with(const From* from, int64_t from_stride, int64_t columns, int64_t width, To* to, int64_t to_stride,
               Convert convert) {
    for (int64_t channel = 0; channel < width; ++channel)
        for (int64_t column = 0; column < columns; ++column)
            to[channel * to_stride + column] = convert(from[column * from_stride + channel]);
}

// The sizes of a network that prompts go by.
struct Sizes {
    int64_t query, key, mixed, packed, hidden = 0;
    int64_t key_width, value_width;     // of a head that attends
    Readers readers, hidden_readers;    // of the stream and of what attention leaves; of hidden numbers

    explicit Sizes(const Network& net)
        : query(net.heads * (net.nope + net.rotary)),
          key(net.latent ? net.latent + net.rotary : net.kv_heads * net.rotary),
          mixed(net.heads * net.value),
          packed(std::max(net.width, mixed)),
          key_width(net.nope + net.rotary),
          value_width(net.value),
          readers{&net.head},
          hidden_readers{} {
        for (int64_t index = 0; index < net.layer_count; ++index) {
            const Layer& layer = net.layers[index];
            hidden = std::max(hidden, layer.gate.rows);
            readers.join({&layer.q, &layer.k, &layer.v, &layer.kv_a, &layer.o, &layer.gate, &layer.expert_gate});
            hidden_readers.join({&layer.gate, &layer.down});
        }
    }

    // Whether hidden numbers are needed row by row.
    bool hidden_rows() const { return hidden_readers.int8 || hidden_readers.int4; }
};

class Filling {
  public:
    Filling(const Machinery& machine, int threads, const Network& net, const Cache& cache, const Prompt& prompt)
        : level_(machine.level), many_(machine.many), packed_(machine.packed), attend_(machine.attend),
          threads_(threads), net_(net), cache_(cache), prompt_(prompt), sizes_(net),
          products_(level_, many_, packed_, threads), n_(prompt.n), seen_(prompt.start + prompt.n),
          first_(0), kv_heads_(net.latent ? net.heads : net.kv_heads),
          input_(many_.pairs && net.embed.kind == BF16 ? BF16 : F32),
          seen_input_(many_.pairs && cache.kind == BF16 ? BF16 : F32),
          latent_input_(input_ == BF16 && cache.kind == BF16 ? BF16 : F32),
          stride_(rounded_up(seen_, 2)),
          cuts_(many_, 0, n_), seen_cuts_(many_, 0, net.latent ? seen_ : 0),
          experts_(n_ * net.router.active), scratch_(needed()) {
        lay_out([this](int64_t count) { return scratch_.take(count); });
        rows_of(x_, net.width, x_rows_), rows_of(q_, sizes_.query, q_rows_);
        rows_of(k_, sizes_.key, k_rows_), rows_of(v_, sizes_.key, v_rows_);
        std::fill(ones_, ones_ + n_, 1.0f);
    }

    void run() {
        embed();
        for (int64_t index = 0; index < net_.layer_count; ++index) {
            const Layer& layer = net_.layers[index];
            normalise(layer.attn_norm, {&layer.q, &layer.k, &layer.v, &layer.kv_a});
            keep(layer, index);
            if (index + 1 == net_.layer_count && !prompt_.hidden) {
                if (!prompt_.logits) return;
                go_on_with_last(layer);
            }
            attend(layer, index);
            normalise(layer.mlp_norm, {&layer.gate, &layer.expert_gate});
            if (layer.router.weight) feed_experts(layer);
            else feed(layer);
        }
        finish();
    }

  private:
    // Give every buffer its memory; `take` gives memory for a count of numbers.
    template <class Take>
    void lay_out(Take take) {
        const int64_t half = net_.rotary / 2, experts = net_.router.experts;
        for (float** wide : {&x_, &normed_}) *wide = take(n_ * net_.width);
        forms_ = make_forms(cuts_, sizes_.packed, input_, sizes_.readers, take);
        hidden_forms_ = make_forms(cuts_, sizes_.hidden, input_, sizes_.hidden_readers, take);
        if (sizes_.hidden_rows()) hidden_ = take(n_ * sizes_.hidden);
        q_ = take(n_ * sizes_.query), k_ = take(n_ * sizes_.key), v_ = take(net_.latent ? 0 : n_ * sizes_.key);
        mixed_ = take(n_ * sizes_.mixed);
        cos_ = take(n_ * half), sin_ = take(n_ * half);
        values_ = take(kv_heads_ * net_.value * stride_ * size_of(seen_input_) / 4 + 1);
        if (net_.latent) {
            latents_ = make_forms(seen_cuts_, net_.latent, latent_input_, {&net_.layers[0].kv_b}, take);
            expanded_ = take(seen_ * expanded_heads() * (net_.nope + net_.value));
            keys_ = take(net_.heads * seen_ * sizes_.key_width * size_of(seen_input_) / 4 + 1);
        }
        scores_ = take(n_ * experts), ranking_ = take(n_ * experts), bias_ = take(experts);
        weights_ = take(n_ * net_.router.active), ones_ = take(n_);
        room_ = Scratch::rounded(attend_room(sizes_.key_width, sizes_.value_width));
        rooms_ = take(room_ * threads_);
    }

    int64_t needed() {
        int64_t count = 0;
        lay_out([&count](int64_t more) -> float* {
            count += Scratch::rounded(more);
            return nullptr;
        });
        return count;
    }

    // Heads whose keys and values are expanded at a time.
    int64_t expanded_heads() const {
        return std::clamp<int64_t>(kExpanded / (seen_ * (net_.nope + net_.value)), 1, net_.heads);
    }

    void rows_of(float* from, int64_t width, std::vector<float*>& rows) const {
        for (int64_t token = 0; token < n_; ++token) rows.push_back(from + token * width);
    }

    // Call task(token) for all tokens that go on.
    template <class Task>
    void each_token(const Task& task) const {
        each(threads_, rounded_up(n_ - first_, kGrain) / kGrain, [&](int64_t grain) {
            const int64_t begin = first_ + grain * kGrain, end = std::min(begin + kGrain, n_);
            for (int64_t token = begin; token < end; ++token) task(token);
        });
    }

    void embed() {
        const Dtype kind = dtype_of(prompt_.kind);
        const int64_t half = net_.rotary / 2;
        each_token([&](int64_t token) {
            level_.widen(kind, shifted(prompt_.embeds, token * net_.width, kind), x_rows_[token], net_.width);
            for (int64_t i = 0; i < half; ++i) {
                const float angle = static_cast<float>(prompt_.start + token) / net_.divisors[i];
                cos_[token * half + i] = cosf(angle), sin_[token * half + i] = sinf(angle);
            }
        });
    }

    // From here on only the last token counts: nobody asks for what the others become.
    void go_on_with_last(const Layer& layer) {
        first_ = n_ - 1;
        cuts_ = Cuts(many_, first_, 1);
        products_.prepare(normed_, net_.width, cuts_, {&layer.q}, forms_);
    }

    void norm(const Norm& norm, int64_t token) {
        level_.norm(dtype_of(norm.kind), norm.weight, static_cast<float>(norm.eps), x_rows_[token],
                    normed_ + token * net_.width, net_.width);
    }

    // Norm the stream and prepare it for its readers.
    void normalise(const Norm& by, const Readers& readers) {
        each(threads_, cuts_.all.size(), [&](int64_t index) {
            const Cut& cut = cuts_.all[index];
            for (int64_t row = 0; row < cut.rows; ++row) norm(by, cut.first + row);
            products_.prepare(normed_, net_.width, cut, readers, forms_);
        });
    }

    // What `normalise` has prepared.
    Prepared stream() const { return {forms_, cuts_, net_.width}; }

    // The stream gets what a matrix makes of prepared rows.
    void add_product(const Prepared& x, const Matrix& matrix) {
        products_.multiply(x, {{&matrix, x_rows_.data()}}, ones_);
    }

    static char* bytes(float* numbers) { return reinterpret_cast<char*>(numbers); }

    // Where the cache keeps what a head has at a column.
    char* column_of(void* buffer, int64_t head, int64_t heads, int64_t column, int64_t width) const {
        const int64_t at = ((prompt_.slot * heads + head) * cache_.capacity + column) * width;
        return const_cast<char*>(shifted(buffer, at, dtype_of(cache_.kind)));
    }

    void store(void* buffer, int64_t token, int64_t head, int64_t heads, const float* from, int64_t width) const {
        char* const to = column_of(buffer, head, heads, prompt_.start + token, width);
        level_.narrow(dtype_of(cache_.kind), from, to, width);
    }

    // What the layer keeps of the tokens.
    void keep(const Layer& layer, int64_t index) {
        if (net_.latent) keep_latents(layer, index);
        else keep_heads(layer, index);
    }

    void keep_heads(const Layer& layer, int64_t index) {
        const int64_t e = net_.rotary, half = e / 2, heads = net_.kv_heads;
        products_.multiply(stream(), {{&layer.k, k_rows_.data()}, {&layer.v, v_rows_.data()}});
        each_token([&](int64_t token) {
            for (int64_t head = 0; head < heads; ++head) {
                float* const key = k_rows_[token] + head * e;
                rotate_halves(key, cos_ + token * half, sin_ + token * half, half);
                store(cache_.keys[index], token, head, heads, key, e);
                store(cache_.values[index], token, head, heads, v_rows_[token] + head * e, e);
            }
        });
    }

    void keep_latents(const Layer& layer, int64_t index) {
        const int64_t half = net_.rotary / 2;
        const Norm& by = layer.latent_norm;
        products_.multiply(stream(), {{&layer.kv_a, k_rows_.data()}});
        each_token([&](int64_t token) {
            float *latent = k_rows_[token], *key = latent + net_.latent;
            turn_pairs(key, token, half);
            level_.norm(dtype_of(by.kind), by.weight, static_cast<float>(by.eps), latent, latent, net_.latent);
            store(cache_.keys[index], token, 0, 1, key, net_.rotary);
            store(cache_.values[index], token, 0, 1, latent, net_.latent);
        });
    }

    // Of a token that is not computed any more the query is free to work in.
    void turn_pairs(float* x, int64_t token, int64_t half) {
        rotate_pairs(x, cos_ + token * half, sin_ + token * half, half, q_rows_[token]);
    }

    void attend(const Layer& layer, int64_t index) {
        products_.multiply(stream(), {{&layer.q, q_rows_.data()}});
        turn_queries();
        if (net_.latent) expand(layer.kv_b, index);
        else turn_values(index);
        attend_tiles(index);
        products_.prepare(mixed_, sizes_.mixed, cuts_, {&layer.o}, forms_);
        add_product({forms_, cuts_, sizes_.mixed}, layer.o);
    }

    void turn_queries() {
        const int64_t half = net_.rotary / 2, width = sizes_.key_width;
        each_token([&](int64_t token) {
            float* const q = q_rows_[token];
            float* const turned = k_rows_[token];  // kept already, free to work in
            for (int64_t at = 0; at < sizes_.query; ++at) q[at] *= static_cast<float>(net_.scale);
            for (int64_t head = 0; head < net_.heads; ++head) {
                const float *cos = cos_ + token * half, *sin = sin_ + token * half;
                if (net_.latent) rotate_pairs(q + head * width + net_.nope, cos, sin, half, turned);
                else rotate_halves(q + head * width, cos, sin, half);
            }
        });
    }

    // Call task(head, begin, end) for all heads and parts of the columns that are seen.
    template <class Task>
    void each_part(int64_t heads, const Task& task) const {
        const int64_t parts = rounded_up(seen_, kColumns) / kColumns;
        each(threads_, heads * parts, [&](int64_t index) {
            const int64_t begin = index % parts * kColumns;
            task(index / parts, begin, std::min(begin + kColumns, seen_));
        });
    }

    // Values of a head, a channel after the other.
    void* values_of(int64_t head) const {
        return bytes(values_) + head * net_.value * stride_ * size_of(seen_input_);
    }

    void turn_values(int64_t index) {
        const int64_t width = net_.value;
        each_part(kv_heads_, [&](int64_t head, int64_t begin, int64_t end) {
            const void* from = column_of(cache_.values[index], head, kv_heads_, begin, width);
            const int64_t count = end - begin;
            if (seen_input_ == BF16) {
                uint16_t* const to = static_cast<uint16_t*>(values_of(head)) + begin;
                turn_with(static_cast<const uint16_t*>(from), width, count, width, to, stride_,
                          [](uint16_t x) { return x; });
            } else {
                float* const to = static_cast<float*>(values_of(head)) + begin;
                if (cache_.kind == F32)
                    turn_with(static_cast<const float*>(from), width, count, width, to, stride_,
                              [](float x) { return x; });
                else if (cache_.kind == F16)
                    turn_with(static_cast<const uint16_t*>(from), width, count, width, to, stride_, from_f16);
                else
                    turn_with(static_cast<const uint16_t*>(from), width, count, width, to, stride_, from_bf16);
            }
            close_values(head, end);
        });
    }

    // Behind an odd number of columns there is one more, of zeros.
    void close_values(int64_t head, int64_t end) const {
        if (end < seen_ || seen_ == stride_) return;
        for (int64_t channel = 0; channel < net_.value; ++channel)
            put(seen_input_, values_of(head), channel * stride_ + seen_, 0.0f);
    }

    // Keys and values of every head from the latents of all columns, some heads at a time.
    void expand(const Matrix& kv_b, int64_t index) {
        each(threads_, seen_cuts_.all.size(), [&](int64_t at) { pack_latents(seen_cuts_.all[at], index); });
        const int64_t rows = net_.nope + net_.value, most = expanded_heads();
        std::vector<float*> to(seen_);
        for (int64_t first = 0; first < net_.heads; first += most) {
            const int64_t heads = std::min(most, net_.heads - first), width = heads * rows;
            for (int64_t column = 0; column < seen_; ++column) to[column] = expanded_ + column * width;
            Matrix part = kv_b;
            part.weight = shifted(kv_b.weight, first * rows * kv_b.width, dtype_of(kv_b.kind)), part.rows = width;
            products_.multiply({latents_, seen_cuts_, net_.latent}, {{&part, to.data()}});
            each_part(heads, [&](int64_t head, int64_t begin, int64_t end) {
                const float* from = expanded_ + begin * width + head * rows;
                join_keys(first + head, from, width, begin, end, index);
                turn_expanded(first + head, from + net_.nope, width, begin, end);
            });
        }
    }

    void pack_latents(const Cut& cut, int64_t index) const {
        const void* from[kMostLanes];
        for (int64_t row = 0; row < cut.rows; ++row)
            from[row] = column_of(cache_.values[index], 0, 1, cut.first + row, net_.latent);
        const Product by{latent_input_, latent_input_, F32, net_.latent};
        many_.pack(by, dtype_of(cache_.kind), from, latents_.block(cut, net_.latent));
    }

    void* keys_of(int64_t head) const {
        return bytes(keys_) + head * seen_ * sizes_.key_width * size_of(seen_input_);
    }

    // A key: channels of its head, and the rotary ones that all heads share.
    void join_keys(int64_t head, const float* from, int64_t stride, int64_t begin, int64_t end, int64_t index) const {
        const Dtype kind = dtype_of(cache_.kind);
        const int64_t bytes = net_.rotary * size_of(seen_input_);
        for (int64_t column = begin; column < end; ++column, from += stride) {
            char* to = const_cast<char*>(shifted(keys_of(head), column * sizes_.key_width, seen_input_));
            level_.narrow(seen_input_, from, to, net_.nope);
            to += net_.nope * size_of(seen_input_);
            const char* shared = column_of(cache_.keys[index], 0, 1, column, net_.rotary);
            if (kind == seen_input_) std::copy(shared, shared + bytes, to);
            else for (int64_t at = 0; at < net_.rotary; ++at) put(F32, to, at, get(kind, shared, at));
        }
    }

    void turn_expanded(int64_t head, const float* from, int64_t stride, int64_t begin, int64_t end) const {
        const int64_t count = end - begin;
        if (seen_input_ == BF16)
            turn_with(from, stride, count, net_.value, static_cast<uint16_t*>(values_of(head)) + begin, stride_, to_bf16);
        else
            turn_with(from, stride, count, net_.value, static_cast<float*>(values_of(head)) + begin, stride_,
                      [](float x) { return x; });
        close_values(head, end);
    }

    // The tiles that see most come first, so that threads end together.
    void attend_tiles(int64_t index) {
        Rooms rooms(rooms_, room_, threads_);
        const int64_t tiles = cuts_.all.size();
        each(threads_, tiles * net_.heads, [&](int64_t at) {
            const int room = rooms.take();
            attend_(tile_of(cuts_.all[tiles - 1 - at / net_.heads], at % net_.heads, index), rooms.at(room));
            rooms.give_back(room);
        });
    }

    Tile tile_of(const Cut& cut, int64_t head, int64_t index) const {
        const int64_t shared = head / (net_.heads / kv_heads_);
        Tile tile{};
        tile.kind = net_.latent ? seen_input_ : dtype_of(cache_.kind), tile.input = seen_input_;
        tile.keys = net_.latent ? keys_of(head) : column_of(cache_.keys[index], shared, kv_heads_, 0, net_.rotary);
        tile.key_width = sizes_.key_width, tile.value_width = net_.value;
        tile.values = values_of(shared), tile.stride = stride_;
        tile.q = q_rows_[cut.first] + head * sizes_.key_width, tile.q_stride = sizes_.query;
        tile.out = mixed_ + cut.first * sizes_.mixed + head * net_.value, tile.out_stride = sizes_.mixed;
        tile.rows = cut.rows, tile.first = prompt_.start + cut.first;
        return tile;
    }

    // The SwiGLU, or the shared experts.
    void feed(const Layer& layer) {
        products_.gate(stream(), layer, hidden_, hidden_forms_);
        add_product({hidden_forms_, cuts_, layer.gate.rows}, layer.down);
    }

    void feed_experts(const Layer& layer) {
        choose(layer);
        const Stacks stacks{dtype_of(layer.expert_gate.kind), layer.expert_gate.weight, layer.expert_up.weight,
                            layer.expert_down.weight, layer.expert_gate.rows, net_.width};
        const int64_t active = net_.router.active, from = first_ * net_.width;
        const Chosen chosen{experts_.data() + first_ * active, weights_ + first_ * active, n_ - first_, active};
        if (is_packed(stacks.kind)) {
            add_packed_experts(packed_, threads_, stacks, &forms_.quantized(stacks.kind)[first_], chosen,
                               &x_rows_[first_]);
        } else {
            const void* const x = input_ == BF16 ? forms_.narrow + from : static_cast<const void*>(normed_ + from);
            add_experts(many_, threads_, stacks, {chosen.experts, chosen.weights, x, input_, chosen.count, active},
                        x_rows_[first_]);
        }
        if (layer.gate.weight) feed(layer);
    }

    // Router and choice, in float32 whatever the weights are stored in.
    void choose(const Layer& layer) {
        const Router& router = net_.router;
        const Product by{dtype_of(layer.router.kind), F32, F32, net_.width};
        if (layer.router_bias)
            level_.widen(dtype_of(layer.router_bias_kind), layer.router_bias, bias_, router.experts);
        each(threads_, rounded_up(n_ - first_, kMaxBatch) / kMaxBatch, [&](int64_t group) {
            const int64_t begin = first_ + group * kMaxBatch, end = std::min<int64_t>(begin + kMaxBatch, n_);
            Operand m{};
            m.weight = layer.router.weight, m.batch = end - begin;
            for (int64_t token = begin; token < end; ++token) {
                m.x[token - begin] = normed_ + token * net_.width;
                m.y[token - begin] = scores_ + token * router.experts;
            }
            level_.rows(by, m, 0, router.experts);
            for (int64_t token = begin; token < end; ++token)
                route(router, scores_ + token * router.experts, layer.router_bias ? bias_ : nullptr,
                      ranking_ + token * router.experts, experts_.data() + token * router.active,
                      weights_ + token * router.active);
        });
    }

    // What is asked for, from the stream.
    void finish() {
        each_token([&](int64_t token) { norm(net_.norm, token); });
        if (prompt_.hidden) std::copy(normed_, normed_ + n_ * net_.width, prompt_.hidden);
        if (!prompt_.logits) return;
        const float* last = normed_ + (n_ - 1) * net_.width;
        const Matrix& head = net_.head;
        Part part{{dtype_of(head.kind), dtype_of(head.kind), F32, head.width}, head.rows, {}, {}};
        Operand& m = part.matrix;
        m.weight = head.weight, m.bias = head.bias, m.batch = 1;
        m.y[0] = prompt_.logits;
        if (is_packed(part.product.weight)) {
            const QuantizedRow& row = forms_.quantized(head.kind)[n_ - 1];
            packed_.quantize(part.product.weight, last, net_.width, row);
            m.x[0] = &row;
        } else if (level_.pairs && head.kind == BF16) {
            level_.narrow(BF16, last, forms_.narrow, net_.width);
            m.x[0] = forms_.narrow;
        } else {
            part.product.input = F32, m.x[0] = last;
        }
        Job job(level_, threads_, &packed_);
        job.add(part);
        job.run();
    }

    const Level& level_;
    const Many& many_;
    const PackedLevel& packed_;
    AttendTile attend_;
    int threads_;
    const Network& net_;
    const Cache& cache_;
    const Prompt& prompt_;
    Sizes sizes_;
    Products products_;
    int64_t n_, seen_;
    int64_t first_;                     // of the tokens that go on
    int64_t kv_heads_;                  // that attend; with a latent all of them
    Dtype input_;                       // of the products with plain matrices
    Dtype seen_input_, latent_input_;   // of those with keys and values, and with latents
    int64_t stride_;                    // of turned values
    Cuts cuts_, seen_cuts_;
    std::vector<int64_t> experts_;
    Forms forms_, hidden_forms_, latents_;
    Scratch scratch_;                   // behind the forms, which are laid out to know its size
    std::vector<float*> x_rows_, q_rows_, k_rows_, v_rows_;
    float *x_, *normed_, *q_, *k_, *v_, *mixed_, *cos_, *sin_, *values_;
    float *hidden_ = nullptr, *expanded_ = nullptr, *keys_ = nullptr;
    float *scores_, *ranking_, *bias_, *weights_, *ones_, *rooms_;
    int64_t room_;
};

}  // namespace

int64_t attend_room(int64_t key_width, int64_t value_width) {
    constexpr int64_t softmax = sizeof(Softmax) / sizeof(float), line = 16;
    const int64_t results = rounded_up(value_width, kStrip), queries = key_width + 1;
    const int64_t shares = std::max(kColumns, (key_width + 1) / 2);
    return softmax + (results + queries + shares) * kMostLanes + 4 * line;
}

void fill(const Machinery& machine, int threads, const Network& network, const Cache& cache, const Prompt& prompt) {
    Filling(machine, threads, network, cache, prompt).run();
}

}  // namespace seekvl
