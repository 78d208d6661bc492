"""A network's matrices as whole numbers of eight or four bits: which of them, with which scales, how far off.

    language model      all linear layers, experts and the head in the format asked for
    vision, adaptor     eight bits, where the outputs for a sample picture stay within `OUTPUT_LIMIT`
    as they were        embeddings, norms, routers, convolutions, positions, the latent's expansion
                        `kv_b_proj` (absorbed attention reads it as a matrix), what would not become smaller,
                        matrices of fewer than `SMALLEST` numbers

How a matrix is rounded is `weights.rounding`, how formats are chosen by what they do to answers
`weights.calibrate`.

Letters: o rows of a matrix, i inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.models.moe import Experts
from seekvl.models.quantized import (
    RANGE,
    STACKS,
    TILE_ROWS,
    Kind,
    Quantized,
    QuantizedExperts,
    QuantizedLinear,
    pack,
    packed_shape,
    quantized_like,
    quantized_modules,
    rounded_inputs,
    unpack,
)
from seekvl.models.siglip import SiglipConfig
from seekvl.models.vl2 import VL2, AnyConfig, AnyVL, VL2Config, on_meta
from seekvl.runtime import SeekVLError, is_whole, log, torch_generator
from seekvl.weights.rounding import feedback_values, int4_values, int8_values

STAYS = ("kv_b_proj",)
"""Linear layers of the language model that are read as a matrix, by the last part of their name."""

SMALLEST = 1 << 18
"""Numbers of a matrix below which it stays: in half precision half of a core's own cache holds it, so fewer
bits would cost accuracy and save no time. Every matrix of the published language models has more, and none of
seekvl-nano (docs/quantization.md).
"""

OUTPUT_LIMIT = 0.015
"""Largest error of a vision matrix's outputs, relative to their norm, at which it is stored in eight bits.

Normal numbers leave 0.010 to 0.013, as they do in the language model; more means numbers that the format does
not suit. A picture takes three quarters of the time then (docs/quantization.md).
"""
WEIGHT_LIMIT: dict[Kind, float] = {"int8": 0.05, "int4": 0.25}
"""Largest error of a matrix, relative to its norm. A row of normal numbers has 0.006 to 0.01 in int8 and 0.08
in int4; more than this means numbers that the format does not suit.
"""

CHUNK = 1 << 21
"""Numbers of a matrix that are worked on at once: bounds the memory beside the weights, to about 100 MB."""
FEEDBACK_CHUNK = 1 << 24
"""The same where errors are fed back: a column costs a dozen small operations, however many rows it has."""

SAMPLED_ROWS = 64
"""Inputs of a vision matrix that its outputs are compared for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """What became of a linear layer, or of the experts of a layer."""

    name: str
    """Name of the module."""
    kind: Kind | None
    """None where it stays as it was."""
    error: float | None = None
    """Norm of (stored - true) over the norm of the true weight; of experts the largest of their matrices."""
    output_error: float | None = None
    """The same of the outputs for a sample picture, of vision and adaptor."""
    reason: str = ""
    """Why it stays as it was."""
    moved: float | None = None
    """Calibrated: deviation, in nats, by which it moves the gap between the two likeliest tokens of an answer
    where that is narrow; of `gate_proj` and `up_proj`, which share a format, what both do together.
    """
    bare: Sequence[int] = ()
    """Calibrated: experts that saw too few tokens and were rounded by themselves."""


Part = tuple[Matrix, Quantized | None]
"""What becomes of a matrix, and its quantised form; None where it stays."""

Factors = Callable[[str, int], Tensor | None]
"""Gives `rounding.feedback_factor` of the inputs of one matrix of a module, by stack ("" of a linear layer)
and number of the expert; None where the matrix is rounded by itself.
"""

Progress = Callable[[int, int], None]
"""Told how many matrices are done, of how many."""


