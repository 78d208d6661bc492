// Calls the functions of the CPU kernels on the portable level and on another one, with the same numbers, and says how
// far the results are apart, as shares of the largest: a line NAME APART LIMIT for each case.
//
// For machines that the tests in Python do not reach: test_arm.py compiles it with the kernels and runs it under an
// emulator. The portable level itself is held against torch by those tests.
//
//     usage: levels LEVEL        its number in Python's LEVELS
//            levels              says how the level of ARM multiplies bytes here: dotprod or plain
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "numbers.h"
#include "packed.h"
#include "prompt.h"
#include "step.h"

using namespace seekvl;

extern "C" {
int32_t seekvl_levels();
int32_t seekvl_dotprod();
void seekvl_linear(int32_t level, int32_t threads, int32_t weight_dtype, int32_t x_dtype, const void* weight,
                   const void* bias, const void* x, void* y, int64_t b, int64_t o, int64_t i);
int32_t seekvl_linear_many(int32_t level, int32_t threads, int32_t weight_dtype, int32_t x_dtype, const void* weight,
                           const void* bias, const void* x, void* y, int64_t b, int64_t o, int64_t i);
void seekvl_packed_linear(int32_t level, int32_t threads, int32_t kind, int32_t dtype, const uint8_t* weight,
                          const void* bias, const void* x, void* y, int64_t b, int64_t o, int64_t i);
void seekvl_experts(int32_t level, int32_t threads, int32_t dtype, const void* gate, const void* up, const void* down,
                    const int64_t* experts, const float* weights, const void* x, void* y, int64_t n, int64_t k,
                    int64_t d, int64_t m);
void seekvl_packed_experts(int32_t level, int32_t threads, int32_t kind, int32_t dtype, const uint8_t* gate,
                           const uint8_t* up, const uint8_t* down, const int64_t* experts, const float* weights,
                           const void* x, void* y, int64_t n, int64_t k, int64_t d, int64_t m);
int32_t seekvl_experts_kept(int32_t level, int32_t threads, int32_t dtype, const void* gate, const void* up,
                            const void* down, const int64_t* experts, const float* weights, const void* x, void* y,
                            void* kept, int64_t n, int64_t k, int64_t d, int64_t m);
int32_t seekvl_experts_backward(int32_t level, int32_t threads, int32_t dtype, const void* gate, const void* up,
                                const void* down, const int64_t* experts, const float* weights, const void* x,
                                const void* kept, const void* grads, void* d_gate, void* d_up, void* d_down, void* d_x,
                                float* d_weights, int64_t count, int64_t n, int64_t k, int64_t d, int64_t m);
void seekvl_step(int32_t level, int32_t threads, const Network* network, const Cache* cache, const Tokens* tokens,
                 float* logits);
int32_t seekvl_prompt(int32_t level, int32_t threads, const Network* network, const Cache* cache,
                      const Prompt* prompt);
void seekvl_release();
}

namespace {

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

constexpr int kThreads = 2;
constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "int8", "int4"};
constexpr Dtype kPlain[] = {F32, F16, BF16}, kPacked[] = {INT8, INT4};
constexpr float kExact = 1e-5f;                          // two orders of a sum
constexpr float kRounded[] = {1e-5f, 1e-3f, 8e-3f};      // and a result or a cached number rounded to the other side
constexpr float kQuantized = 2e-2f;                      // and an input, a 127th of its group

std::mt19937 source;

float draw() { return static_cast<float>(source()) / 2147483648.0f - 1.0f; }

int64_t size_of(Dtype kind) { return kind == F32 ? 4 : 2; }

Bytes numbers(Dtype kind, int64_t count, float scale = 1.0f, float middle = 0.0f) {
    Bytes out(count * size_of(kind));
    for (int64_t at = 0; at < count; ++at) put(kind, out.data(), at, middle + scale * draw());
    return out;
}

