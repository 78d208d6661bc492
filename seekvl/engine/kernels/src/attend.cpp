#include "attend.h"

#include <algorithm>
#include <cmath>

#include "jobs.h"
#include "pool.h"

namespace seekvl {
namespace {

constexpr int64_t kBlock = 128;
static_assert(kBlock % kExponentials == 0);

}  // namespace

Attender::Attender(const Level& level, int threads, const Tokens& tokens, int64_t heads, int64_t kv_heads)
    : level_(level), threads_(threads), tokens_(tokens), heads_(heads), kv_heads_(kv_heads) {
    const int64_t shared = heads / kv_heads;
    for (int64_t token = 0; token < tokens.n; ++token) {
        const int64_t blocks = tokens.positions[token] / kBlock + 1;
        for (int64_t kv = 0; kv < kv_heads; ++kv)
            for (int64_t head = 0; head < shared; head += kMaxBatch) {
                const int64_t count = std::min<int64_t>(kMaxBatch, shared - head);
                for (int64_t block = 0; block < blocks; ++block)
                    items_.push_back({static_cast<int64_t>(groups_.size()), block});
                groups_.push_back({token, kv * shared + head, count, kv, blocks, parts_});
                parts_ += count * blocks;
            }
    }
    left_ = std::vector<std::atomic<int64_t>>(groups_.size());
}

void Attender::run(const Attention& attention, float* room) {
    attention_ = attention;
    mixed_ = room, greatest_ = room + parts_ * attention.value_width, sums_ = greatest_ + parts_;
    for (size_t group = 0; group < groups_.size(); ++group) left_[group].store(groups_[group].blocks);
    seekvl::run(threads_, static_cast<int64_t>(items_.size()), 1, work, this);
}

void Attender::work(const void* pointer, int64_t begin, int64_t end) {
    const Attender& attender = *static_cast<const Attender*>(pointer);
    for (int64_t index = begin; index < end; ++index) {
        const Item& item = attender.items_[index];
        const Heads& heads = attender.groups_[item.heads];
        attender.attend(heads, item.block);
        if (attender.left_[item.heads].fetch_sub(1) == 1) attender.merge(heads);
    }
}

// Scores, exponentials and weighted values of one block.
void Attender::attend(const Heads& heads, int64_t block) const {
    const Attention& a = attention_;
    const int64_t row = tokens_.slots[heads.token] * kv_heads_ + heads.kv, start = block * kBlock;
    const int64_t seen = std::min(kBlock, tokens_.positions[heads.token] + 1 - start);
    const int64_t column = row * a.capacity + start, first = heads.token * heads_ + heads.first;
    float scores[kMaxBatch][kBlock], more[kMaxBatch][kBlock];
    const Product keys{a.kind, F32, F32, a.key_width}, values{a.kind, F32, F32, a.value_width};
    Operand m{};
    m.batch = heads.count;
    m.weight = shifted(a.keys, column * a.key_width, a.kind);
    for (int64_t head = 0; head < heads.count; ++head) {
        m.x[head] = a.q + (first + head) * a.q_stride;
        m.y[head] = scores[head];
    }
    level_.rows(keys, m, 0, seen);
    m.weight = shifted(a.values, column * a.value_width, a.kind);
    if (a.q_latent) {
        for (int64_t head = 0; head < heads.count; ++head) {
            m.x[head] = a.q_latent + (first + head) * a.value_width;
            m.y[head] = more[head];
        }
        level_.rows(values, m, 0, seen);
        for (int64_t head = 0; head < heads.count; ++head)
            for (int64_t at = 0; at < seen; ++at) scores[head][at] += more[head][at];
    }
    for (int64_t head = 0; head < heads.count; ++head) {
        const int64_t part = heads.part + head * heads.blocks + block;
        sums_[part] = level_.exponentials(scores[head], seen, &greatest_[part]);
        m.x[head] = scores[head];
        m.y[head] = mixed_ + part * a.value_width;
    }
    level_.mix(values, m, seen);
}

// Join the blocks of each head: those with smaller scores weigh less.
void Attender::merge(const Heads& heads) const {
    const int64_t width = attention_.value_width;
    for (int64_t head = 0; head < heads.count; ++head) {
        const int64_t part = heads.part + head * heads.blocks;
        const float* mixed = mixed_ + part * width;
        float* out = attention_.out + (heads.token * heads_ + heads.first + head) * width;
        const float greatest = *std::max_element(greatest_ + part, greatest_ + part + heads.blocks);
        float sum = 0.0f;
        std::fill(out, out + width, 0.0f);
        for (int64_t block = 0; block < heads.blocks; ++block) {
            const float weight = expf(greatest_[part + block] - greatest);
            sum += weight * sums_[part + block];
            for (int64_t at = 0; at < width; ++at) out[at] += weight * mixed[block * width + at];
        }
        for (int64_t at = 0; at < width; ++at) out[at] /= sum;
    }
}

}  // namespace seekvl
