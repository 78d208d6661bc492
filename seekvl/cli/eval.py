"""`seekvl eval`: how good a model is."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seekvl.cli import options

if TYPE_CHECKING:
    from seekvl.processing.conversation import Conversation
    from seekvl.vlm import VLM

EXAMPLE = "Example: seekvl eval nano --n 200 --kinds colour,count --out accuracy.json"

app = typer.Typer(no_args_is_help=True, epilog=EXAMPLE)

BATCH = 16
"""Questions answered together."""

LONGEST = 128
"""Most tokens of an answer; the longest right one, a caption, has about 100 letters."""


@app.callback()
def evaluate() -> None:
    """Measure a model."""


@app.command("nano", epilog=EXAMPLE)
def nano(
    *,
    model: options.Model = options.NANO,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    n: Annotated[int, typer.Option("--n", min=1, help="Questions of each kind.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides the pictures, all of them unseen in training.")] = 0,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of question, with commas or repeated; by default all but those about small print in "
            "long pictures: small_print (reading), small_locate, small_count, small_colour.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the JSON to this file, too.")
    ] = None,
) -> None:
    """Ask about freshly drawn pictures that no training has seen; print the accuracy by kind."""
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"the folder {out.parent} does not exist", param_hint="--out")
    from seekvl.corpus.nano import sample
    from seekvl.evals.nano import KINDS, SCORES, evaluate
    from seekvl.runtime import atomic_file

    wanted = _kinds(kinds, known=tuple(SCORES), usual=KINDS)
    vlm = options.load_vlm(model, device=device, dtype=dtype)
    answer = _answers(vlm, total=n * len(wanted))
    report = evaluate(answer, sample, n=n, seed=seed, kinds=wanted, batch=BATCH)
    typer.echo(report.json() if json else report.table())
    if out is not None:
        with atomic_file(out) as part:
            part.write_text(report.json() + "\n", encoding="utf-8")


def _kinds(given: Sequence[str] | None, *, known: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Return the kinds to ask, each once, the usual ones where none is given; refuse an unknown one."""
    wanted = [kind.strip() for entry in given or () for kind in entry.split(",")] or list(usual)
    for kind in wanted:
        if kind not in known:
            raise typer.BadParameter(f"{kind!r} is none of {', '.join(known)}", param_hint="--kinds")
    return list(dict.fromkeys(wanted))


def _answers(vlm: "VLM", *, total: int) -> Callable[[list["Conversation"]], list[str]]:
    """Return what answers a batch, and says on stderr how far it is: live on a terminal, else every 10 s."""
    done, begun = 0, time.monotonic()
    shown = begun
    live = sys.stderr.isatty()

    def answer(conversations: list["Conversation"]) -> list[str]:
        """Answer one batch."""
        nonlocal done, shown
        texts = [one.text for one in vlm.batch(conversations, max_new_tokens=LONGEST)]
        done, now = done + len(conversations), time.monotonic()
        if live or done == total or now - shown >= 10:
            shown = now
            rate = done / max(now - begun, 1e-9)
            line = f"{done:,}/{total:,} questions, {rate:.1f} a second, {(total - done) / rate:.0f} s left"
            typer.echo(f"\r\033[K{line}" if live else line, err=True, nl=not live or done == total)
        return texts

    return answer
