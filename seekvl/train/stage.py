"""A training stage: which parameters learn how fast, and how long (2403.05525, sec. 3.2 and table 4)."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from seekvl.runtime import SeekVLError
from seekvl.train.schedule import LanguageShare, Schedule

Rule = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One line of the stage table: parameters treated alike."""

    pattern: str
    """Regular expression the whole parameter name must match, such as `adaptor[.].*`."""
    lr: float = 1.0
    """Multiplier on the learning rate of the stage."""
    weight_decay: float = 0.0
    """Decoupled decay of AdamW; 0 in the paper's table 4."""
    frozen: bool = False
    """Whether these parameters stay as they are."""
    rule: Rule = "adamw"
    """How they learn; "muon" is for the matrices between a network's layers."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise SeekVLError(f"group pattern {self.pattern!r} is no regular expression: {error}") from error
        if self.rule not in get_args(Rule):
            raise SeekVLError(f"group {self.pattern!r}: rule {self.rule!r} is unknown; use 'adamw' or 'muon'")
        if self.lr <= 0 or self.weight_decay < 0:
            raise SeekVLError(
                f"group {self.pattern!r}: lr multiplier {self.lr} must be above 0 and weight decay "
                f"{self.weight_decay} not below; to stop learning say frozen=True"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One complete, printable training stage."""

    name: str
    steps: int
    """Optimiser steps."""
    batch_size: int
    """Samples of one step."""
    lr: float
    """Peak learning rate."""
    schedule: Schedule
    groups: tuple[Group, ...]
    """Every parameter of the model matches exactly one line."""
    language: LanguageShare | None = None
    """Share of text steps; None where there is one stream only."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 1.0 in table 4."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW, table 4."""
    eps: float = 1e-8
    """Of AdamW."""
    bias_gamma: float | None = None
    """How far each step moves the correction bias of routers towards idle experts; 2412.10302 uses 0, 0.001
    and 0 in base's stages. None leaves it alone, like 0.
    """

    def __post_init__(self) -> None:
        for field, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise SeekVLError(f"stage {self.name!r}: {field} is {value}; it must be at least 1")
        for field, number in (("lr", self.lr), ("grad_clip", self.grad_clip)):
            if not 0 < number < float("inf"):
                raise SeekVLError(f"stage {self.name!r}: {field} is {number}; it must be above 0 and finite")
        if self.bias_gamma is not None and not 0 <= self.bias_gamma < float("inf"):
            raise SeekVLError(
                f"stage {self.name!r}: bias_gamma is {self.bias_gamma}; it must be finite and not below 0"
            )
        if self.schedule.warmup > self.steps:
            raise SeekVLError(
                f"stage {self.name!r}: warm-up of {self.schedule.warmup} steps in {self.steps} steps"
            )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step counted from 0, before the multipliers of the groups."""
        return self.lr * self.schedule.factor(step, steps=self.steps)


def assign(stage: Stage, model: nn.Module) -> list[list[str]]:
    """Return, for every line of the stage table, the names of its parameters.

    Raises SeekVLError naming a parameter that matches no line or several, a line that matches nothing, and a
    stage in which nothing learns.
    """
    names: list[list[str]] = [[] for _ in stage.groups]
    for name, _ in model.named_parameters():
        lines = [index for index, group in enumerate(stage.groups) if re.fullmatch(group.pattern, name)]
        if len(lines) != 1:
            found = ", ".join(repr(stage.groups[index].pattern) for index in lines) or "no group"
            raise SeekVLError(
                f"stage {stage.name!r}: parameter {name} matches {found}; it must match exactly one"
            )
        names[lines[0]].append(name)
    for group, members in zip(stage.groups, names, strict=True):
        if not members:
            raise SeekVLError(
                f"stage {stage.name!r}: group {group.pattern!r} matches no parameter of the model"
            )
    if all(group.frozen for group in stage.groups):
        raise SeekVLError(f"stage {stage.name!r}: every group is frozen, nothing would learn")
    return names


def table(stage: Stage, model: nn.Module) -> str:
    """Return the stage as a printable table: count, megabytes, peak learning rate and decay of every line."""
    parameters = dict(model.named_parameters())
    rows = [("parameters", "count", "MB", "rule", "peak LR", "decay")]
    for group, names in zip(stage.groups, assign(stage, model), strict=True):
        members = [parameters[name] for name in names]
        count = sum(member.numel() for member in members)
        size = sum(member.numel() * member.element_size() for member in members)
        rate = "frozen" if group.frozen else f"{stage.lr * group.lr:.2e}"
        decay = "-" if group.frozen else f"{group.weight_decay:g}"
        rule = "-" if group.frozen else group.rule
        rows.append((group.pattern, f"{count:,}", f"{size / 1e6:.2f}", rule, rate, decay))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    bias = f", router bias by {stage.bias_gamma:g}" if stage.bias_gamma else ""
    lines = [
        f"stage {stage.name}: {stage.steps:,} steps of {stage.batch_size}, {stage.schedule.shape} "
        f"schedule{bias}"
    ]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)
