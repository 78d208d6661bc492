"""One optimiser step: forward, backward, clip, look before leaping, update."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeVar

import torch
from torch import nn

from seekvl.runtime import SeekVLError
from seekvl.train.objective import Loss
from seekvl.train.optimizer import Optimizer
from seekvl.train.routers import busiest, move_biases

Precision = Literal["float32", "bfloat16"]


class StepBatch(Protocol):
    """What a batch of any objective must offer."""

    def __len__(self) -> int:
        """Count its samples."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return it on a device."""
        ...


M = TypeVar("M", bound=nn.Module)
B = TypeVar("B", bound=StepBatch)
Objective = Callable[[M, B], Loss]
"""From model and batch to the sum of losses (with gradient) and what to divide it by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step found."""

    loss: float
    """Sum of losses over the weight, without balance losses."""
    weight: float
    """Supervised tokens, or whatever the objective divides by."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    skipped: bool
    """True when loss or gradient was not finite and the parameters were left alone."""
    expert_load: float | None
    """Load of the fullest expert over the mean, see `routers.busiest`; None where the loss saw no router."""


def take_step(
    model: M,
    batch: B,
    *,
    objective: Objective[M, B],
    optimizer: Optimizer,
    lr: float,
    grad_clip: float,
    precision: Precision = "float32",
    bias_gamma: float | None = None,
) -> StepResult:
    """Update the model once on a batch that lies on its device.

    precision "bfloat16" computes matrix products in bfloat16; parameters, loss and optimiser stay float32.
    bias_gamma: how far router biases move afterwards, in float32 too; None or 0 leaves them. A loss or
    gradient that is not finite changes nothing but the result.

    Raises SeekVLError when no learning parameter has a part in the loss, and for biases that cannot be moved.
    """
    with autocast(batch_device(model), precision=precision):
        loss = objective(model, batch)
    minimised = loss.minimised()
    if not minimised.requires_grad:
        raise SeekVLError(
            "no parameter that learns has a part in the loss; unfreeze one or change the objective"
        )
    optimizer.zero_grad()
    minimised.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(learning, grad_clip))
    value = float(loss.mean().detach())
    finite = math.isfinite(norm) and math.isfinite(value)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.step()
        if bias_gamma:
            move_biases(model, loss.record, gamma=bias_gamma)
    optimizer.zero_grad()
    return StepResult(
        loss=value,
        weight=float(loss.weight),
        grad_norm=norm,
        skipped=not finite,
        expert_load=None if loss.record is None else busiest(loss.record),
    )


def autocast(device: torch.device, *, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a forward runs in the wanted precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    if precision != "bfloat16":
        raise SeekVLError(f"precision {precision!r} is unknown; use 'float32' or 'bfloat16'")
    return torch.autocast(device.type, dtype=torch.bfloat16)


def batch_device(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters, where its batches belong."""
    return next(model.parameters()).device
