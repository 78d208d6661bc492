"""A network's matrices as whole numbers of eight or four bits: which of them, with which scales, how far off.

    language model      all linear layers, experts and the head in the format asked for
    vision, adaptor     eight bits, where the outputs for a sample picture stay within `OUTPUT_LIMIT`
    as they were        embeddings, norms, routers, convolutions, positions, the latent's expansion
                        `kv_b_proj` (absorbed attention reads it as a matrix), what would not become smaller,
                        matrices of fewer than `SMALLEST` numbers

int8 has the largest magnitude of a row as its 127th step. int4 searches: for each row and 32 inputs several
scales are tried, each is fitted to the values it gives by least squares, and the one with the least squared
error stays. The number that is largest may get the value -8, of which there is no positive one; a scale may
therefore be negative.

Letters: o rows of a matrix, i inputs, G groups of 32 inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.models.moe import Experts
from seekvl.models.quantized import (
    GROUP,
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
from seekvl.runtime import SeekVLError, log, torch_generator

STAYS = ("kv_b_proj",)
"""Linear layers of the language model that are read as a matrix, by the last part of their name."""

SMALLEST = 1 << 18
"""Numbers of a matrix below which it stays: in half precision half of a core's own cache holds it, so fewer
bits would cost accuracy and save no time. Every matrix of the published language models has more, and none of
seekvl-nano (docs/quantization.md).
"""

OUTPUT_LIMIT = 0.005
"""Largest error of a vision matrix's outputs, relative to their norm, at which it is stored in eight bits.

Most have 0.007 to 0.011 and stay: in eight bits a picture took no less time (docs/quantization.md).
"""
WEIGHT_LIMIT: dict[Kind, float] = {"int8": 0.05, "int4": 0.25}
"""Largest error of a matrix, relative to its norm. A row of normal numbers has 0.006 to 0.01 in int8 and 0.08
in int4; more than this means numbers that the format does not suit.
"""

STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
"""Steps of a scale that int4 tries for the largest number of a group: above 8 it is cut off."""

CHUNK = 1 << 21
"""Numbers of a matrix that are worked on at once: bounds the memory beside the weights, to about 100 MB."""

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


Progress = Callable[[int, int], None]
"""Told how many matrices are done, of how many."""


def int8_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers i8[o, i] and scales f32[o] of a matrix f[o, i].

    >>> int8_values(torch.tensor([[1.27, -0.5]]))[0].tolist()
    [[127, -50]]
    """
    scales = weight.float().abs().amax(dim=1) / 127.0
    values = (weight.float() / scales.where(scales > 0, 1.0)[:, None]).round()
    return values.clamp(*RANGE["int8"]).to(torch.int8), scales


