"""Opening pictures: from a path, a URL, bytes or a PIL image to decoded pixels, or an error that says why."""

import base64
import binascii
import http.client
import io
import re
import string
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from seekvl.processing.choices import Preprocessing
from seekvl.processing.conversation import Source, not_a_picture
from seekvl.runtime import SeekVLError

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on broken files."""

CHUNK = 1 << 16
"""Bytes read from a server at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureLimits:
    """How much a single picture may cost before it is refused."""

    max_pixels: int = 100_000_000
    """Pixels after decoding; a small file can claim any number of them (a decompression bomb)."""
    max_bytes: int = 50_000_000
    """Bytes fetched from a URL."""
    timeout: float = 20.0
    """Seconds for a URL, all in all."""


DEFAULT_LIMITS = PictureLimits()


def open_picture(
    source: Source, *, limits: PictureLimits = DEFAULT_LIMITS, mode: Preprocessing = "seekvl"
) -> Image.Image:
    """Open and fully decode a picture; of an animation, the first frame, or the one a PIL image is at.

    Greys of 16 and 32 bits become 8 in mode "seekvl"; the other modes leave them to Pillow's conversion,
    which clips, as the references do. The EXIF orientation is left as it is, alpha too: what is done with
    them is up to the mode as well.

    Raises SeekVLError for a missing file, a bad URL, something that is no picture, a truncated, zero-sized or
    too large picture, and types that are no pictures (for arrays use PIL.Image.fromarray).
    """
    name = "picture"
    if isinstance(source, Image.Image):
        image = _decode(source, name=name, limits=limits)
    elif isinstance(source, bytes):
        name = f"picture of {len(source)} bytes"
        image = _decode_bytes(source, name=name, limits=limits)
    elif isinstance(source, Path):
        name = _short(str(source))
        image = _open_file(source, limits=limits)
    elif isinstance(source, str):
        name = _short(source)
        image = _open_named(source, limits=limits)
    else:
        raise SeekVLError(not_a_picture(source))
    return _eight_bit(image, name=name) if mode == "seekvl" else image


def _open_named(source: str, *, limits: PictureLimits) -> Image.Image:
    """Open what a string names: a URL or a path."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?", source)
    if scheme and scheme[1].lower() in ("http", "https"):
        return _decode_bytes(_fetch(source, limits=limits), name=_short(source), limits=limits)
    if scheme and scheme[1].lower() == "data":
        return _decode_bytes(_data_url(source), name=_short(source), limits=limits)
    if scheme and scheme[2]:
        raise SeekVLError(
            f"picture {_short(source)}: {scheme[1]} URLs are not supported; use http, https, data or a path"
        )
    if "\0" in source:
        raise SeekVLError("a picture path holds a zero byte; give bytes as bytes, not as a string")
    return _open_file(Path(source), limits=limits)


def _open_file(path: Path, *, limits: PictureLimits) -> Image.Image:
    """Open a picture on disk."""
    try:
        handle = path.open("rb")
    except FileNotFoundError as error:
        raise SeekVLError(f"picture {_short(str(path))}: there is no such file") from error
    except IsADirectoryError as error:
        raise SeekVLError(f"picture {_short(str(path))}: this is a folder, not a file") from error
    except OSError as error:
        raise SeekVLError(
            f"picture {_short(str(path))}: cannot be opened ({error.strerror or error})"
        ) from error
    except UnicodeEncodeError as error:
        raise SeekVLError(f"picture {_short(str(path))}: no file name can hold these letters") from error
    with handle:
        return _identify(handle, name=_short(str(path)), limits=limits)


def _decode_bytes(data: bytes, *, name: str, limits: PictureLimits) -> Image.Image:
    """Open a picture held in memory."""
    if not data:
        raise SeekVLError(f"{name}: empty, no bytes to decode")
    return _identify(io.BytesIO(data), name=name, limits=limits)


def _identify(handle: BinaryIO, *, name: str, limits: PictureLimits) -> Image.Image:
    """Read the header of a picture and decode it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image: Image.Image = Image.open(handle)
    except Image.DecompressionBombError as error:
        raise SeekVLError(f"{name}: decompression bomb, refused by Pillow ({error})") from error
    except DECODE_ERRORS as error:
        raise SeekVLError(f"{name}: not a picture in a format that can be read") from error
    if image.format == "EPS":
        raise SeekVLError(f"{name}: EPS is a program that draws a picture, and is not run; save it as PNG")
    return _decode(image, name=name, limits=limits)


