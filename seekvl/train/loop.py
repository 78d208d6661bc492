"""The training loop: batches by step number, checkpoints, and an exact continuation after any end.

run = Run(model=model, stage=stage, batch=streams, objective=next_token_loss, folder=Path("run"), seed=0)
train(run, resume=True)
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from seekvl.runtime import SeekVLError, seed_for, torch_generator
from seekvl.train import checkpoint
from seekvl.train.checkpoint import Progress
from seekvl.train.metrics import ProgressLine, StepLog, StepRecord
from seekvl.train.optimizer import Optimizer, make_optimizer
from seekvl.train.stage import Stage, table
from seekvl.train.step import B, M, Objective, Precision, take_step


class RunInterruptedError(SeekVLError):
    """The run was stopped from outside, after a checkpoint from which it goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What a hook sees after a complete step."""

    step: int
    """Complete steps so far."""
    steps: int
    """Steps of the stage."""
    model: nn.Module
    record: StepRecord
    folder: Path


Hook = Callable[[Moment], None]
"""Called after every complete step; it must leave the model and torch's random generator as they are."""


def one_kind(step: int) -> str:
    """Return the name of the only stream of a run that has one."""
    return "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(Generic[M, B]):
    """One stage on one device: everything that decides its result, and where it goes."""

    model: M
    stage: Stage
    batch: Callable[[int], B]
    """The batch of a step, on the CPU, a function of the step number alone: any process may be asked."""
    objective: Objective[M, B]
    """Sum of losses and count of a batch, such as `objective.next_token_loss`."""
    folder: Path
    """Where checkpoints (`step-…`) and `log.jsonl` go; one stage, one folder."""
    seed: int
    kind: Callable[[int], str] = one_kind
    """Name of the stream that feeds a step, for the log; `Streams.kind`."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"
    workers: int = 0
    """Processes that make batches ahead; 0 makes them in between. The result does not depend on it."""
    threads: int | None = None
    """CPU threads of torch; None leaves them as they are."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    max_skipped: int = 10
    """Steps in a row without finite numbers after which the run stops."""
    deterministic: bool = False
    """Use only kernels whose sums have a fixed order: on CUDA slower, and needed for equal losses there."""

    def __post_init__(self) -> None:
        limits = (
            ("checkpoint_every", self.checkpoint_every, 1),
            ("keep", self.keep, 1),
            ("max_skipped", self.max_skipped, 1),
            ("workers", self.workers, 0),
            ("threads", 1 if self.threads is None else self.threads, 1),
        )
        for name, value, least in limits:
            if value < least:
                raise SeekVLError(f"run: {name} is {value}; it must be at least {least}")
        if self.precision not in ("float32", "bfloat16"):
            raise SeekVLError(f"run: precision {self.precision!r} is unknown; use 'float32' or 'bfloat16'")

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to go on, as JSON values."""
        stage = {f"stage.{name}": value for name, value in asdict(self.stage).items()}
        plain = {**stage, "seed": self.seed, "precision": self.precision}
        return cast(
            "dict[str, Any]", json.loads(json.dumps(plain))
        )  # tuples become the lists a file gives back


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a finished run leaves."""

    steps: int
    checkpoint: Path
    """Folder of the last checkpoint."""
    seconds: float
    """Wall time of this start."""


def train(run: Run[M, B], *, resume: bool = False, hooks: Sequence[Hook] = (), show: bool = True) -> Summary:
    """Train one stage to its last step, leave the weights in the model and return where its checkpoint lies.

    resume: go on from the newest checkpoint in the folder, or begin where there is none; a finished run
    only loads its weights. hooks see the model after each complete step. show: table and progress on stderr.

    SIGINT and SIGTERM let the step in work finish, save it and raise RunInterruptedError; a second SIGINT
    stops at once and leaves the checkpoints so far. KeyboardInterrupt from a hook counts as SIGINT.

    Raises SeekVLError for a folder that holds another run, for a stage table that does not fit the model,
    and when too many steps in a row have no finite numbers.
    """
    begun = time.monotonic()
    with _torch_settings(run):
        run.model.to(run.device).train()
        optimizer = make_optimizer(run.stage, run.model)
        torch.manual_seed(seed_for(run.seed, "train", run.stage.name))
        progress = _begin(run, optimizer, resume=resume)
        if show:
            print(table(run.stage, run.model), file=sys.stderr)
        path = _steps(run, optimizer, progress=progress, hooks=hooks, show=show)
        run.model.eval()
    return Summary(steps=run.stage.steps, checkpoint=path, seconds=time.monotonic() - begun)


def _begin(run: Run[M, B], optimizer: Optimizer, *, resume: bool) -> Progress:
    """Load the newest checkpoint of the folder, or start at step 0."""
    found = checkpoint.latest(run.folder)
    if found is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        return Progress(step=0, skipped=0, settings=run.settings)
    if not resume:
        raise SeekVLError(f"{run.folder} holds the run up to {found.name}; resume it or use another folder")
    checkpoint.check_settings(checkpoint.read_progress(found), settings=run.settings, path=found)
    return checkpoint.load(found, model=run.model, optimizer=optimizer, device=run.device)


