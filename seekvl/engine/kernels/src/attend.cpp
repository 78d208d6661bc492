#include "attend.h"

#include <algorithm>
#include <cmath>

#include "jobs.h"
#include "pool.h"

namespace seekvl {
namespace {

static_assert(kBlock % kExponentials == 0);

// Runs that make up a thread's share, unless they would be longer than kRun.
constexpr int64_t kRuns = 8;

}  // namespace

Attender::Attender(const Level& level, int threads, const Tokens& tokens, int64_t heads, int64_t kv_heads, bool latent)
    : level_(level), threads_(threads), tokens_(tokens), heads_(heads), kv_heads_(kv_heads) {
    const int64_t shared = heads / kv_heads;
    for (int64_t token = 0; token < tokens.n; ++token) {
        const int64_t blocks = tokens.positions[token] / kBlock + 1;
        for (int64_t kv = 0; kv < kv_heads; ++kv)
            for (int64_t head = 0; head < shared; head += kMaxBatch) {
                const int64_t count = std::min<int64_t>(kMaxBatch, shared - head);
                groups_.push_back({token, kv * shared + head, count, kv, blocks, parts_});
                parts_ += count * blocks;
            }
    }
    int64_t blocks = 0;
    for (const Heads& group : groups_) blocks += group.blocks;
    const int64_t run = latent ? 1 : std::clamp<int64_t>(blocks / (kRuns * threads), 1, kRun);
    for (size_t group = 0; group < groups_.size(); ++group)
        for (int64_t block = 0; block < groups_[group].blocks; block += run)
            items_.push_back({static_cast<int64_t>(group), block, std::min(run, groups_[group].blocks - block)});
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
        attender.attend(heads, item.block, item.count);
        if (attender.left_[item.heads].fetch_sub(item.count) == item.count) attender.merge(heads);
    }
}

// Scores, exponentials and weighted values of `count` blocks. All keys are read before the values: memory gives more
// to one long stream than to two short ones in turns.
void Attender::attend(const Heads& heads, int64_t block, int64_t count) const {
    float scores[kRun][kMaxBatch][kBlock];
    for (int64_t at = 0; at < count; ++at) score(heads, block + at, scores[at]);
    for (int64_t at = 0; at < count; ++at) mix(heads, block + at, scores[at]);
}

Attender::Columns Attender::columns_of(const Heads& heads, int64_t block) const {
    const int64_t row = tokens_.slots[heads.token] * kv_heads_ + heads.kv, start = block * kBlock;
    return {row * attention_.capacity + start, std::min(kBlock, tokens_.positions[heads.token] + 1 - start)};
}

// Scores of a block, and their exponentials in their place.
void Attender::score(const Heads& heads, int64_t block, float (*scores)[kBlock]) const {
    const Attention& a = attention_;
    const Columns columns = columns_of(heads, block);
    const int64_t first = heads.token * heads_ + heads.first;
    Operand m{};
    m.batch = heads.count;
    m.weight = shifted(a.keys, columns.first * a.key_width, a.kind);
    for (int64_t head = 0; head < heads.count; ++head) {
        m.x[head] = a.q + (first + head) * a.q_stride;
        m.y[head] = scores[head];
    }
    level_.rows({a.kind, F32, F32, a.key_width}, m, 0, columns.count);
    if (a.q_latent) add_latent_scores(columns, first, m, scores);
    for (int64_t head = 0; head < heads.count; ++head) {
        const int64_t part = heads.part + head * heads.blocks + block;
        sums_[part] = level_.exponentials(scores[head], columns.count, &greatest_[part]);
    }
}

void Attender::add_latent_scores(const Columns& columns, int64_t first, Operand m, float (*scores)[kBlock]) const {
    const Attention& a = attention_;
    float more[kMaxBatch][kBlock];
    m.weight = shifted(a.values, columns.first * a.value_width, a.kind);
    for (int64_t head = 0; head < m.batch; ++head) {
        m.x[head] = a.q_latent + (first + head) * a.value_width;
        m.y[head] = more[head];
    }
    level_.rows({a.kind, F32, F32, a.value_width}, m, 0, columns.count);
    for (int64_t head = 0; head < m.batch; ++head)
        for (int64_t at = 0; at < columns.count; ++at) scores[head][at] += more[head][at];
}

// The values of a block, weighted by what `score` has left.
void Attender::mix(const Heads& heads, int64_t block, const float (*scores)[kBlock]) const {
    const Attention& a = attention_;
    const Columns columns = columns_of(heads, block);
    Operand m{};
    m.batch = heads.count;
    m.weight = shifted(a.values, columns.first * a.value_width, a.kind);
    for (int64_t head = 0; head < heads.count; ++head) {
        m.x[head] = scores[head];
        m.y[head] = mixed_ + (heads.part + head * heads.blocks + block) * a.value_width;
    }
    level_.mix({a.kind, F32, F32, a.value_width}, m, columns.count);
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
