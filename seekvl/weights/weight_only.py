"""int8, int4 and fp8 weights on a GPU, through torchao (extra `gpu`): linear layers keep their class, their
weights become torchao's tensors, activations stay what they are.

    int8    a scale for each row of the matrix
    int4    a scale and a zero for each row and 64 inputs; 4.5 bits a number
    fp8     float8_e4m3, a scale for each row

Changed are the linear layers of the language model. Experts stay plain: torch's grouped product takes no
torchao tensor. So do `kv_b_proj`, which is read as a matrix, and everything that sees pictures.
"""

from typing import Literal, get_args

from torch import bfloat16, nn

from seekvl.models.moe import Experts
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import SeekVLError, log, require
from seekvl.weights.quantize import STAYS, Progress

GpuKind = Literal["int8", "int4", "fp8"]
GPU_KINDS: tuple[GpuKind, ...] = get_args(GpuKind)

GROUP = 64
"""Inputs that share a scale in int4."""


def quantize_on_gpu(model: AnyVL, kind: GpuKind, *, progress: Progress | None = None) -> None:
    """Change the weights of a plain network in place, one after the other.

    Warns where experts stay plain. Raises SeekVLError without torchao, and for int4 of another dtype than
    bfloat16 or of widths that it does not take.
    """
    torchao = require("torchao.quantization", extra="gpu")
    dtype = model.language.embed_tokens.weight.dtype
    if kind == "int4" and dtype != bfloat16:
        raise SeekVLError(f"int4 on a GPU computes in bfloat16, not in {dtype}; use dtype='bfloat16'")
    config = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int4": lambda: torchao.Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d"
        ),
        "fp8": torchao.Float8WeightOnlyConfig,
    }[kind]()
    found = {
        name: module
        for name, module in model.language.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in STAYS
    }
    for name, module in found.items():  # torchao would leave it as it is, without a word
        if kind == "int4" and module.in_features % GROUP:
            raise SeekVLError(
                f"language.{name} has {module.in_features} inputs; int4 on a GPU wants a multiple of {GROUP}"
            )
    _say_what_stays(model, list(found.values()), kind)
    for done, module in enumerate(found.values(), start=1):
        torchao.quantize_(module, config)
        if progress is not None:
            progress(done, len(found))


def _say_what_stays(model: AnyVL, found: list[nn.Linear], kind: GpuKind) -> None:
    """Warn where experts keep most of the bytes."""
    experts = [module for module in model.language.modules() if isinstance(module, Experts)]
    stay = sum(parameter.numel() for module in experts for parameter in module.parameters())
    if stay:
        turned = sum(module.weight.numel() for module in found)
        log.warning(
            "%s on a GPU turns linear layers, %.2f billion numbers; experts, %.2f billion, stay as they are",
            *(kind, turned / 1e9, stay / 1e9),
        )


def gpu_kind(name: str) -> GpuKind:
    """Return a format of GPUs by its name.

    Raises SeekVLError for another.
    """
    for kind in GPU_KINDS:
        if kind == name:
            return kind
    raise SeekVLError(f"quantize={name!r} is unknown; a GPU has {', '.join(GPU_KINDS)}")
