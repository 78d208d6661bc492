"""Warm-up of an adaptor: what lies under a cell, said with the language model's own words.

The paper warms its adaptor up on captions with a frozen language model (2403.05525, sec. 3.2.1). A frozen
model of two million parameters gives it little to learn from: the adaptor ends up as a constant that pleases
it. So each feature row is sent through the frozen head instead, and has to score the name of the colour, the
shape or the letter under it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seekvl.models.vl import VL
from seekvl.models.vl2 import AnyVL
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes.nano_encoders import ALPHABET, COLOUR_NAMES, FORMS, CellBatch
from seekvl.train.objective import Loss

NAMED = {"colour": 0, "form": 1, "letter 0": 3}
"""Which labels of a cell are said, and their place among them."""


@dataclass(frozen=True, slots=True)
class Naming:
    """The objective; made for one tokenizer."""

    tokens: tuple[tuple[int, ...], ...]
    """For each label of `NAMED` the token ids of its classes; class 0 means nothing and is never asked for.
    """

    def __call__(self, model: AnyVL, batch: CellBatch) -> Loss:
        """Return the mean cross entropy of the names of a batch, counted in pictures.

        The cells of the batch are the features that the adaptor makes.
        """
        features = adapted(model, batch.pixels)  # n t d
        logits = model.head(model.language.norm(features)).float()
        losses = []
        for place, tokens in zip(NAMED.values(), self.tokens, strict=True):
            label = batch.labels[..., place]  # n t
            names = torch.tensor(tokens, device=label.device)
            wrong = F.cross_entropy(logits[label > 0], names[label[label > 0]], reduction="sum")
            losses.append(wrong / (label > 0).sum().clamp(min=1))  # a batch may have no letter
        count = torch.tensor(float(len(batch)), device=features.device)
        return Loss(total=torch.stack(losses).sum() * count, weight=count)


def adapted(model: AnyVL, pixels: Tensor) -> Tensor:
    """Return what the adaptor makes of views f32[n, 3, S, S]: f[n, t, d], tiles with no lines around them."""
    if isinstance(model, VL):
        return model.encode_pictures(pixels)
    features: Tensor = model.adaptor(model.vision(pixels, normalized=True))
    return features


def naming(tokenizer: Tokenizer) -> Naming:
    """Return the objective in the words of a tokenizer; of a name of several tokens the first counts."""
    vocabularies: tuple[Sequence[str], ...] = (
        [f" {name}" for name in COLOUR_NAMES],
        [f" {name}" for name in FORMS],
        ALPHABET,
    )
    return Naming(tuple((0, *(tokenizer.encode(name)[0] for name in names)) for names in vocabularies))
