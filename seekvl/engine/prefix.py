"""What the cache of a conversation holds, so that the next turn computes only what is new.

turn 1   BOS system User: [picture] q1  Assistant:  a1
turn 2   BOS system User: [picture] q1  Assistant:  a1 EOS User: q2  Assistant:
         `------------- already in the cache -------'
"""

import hashlib
from itertools import accumulate

from seekvl.engine.cache import KVCache
from seekvl.models.vl2 import AnyVL
from seekvl.processing.encode import ModelInput
from seekvl.processing.tile_image import tile_count


class Prefix:
    """A cache of one row, with the tokens and pictures it was filled from."""

    def __init__(self, model: AnyVL) -> None:
        weight = model.language.embed_tokens.weight
        self.cache = KVCache(model.config.language, rows=1, device=weight.device, dtype=weight.dtype)
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
        for index, (start, end) in enumerate(picture_places(inputs)):
            equal = index < len(self._pictures) and self._pictures[index] == pictures[index]
            if start < shared and not (equal and shared >= end):
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


def picture_places(inputs: ModelInput) -> list[tuple[int, int]]:
    """Return the first token of each picture and the one behind its last."""
    slots = inputs.image_mask.nonzero().flatten().tolist()
    ends = list(accumulate(inputs.bill.image_tokens))
    starts = [end - size for end, size in zip(ends, inputs.bill.image_tokens, strict=True)]
    return [(slots[start], slots[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]


def picture_tiles(inputs: ModelInput) -> list[slice]:
    """Return where each picture's tiles lie along the first axis of the pixels; without grids one each."""
    if inputs.pixels is None:
        return []
    counts = [1] * len(inputs.pixels) if inputs.grids is None else [tile_count(grid) for grid in inputs.grids]
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def picture_digests(inputs: ModelInput) -> list[bytes]:
    """Return a fingerprint of each picture: its pixels, over all its tiles, and its grid."""
    digests = []
    for index, tiles in enumerate(picture_tiles(inputs)):
        assert inputs.pixels is not None
        state = hashlib.blake2b(inputs.pixels[tiles].numpy().tobytes(), digest_size=16)
        if inputs.low_pixels is not None:
            state.update(inputs.low_pixels[tiles].numpy().tobytes())
        if inputs.grids is not None:
            state.update(repr(inputs.grids[index]).encode())
        digests.append(state.digest())
    return digests
