"""Matrices rounded and formats chosen by what a model answers about pictures.

    1 round     the first passages pass through the language model once; as a matrix gets its inputs it is
                rounded in both formats with errors fed back (`rounding.feedback_values`)
    2 measure   the other passages: how far each matrix in each format moves the gap between the two likeliest
                tokens of an answer
    3 choose    the fewest bytes at which the outputs of each matrix stay within `OUTPUT_LIMIT`, and, where it
                is asked for, a share of the answers stands

An answer changes where the second likeliest token overtakes the first: what counts is how far the gap of
their logits moves, at places where it is narrow. To first order that is the sum over the outputs y of a
matrix of (d gap / d y) (y' - y); one backward pass of the plain model gives it for all matrices and formats
together. The p places of a passage go in with random signs, so that the sum is as large as one of them times
the root of p. Matrices add up as independent errors do, by their squares.

Vision and adaptor stay: towers are no faster in eight bits (docs/quantization.md).

Letters: b passages, t tokens, n tokens of all passages, p places of answers, d width, v vocabulary, i inputs
and o outputs of a matrix, E experts, k experts a token.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.models.moe import Experts
from seekvl.models.quantized import KINDS, Kind, Quantized
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import SeekVLError, torch_generator
from seekvl.weights.quantize import (
    Factors,
    Matrix,
    Part,
    Progress,
    candidates,
    check_plain,
    choose_smallest,
    packed_bytes,
    quantize_module,
    too_far_off,
    why_it_stays,
)
from seekvl.weights.rounding import feedback_factor

HEAD = "language.lm_head"

FITTED_TOKENS = 8192
"""Tokens that errors are fed back for: their inputs to one matrix are in memory together."""
MEASURED_TOKENS = 2048
"""Tokens that are measured together, with all their activations in memory; a passage at least."""
COVERED = 128
"""Tokens an expert must have seen for its errors to be fed back: fewer say little of its inputs."""
NEAR = 0.1
"""Gap in nats up to which a place counts: beyond it the second token is far from overtaking the first."""
CHANGED = 8
"""Changed answers, in expectation, that a deviation of gaps is read off; where fewer are allowed, it is taken
in proportion: gaps near zero are few, and no denser than those a little above.
"""
NORMAL = (math.pi / 2) ** 0.5
"""Deviation of a normal number in mean magnitudes."""

OUTPUT_LIMIT: dict[Kind, float] = {"int8": 0.02, "int4": 0.1}
"""Largest error of a matrix's outputs relative to their norm, for the passages that are measured. Ordinary
ones have 0.005 to 0.015 and 0.03 to 0.06; more means inputs or weights that the format does not suit.
"""


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
class _Fitted:
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


@dataclass(slots=True)
class _State:
    """What is known of each module, by name."""

    fitted: dict[str, dict[Kind, _Fitted]] = field(default_factory=dict)
    stays: dict[str, str] = field(default_factory=dict)
    """Why it stays, whatever is measured."""
    bare: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Experts that saw too few tokens."""


def calibrated_parts(
    model: AnyVL,
    kind: Kind,
    passages: Sequence[Passage],
    *,
    agreement: float | None = None,
    smallest: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Part]:
    """Yield each candidate with the form it gets, as `quantize.quantized_parts` does: of the formats up to
    `kind` the one that takes the fewest bytes, while its outputs stay within `OUTPUT_LIMIT` and the share
    `agreement` of the answers is expected to stand; None asks for none.

    Everything is rounded before the first comes, in both formats, and kept: 1.6 bytes a number beside the
    plain weights.

    Raises SeekVLError as `quantized_parts` does, for an agreement outside of 0..1, for fewer than two
    passages, and for passages without an answer.
    """
    check_plain(model, kind)
    if agreement is not None and not 0 <= agreement <= 1:
        raise SeekVLError(f"agreement is {agreement}: give a share of answers, 0 to 1")
    if len(passages) < 2 or any(not 1 <= passage.places <= len(passage.embeds) for passage in passages):
        raise SeekVLError(
            f"calibration needs two answers or more, one to round by and one to measure; got {len(passages)}"
        )
    kinds = tuple(known for known in KINDS if known in ("int8", kind))
    names = list(candidates(model, kind))
    state = _State()
    fit, rest = _split(passages)
    smallest = choose_smallest(smallest)
    _fit(model, fit, names, kinds=kinds, smallest=smallest, state=state, progress=progress)
    gaps = _measure(model, rest, state=state)
    near = sum(int((gap < NEAR).sum()) for gap in gaps)
    for fitted in state.fitted.values():
        for form in fitted.values():
            form.moved *= NORMAL / max(near, 1)
    allowed = math.inf if agreement is None else allowed_shift(gaps, agreement=agreement) ** 2
    chosen = _choose(model, state, allowed=allowed)
    for name in names:
        yield _outcome(name, chosen.get(name), state=state)


