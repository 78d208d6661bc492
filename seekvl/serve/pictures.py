"""Pictures of a request: from a data: or web address, or an uploaded file, to decoded pixels, or an error
that names the field.
"""

import base64
import binascii
import hashlib
import io
import re
import time
import warnings
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import anyio.to_thread
from anyio import CapacityLimiter
from PIL import Image

from seekvl.processing.picture import DECODE_ERRORS, PictureLimits, open_picture
from seekvl.processing.recent import Recent
from seekvl.runtime import SeekVLError
from seekvl.serve.errors import bad_request
from seekvl.serve.fetch import FetchError, Rules, TooLargeError, Web
from seekvl.serve.settings import Settings

MAGIC = {
    "PNG": b"\x89PNG\r\n\x1a\n",
    "JPEG": b"\xff\xd8\xff",
    "GIF": b"GIF8",
    "BMP": b"BM",
    "WEBP": b"RIFF",
}
"""How files of the formats that are taken begin; what a caller says of the type is ignored."""
DECODERS = 2
"""Threads that decode pictures."""

AT_ONCE = 2**16
"""Bytes that are decoded from base64 and hashed in the event loop: a thread takes as long to wake."""
DECODED_BYTES = 64 * 2**20
"""Most bytes of decoded pictures that are kept: clients send a picture again with every turn."""

Stored = Callable[[str, str], Awaitable[bytes | None]]
"""Returns the bytes of a file of this server by its address and owner, None for any other address."""


async def nothing_stored(url: str, owner: str) -> bytes | None:
    """Know no files."""
    return None


def picture_format(data: bytes) -> str | None:
    """Tell the format of a picture by its first bytes; None for what is not taken.

    >>> picture_format(b"GIF89a..."), picture_format(b"<svg>")
    ('GIF', None)
    """
    for name, magic in MAGIC.items():
        if data.startswith(magic) and (name != "WEBP" or data[8:12] == b"WEBP"):
            return name
    return None


