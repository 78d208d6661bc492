"""Muon for stacks of matrices, such as the experts of a layer: torch's own takes one matrix at a time.

Letters: e matrices of a stack, o and i sides of each.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

STEPS = 5
"""Newton-Schulz steps, as in torch's Muon."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 in each, as in torch's Muon; they send every singular value near 1."""
SMALLEST = 1e-7
"""Least norm a matrix is divided by."""
MATCH_RMS = 0.2
"""Root mean square of an update of AdamW (2502.16982, sec. 2.2); an orthogonal matrix has 1 / sqrt(max(o,
i))."""


class StackedMuon(torch.optim.Optimizer):
    """torch's Muon with `adjust_lr_fn="match_rms_adamw"`, done for every matrix of a stack at once."""

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is never given
        """Update the parameters once."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = orthogonal(grad.lerp(mean, momentum))  # Nesterov's look ahead
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * MATCH_RMS * max(parameter.shape[1:]) ** 0.5)


def orthogonal(stack: Tensor) -> Tensor:
    """Return nearly the orthogonal matrices closest to those of f[e, o, i], bf16[e, o, i].

    Like torch's Muon it computes in bfloat16 and leaves singular values between about 0.7 and 1.2.
    """
    linear, cubic, quintic = QUINTIC
    x = stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the gram matrix is the smaller one
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.mT if tall else x