def int4_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers i8[o, i] and scales f32[o, G], which bfloat16 holds, of a matrix f[o, i].

    >>> values, scales = int4_values(torch.tensor([[-0.5, 0.25] + [0.0] * 30]))
    >>> values[0, :2].tolist(), scales.tolist()
    ([-8, 4], [[0.0625]])
    """
    width = weight.shape[1]
    groups = torch.unflatten(F.pad(weight.float(), (0, -width % GROUP)), 1, (-1, GROUP))  # o G 32
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # o G 1
    unit = largest.where(largest != 0, 1.0)
    shares = groups / unit  # squares of the numbers themselves may be too small or too large for float32
    best, least = torch.zeros_like(largest), shares.square().sum(dim=2, keepdim=True)
    for steps in STEPS:
        values = _nearest(groups, largest / -steps)
        squares = values.square().sum(dim=2, keepdim=True).clamp(min=1.0)
        scale = ((values * shares).sum(dim=2, keepdim=True) / squares * unit).bfloat16().float()
        error = (shares - scale / unit * _nearest(groups, scale)).square().sum(dim=2, keepdim=True)
        better = error < least
        best, least = scale.where(better, best), error.where(better, least)
    values = _nearest(groups, best).flatten(1)[:, :width]
    return values.to(torch.int8), best.squeeze(2)


def _nearest(groups: Tensor, scale: Tensor) -> Tensor:
    """Return the four-bit values of numbers under a scale, in float32; a scale of zero has none but zero."""
    return (groups / scale.where(scale != 0, torch.inf)).round().clamp(*RANGE["int4"])


def quantize_matrix(weight: Tensor, kind: Kind) -> tuple[Tensor, float]:
    """Return a matrix f[o, i] packed, u8 of `packed_shape`, and its error relative to its norm.

    It is read some rows at a time, wherever it lies.

    Raises SeekVLError for numbers that are not finite.
    """
    o, i = weight.shape
    packed = torch.empty(packed_shape(kind, o, i), dtype=torch.uint8)
    rows = max(CHUNK // i // TILE_ROWS, 1) * TILE_ROWS
    wrong = total = 0.0
    for first in range(0, o, rows):
        part = weight[first : first + rows].detach().float()
        if not part.isfinite().all():
            raise SeekVLError("it holds numbers that are NaN or infinite")
        values, scales = int8_values(part) if kind == "int8" else int4_values(part)
        tiles = pack(values, scales, kind=kind)
        packed[first // TILE_ROWS :][: len(tiles)] = tiles
        stored = unpack(tiles, kind=kind, rows=len(part), width=i)
        wrong += float((stored - part).double().square().sum())
        total += float(part.double().square().sum())
    return packed, (wrong / total) ** 0.5 if total else 0.0


def quantize_module(module: nn.Module, kind: Kind) -> tuple[Quantized, float]:
    """Return a linear layer or experts in quantised form, on the CPU, and the error of its weights."""
    if isinstance(module, nn.Linear):
        layer = quantized_like(module, kind)
        assert isinstance(layer, QuantizedLinear)
        layer.packed, error = quantize_matrix(module.weight, kind)
        return layer.requires_grad_(False), error
    assert isinstance(module, Experts)
    experts = quantized_like(module, kind)
    assert isinstance(experts, QuantizedExperts)
    errors = []
    for name in STACKS:
        for index, matrix in enumerate(getattr(module, name)):
            experts.get_buffer(name)[index], error = quantize_matrix(matrix, kind)
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
    model: AnyVL, kind: Kind, *, progress: Progress | None = None
) -> Iterator[tuple[Matrix, Quantized | None]]:
    """Yield each candidate with its quantised form, None where it stays: the model itself is left as it is.

    Only one matrix at a time needs memory, unless the caller keeps what comes.

    Warns where nothing is large enough. Raises SeekVLError for a model that is quantised already or not on
    the CPU, and for numbers that are not finite.
    """
    _check(model, kind)
    wanted = candidates(model, kind)
    _warn_where_small(model, kind, wanted)
    large = (name for name in wanted if _numbers(model.get_submodule(name)) >= SMALLEST)
    outputs = output_errors(model, [name for name in large if not name.startswith("language.")])
    for done, (name, matrix_kind) in enumerate(wanted.items(), start=1):
        yield _quantized_part(name, model.get_submodule(name), matrix_kind, output_error=outputs.get(name))
        if progress is not None:
            progress(done, len(wanted))


def _quantized_part(
    name: str, module: nn.Module, kind: Kind, *, output_error: float | None
) -> tuple[Matrix, Quantized | None]:
    """Return what becomes of a module, and its quantised form unless it stays."""
    reason, error, part = _why_it_stays(module, kind), None, None
    if output_error is not None and not output_error <= OUTPUT_LIMIT:
        reason = f"outputs would be off by {output_error:.3f}, at most {OUTPUT_LIMIT} is allowed"
    if not reason:
        try:
            part, error = quantize_module(module, kind)
        except SeekVLError as fault:
            raise SeekVLError(f"{name} cannot be quantised: {fault}") from fault
        if error > WEIGHT_LIMIT[kind]:
            reason = f"weights would be off by {error:.3f}, at most {WEIGHT_LIMIT[kind]} is allowed"
            part = None
    stored = None if part is None else kind
    return Matrix(name=name, kind=stored, error=error, output_error=output_error, reason=reason), part


def quantize_model(model: AnyVL, kind: Kind, *, progress: Progress | None = None) -> tuple[Matrix, ...]:
    """Put quantised modules in the place of a model's own, one at a time; return what became of each.

    Raises SeekVLError as `quantized_parts` does.
    """
    done = []
    for matrix, part in quantized_parts(model, kind, progress=progress):
        if part is not None:
            model.set_submodule(matrix.name, part)
        done.append(matrix)
    return tuple(done)


def _check(model: AnyVL, kind: Kind) -> None:
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


def _warn_where_small(model: AnyVL, kind: Kind, names: Iterable[str]) -> None:
    """Say that a format was asked for in vain."""
    ours = (name for name in names if name.startswith("language."))
    largest = max(_numbers(model.get_submodule(name)) for name in ours)
    if largest < SMALLEST:
        log.warning(
            "%s was asked for, but the largest matrix of this language model has %s numbers, and from %s on "
            "fewer bits save time: it stays as it is",
            *(kind, f"{largest:,}", f"{SMALLEST:,}"),
        )


def _why_it_stays(module: nn.Module, kind: Kind) -> str:
    """Say why a module would not become smaller or quicker, or return nothing."""
    matrices, numbers = _matrices(module), _numbers(module)
    if numbers < SMALLEST:
        return f"{numbers:,} numbers lie in a cache; from {SMALLEST:,} on fewer bits save time"
    now, then = sum(matrix.nbytes for matrix in matrices), _packed_bytes(matrices, kind)
    if then >= now:
        return f"{kind} would take {then:,} bytes instead of {now:,}"
    return ""


def _matrices(module: nn.Module) -> list[Tensor]:
    """Return the weights f[o, i] or f[E, o, i] of a linear layer or of experts."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    assert isinstance(module, Experts)
    return [getattr(module, name) for name in STACKS]


