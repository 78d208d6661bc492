"""Answers that can only hold well-formed boxes: tokens that would spoil one are not offered for choice.

    text --<|ref|>--> label --<|/ref|><|det|>[[--> number ,_ number ,_ number ,_ number --]--> listed
     ^                                               ^                                           |
     |                                               +---------------------,_[------------------+
     +------------------------------------------------------------------------]<|/det|>----------+

A grammar of bytes, so that any byte-level vocabulary will do: a token is allowed where every byte of it is,
whether the marks are tokens of their own or spelled. Numbers go from 0 to 999, the third is no less than the
first and the fourth no less than the second. An answer ends only outside of boxes; and since each state knows
how many tokens would close it, no box is begun and no label gets longer than the length of the answer allows.

Letters: m tokens that are allowed in a state.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from seekvl.engine.choices import Constrain
from seekvl.processing.tokenizer import GROUNDING_MARKS, Tokenizer
from seekvl.runtime import SeekVLError

Place: TypeAlias = Literal["start", "text", "label", "fixed", "number", "listed"]

MARKS = tuple(mark.encode() for mark in GROUNDING_MARKS)
OPEN, NAMED, LIST, CLOSE, HARMLESS = MARKS
"""The marks as bytes; the last, <|grounding|>, may stand anywhere outside of boxes."""


@dataclass(frozen=True, slots=True)
class State:
    """How far an answer has come."""

    place: Place
    seen: bytes = b""
    """In text and labels: the beginning of what may become a mark."""
    rest: bytes = b""
    """The bytes that must come now, where they are fixed; after them comes a number, or text for index -1."""
    index: int = -1
    """Which number of a box it is, or comes next."""
    digits: int | None = None
    """The number so far; None before its first digit."""
    least: tuple[int, int] = (0, 0)
    """What the numbers must reach that are next across and down: the box's x1 and y1."""


TEXT = State("text")
LABEL = State("label")


def advance(state: State, byte: int) -> State | None:
    """Return the state after one more byte; None where it may not come."""
    match state.place:
        case "start":
            return _start(state, byte)
        case "text" | "label":
            return _write(state, byte)
        case "fixed":
            return _fixed(state, byte)
        case "number":
            return _number(state, byte)
    if byte == ord(","):
        return State("fixed", rest=b" [", index=0)
    return State("fixed", rest=CLOSE) if byte == ord("]") else None


def closing(state: State) -> bytes:
    """Return a shortest way to end the box that a state is in; empty in text.

    >>> closing(State("number", index=2, digits=4, least=(40, 7)))
    b'0, 7]]<|/det|>'
    """
    match state.place:
        case "text":
            return b""
        case "start":
            return OPEN[len(state.seen.strip()) :] + closing(LABEL)
        case "label":
            begun = len(state.seen) if NAMED.startswith(state.seen) else 0
            return NAMED[begun:] + LIST + b"[[" + closing(State("number", index=0))
        case "fixed":
            after = TEXT if state.index < 0 else replace(state, place="number", rest=b"")
            return state.rest + closing(after)
        case "number":
            return _closing_number(state)
    return b"]" + CLOSE


def _start(state: State, byte: int) -> State | None:
    """Begin an answer with a box, after one blank at most, as the answers of some templates have it."""
    seen = state.seen + bytes([byte])
    if seen.removeprefix(b" ") == OPEN:
        return LABEL
    return replace(state, seen=seen) if OPEN.startswith(seen.removeprefix(b" ")) else None


def _write(state: State, byte: int) -> State | None:
    """Go on in text or a label: anything but marks that do not belong there, and line breaks in labels."""
    seen = state.seen + bytes([byte])
    if seen in MARKS:
        if state.place == "label":
            return State("fixed", rest=LIST + b"[[", index=0) if seen == NAMED else None
        return {OPEN: LABEL, HARMLESS: TEXT}.get(seen)
    if state.place == "label" and byte == ord("\n"):
        return None
    if not any(mark.startswith(seen) for mark in MARKS):
        seen = (
            b"<" if byte == ord("<") else b""
        )  # no mark has a second "<", so no other beginning is possible
    return replace(state, seen=seen)


