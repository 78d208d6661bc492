// The router of a layer with experts, as `Gate` of models/moe.py decides.
#pragma once

#include <cstdint>

#include "step.h"

namespace seekvl {

// Pick the experts of one token, and their weights, from its logits f32[E], which are overwritten; bias f32[E] or
// null; `ranking` f32[E] is room to work in.
//
// Of experts with equal scores the first is taken; torch promises no order there. NaN counts as the greatest, as in
// torch, so that whatever the numbers are, the experts are different ones that exist.
void route(const Router& router, float* logits, const float* bias, float* ranking, int64_t* experts, float* weights);

}  // namespace seekvl