Floats widened(Dtype kind, const Bytes& from) {
    Floats out(from.size() / size_of(kind));
    for (size_t at = 0; at < out.size(); ++at) out[at] = get(kind, from.data(), at);
    return out;
}

// A stack of `count` packed matrices [o, i].
Bytes packed_stack(Dtype kind, int64_t o, int64_t i, int64_t count) {
    Bytes out(count * tiles_of(o) * tile_bytes(kind, i));
    for (uint8_t& byte : out) byte = static_cast<uint8_t>(source() >> 8 | 1);
    const int64_t stride = kind == INT8 ? tile_bytes(kind, i) : kInt4Unit, scales = kind == INT8 ? kTile : 2 * kTile;
    for (size_t at = 0; at < out.size(); at += stride)
        for (int64_t row = 0; row < scales; ++row)
            put(kind == INT8 ? F32 : BF16, out.data() + at, row, (1.5f + draw()) / ((kind == INT8 ? 80 : 5) * std::sqrt(i)));
    return out;
}

Bytes stack(Dtype kind, int64_t o, int64_t i, int64_t count) {
    return is_packed(kind) ? packed_stack(kind, o, i, count) : numbers(kind, count * o * i, 1.5f / std::sqrt(i));
}

int32_t other;

// Prints how far the results of `run`, a function of the level, are apart.
template <class Run>
void compare(const std::string& name, float limit, Run run) {
    const Floats wanted = run(0), found = run(other);
    float largest = 0.0f, apart = 0.0f;
    for (size_t at = 0; at < wanted.size(); ++at) {
        largest = std::max(largest, std::fabs(wanted[at]));
        const float difference = std::fabs(wanted[at] - found[at]);
        if (!(difference <= apart)) apart = difference;
    }
    std::printf("%s %.1e %.1e\n", name.c_str(), apart / largest, limit);
}

void append(Floats& to, const Floats& more) { to.insert(to.end(), more.begin(), more.end()); }

void products() {
    const int64_t o = 37, i = 515;
    for (const Dtype kind : kPlain)
        for (const Dtype outer : kPlain)
            for (const int64_t b : {1, 3, 8, 9, 100}) {
                if (outer != F32 && outer != kind) continue;
                const Bytes weight = stack(kind, o, i, 1), bias = numbers(kind, o), x = numbers(outer, b * i);
                compare(std::string(kNames[kind]) + "/" + kNames[outer] + "/" + std::to_string(b), kRounded[outer],
                        [&](int32_t level) {
                            Bytes y(b * o * size_of(outer));
                            if (b <= kMaxBatch)
                                seekvl_linear(level, kThreads, kind, outer, weight.data(), bias.data(), x.data(),
                                              y.data(), b, o, i);
                            else if (seekvl_linear_many(level, kThreads, kind, outer, weight.data(), bias.data(),
                                                        x.data(), y.data(), b, o, i))
                                std::abort();
                            return widened(outer, y);
                        });
            }
    for (const Dtype kind : kPacked)
        for (const Dtype outer : kPlain)
            for (const int64_t b : {1, 3, 8, 40}) {
                const Bytes weight = stack(kind, o, i, 1), bias = numbers(outer, o), x = numbers(outer, b * i);
                compare(std::string(kNames[kind]) + "/" + kNames[outer] + "/" + std::to_string(b), kRounded[outer],
                        [&](int32_t level) {
                            Bytes y(b * o * size_of(outer));
                            seekvl_packed_linear(level, kThreads, kind, outer, weight.data(), bias.data(), x.data(),
                                                 y.data(), b, o, i);
                            return widened(outer, y);
                        });
            }
}

