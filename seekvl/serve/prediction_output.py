"""The drawn picture of a prediction: its boxes on the picture they are in, as a PNG."""

import base64
import io
import math
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import anyio.to_thread
from anyio import CapacityLimiter
from PIL import Image

from seekvl.processing.draw import draw_boxes
from seekvl.processing.grounding import parse_boxes
from seekvl.processing.pad_image import upright
from seekvl.runtime import SeekVLError
from seekvl.serve.fetch import FetchError, Rules, Web
from seekvl.serve.settings import Settings

MOST_PIXELS = 16_000_000
"""Larger pictures are scaled down before they are drawn into: the PNG would have hundreds of megabytes."""
UPLOAD_SECONDS = 60.0

_painters = CapacityLimiter(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A picture with boxes."""

    address: str
    """A data: URL, or where it was put."""
    notice: str | None = None
    """What the caller should know of it."""


async def draw(picture: Image.Image, text: str, *, name: str, settings: Settings) -> Drawn:
    """Draw the boxes of an answer into the last picture of its prompt, which they refer to.

    name: that of the file, where pictures are uploaded. Raises SeekVLError where that fails.
    """
    paint = partial(_paint, picture, text, preprocessing=settings.preprocessing)
    png, notice = await anyio.to_thread.run_sync(paint, limiter=_painters)
    if settings.upload_url is None:
        return Drawn(address=f"data:image/png;base64,{base64.b64encode(png).decode()}", notice=notice)
    return Drawn(address=await _put(png, url=settings.upload_url, name=name), notice=notice)


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
