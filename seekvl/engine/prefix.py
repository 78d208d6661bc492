"""What the cache of a conversation holds, so that the next turn computes only what is new.

turn 1   BOS system User: [picture] q1  Assistant:  a1
turn 2   BOS system User: [picture] q1  Assistant:  a1 EOS User: q2  Assistant:
         `------------- already in the cache -------'
"""

import hashlib

from torch import Tensor

from seekvl.engine.cache import KVCache
from seekvl.models.vl import VL
from seekvl.processing.encode import ModelInput


class Prefix:
    """A cache of one row, with the tokens and pictures it was filled from."""

    def __init__(self, model: VL) -> None:
        weight = model.language.embed_tokens.weight
        self.cache = KVCache(model.config.language, rows=1, device=weight.device, dtype=weight.dtype)
        self._slots = model.config.visual_tokens
        self._ids: list[int] = []
        self._pictures: list[bytes] = []

    def reuse(self, inputs: ModelInput) -> int:
        """Cut the cache to what it shares with a prompt, remember the prompt, and return the tokens shared.

        Tokens must be equal and pictures must have equal pixels. A picture is shared whole or not at all, and
        the last token never is, because its logits are wanted.
        """
        ids, pictures = inputs.input_ids.tolist(), picture_digests(inputs)
        held = self._ids[: self.cache.lengths[0]]
        shared = 0
        for old, new in zip(held, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        starts = inputs.image_mask.nonzero().flatten().tolist()[:: self._slots]
        for index, start in enumerate(starts):
            equal = index < len(self._pictures) and self._pictures[index] == pictures[index]
            if start < shared and not (equal and shared >= start + self._slots):
                shared = start
        self.cache.truncate(0, shared)
        self._ids, self._pictures = ids, pictures
        return shared

    def append(self, token: int) -> None:
        """Remember a generated token that is about to be fed."""
        self._ids.append(token)

    def clear(self) -> None:
        """Forget everything; the buffers stay."""
        self.cache.truncate(0, 0)
        self._ids, self._pictures = [], []


def picture_digests(inputs: ModelInput) -> list[bytes]:
    """Return a fingerprint of each picture's pixels."""
    if inputs.pixels is None:
        return []
    lows = [None] * len(inputs.pixels) if inputs.low_pixels is None else list(inputs.low_pixels)
    return [_digest(high, low) for high, low in zip(inputs.pixels, lows, strict=True)]


def _digest(high: Tensor, low: Tensor | None) -> bytes:
    """Fingerprint the pixels of one picture."""
    state = hashlib.blake2b(high.numpy().tobytes(), digest_size=16)
    if low is not None:
        state.update(low.numpy().tobytes())
    return state.digest()
