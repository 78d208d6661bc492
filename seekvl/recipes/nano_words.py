"""The tokenizer of seekvl-nano: a byte-level BPE learnt from the words of its own corpus."""

import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from seekvl.corpus import nano as corpus
from seekvl.processing.template import Template, prompt_text, render
from seekvl.processing.tokenizer import BOS, EOS, GROUNDING_MARKS, IMAGE
from seekvl.runtime import atomic_file

VOCABULARY = 1024
"""Rows of embedding and head; the corpus fills fewer."""


def train_tokenizer(path: Path, *, template: Template, seed: int = 0, samples: int = 6000) -> None:
    """Learn nano's byte-level BPE from its own corpus and write it as a `tokenizer.json`.

    Digits and the letters of capitalised words stay single tokens, so that reading a word and a coordinate is
    copying letter by letter. BOS, EOS and the picture placeholder are DeepSeek-VL's, the marks of boxes
    VL2's.
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
    specials = (BOS, EOS, IMAGE, *GROUNDING_MARKS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(specials),
        min_frequency=3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(seed, samples, template=template), trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    with atomic_file(path) as part:
        backend.save(str(part))


def _texts(seed: int, samples: int, *, template: Template) -> Iterator[str]:
    """Yield the prompts of the first samples of both streams, cut at their special tokens."""
    specials = re.compile("|".join(re.escape(token) for token in (EOS, IMAGE, *GROUNDING_MARKS)))
    for index in range(samples):
        sample = corpus.text_sample(seed, index) if index % 3 == 0 else corpus.sample(seed, index)
        yield from specials.split(prompt_text(render(sample.conversation, template=template, complete=True)))