def _split(passages: Sequence[Passage]) -> tuple[Sequence[Passage], Sequence[Passage]]:
    """Part the passages in those to round by, `FITTED_TOKENS` or half of them, and those to measure."""
    total = 0
    for index, passage in enumerate(passages):
        total += len(passage.embeds)
        if index + 1 >= len(passages) / 2 or total >= FITTED_TOKENS:
            return passages[: index + 1], passages[index + 1 :]
    raise AssertionError("half of the passages is reached before their end")


def _fit(
    model: AnyVL,
    passages: Sequence[Passage],
    names: Sequence[str],
    *,
    kinds: Sequence[Kind],
    smallest: int,
    state: _State,
    progress: Progress | None,
) -> None:
    """Round every module that may be, as its inputs come by in one pass of all passages."""
    embeds, kept = _stacked(passages)  # b t d, bool[b, t]
    modules: dict[str, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        reason = "towers are no faster in whole numbers"
        if name.startswith("language."):
            reason = why_it_stays(module, kinds[0], smallest=smallest)
        if reason:
            state.stays[name] = reason
        else:
            modules[name] = module
    inputs = _Inputs(kept.flatten())

    def fit(name: str, x: Tensor, experts: Tensor | None) -> None:
        """Round the module by its inputs x[..., i]."""
        module = modules[name]
        try:
            if isinstance(module, Experts):
                assert experts is not None
                factors, state.bare[name] = inputs.of_experts(module, x, experts)
            else:
                factors = inputs.of_linear(x)
            done = {kind: _Fitted(*quantize_module(module, kind, factors=factors)) for kind in kinds}
        except SeekVLError as fault:
            raise SeekVLError(f"{name} cannot be quantised: {fault}") from fault
        state.fitted[name] = done
        if progress is not None:
            progress(len(state.fitted), len(modules))

    with torch.no_grad(), _watching(modules, fit):
        hidden = model.hidden(embeds)
    if HEAD in modules:
        with torch.no_grad():
            fit(HEAD, hidden, None)


class _Inputs:
    """Curvature of what modules get, without the tokens that only fill rows up.

    Modules that read the same tensor come one after the other: the factor of the last one is kept.
    """

    def __init__(self, kept: Tensor) -> None:
        """Take which tokens bool[n] count."""
        self.kept = kept
        self.seen: tuple[Tensor, Tensor] | None = None
        """The last inputs, and their factor."""

    def of_linear(self, x: Tensor) -> Factors:
        """Return the factor of inputs x[..., i]."""
        if self.seen is None or self.seen[0] is not x:
            self.seen = x, feedback_factor(x.flatten(0, -2)[self.kept])
        factor = self.seen[1]
        return lambda stack, expert: factor

    def of_experts(self, module: Experts, x: Tensor, experts: Tensor) -> tuple[Factors, tuple[int, ...]]:
        """Return the factors of inputs x[n, d] that went to experts i64[n, k], and the experts that got too
        few to have one.
        """
        x, experts = x[self.kept], experts[self.kept]
        counts = experts.flatten().bincount(minlength=len(module.gate_proj)).tolist()
        bare = tuple(expert for expert, count in enumerate(counts) if count < COVERED)
        last: dict[tuple[str, int], Tensor] = {}

        def factor(stack: str, expert: int) -> Tensor | None:
            """Return that of one matrix; gate and up share theirs."""
            key = ("down_proj" if stack == "down_proj" else "gate_proj", expert)
            if expert in bare:
                return None
            if key not in last:
                rows = x[(experts == expert).any(dim=1)].float()
                if stack == "down_proj":
                    gate, up = module.gate_proj[expert].float(), module.up_proj[expert].float()
                    rows = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
                last.clear()
                last[key] = feedback_factor(rows)
            return last[key]

        return factor, bare


def _watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor | None], None]
) -> ExitStack:
    """Tell `see` of the inputs x[..., i] of each module as they come, with those of experts i64[n, k]; the
    head is not asked here.
    """
    hooks = ExitStack()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda module, given, named: see(name, given[0], named.get("experts"))

    for name, module in modules.items():
        if name != HEAD:
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            hooks.callback(handle.remove)
    return hooks


