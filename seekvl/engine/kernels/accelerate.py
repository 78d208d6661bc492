"""Where a network meets the kernels: its layers change their class, and nothing else.

Parameters, names and saved files stay what they are. A layer asks at every call whether the kernels can serve
it, and does what it did before where they cannot: on another device, with a matrix that torch multiplies as
fast, with a gradient. Experts learn through them, too.
"""

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from seekvl.engine.kernels.compiled import LEVELS, choose_level
from seekvl.engine.kernels.gradients import raw_learning_experts
from seekvl.engine.kernels.packed import raw_packed_experts, raw_packed_linear
from seekvl.engine.kernels.products import DTYPES, MAX_ROWS, raw_experts, raw_linear
from seekvl.models.moe import Experts
from seekvl.models.quantized import QuantizedExperts, QuantizedLinear

SMALLEST = {torch.float32: 1 << 19, torch.bfloat16: 1 << 15, torch.float16: 1 << 15}
"""Bytes of a weight below which torch is left alone: calling costs more there than reading. torch's own
products of half precision are slower to call than those of float32 (docs/performance.md).
"""


ANY = 1 << 40
MOST_ROWS = {
    "avx2": {torch.float32: 64, torch.bfloat16: ANY, torch.float16: ANY},
    "avx512": {torch.float32: 64, torch.bfloat16: ANY, torch.float16: ANY},
    "avx512_bf16": {torch.float32: 64, torch.bfloat16: 32, torch.float16: ANY},
}
"""Rows up to which a linear layer gains, by level and dtype. Beyond, torch is as fast: it computes float32
well, and bfloat16 on processors that multiply it. Experts gain by any number of tokens, for each of them sees
few. `portable` takes several times as long as torch, and on `neon` nothing has been measured: there more rows
than `MAX_ROWS` stay with torch (docs/performance.md).
"""

_MOST_ROWS = {
    (LEVELS.index(level), dtype): most
    for level, by_dtype in MOST_ROWS.items()
    for dtype, most in by_dtype.items()
}
_BLOCKED = {level for level, _ in _MOST_ROWS}

LEARNING = {
    "avx2": (torch.float32, torch.bfloat16, torch.float16),
    "avx512": (torch.float32, torch.bfloat16, torch.float16),
    "avx512_bf16": (torch.float32, torch.bfloat16, torch.float16),
}
"""Dtypes in which experts learn through the kernels, by level; elsewhere torch computes."""

_LEARNING = {LEVELS.index(level): dtypes for level, dtypes in LEARNING.items()}


class KernelLinear(nn.Linear):
    """A linear layer that decodes through the kernels, and takes those prompts through them that gain."""

    level: int
    """Index into `LEVELS`."""
    smallest: int | None
    """Bytes of a weight below which torch computes; None as `SMALLEST` says."""

    def forward(self, x: Tensor) -> Tensor:
        """Return f[..., o] of x[..., i]."""
        weight = self._parameters["weight"]  # an attribute of a module takes longer to find than all checks
        bias = self._parameters["bias"]
        assert weight is not None
        if (
            0 < x.numel() <= _MOST_ROWS.get((self.level, x.dtype), MAX_ROWS) * self.in_features
            and x.shape[-1] == self.in_features  # torch says what is wrong
            and _served(x, weight, smallest=self.smallest)
            and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
        ):
            return raw_linear(x, weight, bias, level=self.level, threads=torch.get_num_threads())
        return super().forward(x)


