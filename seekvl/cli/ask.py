"""`seekvl ask`: one question about pictures, one answer."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seekvl.cli import options
from seekvl.cli.ask_batch import Batch, Out, ask_batch, check_batch
from seekvl.cli.show import Readable, Size, answer_json, box_lines, print_costs, upright
from seekvl.engine.choices import Constrain
from seekvl.processing.choices import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

    from seekvl.engine.request import SamplingParams
    from seekvl.processing.conversation import Source
    from seekvl.processing.grounding import Box
    from seekvl.vlm import VLM, Answer

EXAMPLE = 'Example: seekvl ask picture.png "Where is the red star?" --draw answer.png'

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".svg": "SVG"}
"""What --draw can write."""

Pictures = Annotated[
    list[str] | None,
    typer.Argument(metavar="PICTURE", help="Paths or URLs; - reads one from stdin.", show_default=False),
]
Question = Annotated[
    str | None,
    typer.Argument(metavar="QUESTION", help="The question; it comes last.", show_default=False),
]
Draw = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT.png",
        dir_okay=False,
        help="Write the picture with the boxes of the answer here; as OUT.svg, boxes and labels stay "
        "elements that can be edited.",
    ),
]
BoxesIn = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="The boxes are in picture N, counted from 1; by default in the last one."
    ),
]
Constrained = Annotated[
    Constrain | None,
    typer.Option(
        help="boxes: the boxes of the answer are well-formed, whatever the model would say; box_first: "
        "and it starts with one."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print tokens and seconds on stderr.")]


def ask(
    *,
    pictures: Pictures = None,
    question: Question = None,
    model: options.Model = options.NANO,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    preprocessing: options.Preprocessing = "seekvl",
    max_tiles: options.MaxTiles = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    json: options.Json = False,
    draw: Draw = None,
    boxes_in: BoxesIn = None,
    constrain: Constrained = None,
    verbose: Verbose = False,
    batch: Batch = None,
    out: Out = None,
) -> None:
    """Answer a question about one picture, several, or none; or, with --batch, many questions."""
    names = pictures or []
    given = {"PICTURE": names, "--json": json, "--draw": draw, "--boxes-in": boxes_in, "--verbose": verbose}
    check_batch(batch, out, others=[name for name, value in given.items() if value])
    if batch is None:
        question = _check_call(names, question, draw=draw, boxes_in=boxes_in)
    from seekvl.engine.request import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop) if stop else None,
        constrain=constrain,
    )
    opened = _open(names, preprocessing=preprocessing)
    vlm = options.load_vlm(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        preprocessing=preprocessing,
        max_tiles=max_tiles,
    )
    if batch is not None and out is not None:
        ask_batch(vlm, batch, out, question=question, params=params, system=system)
        return
    assert question is not None
    answer = _answer(vlm, question, images=opened, params=params, system=system, show=not json)
    if boxes_in is not None:
        answer = replace(answer, boxes=[replace(box, image=boxes_in - 1) for box in answer.boxes])
    _print(answer, sizes=[picture.size for picture in opened], json=json, verbose=verbose)
    if draw is not None:
        _draw(draw, answer.boxes, pictures=opened, names=names)


def _check_call(
    names: Sequence[str], question: str | None, *, draw: Path | None, boxes_in: int | None
) -> str:
    """Refuse a wrong call before anything slow begins; return the question."""
    if question is None:
        raise typer.BadParameter("there is no question; it comes last", param_hint="QUESTION")
    if not question.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
    if question == "-" or os.path.isfile(question):
        raise typer.BadParameter(f"{question!r} is a picture; the question comes last", param_hint="QUESTION")
    if names.count("-") > 1:
        raise typer.BadParameter("- was given twice; stdin holds one picture", param_hint="PICTURE")
    if boxes_in is not None and boxes_in > len(names):
        raise typer.BadParameter(
            f"{boxes_in} is more than the {len(names)} given pictures", param_hint="--boxes-in"
        )
    if draw is None:
        return question
    if not names:
        raise typer.BadParameter("there is no picture to draw on", param_hint="--draw")
    if draw.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"{draw} must end in {', '.join(FORMATS)}", param_hint="--draw")
    if not draw.parent.is_dir():
        raise typer.BadParameter(f"the folder {draw.parent} does not exist", param_hint="--draw")
    return question


def _open(names: Sequence[str], *, preprocessing: Preprocessing) -> list["Image.Image"]:
    """Open the pictures, so that a bad one is known before the model is loaded."""
    from seekvl.processing.picture import open_picture
    from seekvl.runtime import SeekVLError

    opened = []
    for number, name in enumerate(names, start=1):
        source: Source = sys.stdin.buffer.read() if name == "-" else name
        try:
            picture = open_picture(source, mode=preprocessing)
        except SeekVLError as error:
            where = "stdin" if name == "-" else f"picture {number} of {len(names)}"
            raise SeekVLError(f"{where}: {error}") from error
        opened.append(upright(picture, preprocessing=preprocessing))
    return opened


def _answer(
    vlm: "VLM",
    question: str,
    *,
    images: Sequence["Image.Image"],
    params: "SamplingParams",
    system: str | None,
    show: bool,
) -> "Answer":
    """Get the answer and show it: on a terminal as it comes, elsewhere only when it is whole."""
    from seekvl.vlm import answer_of

    live = show and sys.stdout.isatty()
    readable, whole, completion = Readable(), "", None
    pieces = vlm.session(system=system).stream(question, images=images, params=params)
    for piece in options.awaited(pieces):
        completion = piece.completion
        text = readable.push(piece.text)
        whole += text
        if live:
            typer.echo(text, nl=False)
    rest = readable.finish()
    if show:
        typer.echo(rest if live else whole + rest)
    assert completion is not None
    return answer_of(completion)


def _print(answer: "Answer", *, sizes: Sequence[Size], json: bool, verbose: bool) -> None:
    """Print what stands below the text of an answer, or all of it as JSON."""
    if json:
        typer.echo(answer_json(answer, sizes))
    else:
        for line in box_lines(answer.boxes, sizes):
            typer.echo(line)
    if verbose:
        print_costs(answer)


def _draw(
    path: Path, boxes: Sequence["Box"], *, pictures: Sequence["Image.Image"], names: Sequence[str]
) -> None:
    """Draw the boxes on the picture they belong to and write it, whole or not at all."""
    from seekvl.processing.grounding import draw_boxes, svg_boxes
    from seekvl.runtime import SeekVLError, atomic_file

    if not boxes:
        raise SeekVLError("no box in the answer: nothing was drawn")
    numbers = {box.image for box in boxes}
    if len(numbers) > 1:
        raise SeekVLError(
            f"the boxes lie in {len(numbers)} pictures and --draw writes one: nothing was drawn; "
            "--boxes-in says which"
        )
    number = numbers.pop()
    with atomic_file(path) as part:
        if path.suffix.lower() == ".svg":
            part.write_text(svg_boxes(pictures[number], boxes), encoding="utf-8")
        else:
            draw_boxes(pictures[number], boxes).save(part, format=FORMATS[path.suffix.lower()])
    typer.echo(f"drew {len(boxes)} box{'es' * (len(boxes) > 1)} of {names[number]} into {path}", err=True)
