"""Where a network meets the GPU path: its layers change their class, and nothing else.

Parameters, names and saved files stay what they are, as with the kernels of a CPU.

Letters: n tokens, k experts a token, d width, v views (pictures or tiles).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.engine.gpu.switch import RECORDED, Compiled, choose_gpu_level
from seekvl.engine.kernels.accelerate import KernelExperts
from seekvl.models import sam, siglip
from seekvl.models.moe import Experts, aligned
from seekvl.models.vl2 import AnyVL

MOST_SLOTS = 48
"""Slots, k of each token, up to which each one reads the matrices of its expert by itself, and nothing is
sorted: eight tokens of the published models. A guess: no GPU has been asked yet (docs/performance.md).
"""

MOST_ROWS = 64
"""Most rows of a recorded step."""

GROUPED_SINCE = (9, 0)
"""Compute capability from which torch's grouped product of bfloat16 asks the device for nothing."""


class GpuExperts(Experts):
    """Routed experts that a few tokens read where they lie, and many through grouped products."""

    recordable: bool
    """Whether this GPU has a grouped product of bfloat16 that does not ask the device for lengths."""

    def forward(self, x: Tensor, *, experts: Tensor, weights: Tensor) -> Tensor:
        """Return f[n, d]: what experts i64[n, k] make of x[n, d], summed in float32 by weights f32[n, k]."""
        if torch.is_grad_enabled() or not (experts.numel() <= MOST_SLOTS or self._waits(x)):
            return super().forward(x, experts=experts, weights=weights)
        from seekvl.engine.gpu import triton_kernels

        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        outputs = triton_kernels.slot_experts(x, experts, gate=gate, up=up, down=down)  # n k d
        return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    def _waits(self, x: Tensor) -> bool:
        """Whether tokens of a step would wait in a grouped product, which nobody can record."""
        served = self.recordable and x.dtype == torch.bfloat16 and aligned(self.gate_proj, self.down_proj)
        return len(x) <= MOST_ROWS and not served


class CompiledSiglipBlock(siglip.Block):
    """A block of SigLIP as torch compiles it."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and MLP to x[v, t, c]."""
        return in_powers(_compiled(siglip.Block), self, x)


class CompiledSamBlock(sam.Block):
    """A block of SAM as torch compiles it."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and MLP to x[v, g, g, c]."""
        return in_powers(_compiled(sam.Block), self, x)


@cache
def _compiled(kind: type[siglip.Block] | type[sam.Block]) -> Compiled[Tensor]:
    """Return the forward of a block as torch compiles it, once for all blocks."""
    return Compiled(kind.forward)


def in_powers(forward: Compiled[Tensor], block: nn.Module, x: Tensor) -> Tensor:
    """Apply a block to x[v, ...] in parts whose sizes are powers of two, so that few shapes are compiled.

    10 tiles go as 8 and 2: of the sizes up to 16 five are compiled, not sixteen.
    """
    sizes = [1 << bit for bit in reversed(range(len(x).bit_length())) if len(x) >> bit & 1]
    if len(sizes) == 1:
        return forward(block, x)
    return torch.cat([forward(block, part) for part in torch.split(x, sizes)])


EXPERTS: dict[type[nn.Module], type[nn.Module]] = {Experts: GpuExperts}
"""What takes the place of what from the level "graphs" on."""

BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    siglip.Block: CompiledSiglipBlock,
    sam.Block: CompiledSamBlock,
}
"""What takes the place of what on the level "compiled"."""


def accelerate_on_gpu(model: AnyVL, level: str | None = None) -> str | None:
    """Let a network answer as the level of its device says (`gpu.switch`); return that level, None where
    torch walks through the layers. Layers of a lower level get their own class back.
    """
    chosen = choose_gpu_level(model.language.embed_tokens.weight.device, level)
    wanted = (EXPERTS if chosen in RECORDED else {}) | (BLOCKS if chosen == "compiled" else {})
    plain = {fast: own for own, fast in (EXPERTS | BLOCKS).items()}
    if wanted:
        plain[KernelExperts] = Experts  # of a network that was on the CPU before
    for module in model.modules():
        own = plain.get(type(module), type(module))
        if own in wanted or type(module) in plain:
            module.__class__ = wanted.get(own, own)
        if isinstance(module, GpuExperts):
            module.recordable = _grouped(module.gate_proj.device)
    return chosen


def _grouped(device: torch.device) -> bool:
    """Whether a device has a grouped product that asks it for nothing."""
    return hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(device) >= GROUPED_SINCE
