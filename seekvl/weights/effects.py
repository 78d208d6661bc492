"""What rounding a matrix does to the answers of a model.

An answer changes where the second likeliest token overtakes the first: what counts is how far the gap of
their logits moves, at places where it is narrow. To first order that is the sum over the outputs y of a
matrix of (d gap / d y) (y' - y); one backward pass of the plain model gives it for all matrices and formats
together. The p places of a passage go in with random signs, so that the sum is as large as one of them times
the root of p. Matrices add up as independent errors do, by their squares.

Letters: b passages, t tokens, n tokens of all passages, p places of answers, d width, v vocabulary, i inputs
and o outputs of a matrix.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.models.quantized import Kind, Quantized
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import torch_generator

HEAD = "language.lm_head"
"""Name of the head: it is not among the modules that a pass through the layers calls."""

MEASURED_TOKENS = 2048
"""Tokens that are measured together, with all their activations in memory; a passage at least."""
NEAR = 0.1
"""Gap in nats up to which a place counts: beyond it the second token is far from overtaking the first."""
CHANGED = 8
"""Changed answers, in expectation, that a deviation of gaps is read off; where fewer are allowed, it is taken
in proportion: gaps near zero are few, and no denser than those a little above.
"""
NORMAL = (math.pi / 2) ** 0.5
"""Deviation of a normal number in mean magnitudes."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt and the answer the plain model gave to it."""

    embeds: Tensor
    """f[t, d]: embeddings of both, pictures among them, on the CPU."""
    places: int
    """How many tokens at the end decide the answer: one for each of its tokens, its end too, the last of the
    prompt being the first.
    """


@dataclass(slots=True)
class Form:
    """A module rounded in one format."""

    part: Quantized
    error: float
    moved: float = 0.0
    """Deviation in nats, see `Matrix.moved`; while it is measured, the sum over the passages of |sum over
    places of sign times shift of the gap|, times the root of the places.
    """
    wrong: float = 0.0
    """Squared norm of what its outputs are off by; `true` that of the outputs."""
    true: float = 0.0

    @property
    def output_error(self) -> float | None:
        """Error of the outputs relative to their norm; None where none was seen."""
        return (self.wrong / self.true) ** 0.5 if self.true else None


Forms = Mapping[str, Mapping[Kind, Form]]
"""Each module that was rounded, by name, in each format."""