void experts() {
    const int64_t count = 5, k = 2, d = 70, m = 45;
    for (const Dtype kind : {F32, F16, BF16, INT8, INT4})
        for (const int64_t n : {3, 90}) {
            const bool packed = is_packed(kind);
            const Dtype outer = packed ? F32 : kind;
            const Bytes gate = stack(kind, m, d, count), up = stack(kind, m, d, count), down = stack(kind, d, m, count);
            const Bytes x = numbers(outer, n * d), grads = numbers(outer, n * d);
            std::vector<int64_t> chosen(n * k);
            for (int64_t slot = 0; slot < n * k; ++slot) chosen[slot] = (slot * 3 + slot / k) % count;
            Floats weights(n * k);
            for (float& weight : weights) weight = 0.5f + 0.4f * draw();
            const std::string name = std::string("experts/") + kNames[kind] + "/" + std::to_string(n);
            compare(name, packed ? kQuantized : kRounded[outer], [&](int32_t level) {
                Bytes y(n * d * size_of(outer));
                const auto call = [&](auto function, auto... kinds) {
                    function(level, kThreads, kinds..., gate.data(), up.data(), down.data(), chosen.data(),
                             weights.data(), x.data(), y.data(), n, k, d, m);
                };
                if (packed) call(seekvl_packed_experts, kind, outer);
                else call(seekvl_experts, kind);
                return widened(outer, y);
            });
            if (packed) continue;
            compare(name + "/kept", kRounded[outer], [&](int32_t level) {
                Bytes y(n * d * size_of(outer)), kept(n * k * 2 * m * size_of(outer));
                if (seekvl_experts_kept(level, kThreads, kind, gate.data(), up.data(), down.data(), chosen.data(),
                                        weights.data(), x.data(), y.data(), kept.data(), n, k, d, m))
                    std::abort();
                Floats out = widened(outer, y);
                append(out, widened(outer, kept));
                return out;
            });
            const Bytes kept = numbers(outer, n * k * 2 * m);
            compare(name + "/backward", kRounded[outer], [&](int32_t level) {
                Bytes d_gate(gate.size()), d_up(up.size()), d_down(down.size()), d_x(x.size());
                Floats d_weights(n * k);
                if (seekvl_experts_backward(level, kThreads, kind, gate.data(), up.data(), down.data(), chosen.data(),
                                            weights.data(), x.data(), kept.data(), grads.data(), d_gate.data(),
                                            d_up.data(), d_down.data(), d_x.data(), d_weights.data(), count, n, k, d,
                                            m))
                    std::abort();
                Floats out = d_weights;
                for (const Bytes* gradient : {&d_gate, &d_up, &d_down, &d_x}) append(out, widened(outer, *gradient));
                return out;
            });
        }
}

// A language model of random weights: plain attention, or a latent and experts behind a dense layer.
struct Model {
    Network network{};
    std::vector<Layer> layers;
    std::deque<Bytes> memory;
    Floats divisors;
    Dtype kind, plain;      // of matrices; of what is never packed

    Matrix matrix(Dtype of, int64_t o, int64_t i, int64_t count = 1) {
        return {memory.emplace_back(stack(of, o, i, count)).data(), nullptr, o, i, of};
    }
    Norm norm(int64_t width) { return {memory.emplace_back(numbers(plain, width, 0.3f, 1.0f)).data(), plain, 1e-6}; }

