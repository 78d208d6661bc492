"""What a prediction gives beside its text: figures, and its boxes drawn on their picture, as a PNG."""

import base64
import io
import math
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import anyio.to_thread
from anyio import CapacityLimiter
from PIL import Image

from seekvl.engine.request import Completion
from seekvl.processing.draw import draw_boxes
from seekvl.processing.grounding import parse_boxes
from seekvl.processing.pad_image import upright
from seekvl.runtime import SeekVLError
from seekvl.serve.fetch import FetchError, Rules, Web
from seekvl.serve.grounding import Grounding
from seekvl.serve.settings import Settings

MOST_PIXELS = 16_000_000
"""Larger pictures are scaled down before they are drawn into: the PNG would have hundreds of megabytes."""
UPLOAD_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A picture with boxes."""

    address: str
    """A data: URL, or where it was put."""
    notice: str | None = None
    """What the caller should know of it."""


async def draw(
    picture: Image.Image, text: str, *, name: str, settings: Settings, painter: CapacityLimiter
) -> Drawn:
    """Draw the boxes of an answer into the last picture of its prompt, which they refer to.

    name: that of the file, where pictures are uploaded. painter: bounds the threads that draw. Raises
    SeekVLError where an upload fails.
    """
    paint = partial(_paint, picture, text, preprocessing=settings.preprocessing)
    png, notice = await anyio.to_thread.run_sync(paint, limiter=painter)
    if settings.upload_url is None:
        return Drawn(address=f"data:image/png;base64,{base64.b64encode(png).decode()}", notice=notice)
    return Drawn(address=await _put(png, url=settings.upload_url, name=name), notice=notice)


def figures(completion: Completion, boxes: Grounding, *, first_seconds: float) -> dict[str, object]:
    """Return what is told of an answer beside its text."""
    usage, timings = completion.usage, completion.timings
    return {
        "input_token_count": usage.prompt_tokens,
        "output_token_count": usage.completion_tokens,
        "image_token_count": usage.image_tokens,
        "cached_token_count": usage.cached_tokens,
        "time_to_first_token": first_seconds,
        "vision_time": timings.vision,
        "prefill_time": timings.prefill,
        "decode_time": timings.decode,
        "finish_reason": completion.finish_reason,
        "boxes": boxes,
    }


def _paint(picture: Image.Image, text: str, *, preprocessing: str) -> tuple[bytes, str | None]:
    """Return a PNG, and what to tell of it."""
    if preprocessing == "seekvl":  # the other modes see pictures as they are stored
        picture = upright(picture)
    size, notice = picture.size, None
    if size[0] * size[1] > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (size[0] * size[1]))
        picture = picture.resize((max(1, int(size[0] * scale)), max(1, int(size[1] * scale))))
        notice = (
            f"the drawn picture was scaled from {size[0]}x{size[1]} to {picture.width}x{picture.height} px"
        )
    drawn = io.BytesIO()
    draw_boxes(picture, parse_boxes(text)).save(drawn, format="PNG")
    return drawn.getvalue(), notice


async def _put(png: bytes, *, url: str, name: str) -> str:
    """Upload a picture; return where it lies, as the receiver says."""
    host = urlsplit(url).hostname or ""
    web = Web(Rules(allowed=(host,), max_bytes=0, seconds=UPLOAD_SECONDS))  # the operator named it
    try:
        status, location = await web.send(
            f"{url.rstrip('/')}/{name}", body=png, headers={"Content-Type": "image/png"}, method="PUT"
        )
    except FetchError as error:
        raise SeekVLError(f"the drawn picture could not be uploaded: {error}") from error
    if not 200 <= status < 300 or not location:
        raise SeekVLError(f"the drawn picture could not be uploaded: the receiver answered {status}")
    return location.partition("?")[0]
