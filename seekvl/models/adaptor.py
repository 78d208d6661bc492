"""The vision-language adaptor of DeepSeek-VL: from tower width to language width (2403.05525, sec. 3.1).

The paper draws concatenation before projection; the published 7B projects each tower to half the language
width first, then concatenates (high half first) and mixes. We follow the weights (golden vl1-hybrid).

Letters: n pictures, t features a picture, c tower width, d language width.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.runtime import SeekVLError

AdaptorKind = Literal["identity", "linear", "mlp_gelu", "low_high_hybrid_split_mlp_gelu"]


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

    def __post_init__(self) -> None:
        if self.kind not in get_args(AdaptorKind):
            raise SeekVLError(
                f"adaptor kind {self.kind!r} is unknown; known are {', '.join(get_args(AdaptorKind))}"
            )
        if self.depth < 1:
            raise SeekVLError(f"adaptor depth {self.depth} is below 1")
        if self.kind == "identity" and self.input_width != self.width:
            raise SeekVLError(f"an identity adaptor cannot turn width {self.input_width} into {self.width}")
        if self.is_hybrid and self.width % 2:
            raise SeekVLError(
                f"a hybrid adaptor halves the language width, which {self.width} does not allow"
            )

    @property
    def is_hybrid(self) -> bool:
        """Whether the adaptor takes the features of two towers."""
        return self.kind == "low_high_hybrid_split_mlp_gelu"


class Adaptor(nn.Module):
    """All published kinds in one module."""

    def __init__(self, config: AdaptorConfig) -> None:
        super().__init__()
        self.config = config
        c, d = config.input_width, config.width
        widths: list[int] = []
        if config.is_hybrid:
            self.high_up = nn.Linear(c, d // 2)
            self.low_up = nn.Linear(c, d // 2)
            widths = [d] * (config.depth - 1)
        elif config.kind != "identity":
            widths = [c] + [d] * ((config.depth if config.kind == "mlp_gelu" else 1) - 1)
        self.layers = nn.ModuleList(nn.Linear(width, d) for width in widths)

    def forward(self, features: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Project f[n, t, c], or the pair (high, low) of them for the hybrid kind, to f[n, t, d]."""
        if self.config.is_hybrid != isinstance(features, tuple):
            towers = "two towers" if isinstance(features, tuple) else "one tower"
            raise SeekVLError(f"adaptor {self.config.kind!r} got the features of {towers}")
        if isinstance(features, tuple):
            high, low = features
            x = torch.cat((self.high_up(high), self.low_up(low)), dim=-1)  # n t d
            for layer in self.layers:
                x = layer(F.gelu(x))
            return x
        x = features
        for index, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if index else x)
        return x
