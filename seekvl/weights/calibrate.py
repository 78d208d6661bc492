"""Matrices rounded and formats chosen by what a model answers about pictures.

    1 round     the first passages pass through the language model once; as a matrix gets its inputs it is
                rounded in both formats with errors fed back (`rounding.feedback_values`)
    2 measure   the other passages: what each matrix in each format does to the answers (`effects`)
    3 choose    the fewest bytes at which the outputs of each matrix stay within `OUTPUT_LIMIT`, and, where it
                is asked for, a share of the answers stands

Vision and adaptor stay: towers are no faster in eight bits (docs/quantization.md).

Letters: b passages, t tokens, n tokens of all passages, p places of answers, d width, i inputs of a matrix, E
experts, k experts a token.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.models.moe import Experts
from seekvl.models.quantized import KINDS, Kind
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import SeekVLError
from seekvl.weights.effects import HEAD, Form, Passage, allowed_shift, measure, stacked, unit_of
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

FITTED_TOKENS = 8192
"""Tokens that errors are fed back for: their inputs to one matrix are in memory together."""
COVERED = 128
"""Tokens an expert must have seen for its errors to be fed back: fewer say little of its inputs."""
OUTPUT_LIMIT: dict[Kind, float] = {"int8": 0.02, "int4": 0.1}
"""Largest error of a matrix's outputs relative to their norm, for the passages that are measured. Ordinary
ones have 0.005 to 0.015 and 0.03 to 0.06; more means inputs or weights that the format does not suit.
"""


@dataclass(slots=True)
class _State:
    """What is known of each module, by name."""

    fitted: dict[str, dict[Kind, Form]] = field(default_factory=dict)
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
    measured: Progress | None = None,
) -> Iterator[Part]:
    """Yield each candidate with the form it gets, as `quantize.quantized_parts` does: of the formats up to
    `kind` the one that takes the fewest bytes, while its outputs stay within `OUTPUT_LIMIT` and the share
    `agreement` of the answers is expected to stand; None asks for none.

    Everything is rounded before the first comes, in both formats, and kept: 1.6 bytes a number beside the
    plain weights. `progress` is told how many matrices are rounded, `measured` how many passages are.

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
    gaps = measure(model, rest, forms=state.fitted, progress=measured)
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
    embeds, kept = stacked(passages)  # b t d, bool[b, t]
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
            done = {kind: Form(*quantize_module(module, kind, factors=factors)) for kind in kinds}
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
        """Return that of one module."""
        return lambda module, given, named: see(name, given[0], named.get("experts"))

    for name, module in modules.items():
        if name != HEAD:
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            hooks.callback(handle.remove)
    return hooks


def _choose(model: AnyVL, state: _State, *, allowed: float) -> dict[str, Kind]:
    """Return name -> format of what is quantised: the fewest bytes that move gaps by no more than `allowed`,
    a sum of squares.

    With a price on movement each unit takes its own best format; the price is raised until that is met.
    """
    units: dict[str, list[str]] = {}
    for name in state.fitted:
        units.setdefault(unit_of(name), []).append(name)
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


def _why_not(form: Form, kind: Kind) -> str:
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
