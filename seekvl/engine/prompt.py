"""A prompt as whole numbers: its tokens, where pictures stand in it, and where it is cut for the prefill.

    tokens   BOS User : p p p p p p q q q q Assistant :
    cuts, of at most 5 tokens     |         |       |             at each picture's end, and every 5 tokens

Where cuts are depends only on what stands before them. So two prompts that begin alike are computed in the
same pieces as far as they are alike, and what one of them left in the cache up to a cut is, bit for bit, what
the other would compute.

Where the numbers of a token do not depend on the pieces (`forward.exact_cuts`) a prompt is seamless: it is
cut every so many tokens only, and what is in the cache can be taken over up to any token.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture in a prompt."""

    start: int
    """Its first token."""
    end: int
    """The token behind its last."""
    digest: bytes
    """Fingerprint of its pixels."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the scheduler knows of a prompt; get one from `make_prompt`."""

    ids: tuple[int, ...]
    pictures: tuple[Shown, ...]
    cuts: tuple[int, ...]
    """Ends of the pieces that any prompt with this beginning has, ascending."""
    marks: tuple[bytes, ...]
    """For each cut, a fingerprint of everything in front of it, pictures too."""
    seamless: bool = False
    """Whether its tokens have the same numbers wherever it is cut."""

    def __len__(self) -> int:
        return len(self.ids)


def make_prompt(
    ids: Sequence[int], pictures: Sequence[Shown], *, chunk: int, seamless: bool = False
) -> Prompt:
    """Cut a prompt into pieces of at most `chunk` tokens.

    >>> make_prompt(range(13), [Shown(3, 9, b"")], chunk=5).cuts
    (5, 9)
    >>> make_prompt(range(13), [Shown(3, 9, b"")], chunk=5, seamless=True).cuts
    (5, 10)
    """
    ends = [] if seamless else [picture.end for picture in pictures]
    cuts = tuple(_cuts(len(ids), ends, chunk=chunk))
    marks, state = [], hashlib.blake2b(digest_size=16)
    for start, end in pairwise((0, *cuts)):
        state.update(array("q", ids[start:end]).tobytes())
        for picture in pictures:
            if start <= picture.start < end:
                state.update(picture.digest)
        marks.append(state.copy().digest())
    return Prompt(tuple(ids), tuple(pictures), cuts, tuple(marks), seamless)


def _cuts(total: int, ends: Sequence[int], *, chunk: int) -> Iterator[int]:
    """Yield the cuts of so many tokens with pictures that end there."""
    last = 0
    for end in (*ends, None):
        while last + chunk < (total + 1 if end is None else end):
            last += chunk
            yield last
        if end is not None:
            last = end
            yield last


def common_cut(one: Prompt, other: Prompt) -> int:
    """Return the last cut up to which two prompts are the same; 0 where none is."""
    shared = 0
    for cut, mark, twin in zip(one.cuts, one.marks, other.marks, strict=False):
        if mark != twin:
            break
        shared = cut
    return shared


def common_beginning(one: Prompt, other: Prompt) -> int:
    """Return how many tokens two prompts begin with that are the same, pictures among them too.

    >>> red, blue = (make_prompt([1, 2, 9, 9, 3], [Shown(2, 4, name)], chunk=8) for name in (b"red", b"blue"))
    >>> common_beginning(red, red), common_beginning(red, blue)
    (5, 2)
    """
    shared = _equal(one.ids, other.ids)
    for mine, theirs in zip(one.pictures, other.pictures, strict=False):
        if mine != theirs:
            return min(shared, mine.start, theirs.start)
    count = min(len(one.pictures), len(other.pictures))
    left = (*one.pictures[count:], *other.pictures[count:])
    return min((shared, *(shown.start for shown in left)))


def common_tokens(held: Sequence[int], pictures: Sequence[Shown], prompt: Prompt) -> int:
    """Return how many tokens at the beginning of a prompt are already held, with the pictures among them.

    A picture is shared whole or not at all, and the last token never is, because its logits are wanted.
    """
    shared = _equal(held, prompt.ids[:-1])
    for index, shown in enumerate(prompt.pictures):
        equal = index < len(pictures) and pictures[index].digest == shown.digest
        if shown.start < shared and not (equal and shared >= shown.end):
            return shown.start
    return shared


def _equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens are the same before the first that differs."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))
