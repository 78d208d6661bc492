"""Answers that are one of some given texts, however their tokens are cut.

    texts "cat", "car"     said ""    -> tokens  c  ca  cat  car, each with or without a blank in front
                           said "ca"  -> tokens  t  r

What counts is what is spelled: of every text that begins with what was said, all tokens are offered that go
on in it. So no text is out of reach because its tokens would be cut otherwise. A token after which the rest
would need more tokens than the answer may have is not offered.

Letters: v vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError

Spellings = dict[bytes, list[int]]
"""The tokens that are spelled so."""


class ChoiceConstraint:
    """The constraint on one answer; get one from `choice_constraint`."""

    exempt = False

    def __init__(
        self, costs: dict[bytes, list[int]], *, spellings: Spellings, end_id: int, room: int
    ) -> None:
        self._costs = costs
        """For each text, how many tokens its rest takes from each byte on."""
        self._spellings = spellings
        self._longest = max(map(len, spellings))
        self._end_id = end_id
        self._room = room
        self._said = b""

    @property
    def over(self) -> bool:
        """Whether a text is said that none of the others goes on from."""
        return bool(self._said) and self._open() == [self._said]

    def narrow(self, logits: Tensor) -> Tensor:
        """Return logits f[v] with minus infinity for every token that leads to no text."""
        offered = torch.tensor(sorted(self._offered()), device=logits.device)
        narrowed = torch.full_like(logits, -torch.inf)
        narrowed[offered] = logits[offered]
        return narrowed

    def take(self, token: int) -> None:
        """Follow the answer by the token that was chosen."""
        if token == self._end_id:
            return
        spelled = self._offered()[token]
        self._said += spelled if self._said else spelled.removeprefix(b" ")
        self._room -= 1

    def _open(self) -> list[bytes]:
        """Return the texts that begin with what was said."""
        return [text for text in self._costs if text.startswith(self._said)]

    def _offered(self) -> dict[int, bytes]:
        """Return the tokens that may come next, with their spelling."""
        offered = {self._end_id: b""} if self._said in self._costs else {}
        begun = len(self._said)
        for text in self._open():
            costs = self._costs[text]
            for size in range(1, min(self._longest, len(text) - begun) + 1):
                if costs[begun + size] < self._room:
                    part = text[begun : begun + size]
                    for spelled in (part,) if begun else (part, b" " + part):
                        offered |= dict.fromkeys(self._spellings.get(spelled, ()), spelled)
        return offered


def choice_constraint(
    texts: Sequence[str], tokenizer: Tokenizer, *, end_id: int, room: int
) -> ChoiceConstraint:
    """Hold an answer of at most `room` tokens to one of these texts.

    Raises SeekVLError for texts that the vocabulary cannot spell, or that are all too long.
    """
    spellings = _spellings(tokenizer)
    costs = {text.encode(): _costs(text.encode(), spellings) for text in texts}
    for text, cost in costs.items():
        if cost[0] > len(text):
            raise SeekVLError(f"the vocabulary cannot spell {text.decode()!r}, which constrain lists")
    least = min(cost[0] for cost in costs.values())
    if least > room:
        raise SeekVLError(
            f"the shortest text that constrain lists takes {least} tokens and the answer has room for "
            f"{room}; raise max_new_tokens or shorten the prompt"
        )
    return ChoiceConstraint(costs, spellings=spellings, end_id=end_id, room=room)


def _costs(text: bytes, spellings: Spellings) -> list[int]:
    """Return the fewest tokens that spell a text from each of its bytes on; more than it has where none do.

    >>> _costs(b"abc", {b"a": [0], b"bc": [1], b"c": [2]})
    [2, 1, 1, 0]
    """
    longest, never = max(map(len, spellings)), len(text) + 1
    costs = [never] * len(text) + [0]
    for begin in reversed(range(len(text))):
        for end in range(begin + 1, min(len(text), begin + longest) + 1):
            if text[begin:end] in spellings:
                costs[begin] = min(costs[begin], 1 + costs[end])
    return [min(cost, never) for cost in costs]


@lru_cache(maxsize=4)
def _spellings(tokenizer: Tokenizer) -> Spellings:
    """Return a vocabulary by what its tokens spell; those without text are not in it."""
    spellings: Spellings = {}
    for token in range(tokenizer.vocab_size):
        if spelled := tokenizer.token_bytes(token):
            spellings.setdefault(spelled, []).append(token)
    return spellings