def _fixed(state: State, byte: int) -> State | None:
    """Write the next of the bytes that are fixed."""
    if byte != state.rest[0]:
        return None
    if len(state.rest) > 1:
        return replace(state, rest=state.rest[1:])
    return TEXT if state.index < 0 else replace(state, place="number", rest=b"")


def _number(state: State, byte: int) -> State | None:
    """Go on in a number that can still become a coordinate, or end one that is."""
    least = state.least[state.index % 2]
    if byte in b"0123456789":
        digit = byte - ord("0")
        if state.digits is None:
            digits = digit
        elif state.digits == 0:
            return None  # a leading zero
        else:
            digits = 10 * state.digits + digit
        return None if _reached(digits, least) is None else replace(state, digits=digits)
    if byte != (ord("]") if state.index == 3 else ord(",")) or state.digits is None or state.digits < least:
        return None
    if state.index == 3:
        return State("listed")
    across, down = state.least
    if state.index == 0:
        across = state.digits
    elif state.index == 1:
        down = state.digits
    return State("fixed", rest=b" ", index=state.index + 1, least=(across, down))


def _reached(digits: int, least: int) -> int | None:
    """Return the number that begins with these digits, with the fewest more, and is in range; None: none is.

    >>> _reached(4, 40), _reached(4, 450), _reached(4, 500)
    (40, 450, None)
    """
    for power in (1, 10, 100)[: 4 - len(str(digits)) if digits else 1]:
        low = digits * power
        if low + power > least:
            return max(low, least)
    return None


def _closing_number(state: State) -> bytes:
    """End a number, with the smallest that will do, and those that follow it."""
    least = state.least[state.index % 2]
    value = least if state.digits is None else _reached(state.digits, least)
    assert value is not None  # `advance` goes into no state without
    begun = 0 if state.digits is None else len(str(state.digits))
    text = str(value)[begun:].encode()
    after = advance(replace(state, digits=value), ord("]") if state.index == 3 else ord(","))
    assert after is not None
    return text + (b"]" if state.index == 3 else b",") + closing(after)


@dataclass(frozen=True, slots=True)
class Offer:
    """The tokens that are allowed in a state."""

    tokens: Tensor
    """Ids, i64[m]."""
    closing: Tensor
    """How many tokens will close the box that the answer is in after each of them, i64[m]."""


@dataclass(frozen=True, slots=True)
class Family:
    """The tokens whose text has the same first two bytes, or one; by what follows them."""

    calm: list[int] = field(default_factory=list)
    """Neither the beginning of a mark nor a line break."""
    lined: list[int] = field(default_factory=list)
    """A line break, and no beginning of a mark."""
    wild: list[int] = field(default_factory=list)
    """The beginning of a mark."""