def _stacked(passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Return the embeddings f[b, t, d] of passages, filled up behind with zeros, and which are theirs."""
    longest = max(len(passage.embeds) for passage in passages)
    embeds = torch.stack(
        [F.pad(passage.embeds, (0, 0, 0, longest - len(passage.embeds))) for passage in passages]
    )
    lengths = torch.tensor([len(passage.embeds) for passage in passages])
    return embeds, torch.arange(longest) < lengths[:, None]


def _measure(model: AnyVL, passages: Sequence[Passage], *, state: _State) -> list[Tensor]:
    """Take the effects of all rounded modules into the state; return the gaps f32[p] of each answer."""
    gaps: list[Tensor] = []
    for number, batch in enumerate(_batches(passages)):
        embeds, _ = _stacked(batch)
        with torch.no_grad():
            hidden = model.hidden(embeds)
            head = model.language.lm_head.weight
            found = [_gap(F.linear(rows.float(), head.float()))[0] for rows in _rows(hidden, batch)]
        gaps += found
        near = [index for index, gap in enumerate(found) if (gap < NEAR).any()]
        if near and state.fitted:
            some, narrow = [batch[index] for index in near], [found[index] for index in near]
            _measure_near(model, some, narrow, state=state, number=number)
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


def _gap(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gap f32[p] between the logits f32[p, v] of the two likeliest tokens, and these i64[p, 2]."""
    best = logits.topk(2, dim=1)
    return best.values[:, 0] - best.values[:, 1], best.indices


def _measure_near(
    model: AnyVL, passages: Sequence[Passage], gaps: Sequence[Tensor], *, state: _State, number: int
) -> None:
    """Add up what each module does to the gaps f32[p] of passages that have narrow ones."""
    shifts: dict[tuple[str, Kind], Tensor] = {}

    def see(name: str, kind: Kind, shift: Tensor) -> None:
        """Take in f32[b], the shift of the signed gaps of each passage."""
        key = (_unit(name), kind)
        shifts[key] = shifts[key] + shift if key in shifts else shift

    embeds, kept = _stacked(passages)
    with ExitStack() as hooks:
        for name, fitted in state.fitted.items():
            if name != HEAD:
                hook = _differences(name, fitted, kept=kept, see=see)
                handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
        embeds = embeds.clone().requires_grad_()
        hidden = model.hidden(embeds)
        total, own = _signed_gaps(model, _rows(hidden, passages), state.fitted.get(HEAD, {}), number=number)
        torch.autograd.grad(total, embeds)
    for kind, shift in own.items():
        see(HEAD, kind, shift)
    places = torch.tensor([float((gap < NEAR).sum()) for gap in gaps])  # b
    for (unit, kind), shift in shifts.items():
        for name, fitted in state.fitted.items():
            if _unit(name) == unit:
                fitted[kind].moved += float((shift.abs() * places.sqrt()).sum())


def _signed_gaps(
    model: AnyVL, rows: Sequence[Tensor], head: Mapping[Kind, _Fitted], *, number: int
) -> tuple[Tensor, dict[Kind, Tensor]]:
    """Return the sum of all narrow gaps with random signs, and what a rounded head adds to those of each
    passage, f32[b].
    """
    generator = torch_generator(0, "calibrate", number)
    total, own = rows[0].new_zeros(()).float(), {kind: torch.zeros(len(rows)) for kind in head}
    for index, some in enumerate(rows):
        plain = F.linear(some.float(), model.language.lm_head.weight.float())  # p v
        gap, tokens = _gap(plain)
        signs = torch.randint(0, 2, gap.shape, generator=generator) * 2.0 - 1.0
        signs = signs * (gap < NEAR)  # p
        total = total + (gap * signs).sum()
        for kind, fitted in head.items():
            with torch.no_grad():
                off = fitted.part(some.float()) - plain  # p v
                fitted.wrong += float(off.double().square().sum())
                fitted.true += float(plain.detach().double().square().sum())
                both = off.gather(1, tokens)  # p 2
                own[kind][index] = (signs * (both[:, 0] - both[:, 1])).sum()
    return total, own


def _differences(
    name: str, fitted: Mapping[Kind, _Fitted], *, kept: Tensor, see: Callable[[str, Kind, Tensor], None]
) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
    """Return a hook that compares what a module gives with what its rounded forms would, and, when the
    gradient comes back, what that does to the gaps.
    """
    rows = kept.flatten()  # n

    def hook(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
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


def _unit(name: str) -> str:
    """Return what a module's format is chosen together with: a gate and the `up` beside it."""
    return name.removesuffix("gate_proj") if name.endswith("gate_proj") else name.removesuffix("up_proj")


def _choose(model: AnyVL, state: _State, *, allowed: float) -> dict[str, Kind]:
    """Return name -> format of what is quantised: the fewest bytes that move gaps by no more than `allowed`,
    a sum of squares.

    With a price on movement each unit takes its own best format; the price is raised until that is met.
    """
    units: dict[str, list[str]] = {}
    for name in state.fitted:
        units.setdefault(_unit(name), []).append(name)
    options = {unit: _options(model, state, names) for unit, names in units.items()}

    def best(price: float) -> dict[str, Kind | None]:
        """Return the format of each unit."""
        return {
            unit: min(some, key=lambda kind: some[kind][0] + price * some[kind][1])
            for unit, some in options.items()
        }

    def fits(price: float) -> bool:
        """Whether the formats at this price move no more than is allowed."""
        return sum(options[unit][kind][1] for unit, kind in best(price).items()) <= allowed

    low, high = 0.0, 0.0 if fits(0.0) else 1.0
    while not fits(high) and high < 1e30:
        low, high = high, high * 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return {name: kind for unit, kind in best(high).items() if kind is not None for name in units[unit]}


def _options(model: AnyVL, state: _State, names: Sequence[str]) -> dict[Kind | None, tuple[float, float]]:
    """Return the bytes of modules of one unit and the square of what they move, in each format that suits
    them.
    """
    modules = [model.get_submodule(name) for name in names]
    plain = sum(x.nbytes for module in modules for x in module.parameters(recurse=False))
    options: dict[Kind | None, tuple[float, float]] = {None: (float(plain), 0.0)}
    for kind, form in state.fitted[names[0]].items():
        if not any(_why_not(state.fitted[name][kind], kind) for name in names):
            size = sum(packed_bytes(module, kind) for module in modules)
            options[kind] = (float(size), form.moved**2)
    return options


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


def _why_not(form: _Fitted, kind: Kind) -> str:
    """Say why a module may not have this form, whatever the others have, or return nothing."""
    off = form.output_error
    if off is not None and not off <= OUTPUT_LIMIT[kind]:
        return f"outputs would be off by {off:.3f}, at most {OUTPUT_LIMIT[kind]} is allowed"
    return too_far_off(form.error, kind)


def _outcome(name: str, kind: Kind | None, *, state: _State) -> Part:
    """Return what becomes of a module."""
    if name in state.stays:
        return Matrix(name=name, kind=None, reason=state.stays[name]), None
    forms = state.fitted[name]
    asked: Kind = kind or "int8"
    form = forms[asked]
    reason = "" if kind else _why_not(form, asked)
    if not kind and not reason:
        reason = f"in {asked} it would move gaps by {form.moved:.4f} nats, more than the answers allow"
    matrix = Matrix(
        name=name,
        kind=kind,
        error=form.error,
        output_error=form.output_error,
        reason=reason,
        moved=form.moved,
        bare=state.bare.get(name, ()) if kind else (),
    )
    return matrix, form.part if kind else None
