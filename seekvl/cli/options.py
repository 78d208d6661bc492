"""Options that several verbs share, and the model they name."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from seekvl.processing import choices

if TYPE_CHECKING:
    from seekvl.vlm import VLM

NANO = "seekvl-nano"
Awaited = TypeVar("Awaited")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A bundled model (seekvl-nano, seekvl-nano-moe), a checkpoint folder, or a hub id.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes CUDA where there is one.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Numbers to compute in; auto suits device and size."),
]
Quantize = Annotated[
    Literal["int8", "int4", "fp8"] | None,
    typer.Option(
        help="Turn the language model's matrices into numbers of fewer bits on the way in: half of the "
        "memory or less, and of the time a token takes on a CPU. A folder made by seekvl convert has them "
        "already, for a CPU; on a GPU torchao makes them, and fp8 is there alone.",
        show_default=False,
    ),
]
Preprocessing = Annotated[
    choices.Preprocessing,
    typer.Option(
        help="How pictures become pixels: seekvl (official numerics, EXIF orientation and transparency "
        "respected), official (the reference bit for bit), transformers."
    ),
]
MaxTiles = Annotated[
    int | None,
    typer.Option(
        help="Most tiles of a picture, for DeepSeek-VL2; by default its own rule, which tiles up to two "
        "pictures and sees more of them as a single tile each."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; more varies the answer.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens with this probability in all.")]
TopK = Annotated[int | None, typer.Option(help="Draw among this many likeliest tokens; all by default.")]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Above 1 makes tokens of the answer, for DeepSeek-VL2 of the prompt, too, less likely to come "
        "again; 0.001 to 1000."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Makes drawing repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")]
System = Annotated[
    str | None, typer.Option(help='System prompt instead of the checkpoint\'s own; "" goes without.')
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]


@contextlib.contextmanager
def waiting_line(text: str) -> Iterator[None]:
    """Show on a terminal what the block is busy with, and take the line away at its end."""
    live = sys.stderr.isatty()
    if live:
        typer.echo(f"{text} ...", err=True, nl=False)
    try:
        yield
    finally:
        if live:
            typer.echo("\r\033[K", err=True, nl=False)


def awaited(pieces: Iterator[Awaited]) -> Iterator[Awaited]:
    """Pass pieces on; a terminal is told while the first is waited for, when pictures and prompt are read."""
    with waiting_line("reading the prompt"):
        first = next(pieces, None)
    if first is not None:
        yield first
    yield from pieces


def matrices_line() -> Callable[[int, int], None]:
    """Return what shows on a terminal how many matrices are quantised."""
    return counting_line("quantised", "matrices")


def counting_line(done_to: str, things: str) -> Callable[[int, int], None]:
    """Return what shows on a terminal how many of so many things something has been done to."""
    live = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        """Tell how far it is."""
        if live:
            typer.echo(f"\r\033[K{done_to} {done} of {total} {things}", err=True, nl=done == total)

    return show


def load_vlm(
    model: str,
    *,
    device: str,
    dtype: str,
    quantize: Literal["int8", "int4", "fp8"] | None = None,
    preprocessing: Preprocessing = "seekvl",
    max_tiles: int | None = None,
) -> "VLM":
    """Load the model; a terminal is told while it lasts."""
    with waiting_line(f"loading {model}"):
        from seekvl.vlm import load

        return load(
            model,
            device=device,
            dtype=dtype,
            quantize=quantize,
            preprocessing=preprocessing,
            max_tiles=max_tiles,
            progress=matrices_line(),
        )
