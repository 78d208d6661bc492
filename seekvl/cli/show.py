"""Answers on a terminal: text while it comes, boxes in pixels, timings, JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from PIL import Image

    from seekvl.processing.grounding import Box
    from seekvl.vlm import Answer

Size = tuple[int, int]
"""Width and height of a picture in px."""


class Readable:
    """Turns the pieces of an answer into readable text: the marks of boxes go, their labels stay.

    What could be the beginning of a mark waits for the next piece. All results, joined, equal
    `grounding.strip_marks` of the whole.
    """

    def __init__(self) -> None:
        self._raw = ""
        self._shown = 0

    def push(self, piece: str) -> str:
        """Take a piece and return the text that is certain now."""
        self._raw += piece
        return self._advance(self._raw[: _certain(self._raw)])

    def finish(self) -> str:
        """Return what is left at the end."""
        return self._advance(self._raw)

    def _advance(self, raw: str) -> str:
        from seekvl.processing.grounding import strip_marks

        text = strip_marks(raw)
        fresh = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return fresh


def _certain(raw: str) -> int:
    """Count the letters in front of what may be a mark that is not complete.

    >>> _certain("a dog<|/re"), _certain("a < b")
    (5, 5)
    """
    start = raw.rfind("<")
    tail = raw[start:]
    marks = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
    return start if start >= 0 and any(mark.startswith(tail) for mark in marks) else len(raw)


def box_lines(boxes: Sequence["Box"], sizes: Sequence[Size]) -> list[str]:
    """Write each box as a line: label, corners in px; in 0..999 where no picture was shown."""
    lines = []
    for box in boxes:
        corners, unit = (str(value) for value in box.corners), "0..999"
        if box.image < len(sizes):
            corners = (f"{value:.0f}" for value in box.pixels(*sizes[box.image]))
            unit = "px" if len(sizes) == 1 else f"px of picture {box.image + 1}"
        lines.append(f"{box.label}  {' '.join(corners)} ({unit})")
    return lines


def answer_json(answer: "Answer", sizes: Sequence[Size], *, name: str | None = None) -> str:
    """Write an answer as one line of JSON with the names of `Answer`; boxes have their corners in px, too.

    name: stands in front as "id".
    """
    fields = asdict(answer)
    for entry, box in zip(fields["boxes"], answer.boxes, strict=True):
        seen = box.image < len(sizes)
        entry["pixels"] = [round(value, 2) for value in box.pixels(*sizes[box.image])] if seen else None
    return json.dumps(fields if name is None else {"id": name, **fields})


def print_costs(answer: "Answer") -> None:
    """Print tokens and seconds of an answer on stderr."""
    usage, seconds = answer.usage, answer.timings
    typer.echo(
        f"prompt {usage.prompt_tokens:,} tokens ({usage.image_tokens:,} of pictures, "
        f"{usage.cached_tokens:,} from the cache), answer {usage.completion_tokens:,} tokens, "
        f"finish reason {answer.finish_reason}",
        err=True,
    )
    typer.echo(
        f"preprocess {seconds.preprocess:.3f} s, vision {seconds.vision:.3f} s, "
        f"prefill {seconds.prefill:.3f} s, decode {seconds.decode:.3f} s",
        err=True,
    )


def upright(picture: "Image.Image", *, preprocessing: str) -> "Image.Image":
    """Turn a picture the way the preprocessing sees it, which is what boxes refer to."""
    from seekvl.processing import pad_image

    return picture if preprocessing == "official" else pad_image.upright(picture)
