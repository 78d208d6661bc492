// Attention of new tokens over the cache.
//
// What a token sees is cut into blocks of kBlock columns, for threads to share:
//
//     token 0, head 0  | block 0 | block 1 | 2 |      each block: greatest score, sum of exponentials, and the
//     token 0, head 1  | block 0 | block 1 | 2 |      values weighted by them; who is last of a head merges its
//     token 1, head 0  | block 0 | 1 |                blocks, from left to right
//
// Blocks begin at column 0 and the order of sums within them is fixed, so a token's result depends on nothing but
// what it sees. Heads that share keys and values read them together.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "product.h"
#include "step.h"

namespace seekvl {

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
    Attender(const Level& level, int threads, const Tokens& tokens, int64_t heads, int64_t kv_heads);

    // Numbers that `run` needs room for.
    int64_t room(int64_t value_width) const { return parts_ * (value_width + 2); }

    void run(const Attention& attention, float* room);

  private:
    struct Heads { int64_t token, first, count, kv, blocks, part; };
    struct Item { int64_t heads, block; };
    static void work(const void* pointer, int64_t begin, int64_t end);
    void attend(const Heads& heads, int64_t block) const;
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
