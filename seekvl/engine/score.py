"""How likely given words are: teacher forcing instead of generation.

Letters: t tokens of the prompt, c tokens of a continuation, v vocabulary, d language width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seekvl.engine.cache import KVCache
from seekvl.engine.forward import embed_prompt, feed, prefill, prefill_hidden
from seekvl.models.vl2 import AnyVL
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError

HEAD_ROWS = 256
"""Positions that go through the head together; at 102,400 rows of vocabulary this bounds memory to 0.1 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How likely a continuation is."""

    logprob: float
    """Natural logarithm of its probability after the prompt; the end token is not part of it."""
    tokens: int
    """How many tokens it has."""

    @property
    def perplexity(self) -> float:
        """exp(-logprob / tokens): the measure by which options are compared (2403.05525, sec. 3.2)."""
        try:
            return math.exp(-self.logprob / self.tokens)
        except OverflowError:
            return math.inf


@torch.inference_mode()
def score_continuations(
    model: AnyVL, inputs: ModelInput, *, continuations: Sequence[Sequence[int]], chunk: int | None = None
) -> list[Score]:
    """Score each continuation, given as token ids, after one prompt, which is computed once: a continuation
    costs its own tokens. Where the kernels read prompts, both go through them.

    Raises SeekVLError, before anything is computed, for a continuation that is empty or too long.
    """
    prompt, limit = len(inputs.input_ids), model.config.language.max_positions
    for index, ids in enumerate(continuations, start=1):
        if not ids:
            raise SeekVLError(f"continuation {index} of {len(continuations)} has no tokens; give it text")
        if prompt + len(ids) > limit:
            raise SeekVLError(
                f"continuation {index}: {prompt:,} prompt tokens + {len(ids):,} exceed the model's longest "
                f"sequence of {limit:,}; shorten them"
            )
    weight = model.language.embed_tokens.weight
    cache = KVCache(model.config.language, rows=1, device=weight.device, dtype=weight.dtype)
    cache.reserve(prompt + max(map(len, continuations), default=0))
    first = prefill(model, inputs, cache=cache, row=0, chunk=chunk)  # v
    return [_score(model, first, ids, cache=cache, prompt=prompt) for ids in continuations]


def _score(model: AnyVL, first: Tensor, ids: Sequence[int], *, cache: KVCache, prompt: int) -> Score:
    """Score one continuation after the prompt in the cache, and leave the cache as it was."""
    target = torch.tensor(ids, device=first.device)  # c
    total = first.log_softmax(-1)[target[0]].double()
    if len(ids) > 1:
        hidden = feed(model, model.embed(target[None, :-1]), cache=cache, slot=0)  # 1 c-1 d
        cache.truncate(0, prompt)
        for begin in range(0, len(ids) - 1, HEAD_ROWS):
            rows = model.head(hidden[0, begin : begin + HEAD_ROWS]).float().log_softmax(-1)
            picked = rows.gather(1, target[begin + 1 : begin + 1 + len(rows), None])
            total = total + picked.double().sum()
    if not torch.isfinite(total):
        raise SeekVLError(
            f"the logprob of a continuation is {float(total)}; check the weights with `seekvl verify`"
        )
    return Score(logprob=float(total), tokens=len(ids))


@torch.inference_mode()
def prompt_logits(model: AnyVL, inputs: ModelInput, *, chunk: int | None = None) -> Tensor:
    """Return the logits f32[t, v] after each token of a prompt, on the CPU; chunk as in `prefill`."""
    length, limit = len(inputs.input_ids), model.config.language.max_positions
    if length > limit:
        raise SeekVLError(
            f"the prompt takes {length:,} tokens, the model's longest sequence is {limit:,}; shorten it"
        )
    weight = model.language.embed_tokens.weight
    cache = KVCache(model.config.language, rows=1, device=weight.device, dtype=weight.dtype)
    logits = torch.empty(length, model.config.language.vocab_size, dtype=torch.float32)
    done = 0
    for hidden in prefill_hidden(model, embed_prompt(model, inputs), cache=cache, row=0, chunk=chunk):
        for begin in range(0, hidden.shape[1], HEAD_ROWS):
            rows = model.head(hidden[0, begin : begin + HEAD_ROWS])  # t v
            logits[done : done + len(rows)] = rows
            done += len(rows)
    return logits