def _numbers(module: nn.Module) -> int:
    """Return the numbers of a linear layer's matrix, or of one matrix of one expert."""
    return min(matrix.shape[-2:].numel() for matrix in _matrices(module))


def _packed_bytes(matrices: Sequence[Tensor], kind: Kind) -> int:
    """Return the bytes that matrices or stacks of them take when packed."""
    shapes = (packed_shape(kind, *matrix.shape[-2:]) for matrix in matrices)
    counts = (matrix.shape[:-2].numel() for matrix in matrices)
    return sum(count * tiles * size for count, (tiles, size) in zip(counts, shapes, strict=True))


def saved_bytes(config: AnyConfig, kind: Kind, *, itemsize: int, rows: int | None = None) -> float:
    """Return by how many bytes a format makes the language model's weights smaller: all of them, or those
    that a decoding step of so many rows reads. A plain number takes `itemsize` bytes.

    Rows choose their experts as in `models.cost.step_parameters`. What vision and adaptor may save depends on
    their numbers, and is not counted.
    """
    saved = 0.0
    for _, module, matrix_kind in _packed_in_language(config, kind, itemsize=itemsize):
        matrices = _matrices(module)
        less = itemsize * sum(matrix.numel() for matrix in matrices) - _packed_bytes(matrices, matrix_kind)
        saved += less * (_share_read(config, rows=rows) if isinstance(module, Experts) else 1.0)
    return saved


def packed_operations(config: AnyConfig, kind: Kind, *, itemsize: int, tokens: int) -> float:
    """Return the operations with packed matrices of the language model that so many tokens take, the last of
    which passes the head: a part of `models.cost.language_flops`. A plain number takes `itemsize` bytes.
    """
    found = 0.0
    moe = config.language.moe if isinstance(config, VL2Config) else None
    for name, module, _ in _packed_in_language(config, kind, itemsize=itemsize):
        numbers = sum(matrix.numel() for matrix in _matrices(module))
        if isinstance(module, Experts):
            assert moe is not None
            found += 2.0 * tokens * numbers * moe.active / moe.experts
        else:
            found += 2.0 * numbers * (1 if name == "language.lm_head" else tokens)
    return found


def _packed_in_language(
    config: AnyConfig, kind: Kind, *, itemsize: int
) -> Iterator[tuple[str, nn.Linear | Experts, Kind]]:
    """Yield name, module and kind of what a format makes smaller in a language model; none has memory."""
    model = on_meta(config)
    for name, matrix_kind in candidates(model, kind).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | Experts)
        if not name.startswith("language.") or _numbers(module) < SMALLEST:
            continue
        matrices = _matrices(module)
        if _packed_bytes(matrices, matrix_kind) < itemsize * sum(matrix.numel() for matrix in matrices):
            yield name, module, matrix_kind


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
