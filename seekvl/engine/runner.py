"""Does what the scheduler decided: shapes the cache, encodes pictures, fills prompts, feeds tokens.

Nothing is decided here but what a step's rows must share to give the numbers they would give alone.

Letters: n tokens of a step, v vocabulary, s slots of a picture, d language width.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from seekvl.engine.budget import FEATURE_SHARE, free_bytes, tiles_at_once
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import append, embed_piece, exact_cuts, exact_rows, follow, step
from seekvl.engine.gpu.decoder import roomy, static_decoder
from seekvl.engine.pictures import Features, encode_picture
from seekvl.engine.prompt import Shown
from seekvl.engine.scheduler import Plan
from seekvl.models.vl2 import AnyVL
from seekvl.processing.encode import ModelInput

GUESSED = 8
"""Most guessed tokens where torch checks them, which takes one row at a time."""


class Runner:
    """A network with its cache and the features of the pictures it saw."""

    def __init__(
        self, model: AnyVL, *, exact: bool, tokens: int | None = None, feature_bytes: int | None = None
    ) -> None:
        self.model = model
        self.exact = exact
        """Whether every row gets the numbers it would get alone."""
        self.tokens = tokens
        """Most tokens of the cache, slots times capacity; None: any number."""
        self.cache = _new_cache(model)
        if feature_bytes is None:
            feature_bytes = int(FEATURE_SHARE * free_bytes(self.cache.device))
        self.features = Features(feature_bytes)
        self._static = static_decoder(model)
        """What decodes on a GPU; None where `forward.step` does."""
        self._tiles = tiles_at_once(model)
        self._mark = self._look()
        self._together: int | None = None

    def spare(self, rows: int) -> int:
        """Return how many guessed tokens a step may take beside one token for each of so many rows."""
        if self.exact:
            return max(0, self._exact_rows() - rows)
        return GUESSED if rows == 1 else 0

    def seamless(self) -> bool:
        """Whether a prompt may be cut anywhere, see `Prompt.seamless`."""
        return exact_cuts(self.model)

    def refresh(self) -> bool:
        """Forget features when the weights are others than before, or prompts computed in another way; return
        whether they are.
        """
        mark = self._look()
        changed, self._mark = mark != self._mark, mark
        if changed:
            self.features.clear()
            self._static = static_decoder(self.model)
        return changed

    def _look(self) -> tuple[int, bool]:
        """Return what everything kept depends on: the weights, and who computes prompts."""
        return weights_mark(self.model), self.seamless()

    def reset(self) -> None:
        """Begin with an empty cache, where and of what dtype the weights are now."""
        self.cache = _new_cache(self.model)
        if self._static is not None:
            self._static.forget()
        self._together = None

    def _exact_rows(self) -> int:
        """Return how many tokens of the step at hand may go through the network together; asked once a step,
        for the answer takes as long as the rest of what a small network's step does in Python.
        """
        if self._together is None:
            self._together = 1 if self._static is not None else exact_rows(self.model, self.cache)
        return self._together

    def prepare(self, plan: Plan) -> None:
        """Begin a step: give the cache the shape of a plan, and a job that begins its slot."""
        self._together = None
        rows, capacity = plan.rows, plan.capacity
        if self._static is not None:
            rows, capacity = roomy(rows, capacity, longest=self.cache.limit, tokens=self.tokens)
            if (rows, capacity) != (self.cache.rows, self.cache.capacity):
                self._static.forget()
        self.cache.resize(rows=rows, capacity=capacity)
        if (placed := plan.placement) is not None:
            self.cache.copy(placed.source, placed.slot, length=placed.shared)

    @torch.inference_mode()
    def encode(self, inputs: ModelInput, *, index: int, digest: bytes) -> Tensor:
        """Return the rows f[s, d] of a picture."""
        rows = self.features.get(digest)
        if rows is None:
            rows = encode_picture(self.model, inputs, index=index, chunk=self._tiles)
            self.features.put(digest, rows)
            _wait(rows)
        return rows

    @torch.inference_mode()
    def fill(
        self,
        inputs: ModelInput,
        *,
        slot: int,
        start: int,
        end: int,
        pictures: Sequence[Shown],
        features: Mapping[int, Tensor],
    ) -> Tensor | None:
        """Put tokens start..end of a prompt into a slot; after its last return the logits f32[v].

        features: the rows of those pictures that lie among the tokens, by their number.
        """
        self.cache.truncate(slot, start)
        parts = [
            features[index][max(start - shown.start, 0) : end - shown.start]
            for index, shown in enumerate(pictures)
            if shown.start < end and shown.end > start
        ]
        rows = torch.cat(parts) if parts else None
        embeds = embed_piece(self.model, inputs, start=start, end=end, features=rows)  # 1 t d
        if end < len(inputs.input_ids):
            append(self.model, embeds, cache=self.cache, slot=slot)
            _wait(embeds)
            return None
        logits = follow(self.model, embeds, cache=self.cache, slot=slot)
        _wait(logits)
        return logits

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int], *, held: Mapping[int, int]) -> Tensor:
        """Feed tokens to slots, see `forward.step`; return the logits f32[n, v].

        held: tokens that each of the slots holds.
        """
        for slot, length in held.items():
            self.cache.truncate(slot, length)
        size = self._exact_rows() if self.exact else len(slots)
        logits = [
            self._step(tokens[begin : begin + size], slots[begin : begin + size])
            for begin in range(0, len(slots), size)
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _step(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Feed tokens to slots; a guess, several tokens of one slot, is not what a GPU has recorded."""
        if self._static is not None and len(set(slots)) == len(slots):
            return self._static.step(tokens, cache=self.cache, slots=slots)
        return step(self.model, tokens, cache=self.cache, slots=slots)


def weights_mark(model: AnyVL) -> int:
    """Return a number that changes when weights are exchanged, moved, or changed in place.

    What a cache holds is worth nothing then. An assignment through `.data` into the same memory goes unseen.
    """
    tensors = chain(model.parameters(), model.buffers())
    return hash(
        tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    )


def _new_cache(model: AnyVL) -> KVCache:
    """Make an empty cache beside the model's weights."""
    weight = model.language.embed_tokens.weight
    return KVCache(model.config.language, rows=1, device=weight.device, dtype=weight.dtype)


def _wait(tensor: Tensor) -> None:
    """Let a GPU finish, so that the clock tells the truth."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