class KernelExperts(Experts):
    """Routed experts that decode through the kernels, and take prompts and training steps through them."""

    level: int
    smallest: int | None

    def forward(self, x: Tensor, *, experts: Tensor, weights: Tensor) -> Tensor:
        """Return f[n, d]: what experts i64[n, k] make of x[n, d], summed in float32 by weights f32[n, k]."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if (
            (0 < len(x) <= MAX_ROWS or (len(x) > MAX_ROWS and self.level in _BLOCKED))
            and all(_served(x, weight, smallest=self.smallest) for weight in (gate, up, down))
            and (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
        ):
            threads = torch.get_num_threads()
            return raw_experts(
                x, experts, weights, gate=gate, up=up, down=down, level=self.level, threads=threads
            )
        if self._learns(x, experts, weights):
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            return raw_learning_experts(
                x.to(dtype),
                experts,
                weights,
                gate=gate.to(dtype),
                up=up.to(dtype),
                down=down.to(dtype),
                level=self.level,
            )
        return super().forward(x, experts=experts, weights=weights)

    def _learns(self, x: Tensor, experts: Tensor, weights: Tensor) -> bool:
        """Whether gradients are asked for that the kernels compute, and gain by it."""
        stacks = (self.gate_proj, self.up_proj, self.down_proj)
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        return (
            torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in (x, weights, *stacks))
            and dtype in _LEARNING.get(self.level, ())
            and experts.numel() > 0
            and len(x) > MAX_ROWS
            and all(tensor.is_cpu and tensor.is_contiguous() for tensor in stacks)
            and (autocast or all(tensor.dtype == dtype for tensor in stacks))
            and (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
            and x.is_cpu
            and type(x) is Tensor
            and not torch.compiler.is_compiling()
        )


class KernelQuantizedLinear(QuantizedLinear):
    """A quantised linear layer that decodes and reads prompts through the kernels."""

    level: int
    smallest: int | None
    """Without meaning here: unpacking a matrix is never the quicker way."""

    def forward(self, x: Tensor) -> Tensor:
        """Return f[..., o] of x[..., i]."""
        if not _packed_served(x, self.packed):
            return super().forward(x)
        return raw_packed_linear(
            x,
            self.packed,
            None if self.bias is None else self.bias.to(x.dtype),
            kind=self.kind,
            rows=self.out_features,
            level=self.level,
            threads=torch.get_num_threads(),
        )


class KernelQuantizedExperts(QuantizedExperts):
    """Quantised experts that decode and read prompts through the kernels."""

    level: int
    smallest: int | None

    def forward(self, x: Tensor, *, experts: Tensor, weights: Tensor) -> Tensor:
        """Return f[n, d]: what experts i64[n, k] make of x[n, d], summed in float32 by weights f32[n, k]."""
        if not _packed_served(x, self.gate_proj):
            return super().forward(x, experts=experts, weights=weights)
        return raw_packed_experts(
            x,
            experts,
            weights.float(),
            gate=self.gate_proj,
            up=self.up_proj,
            down=self.down_proj,
            kind=self.kind,
            width=self.width,
            level=self.level,
            threads=torch.get_num_threads(),
        )


class Accelerated(Protocol):
    """What every class of the kernels is told."""

    level: int
    smallest: int | None


PACKED: dict[type[nn.Module], type[nn.Module]] = {
    QuantizedLinear: KernelQuantizedLinear,
    QuantizedExperts: KernelQuantizedExperts,
}
"""What takes the place of what in a quantised network."""

KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: KernelLinear,
    Experts: KernelExperts,
    **PACKED,
}
"""What takes the place of what. A subclass of these is somebody else's, and stays."""

LEARNERS: dict[type[nn.Module], type[nn.Module]] = {Experts: KernelExperts}
"""What gains in a training step."""


def accelerate(
    network: nn.Module,
    *,
    level: str | None = None,
    smallest: int | None = None,
    kernels: Mapping[type[nn.Module], type[nn.Module]] = KERNELS,
) -> str | None:
    """Let a network answer through the kernels; return the level they compute on.

    Its experts learn through them as well; `kernels=LEARNERS` takes those alone, for training. Quantised
    layers read prompts through them, too, and of a network that only reads, such as an adaptor, nothing but
    quantised layers gains: `kernels=PACKED` takes those alone. What a vision tower gains by is
    `towers.TOWERS`.

    A weight of fewer than `smallest` bytes, by default those of `SMALLEST`, stays with torch. With `level`
    "off", or None and so said by the environment (see `choose_level`), layers get their own class back and
    None is returned. A network that is not on the CPU is left as it is.

    Raises SeekVLError for a level that does not exist or that this machine cannot execute.
    """
    if not all(tensor.is_cpu for tensor in (*network.parameters(), *network.buffers())):
        return None
    chosen = choose_level(level)
    plain = {kernel: own for own, kernel in kernels.items()}
    for module in network.modules():
        own = plain.get(type(module), type(module))
        if own not in kernels:
            continue
        module.__class__ = own if chosen is None else kernels[own]
        if chosen is not None:
            told = cast(Accelerated, module)
            told.level, told.smallest = LEVELS.index(chosen), smallest
    return chosen


def _served(x: Tensor, weight: Tensor, *, smallest: int | None) -> bool:
    """Whether the kernels can multiply x with this weight, and gain by it."""
    dtype = weight.dtype
    return (
        not torch.is_grad_enabled()
        and x.dtype == dtype
        and dtype in DTYPES
        and weight.nbytes >= (SMALLEST[dtype] if smallest is None else smallest)
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and type(x) is Tensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _packed_served(x: Tensor, packed: Tensor) -> bool:
    """Whether the kernels can multiply x with this quantised matrix."""
    return (
        x.dtype in DTYPES
        and x.is_cpu
        and packed.is_cpu
        and packed.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
        and type(x) is Tensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