def measure(
    model: AnyVL,
    passages: Sequence[Passage],
    *,
    forms: Forms,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Take the effects of all rounded modules into their forms; return the gaps f32[p] of each answer, those
    of short passages first. `progress` is told how many passages are done, of how many.
    """
    gaps: list[Tensor] = []
    for number, batch in enumerate(_batches(passages)):
        embeds, _ = stacked(batch)
        with torch.no_grad():
            hidden = model.hidden(embeds)
            gap, _ = _gap(_logits(model, _rows(hidden, batch)))
            found = list(torch.split(gap, [passage.places for passage in batch]))
        gaps += found
        near = [index for index, gap in enumerate(found) if (gap < NEAR).any()]
        if near and forms:
            some, narrow = [batch[index] for index in near], [found[index] for index in near]
            _measure_near(model, some, narrow, forms=forms, number=number)
        if progress is not None:
            progress(len(gaps), len(passages))
    places = max(sum(int((gap < NEAR).sum()) for gap in gaps), 1)
    for kinds in forms.values():
        for form in kinds.values():
            form.moved *= NORMAL / places
    return gaps


def _batches(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    """Yield passages of like length together, `MEASURED_TOKENS` at most."""
    batch: list[Passage] = []
    for passage in sorted(passages, key=lambda passage: len(passage.embeds)):
        if batch and len(passage.embeds) * (len(batch) + 1) > MEASURED_TOKENS:
            yield batch
            batch = []
        batch.append(passage)
    yield batch


def _rows(hidden: Tensor, passages: Sequence[Passage]) -> list[Tensor]:
    """Return the hidden states f[p, d] that decide each answer."""
    ends = [len(passage.embeds) for passage in passages]
    return [row[end - passage.places : end] for row, end, passage in zip(hidden, ends, passages, strict=True)]


def _logits(model: AnyVL, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits f32[p, v] of all rows f[p, d]; half precision would tie the likeliest tokens."""
    return F.linear(torch.cat(tuple(rows)).float(), model.language.lm_head.weight.float())


def _gap(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gap f32[p] between the logits f32[p, v] of the two likeliest tokens, and these i64[p, 2]."""
    best = logits.topk(2, dim=1)
    return best.values[:, 0] - best.values[:, 1], best.indices


def _measure_near(
    model: AnyVL, passages: Sequence[Passage], gaps: Sequence[Tensor], *, forms: Forms, number: int
) -> None:
    """Add up what each module does to the gaps f32[p] of passages that have narrow ones."""
    shifts: dict[tuple[str, Kind], Tensor] = {}

    def see(name: str, kind: Kind, shift: Tensor) -> None:
        """Take in f32[b], the shift of the signed gaps of each passage."""
        key = (unit_of(name), kind)
        shifts[key] = shifts[key] + shift if key in shifts else shift

    embeds, kept = stacked(passages)
    with ExitStack() as hooks:
        for name, fitted in forms.items():
            if name != HEAD:
                hook = _differences(name, fitted, kept=kept, see=see)
                handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
        embeds = embeds.clone().requires_grad_()
        hidden = model.hidden(embeds)
        total, own = _signed_gaps(model, _rows(hidden, passages), forms.get(HEAD, {}), number=number)
        torch.autograd.grad(total, embeds)
    for kind, shift in own.items():
        see(HEAD, kind, shift)
    places = torch.tensor([float((gap < NEAR).sum()) for gap in gaps])  # b
    for (unit, kind), shift in shifts.items():
        for name, fitted in forms.items():
            if unit_of(name) == unit:
                fitted[kind].moved += float((shift.abs() * places.sqrt()).sum())


def _signed_gaps(
    model: AnyVL, rows: Sequence[Tensor], head: Mapping[Kind, Form], *, number: int
) -> tuple[Tensor, dict[Kind, Tensor]]:
    """Return the sum of all narrow gaps with random signs, and what a rounded head adds to those of each
    passage, f32[b].
    """
    logits = _logits(model, rows)  # p v, of all passages
    gap, tokens = _gap(logits)
    signs = torch.randint(0, 2, gap.shape, generator=torch_generator(0, "calibrate", number)) * 2.0 - 1.0
    signs = signs * (gap < NEAR)
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(some) for some in rows]))  # p
    own: dict[Kind, Tensor] = {}
    with torch.no_grad():
        for kind, form in head.items():
            off = form.part(torch.cat(tuple(rows)).float()) - logits  # p v
            form.wrong += float(off.double().square().sum())
            form.true += float(logits.double().square().sum())
            both = off.gather(1, tokens)  # p 2
            own[kind] = torch.zeros(len(rows)).index_add(0, owner, signs * (both[:, 0] - both[:, 1]))
    return (gap * signs).sum(), own


def _differences(
    name: str, fitted: Mapping[Kind, Form], *, kept: Tensor, see: Callable[[str, Kind, Tensor], None]
) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
    """Return a hook that compares what a module gives with what its rounded forms would, and, when the
    gradient comes back, what that does to the gaps.
    """
    rows = kept.flatten()  # n

    def hook(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        """Compare them now."""
        offs: dict[Kind, Tensor] = {}
        with torch.no_grad():
            x = given[0].detach().float().flatten(0, -2)[rows]  # n i
            routed = {key: value.detach()[rows] for key, value in named.items()}
            if isinstance(module, nn.Linear):
                bias = None if module.bias is None else module.bias.float()
                plain = F.linear(x, module.weight.float(), bias)  # n o
            else:
                plain = output.detach().float().flatten(0, -2)[rows]
            for kind, form in fitted.items():
                off = form.part(x, **routed) - plain
                form.wrong += float(off.double().square().sum())
                form.true += float(plain.double().square().sum())
                offs[kind] = off.bfloat16()  # kept until the gradient comes: half the memory

        def back(gradient: Tensor) -> None:
            """Multiply the differences by the gradient of the output."""
            flat = gradient.float().flatten(0, -2)[rows]  # n o
            owner = torch.arange(len(kept)).repeat_interleave(kept.sum(dim=1))  # n
            for kind, off in offs.items():
                see(name, kind, torch.zeros(len(kept)).index_add(0, owner, (flat * off).sum(dim=1)))

        output.register_hook(back)  # type: ignore[no-untyped-call]  # torch leaves it without types

    return hook


def stacked(passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Return the embeddings f[b, t, d] of passages, filled up behind with zeros, and which are theirs."""
    longest = max(len(passage.embeds) for passage in passages)
    embeds = torch.stack(
        [F.pad(passage.embeds, (0, 0, 0, longest - len(passage.embeds))) for passage in passages]
    )
    lengths = torch.tensor([len(passage.embeds) for passage in passages])
    return embeds, torch.arange(longest) < lengths[:, None]


def unit_of(name: str) -> str:
    """Return what a module's format is chosen together with: a gate and the `up` beside it."""
    return name.removesuffix("gate_proj") if name.endswith("gate_proj") else name.removesuffix("up_proj")


def allowed_shift(gaps: Sequence[Tensor], *, agreement: float) -> float:
    """Return the deviation in nats by which the gaps f32[p] of each answer may move while this share of the
    answers is expected to stand; infinity where any deviation will do.

    >>> gaps = [torch.tensor([0.01 * index, 3.0]) for index in range(100)]
    >>> round(allowed_shift(gaps, agreement=0.9), 3), round(allowed_shift(gaps, agreement=0.99), 3)
    (0.244, 0.024)
    """
    wish, low, high = 1 - agreement, 0.0, 1e6
    most = 1 - standing(gaps, high)
    if wish >= most:
        return math.inf
    target = max(wish, min(CHANGED / len(gaps), most / 2))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - standing(gaps, middle) <= target else (low, middle)
    return low * wish / target


def standing(gaps: Sequence[Tensor], deviation: float) -> float:
    """Return the share of answers expected to stand when their gaps f32[p] move by independent normal numbers
    of this deviation, in nats: those of which no gap is closed.

    >>> round(standing([torch.tensor([1.0]), torch.tensor([0.0])], 0.1), 3)
    0.75
    """
    stand = [torch.special.ndtr(gap.double() / deviation).prod() for gap in gaps]
    return float(torch.stack(stand).mean())
