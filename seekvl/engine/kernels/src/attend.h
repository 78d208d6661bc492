// Attention of new tokens over the cache.
//
// What a token sees is cut into blocks of kBlock columns, for threads to share:
//
//     token 0, head 0  | block 0 | block 1 | 2 |      each block: greatest score, sum of exponentials, and the
//     token 0, head 1  | block 0 | block 1 | 2 |      values weighted by them; who is last of a head merges its
//     token 1, head 0  | block 0 | 1 |                blocks, from left to right
//
// Blocks begin at column 0 and the order of sums within them is fixed, so a token's result depends on nothing but
// what it sees. Heads that share keys and values read them together. A thread takes up to kRun neighbouring blocks at a
// time, all keys of them before the values.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "product.h"
#include "step.h"

namespace seekvl {

constexpr int64_t kBlock = 128;     // columns
constexpr int64_t kRun = 8;         // blocks

// One layer's queries f32 and cache.
struct Attention {
    Dtype kind;
    int64_t capacity;
    const void* keys;           // [rows, k, capacity, key_width]
    const void* values;         // [rows, k, capacity, value_width]
    int64_t key_width, value_width;
    const float* q;             // [n, h], `q_stride` numbers apart, scaled
    int64_t q_stride;
    const float* q_latent;      // [n, h, value_width], whose products with the values add to the scores, or null
    float* out;                 // [n, h, value_width]
};

class Attender {
  public:
    // `latent` where values are met twice, by scores and by what is weighted: a thread takes one block then, which
    // stays in its cache.
    Attender(const Level& level, int threads, const Tokens& tokens, int64_t heads, int64_t kv_heads, bool latent);

    // Numbers that `run` needs room for.
    int64_t room(int64_t value_width) const { return parts_ * (value_width + 2); }

    void run(const Attention& attention, float* room);

  private:
    struct Heads { int64_t token, first, count, kv, blocks, part; };
    struct Item { int64_t heads, block, count; };
    struct Columns { int64_t first, count; };       // of a row's head in the cache
    static void work(const void* pointer, int64_t begin, int64_t end);
    void attend(const Heads& heads, int64_t block, int64_t count) const;
    Columns columns_of(const Heads& heads, int64_t block) const;
    void score(const Heads& heads, int64_t block, float (*scores)[kBlock]) const;
    void add_latent_scores(const Columns& columns, int64_t first, Operand m, float (*scores)[kBlock]) const;
    void mix(const Heads& heads, int64_t block, const float (*scores)[kBlock]) const;
    void merge(const Heads& heads) const;

    const Level& level_;
    int threads_;
    const Tokens& tokens_;
    int64_t heads_, kv_heads_, parts_ = 0;
    std::vector<Heads> groups_;
    std::vector<Item> items_;
    mutable std::vector<std::atomic<int64_t>> left_;  // blocks of each group that are not done
    Attention attention_{};
    float *mixed_ = nullptr, *greatest_ = nullptr, *sums_ = nullptr;
};

}  // namespace seekvl
