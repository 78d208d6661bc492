"""`seekvl train`: complete training runs."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seekvl.cli import options

if TYPE_CHECKING:
    from seekvl.recipes.nano_build import Build

EXAMPLE = "Example: seekvl train nano --out runs/nano --workers 2"

app = typer.Typer(no_args_is_help=True, epilog=EXAMPLE)

Out = Annotated[
    Path, typer.Option(metavar="DIR", file_okay=False, help="Folder for checkpoints, logs and the model.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that draw pictures ahead.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch; torch decides by default.")]
Seed = Annotated[int, typer.Option(help="Decides weights, pictures and order.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on where an earlier start stopped, or refuse to.")
]
StepsScale = Annotated[
    float, typer.Option(help="Multiplies the steps of every stage: 0.001 tries the recipe out.")
]


@app.callback()
def train() -> None:
    """Train a model from nothing."""


@app.command("nano", epilog=EXAMPLE)
def nano(
    *,
    out: Out,
    device: options.Device = "auto",
    workers: Workers = 1,
    threads: Threads = None,
    seed: Seed = 0,
    resume: Resume = True,
    steps_scale: StepsScale = 1.0,
) -> None:
    """Train seekvl-nano, the bundled model, from nothing: hours on two CPU cores.

    Ctrl-C stops after the step in work and saves it; called again, it goes on from there.
    """
    from seekvl.recipes.nano import build

    _run(
        build,
        out=out,
        device=device,
        workers=workers,
        threads=threads,
        seed=seed,
        resume=resume,
        steps_scale=steps_scale,
    )


@app.command("nano-moe", epilog="Example: seekvl train nano-moe --out runs/nano-moe --workers 2")
def nano_moe(
    *,
    out: Out,
    device: options.Device = "auto",
    workers: Workers = 1,
    threads: Threads = None,
    seed: Seed = 0,
    resume: Resume = True,
    steps_scale: StepsScale = 1.0,
) -> None:
    """Train seekvl-nano-moe, a DeepSeek-VL2 in miniature, on the tower of seekvl-nano: hours on two CPU
    cores.

    Ctrl-C stops after the step in work and saves it; called again, it goes on from there.
    """
    from seekvl.recipes.nano_moe import build

    _run(
        build,
        out=out,
        device=device,
        workers=workers,
        threads=threads,
        seed=seed,
        resume=resume,
        steps_scale=steps_scale,
    )


def _run(
    build: Callable[["Build"], Path],
    *,
    out: Path,
    device: str,
    workers: int,
    threads: int | None,
    seed: int,
    resume: bool,
    steps_scale: float,
) -> None:
    """Run a recipe and say where its model is."""
    from seekvl.recipes.nano_build import Build
    from seekvl.runtime import select_device
    from seekvl.train.loop import RunInterruptedError

    _log_to_stderr()
    start = Build(
        folder=out,
        device=select_device(device),
        seed=seed,
        workers=workers,
        threads=threads,
        scale=steps_scale,
        resume=resume,
    )
    try:
        folder = build(start)
    except RunInterruptedError as error:
        typer.echo(f"{error}: call the same command again", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"the trained model is in {folder}")
    typer.echo(f'use it: seekvl ask picture.png "What is in the picture?" --model {folder}')


def _log_to_stderr() -> None:
    """Let what seekvl logs be seen on stderr."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("seekvl").setLevel(logging.INFO)
