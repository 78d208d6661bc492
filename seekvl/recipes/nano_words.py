"""The tokenizer of seekvl-nano: a byte-level BPE learnt from the words of its own corpus."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from seekvl.corpus import nano as corpus
from seekvl.processing.template import Template, prompt_text, render
from seekvl.recipes.nano_sources import Draw
from seekvl.runtime import atomic_file

VOCABULARY = 1024
"""Rows of embedding and head; the corpus fills fewer."""


def train_tokenizer(
    path: Path,
    *,
    template: Template,
    specials: Sequence[str],
    draw: Draw = corpus.sample,
    seed: int = 0,
    samples: int = 6000,
) -> None:
    """Learn a byte-level BPE from the prompts of drawn samples and write it as a `tokenizer.json`.

    Digits and the letters of capitalised words stay single tokens, so that reading a word and a coordinate is
    copying letter by letter. `specials` get the last ids, in their order.
    """
    backend = Backend(models.BPE())
    capitals = Regex(r"\p{Lu}(?=\p{Lu})|(?<=\p{Lu})\p{Lu}")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]+"), "isolated"),
            pre_tokenizers.Split(Regex(r", (?=\d)"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.Split(capitals, "isolated"),
            pre_tokenizers.Split(Regex(r"\s?(?!, $)\p{P}+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(specials),
        min_frequency=3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        _texts(seed, samples, template=template, specials=specials, draw=draw), trainer
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    with atomic_file(path) as part:
        backend.save(str(part))


def _texts(
    seed: int, samples: int, *, template: Template, specials: Sequence[str], draw: Draw
) -> Iterator[str]:
    """Yield the prompts of the first samples of both streams, cut where encoding cuts them.

    BOS stands in no prompt.
    """
    marks = re.compile("|".join(re.escape(token) for token in specials))
    for index in range(samples):
        text = index % 3 == 0
        sample = corpus.text_sample(seed, index) if text else draw(seed, index, kind=None, questions=6)
        pieces = render(sample.conversation, template=template, complete=True)
        for apart, stretch in groupby(pieces, key=lambda piece: piece.printed_only or piece.picture):
            if not apart:
                yield from marks.split(prompt_text(list(stretch)))
