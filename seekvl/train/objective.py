"""What learning minimises: cross entropy of the next token where tokens count (2403.05525, sec. 3.2).

Letters: b rows, t tokens, r supervised tokens of the batch, n pictures, s slots, d width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seekvl.data.collate import Batch
from seekvl.models.moe import RouterRecord
from seekvl.models.vl import VL
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import SeekVLError
from seekvl.train.routers import has_experts

ROW_STEP = 64
"""Supervised rows are filled up to a multiple of this, so that the head meets few shapes."""


class Loss(NamedTuple):
    """A loss before its division, so that micro-batches and devices can add theirs first."""

    total: Tensor
    """f32[]: sum of weighted losses, with gradient."""
    weight: Tensor
    """f32[]: sum of the weights, without gradient."""
    record: RouterRecord | None = None
    """What the routers did; None for a network without experts, or a loss that does not reach them."""

    def mean(self) -> Tensor:
        """Return the total over the weight; 0 and no NaN where nothing counts."""
        return self.total / torch.where(self.weight > 0, self.weight, torch.ones_like(self.weight))

    def minimised(self) -> Tensor:
        """Return what a step minimises: the mean, plus the balance losses of routers (2401.06066, sec. 3.3).

        The loss that is told is the mean alone, as in the reference. Where nothing counts this is 0, too.
        """
        if self.record is None:
            return self.mean()
        return self.mean() + self.record.loss() * (self.weight > 0)


def next_token_loss(model: AnyVL, batch: Batch) -> Loss:
    """Return the weighted cross entropy of every token given those before it.

    The weight belongs to the *predicted* token, hence the shift by one:

        tokens    <bos> User :  hi  Assistant :  yes <eos>
        weights     0    0   0   0      0     0   1    1
        predicts                              ^yes ^<eos>

    Only hidden states that predict a weighted token pass through the head. With experts the record holds what
    routers did with every token but padding.
    """
    features = picture_features(model, batch)
    embeds = model.embed(batch.input_ids, image_mask=batch.image_mask, image_features=features)
    weights = batch.loss_weights[:, 1:]
    counted = weights != 0  # b t-1
    picked, record = _picked(model, embeds, batch, counted=counted)  # r d
    fill = -len(picked) % ROW_STEP
    logits = model.head(F.pad(picked, (0, 0, 0, fill)))  # r' v
    at = counted.nonzero(as_tuple=True)
    targets = F.pad(batch.input_ids[:, 1:][at], (0, fill))
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    total = (losses * F.pad(weights[at], (0, fill))).sum()
    return Loss(total=total, weight=weights.sum(), record=record)


def _picked(
    model: AnyVL, embeds: Tensor, batch: Batch, *, counted: Tensor
) -> tuple[Tensor, RouterRecord | None]:
    """Return the hidden states f[r, d] that predict the tokens counted in bool[b, t-1], and what routers did
    on the way, where there are any. Parts of the batch go through the network one after the other.
    """
    first, picked, records = 0, [], []
    for rows, tokens in batch.parts:
        here = slice(first, first + rows), slice(tokens)
        if has_experts(model):
            record = RouterRecord(counted=batch.present[here])
            records.append((rows, record))
            hidden = model.hidden(embeds[here], positions=batch.positions[here], record=record)
        else:
            hidden = model.hidden(embeds[here], positions=batch.positions[here])
        picked.append(hidden[:, :-1][counted[here[0], : tokens - 1]])
        first += rows
    return torch.cat(picked), RouterRecord.joined(records) if records else None


def picture_features(model: AnyVL, batch: Batch) -> Tensor | None:
    """Return the rows of a batch's pictures, f[n, s, d] of n pictures alike or f[s, d] of tiled ones; None
    without pictures.

    Raises SeekVLError for pictures prepared for the other family.
    """
    if batch.pixels is None:
        return None
    if isinstance(model, VL) != (batch.grids is None):
        how = "one stack of pictures" if batch.grids is None else "tiles"
        raise SeekVLError(f"the batch holds {how}, which {type(model).__name__} does not take")
    if isinstance(model, VL):
        return model.encode_pictures(batch.pixels, low_pixels=batch.low_pixels, normalized=batch.normalized)
    assert batch.grids is not None
    return model.encode_pictures(batch.pixels, grids=batch.grids)
