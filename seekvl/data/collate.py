"""From encoded samples to one batch: rows padded on the right to a few fixed lengths, pictures in one stack.

Rows of alike length stand together, in parts that the language model may take one after the other, each cut
to a length of its own:

    4 rows in 2 parts    a a a . . . . .      a a a .
                         b b b b . . . .      b b b b
                         c c c c c c . .                    c c c c c c . .
                         d d d d d d d d                    d d d d d d d d

Letters: b rows, t tokens of the padded row, n pictures of the batch, k tiles of them, S and s sides of a
picture in px.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from seekvl.processing.encode import ModelInput
from seekvl.processing.tile_image import Grid, tile_count
from seekvl.runtime import SeekVLError


class Part(NamedTuple):
    """Rows of a batch that stand together and are of alike length."""

    rows: int
    tokens: int
    """Length of the row that holds the longest of them; what lies behind it is padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one optimiser step learns from."""

    input_ids: Tensor
    """i64[b, t], padded on the right."""
    loss_weights: Tensor
    """f32[b, t]: how much the prediction *of* this token counts; 0 for prompts, picture slots and padding."""
    image_mask: Tensor
    """bool[b, t]: slots that picture rows fill, in order."""
    positions: Tensor
    """i64[b, t]: rotary positions, 0.. in every row."""
    present: Tensor
    """bool[b, t]: False at the padding."""
    parts: tuple[Part, ...]
    """The rows, in order; one part holds them all."""
    pixels: Tensor | None
    """f32[n, 3, S, S], the pictures of row 0, then those of row 1 and so on; of DeepSeek-VL2 f32[k, 3, S, S],
    their tiles, with no padding between; None without pictures."""
    low_pixels: Tensor | None
    """f32[n, 3, s, s] for the low-resolution tower where the processor made them."""
    normalized: bool
    """Whether the processor has normalised the pixels already."""
    grids: tuple[Grid, ...] | None = None
    """Columns and rows of local tiles of each picture; None where no sample has tiles."""

    def __len__(self) -> int:
        """Count the samples b."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; from pinned memory the copies run beside the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the data loader calls this when it feeds CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            input_ids=move(self.input_ids),
            loss_weights=move(self.loss_weights),
            image_mask=move(self.image_mask),
            positions=move(self.positions),
            present=move(self.present),
            parts=self.parts,
            pixels=None if self.pixels is None else move(self.pixels),
            low_pixels=None if self.low_pixels is None else move(self.low_pixels),
            normalized=self.normalized,
            grids=self.grids,
        )


def bucket(length: int, *, lengths: Sequence[int]) -> int:
    """Return the smallest of the given lengths that holds this many tokens.

    Few lengths mean few tensor shapes; each new shape costs a kernel set-up.

    >>> bucket(130, lengths=(256, 128))
    256
    """
    fitting = [candidate for candidate in lengths if candidate >= length]
    if not fitting:
        limit = max(lengths, default=0)
        raise SeekVLError(
            f"{length} tokens exceed the longest row of {limit}; shorten the sample or raise the lengths"
        )
    return min(fitting)


