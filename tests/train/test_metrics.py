import io
from dataclasses import replace
from pathlib import Path

import pytest

from seekvl.runtime import SeekVLError
from seekvl.train.metrics import ProgressLine, StepLog, StepRecord, read_log

RECORD = StepRecord(
    step=0,
    kind="language",
    loss=1 / 3,
    weight=5.0,
    samples=4,
    lr=1e-3,
    grad_norm=0.5,
    skipped=False,
    seconds=0.1,
    data_seconds=0.01,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write(path: Path, *, start: int, steps: range) -> None:
    log = StepLog(path, start=start)
    for step in steps:
        log.write(replace(RECORD, step=step))
    log.close()


def test_records_come_back_at_full_precision(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", start=0, steps=range(2))
    assert read_log(tmp_path / "log.jsonl") == [RECORD, replace(RECORD, step=1)]


def test_going_on_drops_later_steps_and_a_line_cut_by_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, start=0, steps=range(6))
    path.write_text(path.read_text() + '{"step": 6, "ki')
    write(path, start=4, steps=range(4, 5))
    assert [record.step for record in read_log(path)] == [0, 1, 2, 3, 4]


def test_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, start=0, steps=range(1))
    path.write_text(path.read_text() + '{"stop": 1}\n')
    with pytest.raises(SeekVLError, match="line 2: not a record of this log"):
        read_log(path)


def test_plain_lines_come_every_few_seconds_and_at_the_end() -> None:
    out = io.StringIO()
    with ProgressLine("stage2", start=0, steps=3, every=1000.0, stream=out) as progress:
        for step in range(3):
            progress.show(replace(RECORD, step=step))
    assert len(out.getvalue().splitlines()) == 1
    assert out.getvalue().startswith("stage2  step 3/3  loss language 0.3333  lr 1.00e-03")


def test_terminal_gets_a_live_line() -> None:
    out = Terminal()
    with ProgressLine("stage2", start=0, steps=2, stream=out) as progress:
        progress.show(RECORD)
        progress.show(replace(RECORD, step=1))
    assert "stage2  step 2/2" in out.getvalue()


def test_line_tells_rate_remaining_time_and_skips() -> None:
    progress = ProgressLine("s", start=10, steps=20, stream=io.StringIO())
    progress.show(replace(RECORD, step=10))
    text = progress.line(replace(RECORD, step=10, skipped=True), now=progress._begun + 2.0)
    assert "2.0 samples/s  18 s left  step skipped: not finite" in text
