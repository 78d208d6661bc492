"""The samples the small models learn from: drawn pictures with questions, and dialogues, with weighted
answers.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from seekvl.corpus import nano as corpus
from seekvl.data.sample import Sample
from seekvl.processing.encode import ModelInput, Processor
from seekvl.processing.tokenizer import Tokenizer

PLACES = (2.0, 1.0, 0.2, 0.2)
"""Weight of a token inside a box, by how many digits stand right before it: hundreds, tens, units, end.

What may stand at one place must weigh the same. By the digits that follow, the comma after a short number
would weigh ten times the third digit of a long one, and every number would end after two.
"""


def weigh_answers(inputs: ModelInput, *, tokenizer: Tokenizer) -> ModelInput:
    """Weigh tokens so that a long answer counts more than a short one, but not as many times more as it has
    tokens, and the last digits of a box hardly at all.

    By tokens, the digits of boxes would be most of what there is to learn, and "red" next to nothing; by
    answers, a digit would count a tenth of "red", and boxes come last or never.

        answer     red <eos>     <ref> red circle </ref> <det> [[ 1  2  0   , ...
        weights    .7   .7       .2    .2  .2     .2     .4    .4 .4 .2 .04 .04
    """
    assert inputs.loss_weights is not None
    counted = inputs.loss_weights > 0
    begins = counted & ~torch.cat((torch.zeros(1, dtype=torch.bool), counted[:-1]))
    answer = begins.cumsum(0) * counted  # t: number of the answer, 0 outside
    lengths = answer.bincount()[answer].float()
    return replace(inputs, loss_weights=counted * lengths**-0.5 * _places(inputs.input_ids, tokenizer))


def _places(ids: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Return f32[t], the weight of each token by its place in a number of a box; 1 outside of boxes."""
    opened, closed = (ids.eq(tokenizer.encode(mark)[0]) for mark in ("<|det|>", "<|/det|>"))
    inside = opened.cumsum(0) > closed.cumsum(0)
    digit = torch.isin(ids, torch.tensor([tokenizer.encode(str(digit))[0] for digit in range(10)])) & inside
    before = torch.zeros_like(ids)  # t: digits right before, at most 3
    run = torch.ones_like(digit)
    for back in range(1, len(PLACES)):
        run = run & torch.cat((torch.zeros(back, dtype=torch.bool), digit))[: len(digit)]
        before += run
    return torch.where(inside, torch.tensor(PLACES)[before], 1.0)


class Draw(Protocol):
    """What draws samples, a pure function of seed and index, such as `corpus.nano.sample`."""

    def __call__(self, seed: int, index: int, *, kind: str | None, questions: int) -> Sample:
        """Draw the sample of a seed and index, with questions of one kind or, for None, of all."""
        ...


@dataclass(frozen=True, slots=True)
class TextSource:
    """Short dialogues without pictures."""

    processor: Processor
    seed: int
    name: str
    """What the model calls itself."""

    def __call__(self, index: int) -> ModelInput:
        """Return sample `index`, encoded for training."""
        conversation = corpus.text_sample(self.seed, index, name=self.name).conversation
        return weigh_answers(
            self.processor.encode(conversation, train=True), tokenizer=self.processor.tokenizer
        )


@dataclass(frozen=True, slots=True)
class PictureSource:
    """Pictures with questions and answers; one in four is for counting, which mixed questions leave to small
    numbers.
    """

    processor: Processor
    seed: int
    questions: int
    """Most questions a picture."""
    draw: Draw = corpus.sample
    """What draws them, and in which mixture."""

    def __call__(self, index: int) -> ModelInput:
        """Return sample `index`, encoded for training."""
        kind = "count" if index % 4 == 3 else None
        sample = self.draw(self.seed, index, kind=kind, questions=self.questions)
        return weigh_answers(
            self.processor.encode(sample.conversation, train=True), tokenizer=self.processor.tokenizer
        )