class PictureDesk:
    """Opens the pictures of requests within the limits of the server."""

    def __init__(self, settings: Settings, *, stored: Stored = nothing_stored) -> None:
        self.settings = settings
        self.seconds: Callable[[float], None] = lambda seconds: None
        """Is told what each picture took."""
        self._stored = stored
        self._web = Web(
            Rules(
                allowed=settings.fetch_hosts,
                max_bytes=settings.max_picture_bytes,
                seconds=settings.fetch_seconds,
            )
        )
        self._limits = PictureLimits(max_pixels=settings.max_pixels, max_bytes=settings.max_picture_bytes)
        self._decoders = CapacityLimiter(DECODERS)
        self._decoded = Recent[bytes, Image.Image](DECODED_BYTES)

    async def open(self, url: str, *, param: str, owner: str = "") -> Image.Image:
        """Return the picture at an address. Raises ApiError naming the field `param`.

        owner: whose files it may be among.
        """
        began = time.monotonic()
        data = await self._read(url, param=param, owner=owner)
        picture = await self.decode(data, param=param)
        self.seconds(time.monotonic() - began)
        return picture

    async def original(self, url: str, *, param: str, owner: str = "") -> bytes:
        """Return the bytes of the picture at an address, checked as `open` does. Raises ApiError."""
        data = await self._read(url, param=param, owner=owner)
        await self.decode(data, param=param)
        return data

    async def decode(self, data: bytes, *, param: str) -> Image.Image:
        """Return the picture that some bytes hold. Raises ApiError naming the field `param`."""
        most = self.settings.max_picture_bytes
        if len(data) > most:
            message = f"the picture has {len(data):,} bytes, at most {most:,} are taken; scale it down"
            raise bad_request(message, param=param, code="image_too_large")
        if picture_format(data) is None:
            raise bad_request(
                "this is no picture that is taken: use PNG, JPEG, WebP, GIF or BMP",
                param=param,
                code="invalid_image",
            )
        try:
            if len(data) <= AT_ONCE and (known := self._decoded.get(_digest(data))) is not None:
                return known
            return await anyio.to_thread.run_sync(self._open, data, limiter=self._decoders)
        except TooLargeError as error:
            raise bad_request(str(error), param=param, code="image_too_large") from error
        except SeekVLError as error:
            raise bad_request(str(error), param=param, code="invalid_image") from error

    def check_count(self, pictures: int, *, param: str) -> None:
        """Refuse a request with too many pictures."""
        most = self.settings.max_pictures
        if pictures > most:
            message = f"the request has {pictures} pictures, at most {most} are taken"
            raise bad_request(message, param=param, code="too_many_images")

    def _open(self, data: bytes) -> Image.Image:
        """Decode a picture, or remember it: the work of a thread."""
        digest = _digest(data)
        if (known := self._decoded.get(digest)) is not None:
            return known
        check_pixels(data, most=self.settings.max_pixels)
        picture = open_picture(data, limits=self._limits, mode=self.settings.preprocessing)
        try:
            picture.getexif()  # read on demand, and two threads at once would see half of it
        except DECODE_ERRORS:  # whoever asks next shall find it damaged, too
            return open_picture(data, limits=self._limits, mode=self.settings.preprocessing)
        size = picture.width * picture.height * len(picture.getbands())
        self._decoded.put(digest, picture, size=size)
        return picture

    async def _read(self, url: str, *, param: str, owner: str) -> bytes:
        """Return the bytes at an address."""
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        try:
            if scheme == "data" and len(url) <= AT_ONCE:
                return read_data_url(url, most=self.settings.max_picture_bytes)
            if scheme == "data":
                return await anyio.to_thread.run_sync(
                    partial(read_data_url, url, most=self.settings.max_picture_bytes)
                )
            stored = await self._stored(url, owner)
            if stored is not None:
                return stored
            if scheme in ("http", "https"):
                if not self.settings.fetch:
                    raise FetchError("this server fetches nothing; send a data: URL")
                return await self._web.get(url)
            if scheme == "file" and self.settings.file_root is not None:
                root, most = self.settings.file_root, self.settings.max_picture_bytes
                return await anyio.to_thread.run_sync(partial(read_file_url, url, root, most=most))
        except FetchError as error:
            code = "image_too_large" if isinstance(error, TooLargeError) else "invalid_image"
            raise bad_request(f"the picture: {error}", param=param, code=code) from error
        raise bad_request(
            "a picture is given by a data: or an https: address", param=param, code="invalid_image"
        )


def _digest(data: bytes) -> bytes:
    """Return what tells the bytes of a picture from others."""
    return hashlib.blake2b(data, digest_size=16).digest()


def check_pixels(data: bytes, *, most: int) -> None:
    """Refuse a picture whose header tells of too many pixels, before anything is decoded.

    Raises TooLargeError. What else may be wrong is told by the decoder.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is below it
            header = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"the picture has more than {most:,} pixels") from error
    except DECODE_ERRORS:
        return
    width, height = header.size
    if width * height > most:
        raise TooLargeError(f"the picture has {width}x{height} px, at most {most:,} pixels are taken")


def read_data_url(url: str, *, most: int) -> bytes:
    """Return the bytes of a data: URL. Raises FetchError."""
    head, comma, body = url.partition(",")
    if not comma:
        raise FetchError("a data: URL needs a comma before its data")
    if len(body) > 2 * most:  # base64 takes 4/3, and line breaks are allowed
        raise TooLargeError(f"more than {most:,} bytes")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        raw = re.sub(rb"\s", b"", unquote(body, errors="strict").encode("ascii"))
        return base64.b64decode(raw, validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise FetchError("the data: URL is not valid base64") from error


def read_file_url(url: str, root: Path, *, most: int) -> bytes:
    """Return a file below a folder, of at most so many bytes.

    Raises FetchError, outside of the folder with the same words whether it exists or not.
    """
    refused = FetchError("no such file, or not one of the folder that may be read")
    parts = urlsplit(url)
    if parts.netloc:
        raise refused
    try:
        path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
        if not path.is_relative_to(root.resolve(strict=True)) or not path.is_file():
            raise refused
        if path.stat().st_size > most:
            raise TooLargeError(f"more than {most:,} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise refused from error
