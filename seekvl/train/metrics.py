"""What a run tells: one JSON line per step in a file, and how far it is on the terminal."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from seekvl.runtime import SeekVLError, atomic_file

if TYPE_CHECKING:
    from rich.live import Live

SMOOTHING = 0.98
"""Weight of the past in the displayed loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One line of the log."""

    step: int
    """Number of the step, counted from 0."""
    kind: str
    """Stream the batch came from, such as "language" or "multimodal"."""
    loss: float
    """Loss of the batch at full precision; NaN or infinite where `skipped`."""
    weight: float
    """Supervised tokens, or whatever the objective divides by."""
    samples: int
    lr: float
    """Learning rate before the multipliers of the groups."""
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Whether the update was left out because a number was not finite."""
    seconds: float
    """Wall time of the step, waiting for data included."""
    data_seconds: float
    """Wall time spent waiting for the batch."""
    expert_load: float | None = None
    """Load of the fullest expert over the mean of its layer, in the layer where that is most: 1 is balance.
    None for a network, or a loss, without experts.
    """


def read_log(path: Path) -> list[StepRecord]:
    """Return the records of a log file, oldest first; SeekVLError naming a line that cannot be read."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(StepRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise SeekVLError(f"{path}, line {number}: not a record of this log: {error}") from error
    return records


class StepLog:
    """The log file of a run; going on at a step drops what an interrupted run wrote from there on."""

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < start]
        with atomic_file(path) as part:
            part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: StepRecord) -> None:
        """Append a record."""
        self._file.write(json.dumps(asdict(record)) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a log, without a last one that a crash cut off."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


class ProgressLine:
    """How far the run is, on stderr: a live line on a terminal, elsewhere a line every `every` seconds."""

    def __init__(
        self, name: str, *, start: int, steps: int, every: float = 10.0, stream: TextIO | None = None
    ) -> None:
        self.name, self.start, self.steps, self.every = name, start, steps, every
        self._stream = stream or sys.stderr
        self._losses: dict[str, float] = {}
        self._begun = self._shown = time.monotonic()
        self._samples = 0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, record: StepRecord) -> None:
        """Take a record in, and show the state of the run when it is time."""
        self._samples += record.samples
        if not record.skipped:
            past = self._losses.get(record.kind, record.loss)
            self._losses[record.kind] = SMOOTHING * past + (1 - SMOOTHING) * record.loss
        now = time.monotonic()
        last = record.step + 1 == self.steps
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(self.line(record, now=now)))
        elif last or now - self._shown >= self.every:
            self._shown = now
            print(self.line(record, now=now), file=self._stream, flush=True)

    def line(self, record: StepRecord, *, now: float) -> str:
        """Return the state of the run as one line."""
        done = record.step + 1
        seconds = max(now - self._begun, 1e-9)
        left = (self.steps - done) * seconds / (done - self.start)
        losses = "  ".join(f"{kind} {loss:.4f}" for kind, loss in sorted(self._losses.items()))
        skipped = "  step skipped: not finite" if record.skipped else ""
        return (
            f"{self.name}  step {done:,}/{self.steps:,}  loss {losses or '-'}  lr {record.lr:.2e}  "
            f"{self._samples / seconds:.1f} samples/s  {duration(left)} left{skipped}"
        )


def duration(seconds: float) -> str:
    """Return a duration for people.

    >>> duration(42), duration(192), duration(7500)
    ('42 s', '3 min 12 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
