"""What was looked at in a check of several things, and what came of it: one line each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from seekvl.runtime import SeekVLError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    detail: str
    """What was found, in one line; what to do where it is not ok."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything looked at, in order; what needs a failed check's result is not reached and not listed."""

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def lines(self) -> list[str]:
        """Return a line for each check."""
        words = {True: "ok    ", False: "FAILED"}
        return [f"{words[check.ok]} {check.name}: {check.detail}" for check in self.checks]


class Checks:
    """Runs checks one after the other and remembers what came out."""

    def __init__(self) -> None:
        self.done: list[Check] = []

    def run(self, name: str, look: Callable[[], tuple[T, str]]) -> T | None:
        """Run one check that returns its result and a line; None after a failure."""
        try:
            result, detail = look()
        except SeekVLError as error:
            self.done.append(Check(name=name, ok=False, detail=str(error)))
            return None
        self.done.append(Check(name=name, ok=True, detail=detail))
        return result
