"""The optimiser of a stage: AdamW, and Muon for the groups that ask for it, as one.

AdamW is the paper's (2403.05525, table 4). Muon turns the momentum of a matrix into the nearest orthogonal
one before it steps; small networks that learn from nothing need fewer steps with it. It is torch's own, and
for stacks of matrices, such as experts, `muon.StackedMuon`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from seekvl.runtime import SeekVLError
from seekvl.train.muon import StackedMuon
from seekvl.train.stage import Stage, assign

MUON_MOMENTUM = 0.95


class Optimizer:
    """Several optimisers over disjoint parameters, used as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, themselves: what is written into them counts."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the parameters once."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the states of all parts. Raises ValueError where they are those of other parts."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def make_optimizer(stage: Stage, model: nn.Module) -> Optimizer:
    """Freeze and unfreeze the parameters as the stage says and return an optimiser over those that learn.

    Each group keeps its multiplier under "scale"; `train.step` sets the learning rate from it. Raises
    SeekVLError for a group that Muon cannot serve, because one of its parameters is no matrix and no stack of
    them.
    """
    parameters = dict(model.named_parameters())
    groups: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": [], "stacked": []}
    for group, names in zip(stage.groups, assign(stage, model), strict=True):
        for name in names:
            parameters[name].requires_grad_(not group.frozen)
            if group.rule == "muon" and parameters[name].dim() not in (2, 3):
                raise SeekVLError(
                    f"stage {stage.name!r}: muon is for matrices and stacks of them, {name} has shape "
                    f"{tuple(parameters[name].shape)}; use adamw for it"
                )
        if not group.frozen:
            learning = [parameters[name] for name in names]
            stacks = [one for one in learning if group.rule == "muon" and one.dim() == 3]
            others = [one for one in learning if group.rule != "muon" or one.dim() != 3]
            for rule, members in ((group.rule, others), ("stacked", stacks)):
                if members:
                    line = {"params": members, "weight_decay": group.weight_decay, "scale": group.lr}
                    groups[rule].append(line)
    parts: list[torch.optim.Optimizer] = []
    if groups["adamw"]:
        parts.append(
            torch.optim.AdamW(groups["adamw"], lr=stage.lr, betas=stage.betas, eps=stage.eps, fused=True)
        )
    if groups["muon"]:
        parts.append(
            torch.optim.Muon(
                groups["muon"], lr=stage.lr, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"
            )
        )
    if groups["stacked"]:
        parts.append(StackedMuon(groups["stacked"], lr=stage.lr, momentum=MUON_MOMENTUM))
    return Optimizer(parts)
