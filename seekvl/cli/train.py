"""`seekvl train`: complete training runs."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from seekvl.cli import options

app = typer.Typer(no_args_is_help=True)

EXAMPLE = "Example: seekvl train nano --out runs/nano --workers 2"


@app.callback()
def train() -> None:
    """Train a model from nothing."""


@app.command("nano", epilog=EXAMPLE)
def nano(
    *,
    out: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Folder for checkpoints, logs and the model.")
    ],
    device: options.Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw pictures ahead.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of torch; torch decides by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, pictures and order.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on where an earlier start stopped, or refuse to.")
    ] = True,
    steps_scale: Annotated[
        float, typer.Option(help="Multiplies the steps of every stage: 0.001 tries the recipe out.")
    ] = 1.0,
) -> None:
    """Train seekvl-nano, the bundled model, from nothing: hours on two CPU cores.

    Ctrl-C stops after the step in work and saves it; called again, it goes on from there.
    """
    from seekvl.recipes.nano import build
    from seekvl.runtime import select_device
    from seekvl.train.loop import RunInterruptedError

    _log_to_stderr()
    try:
        folder = build(
            out,
            seed=seed,
            device=select_device(device),
            workers=workers,
            threads=threads,
            scale=steps_scale,
            resume=resume,
        )
    except RunInterruptedError as error:
        typer.echo(f"{error}: call the same command again", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"the trained model is in {folder}")
    typer.echo(f'use it: seekvl ask picture.png "What is in the picture?" --model {folder}')


def _log_to_stderr() -> None:
    """Let what seekvl logs be seen on stderr."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("seekvl").setLevel(logging.INFO)
