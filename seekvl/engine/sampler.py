"""Choosing the next token from its logits.

The order is that of the reference's generation: repetition penalty, temperature, top-k, top-p, draw; a
constraint, which the reference does not know, comes after the penalty. Output rows beyond the vocabulary are
not excluded without one, as they are not there; published models never rate them highest, and they decode to
nothing.

Letters: n rows, v vocabulary, m tokens seen so far.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from seekvl.engine.constrain import Constraint
from seekvl.engine.request import Likelihood, SamplingParams
from seekvl.runtime import SeekVLError, torch_generator


@dataclass(kw_only=True, slots=True)
class Sampler:
    """The state of choosing for one answer: what was generated, and its own source of randomness."""

    params: SamplingParams
    prompt: frozenset[int] = frozenset()
    """Tokens of the prompt that the repetition penalty counts."""
    generated: list[int] = field(default_factory=list)
    constraint: Constraint | None = None
    """What the answer may say; None: anything."""
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        if self.params.seed is None:
            self.generator = torch.Generator()
            self.generator.seed()
        else:
            self.generator = torch_generator(self.params.seed, "sampling")


class Peak(NamedTuple):
    """The largest logit of a row, and its token."""

    logit: float
    token: int


def peaks(logits: Tensor) -> list[Peak]:
    """Return the peak of each row of logits f32[n, v]: of all rows of a step at once, which costs as one."""
    logit, token = logits.max(dim=-1)
    return list(map(Peak, logit.tolist(), token.tolist()))


def choose(logits: Tensor, sampler: Sampler, *, peak: Peak | None = None) -> int:
    """Choose the next token from logits f32[v]. peak: theirs, where it was found beforehand.

    Raises SeekVLError for logits that are not finite.
    """
    if peak is None:
        (peak,) = peaks(logits[None])
    if not math.isfinite(peak.logit):
        raise SeekVLError(
            f"logits for token {len(sampler.generated) + 1} are not finite: {peak.logit}; "
            "check the weights with `seekvl verify`, or do not compute in float16"
        )
    params, constraint, scores = sampler.params, sampler.constraint, logits
    if params.plain_greedy:
        return peak.token
    if constraint is None or not constraint.exempt:
        seen = sampler.prompt.union(sampler.generated)
        scores = penalise(logits, seen, penalty=params.repetition_penalty)
        scores = subtract(scores, sampler.generated, params)
    if constraint is None:
        return _draw(scores, sampler)
    token = _draw(constraint.narrow(scores), sampler)
    constraint.take(token)
    return token


def _draw(scores: Tensor, sampler: Sampler) -> int:
    """Take the likeliest token of f[v], or draw one."""
    if sampler.params.temperature == 0:
        return int(scores.argmax())
    probabilities = distribution(scores, sampler.params)
    return int(torch.multinomial(probabilities.cpu(), 1, generator=sampler.generator))


def distribution(scores: Tensor, params: SamplingParams) -> Tensor:
    """Return the probabilities f64[v] to draw from, for a temperature above 0."""
    scores = scores.double()
    scores = (
        scores - scores.max()
    ) / params.temperature  # at most 0, so that a tiny temperature cannot overflow
    if params.top_k is not None:
        scores = keep_top_k(scores, params.top_k)
    if params.top_p < 1:
        scores = keep_top_p(scores, params.top_p)
    return scores.softmax(-1)


def penalise(logits: Tensor, seen: Collection[int], *, penalty: float) -> Tensor:
    """Make the m tokens that were seen before less likely (above 1) or more so (below 1), each once."""
    if penalty == 1.0 or not seen:
        return logits
    index = torch.tensor(sorted(set(seen)), device=logits.device)
    scores = logits.clone()
    picked = scores[index]
    scores[index] = torch.where(picked < 0, picked * penalty, picked / penalty)
    return scores


def subtract(scores: Tensor, generated: Sequence[int], params: SamplingParams) -> Tensor:
    """Subtract presence and frequency penalties from the scores f[v] of tokens already generated."""
    if not generated or (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0):
        return scores
    counts = Counter(generated)
    lower = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
    lowered = scores.clone()
    lowered[torch.tensor(list(counts), device=scores.device)] -= torch.tensor(lower, device=scores.device)
    return lowered


def likelihood(logits: Tensor, token: int, *, most: int) -> Likelihood:
    """Return how likely a token is by logits f32[v], with so many of the likeliest.

    >>> likelihood(torch.tensor([0.0, 0.0]).log_softmax(0), 1, most=1).logprob
    -0.6931471824645996
    """
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(min(most, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Likelihood(logprob=float(logprobs[token]), top=tuple(pairs))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Set all but the k largest of f[v] to minus infinity; ties with the k-th stay.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([-inf, 3., 2.])
    """
    if k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the likeliest of f[v] that together reach probability p; the others become minus infinity.

    >>> keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6).isfinite()
    tensor([ True,  True, False])
    """
    ordered, index = scores.sort(descending=True)
    probabilities = ordered.softmax(-1)
    ahead = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
    drop = torch.empty_like(ahead, dtype=torch.bool)
    drop[index] = ahead >= p
    return scores.masked_fill(drop, -math.inf)
