"""What a key map is: for each tensor a layout publishes, the parameter of ours that it fills, and how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Operation = Literal["copy", "unsqueeze0", "rows0of3", "rows1of3", "rows2of3", "expert"]
"""From published tensor to our parameter: as it is, with a leading axis of 1, as a third of the fused q|k|v
rows, or as one matrix of a stack of experts.
"""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a published tensor goes."""

    parameter: str
    """Name in our state dict."""
    operation: Operation = "copy"
    index: int = 0
    """Which expert of the stack; 0 elsewhere."""

    @property
    def partial(self) -> bool:
        """Whether it fills only a part of the parameter."""
        return self.operation not in ("copy", "unsqueeze0")

    def shape(self, parameter: Shape) -> Shape:
        """Return the published shape of what goes into a parameter of this shape.

        >>> Target(parameter="qkv", operation="rows1of3").shape((96, 32))
        (32, 32)
        """
        if self.operation == "copy":
            return parameter
        if self.operation in ("unsqueeze0", "expert"):
            return parameter[1:]
        return (parameter[0] // 3, *parameter[1:])

    def of(self, parameter: Tensor) -> Tensor:
        """Return the part of a parameter that the published tensor fills: a view of the published shape."""
        if self.operation == "copy":
            return parameter
        if self.operation == "unsqueeze0":
            return parameter.squeeze(0)
        if self.operation == "expert":
            return parameter[self.index]
        return parameter.chunk(3)[int(self.operation[4])]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyMap:
    """The map of one layout for one model, total in both directions."""

    layout: str
    targets: Mapping[str, Target]
    """Published key -> where it goes. Every parameter of ours is filled by exactly one key, by its three
    thirds, or by each of its experts.
    """
    unused: Mapping[str, Shape | None]
    """Published keys that the network does not use, with their shape where it is known: accepted and left
    out.
    """
    prefixes: Mapping[str, str]
    """Older spellings of a key's beginning -> the one used here."""

    def canonical(self, key: str) -> str:
        """Return the key as this map spells it."""
        for old, new in self.prefixes.items():
            if key.startswith(old):
                return new + key[len(old) :]
        return key


def parameter_shapes(model: torch.nn.Module) -> dict[str, Shape]:
    """Return name -> shape of everything a checkpoint must fill."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
