"""`seekvl ask --batch`: a file of questions, or one question about every picture of a folder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seekvl.cli.show import Size, answer_json

if TYPE_CHECKING:
    from seekvl.engine.request import SamplingParams
    from seekvl.recipes.answer_file import Tally
    from seekvl.vlm import VLM, Answer

Batch = Annotated[
    Path | None,
    typer.Option(
        metavar="IN.jsonl",
        exists=True,
        help='Answer many questions: lines of {"id", "images", "question"} or {"id", "messages"}, or a '
        "folder of pictures with one QUESTION about each. Started again, it goes on where it was.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT.jsonl",
        dir_okay=False,
        help="Where --batch writes a line of JSON for each answer; what fails is in OUT.jsonl.failed.",
    ),
]


def check_batch(batch: Path | None, out: Path | None, *, others: Sequence[str]) -> None:
    """Refuse a wrong call; `others` are options that were given and have no meaning here."""
    if (batch is None) != (out is None):
        raise typer.BadParameter("--batch and --out are given together", param_hint="--batch")
    if batch is None or out is None:
        return
    if others:
        raise typer.BadParameter(f"{others[0]} has no meaning with --batch", param_hint=others[0])
    if not out.parent.is_dir():
        raise typer.BadParameter(f"the folder {out.parent} does not exist", param_hint="--out")


def ask_batch(
    vlm: "VLM",
    batch: Path,
    out: Path,
    *,
    question: str | None,
    params: "SamplingParams",
    system: str | None,
) -> None:
    """Answer all, tell how far it is, and end with 1 where something failed."""
    from seekvl.recipes.answer_file import answer_file, failures_of

    tally = answer_file(
        vlm,
        batch,
        out,
        params=params,
        write=_line,
        question=question,
        system=system,
        progress=_progress,
    )
    typer.echo(("\r\033[K" if sys.stderr.isatty() else "") + _summary(tally), err=True)
    if tally.failed:
        typer.echo(f"error: {tally.failed:,} failed, see {failures_of(out)}", err=True)
        raise typer.Exit(1)


def _line(name: str, answer: "Answer", sizes: Sequence[Size]) -> str:
    return answer_json(answer, sizes, name=name)


def _progress(tally: "Tally") -> None:
    """Show on a terminal how far it is."""
    if sys.stderr.isatty():
        typer.echo("\r\033[K" + _summary(tally), err=True, nl=False)


def _summary(tally: "Tally") -> str:
    parts = [f"answered {tally.answered + tally.kept:,} of {tally.total:,}"]
    parts += [f"{tally.kept:,} of them before"] if tally.kept else []
    parts += [f"{tally.failed:,} failed"] if tally.failed else []
    return ", ".join(parts)
