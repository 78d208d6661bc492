"""Pictures of a prompt: where they stand, what tells them apart, and their features.

Letters: s slots of a picture, d language width.
"""

from itertools import accumulate

import torch
from torch import Tensor

from seekvl.models.vl import VL
from seekvl.models.vl2 import AnyVL
from seekvl.processing.encode import ModelInput, fingerprint
from seekvl.processing.recent import Recent
from seekvl.processing.tile_image import tile_count


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
    """Return the fingerprint of each picture, as the processor knew it or made now."""
    if inputs.digests is not None:
        return list(inputs.digests)
    digests = []
    for index, tiles in enumerate(picture_tiles(inputs)):
        assert inputs.pixels is not None
        digests.append(
            fingerprint(
                inputs.pixels[tiles],
                low_pixels=None if inputs.low_pixels is None else inputs.low_pixels[tiles],
                grid=None if inputs.grids is None else inputs.grids[index],
                normalized=inputs.normalized,
            )
        )
    return digests


@torch.inference_mode()
def encode_picture(model: AnyVL, inputs: ModelInput, *, index: int, chunk: int | None = None) -> Tensor:
    """Return the rows f[s, d] of one picture; at most `chunk` tiles go through the tower at once.

    A picture is never encoded together with others: torch's products of more tiles differ in their last bits,
    and a picture's features shall not depend on its company.
    """
    weight, tiles = model.language.embed_tokens.weight, picture_tiles(inputs)[index]
    assert inputs.pixels is not None
    pixels = inputs.pixels[tiles].to(weight.device, weight.dtype)
    if isinstance(model, VL):
        low = None if inputs.low_pixels is None else inputs.low_pixels[tiles]
        low = None if low is None else low.to(weight.device, weight.dtype)
        return model.encode_pictures(pixels, low_pixels=low, normalized=inputs.normalized)[0]
    assert inputs.grids is not None
    return model.encode_pictures(pixels, grids=[inputs.grids[index]], chunk=chunk)


class Features:
    """Features of pictures by fingerprint, up to so many bytes."""

    def __init__(self, limit: int) -> None:
        self.queries = 0
        """How often features were asked for."""
        self.hits = 0
        """How often they were there."""
        self._held = Recent[bytes, Tensor](limit)

    @property
    def nbytes(self) -> int:
        """Bytes of all that are held."""
        return self._held.nbytes

    def get(self, digest: bytes) -> Tensor | None:
        """Return the rows f[s, d] of a picture, if they are here."""
        self.queries += 1
        found = self._held.get(digest)
        self.hits += found is not None
        return found

    def put(self, digest: bytes, rows: Tensor) -> None:
        """Keep the rows of a picture, unless they alone exceed the limit."""
        self._held.put(digest, rows, size=rows.nbytes)

    def clear(self) -> None:
        """Forget all features; the counts stay."""
        self._held.clear()
