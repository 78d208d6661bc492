"""The vision-language adaptors of both families: from tower width to language width (2403.05525, sec. 3.1;
2412.10302, sec. 2).

DeepSeek-VL: the paper draws concatenation before projection; the published 7B projects each tower to half
the language width first, then concatenates (high half first) and mixes. We follow the weights (golden
vl1-hybrid).

DeepSeek-VL2: windows of 2 x 2 features become one, *space to depth*; an odd grid grows a row of zeros at the
bottom and a column of zeros at the right. The channels of a window lie together:

    a b | c 0      a1 b1 d1 e1  a2 b2 d2 e2  ...    window 1: channel 1 of its four places, then channel 2
    d e | f 0      c1  0 f1  0  c2  0 f2  0  ...
    ----+----
    g h | i 0
    0 0 | 0 0

Letters: n pictures, t features a picture (g x g, row-major), c tower width, d language width, r side of a
window.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seekvl.runtime import SeekVLError, check_positive

AdaptorKind = Literal[
    "identity", "linear", "mlp_gelu", "low_high_hybrid_split_mlp_gelu", "downsample_mlp_gelu"
]

POOLING_SIDE = 2
"""Side of the windows of token pooling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorConfig:
    """Kind and dimensions, named as in the published config files."""

    kind: AdaptorKind
    input_width: int
    """Channels c of each tower."""
    width: int
    """Language width d."""
    depth: int = 2
    """Linear layers on the way from tower to language; each but the first follows an exact GELU."""
    downsample: int = 1
    """Side r of the windows `downsample_mlp_gelu` makes one feature of; published is 2."""
    mlp_ratio: int = 1
    """Hidden channels of `downsample_mlp_gelu` in language widths."""
    token_pooling: bool = False
    """Whether a linear layer first makes one feature of 2 x 2; no published file does."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(AdaptorKind):
            raise SeekVLError(
                f"adaptor kind {self.kind!r} is unknown; known are {', '.join(get_args(AdaptorKind))}"
            )
        check_positive("adaptor", self)
        if self.kind == "identity" and self.input_width != self.width:
            raise SeekVLError(f"an identity adaptor cannot turn width {self.input_width} into {self.width}")
        if self.is_hybrid and self.width % 2:
            raise SeekVLError(
                f"a hybrid adaptor halves the language width, which {self.width} does not allow"
            )
        if self.is_hybrid and self.token_pooling:
            raise SeekVLError("a hybrid adaptor has no token pooling")
        if self.kind == "downsample_mlp_gelu" and self.depth < 2:
            raise SeekVLError(
                f"adaptor {self.kind!r} has an entry and an exit, depth {self.depth} is below 2"
            )
        if self.kind != "downsample_mlp_gelu" and (self.downsample, self.mlp_ratio) != (1, 1):
            raise SeekVLError(
                f"adaptor {self.kind!r} takes no downsample {self.downsample} or mlp_ratio {self.mlp_ratio}; "
                "only 'downsample_mlp_gelu' does"
            )

    @property
    def is_hybrid(self) -> bool:
        """Whether the adaptor takes the features of two towers."""
        return self.kind == "low_high_hybrid_split_mlp_gelu"

    def out_grid(self, grid: int) -> int:
        """Return the features along one side that become of `grid` of the tower.

        >>> AdaptorConfig(kind="downsample_mlp_gelu", input_width=8, width=8, downsample=2).out_grid(27)
        14
        """
        pooled = grid // POOLING_SIDE if self.token_pooling else grid
        return math.ceil(pooled / self.downsample)


def space_to_depth(x: Tensor, side: int) -> Tensor:
    """Make one feature of each window of f[n, g*g, c]: f[n, (g/r)^2, c*r*r], windows row-major.

    Raises SeekVLError where the features make no square or the windows do not fill it.
    """
    grid = math.isqrt(x.shape[1])
    if grid * grid != x.shape[1] or grid % side:
        raise SeekVLError(f"{x.shape[1]} features do not make a square of {side} x {side} windows")
    y = grid // side
    return rearrange(x, "n (y dy x dx) c -> n (y x) (c dy dx)", y=y, dy=side, dx=side)


def resize_grid(x: Tensor, grid: int) -> Tensor:
    """Return f[n, g*g, c] on a grid of another side: zeros are added at bottom and right, or rows and columns
    left out there.
    """
    old = math.isqrt(x.shape[1])
    if old == grid:
        return x
    x = F.pad(torch.unflatten(x, 1, (old, old)), (0, 0, 0, grid - old, 0, grid - old))  # n g g c
    return x.flatten(1, 2)


class Adaptor(nn.Module):
    """All published kinds in one module."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.config = config
        c, d = config.input_width, config.width
        if config.is_hybrid:
            self.high_up = nn.Linear(c, d // 2)
            self.low_up = nn.Linear(c, d // 2)
        if config.token_pooling:
            self.token_pooling_layer = nn.Linear(POOLING_SIDE**2 * c, c)
        widths = _widths(config)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, features: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Project f[n, t, c], or the pair (high, low) of them for the hybrid kind, to f[n, t', d]."""
        if self.config.is_hybrid != isinstance(features, tuple):
            towers = "two towers" if isinstance(features, tuple) else "one tower"
            raise SeekVLError(f"adaptor {self.config.kind!r} got the features of {towers}")
        if isinstance(features, tuple):
            high, low = features
            x = torch.cat((self.high_up(high), self.low_up(low)), dim=-1)  # n t d
            for layer in self.layers:
                x = layer(F.gelu(x))
            return x
        x = self._gather(features)  # n t' c'
        for index, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if index else x)
        return x

    def _gather(self, x: Tensor) -> Tensor:
        """Make fewer and wider features of f[n, t, c], where the kind asks for it."""
        if self.config.token_pooling:
            grid = math.isqrt(x.shape[1])
            x = resize_grid(
                x, grid - grid % POOLING_SIDE
            )  # an odd row or column is lost, as in the reference
            x = self.token_pooling_layer(space_to_depth(x, POOLING_SIDE))  # n t/4 c
        if self.config.downsample > 1:
            r, grid = self.config.downsample, math.isqrt(x.shape[1])
            x = space_to_depth(resize_grid(x, math.ceil(grid / r) * r), r)  # n t' c*r*r
        return x


def _widths(config: AdaptorConfig) -> list[int]:
    """Channels between the layers, from the first one's input to the last one's output."""
    c, d = config.input_width, config.width
    if config.kind == "downsample_mlp_gelu":
        return [c * config.downsample**2, *[d * config.mlp_ratio] * (config.depth - 1), d]
    if config.is_hybrid:
        return [d] * config.depth
    if config.kind == "identity":
        return []
    return [c, *[d] * (config.depth if config.kind == "mlp_gelu" else 1)]