def _decode(image: Image.Image, *, name: str, limits: PictureLimits) -> Image.Image:
    """Check the size of an opened picture, then decode all of it."""
    width, height = image.size
    if width < 1 or height < 1:
        raise SeekVLError(f"{name}: zero-sized, {width}x{height} px")
    if width * height > limits.max_pixels:
        raise SeekVLError(
            f"{name}: decompression bomb? {width}x{height} px are {width * height:,} pixels, above the "
            f"limit of {limits.max_pixels:,}; scale it down or raise PictureLimits.max_pixels"
        )
    closed = getattr(image, "fp", image) is None  # told by an assertion, unless the pixels are there already
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise SeekVLError(f"{name}: decompression bomb, refused by Pillow ({error})") from error
    except DECODE_ERRORS as error:
        raise SeekVLError(
            f"{name}: truncated or damaged, its {width}x{height} px cannot be decoded "
            f"({'its file was closed before' if closed else error})"
        ) from error
    return image


def _eight_bit(image: Image.Image, *, name: str) -> Image.Image:
    """Scale greys of more than 8 bits to 8 bits, where Pillow's own conversion would clip them to white.

    I;16 spans 0..65535; I too when a value exceeds 255; F spans 0..1, or 0..255 when a value exceeds 1.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise SeekVLError(
            f"{name}: mode {image.mode} with values {values.min():g} to {values.max():g}; scale to 0..255"
        )
    if image.mode == "F":
        top = 1.0 if values.max() <= 1 else 255.0
    else:
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
    if values.max() > top:
        raise SeekVLError(f"{name}: mode F with values up to {values.max():g}; scale it to 0..1 or 0..255")
    grey = Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
    if "exif" in image.info:
        grey.info["exif"] = image.info["exif"]
    return grey


def _data_url(url: str) -> bytes:
    """Decode a data: URL."""
    head, comma, body = url.partition(",")
    if not comma:
        raise SeekVLError(f"picture {_short(url)}: a data: URL needs a comma before its data")
    raw = urllib.parse.unquote_to_bytes(body.encode(errors="replace"))  # what is no UTF-8 is no base64 either
    if not head.lower().endswith(";base64"):
        return raw
    try:
        return base64.b64decode(re.sub(rb"\s", b"", raw), validate=True)
    except binascii.Error as error:
        raise SeekVLError(f"picture {_short(url)}: the data: URL is not valid base64 ({error})") from error


def _fetch(url: str, *, limits: PictureLimits) -> bytes:
    """Fetch a picture over http(s), within the limits."""
    deadline = time.monotonic() + limits.timeout
    try:
        quoted = urllib.parse.quote(url, safe=string.punctuation)  # spaces and letters beyond ASCII
        request = urllib.request.Request(quoted, headers={"User-Agent": "seekvl"})
        with _web().open(request, timeout=limits.timeout) as response:
            data = bytearray()
            while chunk := response.read1(CHUNK):
                data += chunk
                if len(data) > limits.max_bytes:
                    raise SeekVLError(
                        f"picture {_short(url)}: more than {limits.max_bytes:,} bytes; give a smaller one"
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError
            expected = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise SeekVLError(
            f"picture {_short(url)}: the server answered {error.code} {error.reason}"
        ) from error
    except TimeoutError as error:
        raise SeekVLError(f"picture {_short(url)}: no complete answer within {limits.timeout:g} s") from error
    except SeekVLError:
        raise
    except urllib.error.URLError as error:
        raise SeekVLError(f"picture {_short(url)}: cannot be fetched ({error.reason})") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # resets, URLs that are none
        raise SeekVLError(f"picture {_short(url)}: cannot be fetched ({_short(str(error))})") from error
    if expected is not None and expected.isdigit() and len(data) < int(expected):
        raise SeekVLError(
            f"picture {_short(url)}: the server sent {len(data)} of {expected} bytes; try again"
        )
    return bytes(data)


def _web() -> urllib.request.OpenerDirector:
    """Make an opener that speaks http and https only: no redirect may lead to a file or to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _short(text: str) -> str:
    """Shorten a name for an error message, which is one line of letters that every console prints."""
    count = len(text)
    text = text if count <= 120 else f"{text[:100]}... ({count} letters)"
    return text if text.isprintable() else repr(text)[1:-1]