    Model(Dtype stored, bool latent) : kind(stored), plain(is_packed(stored) ? F32 : stored) {
        const int64_t d = 66, heads = latent ? 3 : 6, kv = latent ? 3 : 2, rotary = latent ? 10 : 12, nope = latent ? 13 : 0;
        const int64_t rank = latent ? 37 : 0, value = latent ? 11 : rotary, m = 75, vocabulary = 301;
        for (int index = 0; index < 2; ++index) {
            Layer& layer = layers.emplace_back();
            layer.attn_norm = norm(d), layer.mlp_norm = norm(d);
            layer.q = matrix(kind, heads * (nope + rotary), d), layer.o = matrix(kind, d, heads * value);
            if (latent) {
                layer.kv_a = matrix(kind, rank + rotary, d), layer.kv_b = matrix(plain, heads * (nope + value), rank);
                layer.latent_norm = norm(rank);
            } else {
                layer.k = matrix(kind, kv * rotary, d), layer.v = matrix(kind, kv * value, d);
            }
            const bool routed = latent && index > 0;
            const int64_t dense = routed ? 21 : m;
            layer.gate = matrix(kind, dense, d), layer.up = matrix(kind, dense, d), layer.down = matrix(kind, d, dense);
            if (!routed) continue;
            layer.router = matrix(plain, 8, d);
            layer.expert_gate = matrix(kind, 21, d, 8), layer.expert_up = matrix(kind, 21, d, 8);
            layer.expert_down = matrix(kind, d, 21, 8);
        }
        for (int64_t pair = 0; pair < rotary / 2; ++pair)
            divisors.push_back(std::pow(1e4f, 2.0f * static_cast<float>(pair) / static_cast<float>(rotary)));
        network.width = d, network.layer_count = 2, network.heads = heads, network.kv_heads = kv;
        network.rotary = rotary, network.nope = nope, network.latent = rank, network.value = value;
        network.scale = 1.0 / std::sqrt(static_cast<double>(nope + rotary)), network.divisors = divisors.data();
        network.router = {8, 3, 1, 1, GREEDY, 0, 0, 1.0}, network.layers = layers.data();
        network.norm = norm(d), network.embed = matrix(plain, vocabulary, d), network.head = matrix(kind, vocabulary, d);
    }
};

// A cache of three rows, as if tokens were in it.
struct Held {
    std::deque<Bytes> memory;
    void *keys[2], *values[2];
    Cache cache;

    Held(const Model& model) : cache{model.plain, 300, keys, values} {
        const Network& network = model.network;
        const int64_t heads = network.latent ? 1 : network.kv_heads;
        for (int layer = 0; layer < 2; ++layer) {
            keys[layer] = memory.emplace_back(numbers(model.plain, 3 * heads * 300 * network.rotary)).data();
            const int64_t width = network.latent ? network.latent : network.value;
            values[layer] = memory.emplace_back(numbers(model.plain, 3 * heads * 300 * width)).data();
        }
    }
};

void models() {
    for (const bool latent : {false, true})
        for (const Dtype kind : {F32, F16, BF16, INT8, INT4}) {
            const Model model(kind, latent);
            const float limit = is_packed(kind) ? kQuantized : kRounded[kind];
            const std::string name = std::string(latent ? "latent/" : "attention/") + kNames[kind];
            const auto seed = source();
            compare(name + "/step", limit, [&](int32_t level) {
                source.seed(seed);
                Held held(model);
                const int64_t ids[] = {5, 300, 17}, slots[] = {0, 1, 2};
                Floats logits(3 * 301), out;
                for (int64_t turn = 0; turn < 2; ++turn) {
                    const int64_t positions[] = {turn, 130 + turn, 257 + turn};
                    const Tokens tokens{3, ids, slots, positions};
                    seekvl_step(level, kThreads, &model.network, &held.cache, &tokens, logits.data());
                    append(out, logits);
                }
                return out;
            });
            const Bytes embeds = numbers(model.plain, 150 * 66);
            compare(name + "/prompt", limit, [&](int32_t level) {
                source.seed(seed);
                Held held(model);
                Floats hidden(150 * 66), logits(301);
                const Prompt prompt{150, 1, 20, embeds.data(), model.plain, hidden.data(), logits.data()};
                if (seekvl_prompt(level, kThreads, &model.network, &held.cache, &prompt)) std::abort();
                append(logits, hidden);
                return logits;
            });
        }
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 1) {
        std::puts(seekvl_dotprod() ? "dotprod" : "plain");
        return 0;
    }
    other = count == 2 ? std::atoi(arguments[1]) : -1;
    if (other < 0 || !(seekvl_levels() >> other & 1)) {
        std::fprintf(stderr, "usage: levels LEVEL, the number of one that this machine executes\n");
        return 2;
    }
    products();
    experts();
    models();
    seekvl_release();
    return 0;
}
