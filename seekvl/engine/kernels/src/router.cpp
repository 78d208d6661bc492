#include "router.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace seekvl {
namespace {

bool above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The k greatest of `values`, in order; k is at most `count`.
void greatest(const float* values, int64_t count, int64_t k, int64_t* chosen) {
    for (int64_t rank = 0; rank < k; ++rank) {
        int64_t best = -1;
        for (int64_t at = 0; at < count; ++at) {
            if (best >= 0 && !above(values[at], values[best])) continue;
            if (std::find(chosen, chosen + rank, at) == chosen + rank) best = at;
        }
        chosen[rank] = best;
    }
}

void score(float* logits, int64_t count, bool sigmoid) {
    const float most = *std::max_element(logits, logits + count);
    float sum = 0.0f;
    for (int64_t at = 0; at < count; ++at) {
        logits[at] = sigmoid ? 1.0f / (1.0f + expf(-logits[at])) : expf(logits[at] - most);
        sum += logits[at];
    }
    if (!sigmoid)
        for (int64_t at = 0; at < count; ++at) logits[at] /= sum;
}

// Write 0 outside of the best groups: not minus infinity, see `Gate._best_groups`.
void keep_best_groups(const Router& router, float* ranking) {
    const int64_t size = router.experts / router.groups, best_of = router.choice == NOAUX_TC ? 2 : 1;
    std::vector<float> ranks(router.groups);
    std::vector<int64_t> best(best_of), kept(router.kept_groups);
    for (int64_t group = 0; group < router.groups; ++group) {
        const float* members = ranking + group * size;
        greatest(members, size, best_of, best.data());
        for (const int64_t member : best) ranks[group] += members[member];
    }
    greatest(ranks.data(), router.groups, router.kept_groups, kept.data());
    for (int64_t group = 0; group < router.groups; ++group)
        if (std::find(kept.begin(), kept.end(), group) == kept.end())
            std::fill(ranking + group * size, ranking + (group + 1) * size, 0.0f);
}

}  // namespace

void route(const Router& router, float* logits, const float* bias, float* ranking, int64_t* experts, float* weights) {
    float* scores = logits;
    score(scores, router.experts, router.sigmoid);
    for (int64_t at = 0; at < router.experts; ++at) ranking[at] = scores[at] + (bias ? bias[at] : 0.0f);
    if (router.choice != GREEDY && router.kept_groups < router.groups) keep_best_groups(router, ranking);
    greatest(ranking, router.experts, router.active, experts);
    const float* from = bias ? scores : ranking;
    float sum = 0.0f;
    for (int64_t k = 0; k < router.active; ++k) sum += weights[k] = from[experts[k]];
    const bool divide = router.normalise && router.active > 1;
    for (int64_t k = 0; k < router.active; ++k)
        weights[k] = (divide ? weights[k] / (sum + 1e-20f) : weights[k]) * static_cast<float>(router.scale);
}

}  // namespace seekvl