def collate(inputs: Sequence[ModelInput], *, lengths: Sequence[int], pad_id: int, parts: int = 1) -> Batch:
    """Stack samples encoded for training, padded to the smallest of `lengths` that holds the longest of them.

    With several `parts` the rows are sorted by their number of tokens and dealt to that many, as evenly as it
    goes; otherwise they keep their order.

    Raises SeekVLError for no samples, fewer than parts, a sample without loss weights or longer than every
    length, pictures of different sizes, pictures of which only some are normalised, tiled or carry a
    low-resolution copy, and tiles that are not as many as the grids say.
    """
    if not inputs:
        raise SeekVLError("a batch needs at least one sample")
    for row, sample in enumerate(inputs):
        if len(sample.input_ids) > max(lengths, default=0):
            raise SeekVLError(
                f"sample {row} of the batch: {len(sample.input_ids)} tokens exceed the longest row of "
                f"{max(lengths, default=0)}; shorten the sample or raise the lengths"
            )
    if not 1 <= parts <= len(inputs):
        raise SeekVLError(f"a batch of {len(inputs)} samples cannot be cut into {parts} parts")
    if parts > 1:
        inputs = sorted(inputs, key=lambda sample: len(sample.input_ids))
    width = bucket(max(len(sample.input_ids) for sample in inputs), lengths=lengths)
    shape = (len(inputs), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    loss_weights = torch.zeros(shape)
    image_mask, present = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for row, sample in enumerate(inputs):
        if sample.loss_weights is None:
            raise SeekVLError(f"sample {row} of the batch has no loss weights; encode it with train=True")
        size = len(sample.input_ids)
        input_ids[row, :size] = sample.input_ids
        loss_weights[row, :size] = sample.loss_weights
        image_mask[row, :size] = sample.image_mask
        present[row, :size] = True
    return Batch(
        input_ids=input_ids,
        loss_weights=loss_weights,
        image_mask=image_mask,
        positions=torch.arange(width).repeat(len(inputs), 1),
        present=present,
        parts=_parts(inputs, parts, lengths=lengths),
        pixels=_stack([sample.pixels for sample in inputs], name="pixels"),
        low_pixels=_low_pixels(inputs),
        normalized=_normalized(inputs),
        grids=_grids(inputs),
    )


def _parts(inputs: Sequence[ModelInput], parts: int, *, lengths: Sequence[int]) -> tuple[Part, ...]:
    """Cut rows into parts that differ by one row at the most, each with the length it is padded to."""
    ends = [len(inputs) * part // parts for part in range(parts + 1)]
    return tuple(
        Part(
            rows=end - start,
            tokens=bucket(max(len(sample.input_ids) for sample in inputs[start:end]), lengths=lengths),
        )
        for start, end in pairwise(ends)
    )


def _stack(pictures: Sequence[Tensor | None], *, name: str) -> Tensor | None:
    """Concatenate the pictures of all samples in order, or say which sample's do not fit."""
    present = [(row, tensor) for row, tensor in enumerate(pictures) if tensor is not None and len(tensor)]
    if not present:
        return None
    expected = tuple(present[0][1].shape[1:])
    for row, tensor in present:
        if tuple(tensor.shape[1:]) != expected:
            raise SeekVLError(
                f"sample {row} of the batch: {name} are {tuple(tensor.shape[1:])}, others {expected}"
            )
    return torch.cat([tensor for _, tensor in present])


def _low_pixels(inputs: Sequence[ModelInput]) -> Tensor | None:
    with_pictures = [sample for sample in inputs if sample.pixels is not None]
    carrying = sum(sample.low_pixels is not None for sample in with_pictures)
    if carrying not in (0, len(with_pictures)):
        raise SeekVLError(
            f"{carrying} of {len(with_pictures)} samples with pictures have low_pixels; use one processor"
        )
    return _stack([sample.low_pixels for sample in inputs], name="low_pixels")


def _grids(inputs: Sequence[ModelInput]) -> tuple[Grid, ...] | None:
    """Concatenate the grids of all samples, whose tiles they must count."""
    with_pictures = [(row, sample) for row, sample in enumerate(inputs) if sample.pixels is not None]
    tiled = sum(sample.grids is not None for _, sample in with_pictures)
    if tiled not in (0, len(with_pictures)):
        raise SeekVLError(
            f"{tiled} of {len(with_pictures)} samples with pictures have grids; use one processor"
        )
    for row, sample in with_pictures:
        if sample.grids is None or sample.pixels is None:
            continue
        tiles = sum(map(tile_count, sample.grids))
        if tiles != len(sample.pixels):
            raise SeekVLError(
                f"sample {row} of the batch: its grids make {tiles} tiles, and it has {len(sample.pixels)}"
            )
    known = [sample.grids for sample in inputs if sample.grids is not None]
    return tuple(grid for grids in known for grid in grids) if known else None


def _normalized(inputs: Sequence[ModelInput]) -> bool:
    flags = {sample.normalized for sample in inputs if sample.pixels is not None}
    if len(flags) > 1:
        raise SeekVLError(
            "some pictures of the batch are normalised and some are not; use one processor for all"
        )
    return flags.pop() if flags else False