def _steps(
    run: Run[M, B], optimizer: Optimizer, *, progress: Progress, hooks: Sequence[Hook], show: bool
) -> Path:
    """Take the steps that are left and return the last checkpoint."""
    stage, start = run.stage, progress.step
    live = ProgressLine(stage.name, start=start, steps=stage.steps) if show else None
    with (
        _Stop() as stop,
        contextlib.closing(_batches(run, start=start)) as batches,
        contextlib.closing(StepLog(run.folder / "log.jsonl", start=start)) as lines,
        live or contextlib.nullcontext(),
    ):
        for step in range(start, stage.steps):
            record = _one_step(run, optimizer, step=step, batches=batches)
            lines.write(record)
            if live is not None:
                live.show(record)
            skipped = progress.skipped + 1 if record.skipped else 0
            if skipped >= run.max_skipped:
                raise SeekVLError(
                    f"stage {stage.name!r}: step {step} is number {skipped} in a row without finite numbers "
                    f"(loss {record.loss}, gradient norm {record.grad_norm}); lower the learning rate"
                )
            progress = Progress(step=step + 1, skipped=skipped, settings=run.settings)
            if progress.step % run.checkpoint_every == 0 or progress.step == stage.steps:
                checkpoint.save(
                    run.folder, progress=progress, model=run.model, optimizer=optimizer, keep=run.keep
                )
            _call_hooks(hooks, run=run, record=record, stop=stop)
            if stop.reason is not None and progress.step < stage.steps:
                path = checkpoint.save(
                    run.folder, progress=progress, model=run.model, optimizer=optimizer, keep=run.keep
                )
                raise RunInterruptedError(
                    f"{stop.reason}: stopped after step {progress.step} of {stage.steps}; resume from {path}"
                )
    return checkpoint.step_folder(run.folder, step=stage.steps)


def _one_step(
    run: Run[M, B], optimizer: Optimizer, *, step: int, batches: Iterator[B | SeekVLError]
) -> StepRecord:
    """Wait for the batch of a step and learn from it."""
    begun = time.monotonic()
    batch = next(batches)
    waited = time.monotonic() - begun
    if isinstance(batch, SeekVLError):
        raise SeekVLError(f"step {step}: {batch}") from batch
    if len(batch) != run.stage.batch_size:
        raise SeekVLError(
            f"step {step}: {len(batch)} samples, but the stage has batch_size {run.stage.batch_size}"
        )
    lr = run.stage.learning_rate(step)
    result = take_step(
        run.model,
        batch.to(run.device),
        objective=run.objective,
        optimizer=optimizer,
        lr=lr,
        grad_clip=run.stage.grad_clip,
        precision=run.precision,
        bias_gamma=run.stage.bias_gamma,
    )
    return StepRecord(
        step=step,
        kind=run.kind(step),
        loss=result.loss,
        weight=result.weight,
        samples=len(batch),
        lr=lr,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
        seconds=time.monotonic() - begun,
        data_seconds=waited,
        expert_load=result.expert_load,
    )


def _call_hooks(hooks: Sequence[Hook], *, run: Run[M, B], record: StepRecord, stop: "_Stop") -> None:
    moment = Moment(
        step=record.step + 1, steps=run.stage.steps, model=run.model, record=record, folder=run.folder
    )
    try:
        for hook in hooks:
            hook(moment)
    except KeyboardInterrupt:
        stop.reason = "KeyboardInterrupt"


class _Batches(Dataset[B | SeekVLError]):
    """Batches by step number; a SeekVLError comes out of a worker as a value, so that it stays one line."""

    def __init__(self, batch: Callable[[int], B]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> B | SeekVLError:
        try:
            return self.batch(step)
        except SeekVLError as error:
            return error


def _batches(run: Run[M, B], *, start: int) -> Generator[B | SeekVLError, None, None]:
    """Yield the batches from a step on, in order, made ahead by the workers; closing it ends the workers.

    No global random state is touched, so that the number of workers changes nothing.
    """
    yield from DataLoader(
        _Batches(run.batch),
        batch_size=None,
        sampler=range(start, run.stage.steps),
        num_workers=run.workers,
        prefetch_factor=4 if run.workers else None,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=run.device.type == "cuda",
        generator=torch_generator(run.seed, "workers"),
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Take a worker out of the process group: Ctrl-C and `timeout` signal the group, and the parent decides.

    To ignore the signals instead would make the worker deaf to its parent at the end of the program, too.
    """
    if sys.platform != "win32":
        os.setpgrp()


class _Stop:
    """Notes SIGINT and SIGTERM instead of breaking off amid an update; only the main thread can."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


@contextlib.contextmanager
def _torch_settings(run: Run[M, B]) -> Iterator[None]:
    """Set threads and determinism for the time of the run."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads if run.threads is None else run.threads)
    torch.use_deterministic_algorithms(run.deterministic or deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
