"""What the kernels do on this machine, in a line."""

import torch

from seekvl.engine.kernels.compiled import SWITCH, choose_level, library, missing
from seekvl.engine.kernels.products import MAX_ROWS, linear
from seekvl.runtime import SeekVLError, torch_generator

WIDTH = 515
"""No multiple of any vector."""


def compare_with_torch() -> str:
    """Multiply with the kernels and with torch, and say on which level and how far they are apart.

    Raises SeekVLError where they differ by more than the order of summation explains, and for a level named
    by `SWITCH` that cannot be had.
    """
    level = choose_level()
    if level is None:
        return f"torch computes: {missing() or f'{SWITCH}=off'}"
    generator = torch_generator(0, "kernels")
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    x = torch.randn(MAX_ROWS, WIDTH, generator=generator)
    worst = float((linear(x, weight, level=level).double() - x.double() @ weight.double().T).abs().max())
    limit = WIDTH * 2.0**-24 * float((x.abs() @ weight.abs().T).max())
    if not worst <= limit:
        raise SeekVLError(
            f"{level} differs by {worst:.1e} from torch, at most {limit:.0e} is allowed; set {SWITCH}=off "
            "and report it"
        )
    return f"{level} of {', '.join(library().levels)}; largest difference from torch {worst:.1e}"