class Vocabulary:
    """The tokens of a vocabulary that have text, sorted so that what a state allows is found quickly."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        known = set(self._bytes)
        self._marks = tuple(mark for mark in MARKS if mark in known)
        needed = sorted(set(b"".join(MARKS) + b"[], 0123456789"))
        missing = bytes(value for value in needed if bytes([value]) not in known)
        if missing:
            raise SeekVLError(
                f"boxes cannot be forced: the vocabulary has no token for each of {missing!r} alone"
            )
        self._families: dict[int, dict[int | None, Family]] = {}
        for token, text in enumerate(self._bytes):
            if text:
                second = text[1] if len(text) > 1 else None
                family = self._families.setdefault(text[0], {}).setdefault(second, Family())
                rest = text[2:]
                part = family.wild if b"<" in rest else family.lined if b"\n" in rest else family.calm
                part.append(token)
        self._offers: dict[State, Offer] = {}

    def offer(self, state: State) -> Offer:
        """Return the tokens that are allowed in a state.

        They are remembered, but not for each x1 and y1: those states are very many, and quick to find again.
        """
        known = self._offers.get(state)
        if known is None:
            known = self._find(state)
            if state.least == (0, 0):
                self._offers[state] = known
        return known

    def walk(self, state: State, token: int, *, begin: int = 0) -> State | None:
        """Return the state after a token, its bytes from `begin` on; None where it is not allowed."""
        for byte in self._bytes[token][begin:]:
            after = advance(state, byte)
            if after is None:
                return None
            state = after
        return state

    def to_close(self, state: State) -> int:
        """Count the tokens of `closing`: marks whole where the vocabulary has them, else byte by byte."""
        left, count = closing(state), 0
        while left:
            mark = next((mark for mark in self._marks if left.startswith(mark)), left[:1])
            left, count = left[len(mark) :], count + 1
        if state.place == "label" and NAMED in self._marks and state.seen:
            return min(count, self.to_close(LABEL))  # a whole mark instead of the rest of this one
        return count

    def _find(self, state: State) -> Offer:
        """Try all tokens, family by family."""
        found: dict[State, list[int]] = {}
        for first, families in self._families.items():
            one = advance(state, first)
            if one is None:
                continue
            for second, family in families.items():
                after = one if second is None else advance(one, second)
                if after is not None:
                    self._sort(family, after, into=found)
        tokens = [token for part in found.values() for token in part]
        costs = [torch.full((len(part),), self.to_close(end)) for end, part in found.items()]
        return Offer(torch.tensor(tokens), torch.cat(costs))

    def _sort(self, family: Family, state: State, *, into: dict[State, list[int]]) -> None:
        """Sort the tokens of a family by the state that they lead to from the one after their first bytes.

        Those that certainly stay in text or in a label are not looked at one by one.
        """
        if state == TEXT:
            sure, unsure = family.calm + family.lined, family.wild
        elif state == LABEL:
            sure, unsure = family.calm, family.wild
        else:
            sure, unsure = [], family.calm + family.lined + family.wild
        if sure:
            into.setdefault(state, []).extend(sure)
        for token in unsure:
            end = self.walk(state, token, begin=2)
            if end is not None:
                into.setdefault(end, []).append(token)


class BoxConstraint:
    """The constraint on one answer, which follows it token by token; get one from `box_constraint`."""

    over = False
    """Text may always go on."""

    def __init__(self, vocabulary: Vocabulary, *, state: State, end_id: int, room: int) -> None:
        self._vocabulary = vocabulary
        self._state = state
        self._end_id = end_id
        self._room = room

    @property
    def exempt(self) -> bool:
        """Whether the answer is among the numbers of boxes, where every digit is as good as new."""
        return self._state.place in ("number", "listed", "fixed")

    def narrow(self, logits: Tensor) -> Tensor:
        """Return logits f[v] with minus infinity for every token that may not come next."""
        offer = self._vocabulary.offer(self._state)
        tokens = offer.tokens[offer.closing < self._room]
        if self._state.place == "text":
            tokens = torch.cat((tokens, torch.tensor([self._end_id])))
        tokens = tokens.to(logits.device)
        narrowed = torch.full_like(logits, -torch.inf)
        narrowed[tokens] = logits[tokens]
        return narrowed

    def take(self, token: int) -> None:
        """Follow the answer by the token that was chosen."""
        if token == self._end_id:
            return
        after = self._vocabulary.walk(self._state, token)
        assert after is not None
        self._state = after
        self._room -= 1


def box_constraint(
    kind: Constrain, tokenizer: Tokenizer, *, end_id: int, room: int, begun: str = ""
) -> BoxConstraint:
    """Make the constraint of a kind. `room`: tokens of the answer.

    begun: what the prompt holds of the answer already. A box that is open there is gone on with.

    Raises SeekVLError when a vocabulary cannot spell boxes, when `begun` holds a malformed one, and when
    there is no room for the box to start or go on with.
    """
    vocabulary = _vocabulary(tokenizer)
    state = _after(begun)
    if kind == "box_first" and state.place == "text":
        state = State("start")
    least = vocabulary.to_close(state)
    if room < least:
        raise SeekVLError(
            f"an answer that starts with a box, or goes on with one, takes at least {least} tokens and has "
            f"room for {room}; raise max_new_tokens or shorten the prompt"
        )
    return BoxConstraint(vocabulary, state=state, end_id=end_id, room=room)


def _after(begun: str) -> State:
    """Return the state after what an answer begins with."""
    state: State | None = TEXT
    for place, byte in enumerate(begun.encode()):
        state = None if state is None else advance(state, byte)
        if state is None:
            spoiled = begun.encode()[max(place - 24, 0) : place + 1].decode(errors="replace")
            raise SeekVLError(
                f"the answer is begun with a box that is not well-formed, at the end of {spoiled!r}: "
                "mend it, or go without constrain"
            )
    assert state is not None
    return state


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Sort a tokenizer's vocabulary once."""
    return Vocabulary(tokenizer)
