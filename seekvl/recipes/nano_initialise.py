"""The numbers the small networks start from."""

import math

import torch
from torch import Tensor, nn

from seekvl.runtime import torch_generator

RESIDUAL = ("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")
"""Ends of the names of weights that write to a residual stream."""
MARKS = ("image_newline", "view_separator")
"""Rows of DeepSeek-VL2 that stand among those of words."""


def initialise(model: nn.Module, *, seed: int) -> None:
    """Fill a fresh network with random numbers: weights by their fan-in, those that write to a residual
    stream less.

    Biases are zero and positions of patches start as waves; norms, relative positions and SAM's alpha stay as
    made.
    """
    generator = torch_generator(seed, "initialise")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("pos_embed"):
            parameter.data.copy_(
                waves(parameter[0].numel() // parameter.shape[-1], parameter.shape[-1]).view_as(parameter)
            )
        elif name in MARKS:  # as large as words: a norm sends a row of zeros huge gradients
            nn.init.normal_(parameter, std=len(parameter) ** -0.5, generator=generator)
        elif parameter.dim() >= 2 and "rel_pos" not in name:
            std = _fan_in(name, parameter) ** -0.5
            if name.endswith(RESIDUAL):
                std *= 0.35  # about 1 / sqrt(2 x 4 layers)
            nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)


def _fan_in(name: str, parameter: Tensor) -> int:
    """Count the inputs of one output; experts are stacks of matrices."""
    return parameter.shape[-1] if ".experts." in name else parameter[0].numel()


def waves(cells: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, f32[cells, width], for a square of row-major cells.

    A small tower that starts with them need not first find out where its patches are.
    """
    side = math.isqrt(cells)
    place = torch.arange(side).float()
    speed = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    angles = [axis.flatten()[:, None] * speed for axis in (rows, columns)]
    return 0.5 * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
