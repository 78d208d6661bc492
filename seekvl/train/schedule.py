"""Learning rate and modality of every step in closed form: functions of the step number alone.

Source: 2403.05525, sec. 3.2.2 (modality warm-up, modality grouping) and table 4 (schedules).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from seekvl.runtime import SeekVLError

Shape = Literal["cosine", "step", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the learning rate moves, as a factor on its peak."""

    shape: Shape
    """`cosine` ends at the floor, `step` divides by sqrt(10) at each milestone, `constant` stays."""
    warmup: int = 0
    """Steps of linear rise from peak/warmup to the peak."""
    floor: float = 0.0
    """Factor where the cosine ends."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of all steps at which "step" drops; the paper publishes none, these are our choice."""

    def __post_init__(self) -> None:
        if self.shape not in ("cosine", "step", "constant"):
            raise SeekVLError(f"schedule {self.shape!r} is unknown; use 'cosine', 'step' or 'constant'")
        if self.warmup < 0:
            raise SeekVLError(f"schedule: warmup is {self.warmup} steps; it cannot be negative")
        if not 0.0 <= self.floor <= 1.0:
            raise SeekVLError(f"schedule: floor is {self.floor}; it is a factor from 0 to 1")
        if any(not 0.0 < milestone < 1.0 for milestone in self.milestones):
            raise SeekVLError(f"schedule: milestones {self.milestones} must lie between 0 and 1")

    def factor(self, step: int, *, steps: int) -> float:
        """Return the factor on the peak learning rate at a step counted from 0.

        >>> [Schedule(shape="constant", warmup=4).factor(step, steps=9) for step in (0, 1, 3, 8)]
        [0.25, 0.5, 1.0, 1.0]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "cosine":
            done = (step - self.warmup) / max(1, steps - self.warmup)
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2
        if self.shape == "step":
            return math.sqrt(0.1) ** sum(step >= milestone * steps for milestone in self.milestones)
        return 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Which stream feeds a step, and the how-manieth step of that stream it is."""

    language: bool
    """True for a text step, False for a multimodal one: a step is of one modality (modality grouping)."""
    index: int
    """Earlier steps of the same stream, so that both streams run without gaps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageShare:
    """The wanted share of text steps: `start` falling in a straight line to `target`, then constant.

    The paper warms modalities up from pure text to 0.7 and publishes neither the curve nor its length;
    whether its ratio counts steps, tokens or samples is open too. Here it counts steps.
    """

    target: float
    """Share after the warm-up; 0.7 in the paper's stage 2."""
    start: float = 1.0
    """Share at step 0."""
    warmup: int = 0
    """Steps of the fall; 0 begins at the target."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.target <= 1.0 and 0.0 <= self.start <= 1.0):
            raise SeekVLError(
                f"language share from {self.start} to {self.target}: shares lie between 0 and 1"
            )
        if self.warmup < 0:
            raise SeekVLError(f"language share: warmup is {self.warmup} steps; it cannot be negative")

    def share(self, step: int) -> float:
        """Return the wanted share w at a step."""
        if step >= self.warmup:
            return self.target
        return self.start + (self.target - self.start) * step / self.warmup

    def text_steps(self, step: int) -> int:
        """Count the text steps before this one: the floor of the area W under w, in exact fractions.

        Up to the warm-up W(s) = start s - (start - target) s^2 / (2 warmup); later steps add the target.
        """
        start, target = _fraction(self.start), _fraction(self.target)
        ramp = min(step, self.warmup)
        area = target * (step - ramp) + start * ramp
        if ramp:
            area -= (start - target) * ramp * ramp / (2 * self.warmup)
        return math.floor(area)

    def is_text_step(self, step: int) -> bool:
        """Tell whether the count of text steps grows at this step.

        >>> "".join("t" if LanguageShare(target=0.7).is_text_step(s) else "m" for s in range(10))
        'mttmttmttt'
        """
        return self.text_steps(step + 1) > self.text_steps(step)

    def place(self, step: int) -> Place:
        """Return stream and stream position of a step; costs the same at step 0 and at step 10 million."""
        before = self.text_steps(step)
        language = self.text_steps(step + 1) > before
        return Place(language=language, index=before if language else step - before)


def _fraction(share: float) -> Fraction:
    """Read 0.7 as 7/10 and not as the nearest binary number, so that no rounding moves a step."""
    return Fraction(share).limit_denominator(1_000_000)