def quantize_matrix(weight: Tensor, kind: Kind, *, factor: Tensor | None = None) -> tuple[Tensor, float]:
    """Return a matrix f[o, i] packed, u8 of `packed_shape`, and its error relative to its norm.

    factor: f32[i, i] of its inputs, by which errors are fed back. The matrix is read some rows at a time,
    wherever it lies.

    Raises SeekVLError for numbers that are not finite.
    """
    o, i = weight.shape
    packed = torch.empty(packed_shape(kind, o, i), dtype=torch.uint8)
    chunk = CHUNK if factor is None else FEEDBACK_CHUNK
    rows = max(chunk // i // TILE_ROWS, 1) * TILE_ROWS
    wrong = total = 0.0
    for first in range(0, o, rows):
        part = weight[first : first + rows].detach().float()
        if not part.isfinite().all():
            raise SeekVLError("it holds numbers that are NaN or infinite")
        if factor is not None:
            values, scales = feedback_values(part, kind, factor=factor)
        else:
            values, scales = int8_values(part) if kind == "int8" else int4_values(part)
        tiles = pack(values, scales, kind=kind)
        packed[first // TILE_ROWS :][: len(tiles)] = tiles
        stored = unpack(tiles, kind=kind, rows=len(part), width=i)
        wrong += float((stored - part).double().square().sum())
        total += float(part.double().square().sum())
    return packed, (wrong / total) ** 0.5 if total else 0.0


def quantize_module(
    module: nn.Module, kind: Kind, *, factors: Factors | None = None
) -> tuple[Quantized, float]:
    """Return a linear layer or experts in quantised form, on the CPU, and the error of its weights."""
    if isinstance(module, nn.Linear):
        layer = quantized_like(module, kind)
        assert isinstance(layer, QuantizedLinear)
        factor = None if factors is None else factors("", 0)
        layer.packed, error = quantize_matrix(module.weight.detach(), kind, factor=factor)
        return layer.requires_grad_(False), error
    assert isinstance(module, Experts)
    experts = quantized_like(module, kind)
    assert isinstance(experts, QuantizedExperts)
    errors = []
    for index in range(experts.count):
        for name in STACKS:
            factor = None if factors is None else factors(name, index)
            matrix = module.get_parameter(name)[index].detach()
            experts.get_buffer(name)[index], error = quantize_matrix(matrix, kind, factor=factor)
            errors.append(error)
    return experts, max(errors)


def candidates(model: AnyVL, kind: Kind) -> dict[str, Kind]:
    """Return name -> kind of the modules that quantising would change; what stands in vision and adaptor is
    still to be judged by its outputs.
    """
    found: dict[str, Kind] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Experts) or name.rpartition(".")[2] in STAYS:
            continue
        found[name] = kind if name.startswith("language.") else "int8"
    return found


def quantized_parts(
    model: AnyVL, kind: Kind, *, smallest: int | None = None, progress: Progress | None = None
) -> Iterator[Part]:
    """Yield each candidate with its quantised form, None where it stays: the model itself is left as it is.

    smallest: numbers of the smallest matrix that is quantised, `SMALLEST` when None. Only one matrix at a
    time needs memory, unless the caller keeps what comes.

    Warns where nothing is large enough. Raises SeekVLError for a model that is quantised already or not on
    the CPU, for numbers that are not finite, and for a `smallest` below 0.
    """
    check_plain(model, kind)
    least = choose_smallest(smallest)
    wanted = candidates(model, kind)
    _warn_where_small(model, kind, wanted, smallest=least)
    large = (name for name in wanted if numbers_of(model.get_submodule(name)) >= least)
    outputs = output_errors(model, [name for name in large if not name.startswith("language.")])
    for done, (name, matrix_kind) in enumerate(wanted.items(), start=1):
        module, output_error = model.get_submodule(name), outputs.get(name)
        yield _quantized_part(name, module, matrix_kind, output_error=output_error, smallest=least)
        if progress is not None:
            progress(done, len(wanted))


def _quantized_part(
    name: str, module: nn.Module, kind: Kind, *, output_error: float | None, smallest: int
) -> Part:
    """Return what becomes of a module, and its quantised form unless it stays."""
    reason, error, part = why_it_stays(module, kind, smallest=smallest), None, None
    if output_error is not None and not output_error <= OUTPUT_LIMIT:
        reason = f"outputs would be off by {output_error:.3f}, at most {OUTPUT_LIMIT} is allowed"
    if not reason:
        try:
            part, error = quantize_module(module, kind)
        except SeekVLError as fault:
            raise SeekVLError(f"{name} cannot be quantised: {fault}") from fault
        reason = too_far_off(error, kind)
        part = None if reason else part
    stored = None if part is None else kind
    return Matrix(name=name, kind=stored, error=error, output_error=output_error, reason=reason), part


def too_far_off(error: float, kind: Kind) -> str:
    """Say that a format does not suit weights whose relative error is this, or return nothing."""
    if error <= WEIGHT_LIMIT[kind]:
        return ""
    return f"weights would be off by {error:.3f}, at most {WEIGHT_LIMIT[kind]} is allowed"


def quantize_model(
    model: AnyVL,
    kind: Kind,
    *,
    smallest: int | None = None,
    parts: Iterable[Part] | None = None,
    progress: Progress | None = None,
) -> tuple[Matrix, ...]:
    """Put quantised modules in the place of a model's own, one at a time; return what became of each.

    parts: what to put there, by default those of `quantized_parts`; those of `calibrate.calibrated_parts` are
    made of the answers of this same model, before the first is put.

    Raises SeekVLError as `quantized_parts` does.
    """
    done = []
    if parts is None:
        parts = quantized_parts(model, kind, smallest=smallest, progress=progress)
    for matrix, part in parts:
        if part is not None:
            model.set_submodule(matrix.name, part)
        done.append(matrix)
    return tuple(done)


def choose_smallest(smallest: int | None) -> int:
    """Return the numbers of the smallest matrix that is quantised; `SMALLEST` when None.

    Raises SeekVLError for what is no whole number of at least 0.
    """
    if smallest is None:
        return SMALLEST
    if not is_whole(smallest) or smallest < 0:
        raise SeekVLError(f"smallest is {smallest!r}: give the numbers of a matrix, 0 for every matrix")
    return smallest


def check_plain(model: AnyVL, kind: Kind) -> None:
    """Refuse a format that does not exist, and models that cannot be quantised."""
    if kind not in RANGE:
        raise SeekVLError(f"quantize={kind!r} is unknown; use one of {', '.join(RANGE)}")
    done = quantized_modules(model)
    if done:
        raise SeekVLError(
            f"this model is quantised already ({len(done)} modules, such as {next(iter(done))}); quantise "
            "the checkpoint it was made from"
        )
    device = model.language.embed_tokens.weight.device
    if device.type != "cpu":
        raise SeekVLError(
            f"quantize={kind!r} is for the CPU, and this model is on {device}; load it with device='cpu', or "
            "with dtype='bfloat16' on the GPU"
        )


def _warn_where_small(model: AnyVL, kind: Kind, names: Iterable[str], *, smallest: int) -> None:
    """Say that a format was asked for in vain."""
    ours = (name for name in names if name.startswith("language."))
    largest = max(numbers_of(model.get_submodule(name)) for name in ours)
    if largest < smallest:
        log.warning(
            "%s was asked for, but the largest matrix of this language model has %s numbers, and from %s on "
            "fewer bits save time: it stays as it is; smallest=0 quantises it all the same",
            *(kind, f"{largest:,}", f"{smallest:,}"),
        )


def why_it_stays(module: nn.Module, kind: Kind, *, smallest: int) -> str:
    """Say why a module would not become smaller or quicker, or return nothing."""
    matrices, numbers = _matrices(module), numbers_of(module)
    if numbers < smallest:
        return f"{numbers:,} numbers lie in a cache; from {smallest:,} on fewer bits save time"
    now, then = sum(matrix.nbytes for matrix in matrices), packed_bytes(module, kind)
    if then >= now:
        return f"{kind} would take {then:,} bytes instead of {now:,}"
    return ""


def _matrices(module: nn.Module) -> list[Tensor]:
    """Return the weights f[o, i] or f[E, o, i] of a linear layer or of experts."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    assert isinstance(module, Experts)
    return [getattr(module, name) for name in STACKS]


def numbers_of(module: nn.Module) -> int:
    """Return the numbers of a linear layer's matrix, or of one matrix of one expert."""
    return min(matrix.shape[-2:].numel() for matrix in _matrices(module))


def packed_bytes(module: nn.Module, kind: Kind) -> int:
    """Return the bytes that the weights of a linear layer or of experts take when packed."""
    matrices = _matrices(module)
    shapes = (packed_shape(kind, *matrix.shape[-2:]) for matrix in matrices)
    counts = (matrix.shape[:-2].numel() for matrix in matrices)
    return sum(count * tiles * size for count, (tiles, size) in zip(counts, shapes, strict=True))


def saved_bytes(config: AnyConfig, kind: Kind, *, itemsize: int, rows: int | None = None) -> float:
    """Return by how many bytes a format makes the language model's weights smaller: all of them, or those
    that a decoding step of so many rows reads. A plain number takes `itemsize` bytes.

    Rows choose their experts as in `models.cost.step_parameters`.
    """
    return sum(
        saved * (_share_read(config, rows=rows) if isinstance(module, Experts) else 1.0)
        for name, module, saved in _savings(config, kind, itemsize=itemsize)
        if name.startswith("language.")
    )


def saved_vision_bytes(config: AnyConfig, kind: Kind, *, itemsize: int) -> int:
    """Return by how many bytes a format makes vision and adaptor smaller, if no matrix of them has outputs
    beyond `OUTPUT_LIMIT`: what they are depends on their numbers.
    """
    savings = _savings(config, kind, itemsize=itemsize)
    return sum(saved for name, _, saved in savings if not name.startswith("language."))


def _savings(config: AnyConfig, kind: Kind, *, itemsize: int) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield name, module and the bytes saved of each that a format makes smaller."""
    model = on_meta(config)
    for name, matrix_kind in candidates(model, kind).items():
        module = model.get_submodule(name)
        if numbers_of(module) < SMALLEST:
            continue
        less = itemsize * sum(matrix.numel() for matrix in _matrices(module)) - packed_bytes(
            module, matrix_kind
        )
        yield name, module, max(0, less)


def packed_operations(config: AnyConfig, kind: Kind, *, itemsize: int, tokens: int) -> float:
    """Return the operations with packed matrices of the language model that so many tokens take, the last of
    which passes the head: a part of `models.cost.language_flops`. A plain number takes `itemsize` bytes.
    """
    found = 0.0
    moe = config.language.moe if isinstance(config, VL2Config) else None
    for name, module, saved in _savings(config, kind, itemsize=itemsize):
        if saved == 0 or not name.startswith("language."):
            continue
        numbers = sum(matrix.numel() for matrix in _matrices(module))
        if isinstance(module, Experts):
            assert moe is not None
            found += 2.0 * tokens * numbers * moe.active / moe.experts
        else:
            found += 2.0 * numbers * (1 if name == "language.lm_head" else tokens)
    return found


def _share_read(config: AnyConfig, *, rows: int | None) -> float:
    """Return the share of a layer's experts that a step reads; without rows all of them."""
    moe = config.language.moe if isinstance(config, VL2Config) else None
    return 1.0 if moe is None or rows is None else 1 - (1 - moe.active / moe.experts) ** rows


def output_errors(model: AnyVL, names: Sequence[str]) -> dict[str, float]:
    """Return how far the outputs of linear layers in vision and adaptor are off in int8, relative to their
    norm: for some of the inputs they get from a sample picture.
    """
    inputs: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.inference_mode():
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(_keeper(inputs, name))
            hooks.callback(handle.remove)
        _look(model)
    errors = {}
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.float()
        if not weight.isfinite().all():
            raise SeekVLError(f"{name} cannot be quantised: it holds numbers that are NaN or infinite")
        values, scales = int8_values(weight)
        wanted = F.linear(x, weight)
        found = F.linear(rounded_inputs(x, kind="int8"), values * scales[:, None])
        errors[name] = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return errors


def _keeper(inputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Return a hook that keeps some rows of what a layer is given first, in float32."""

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep them at the first call."""
        if name not in inputs:
            rows = given[0].flatten(0, -2)  # rows i
            chosen = torch.linspace(0, len(rows) - 1, min(SAMPLED_ROWS, len(rows))).round().long()
            inputs[name] = rows[chosen].float().clone()

    return keep


def _look(model: AnyVL) -> None:
    """Show the vision towers a picture as pictures are: smooth areas, edges, fine grain."""
    side, dtype = model.config.image_size, model.language.embed_tokens.weight.dtype
    coarse = torch.rand(1, 3, 4, 4, generator=torch_generator(0, "quantize", "areas"))
    picture = F.interpolate(coarse, size=(side, side), mode="bilinear")
    picture[..., side // 5 : side // 2, side // 4 : side // 2] = torch.tensor([0.9, 0.1, 0.2])[:, None, None]
    picture[..., side // 2 :: 8, side // 2 :] = 0.05
    grain = torch.randn(1, 3, side, side, generator=torch_generator(0, "quantize", "grain"))
    picture = (picture + 0.03 * grain).clamp(0, 1).to(dtype)
    centred = (picture - 0.5) / 0.5
    if isinstance(model, VL2):
        model.encode_pictures(centred, grids=[(1, 1)])
    elif isinstance(model.config.vision, SiglipConfig) and model.config.vision.pixel_mean is None:
        model.encode_pictures(centred, normalized=True)
    else:
        model.encode_pictures(picture)


def summary(matrices: Sequence[Matrix]) -> Mapping[str, int]:
    """Count the matrices by what became of them."""
    counts: dict[str, int] = {}
    for matrix in matrices:
        counts[matrix.kind or "as it was"] = counts.get(matrix.kind or "as it was", 0) + 1
    return counts
