import base64
import http.server
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seekvl.processing.choices import Preprocessing
from seekvl.processing.picture import PictureLimits, open_picture
from seekvl.runtime import SeekVLError


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_claiming(width: int, height: int) -> bytes:
    """Make a PNG whose header claims a size and whose data is missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    empty = zlib.compress(b"")
    data = struct.pack(">I", len(empty)) + b"IDAT" + empty + struct.pack(">I", zlib.crc32(b"IDAT" + empty))
    return b"\x89PNG\r\n\x1a\n" + chunk + data


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = noise(20, 10)
    data = png(image)
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (image, data, path, str(path), url):
        assert open_picture(source).tobytes() == image.tobytes()


def test_relative_path_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("10:30.png").write_bytes(png(noise(3, 3)))
    assert open_picture("10:30.png").size == (3, 3)


def test_first_frame_of_an_animation() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(file.getvalue()).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 32896, 65535, 257]], dtype=np.uint16)
    image = open_picture(png(Image.fromarray(values)))
    assert image.mode == "L"
    assert list(image.tobytes()) == [0, 128, 255, 1]


def test_32_bit_and_float_greys() -> None:
    small = Image.fromarray(np.array([[0, 255]], dtype=np.int32))
    assert list(open_picture(small).tobytes()) == [0, 255]
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert list(open_picture(unit).tobytes()) == [0, 128, 255]
    bytes_as_floats = Image.fromarray(np.array([[0.0, 128.0, 255.0]], dtype=np.float32))
    assert list(open_picture(bytes_as_floats).tobytes()) == [0, 128, 255]


@pytest.mark.parametrize("mode", ["official", "transformers"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_the_modes_of_the_references_leave_greys_to_pillow(mode: Preprocessing, dtype: type) -> None:
    image = Image.fromarray(np.array([[0, 100, 300, 65000]], dtype=dtype))
    opened = open_picture(image, mode=mode)
    assert opened.mode == image.mode
    assert opened.convert("RGB").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 300.0])
def test_float_greys_without_a_known_range(value: float) -> None:
    with pytest.raises(SeekVLError, match="scale"):
        open_picture(Image.fromarray(np.array([[0.0, value]], dtype=np.float32)))


BAD = {
    "missing file": ("no/such/file.png", "there is no such file"),
    "too long a name": ("a" * 5000, "cannot be opened"),
    "folder": (Path(), "this is a folder"),
    "zero byte": ("a\0b", "zero byte"),
    "empty bytes": (b"", "empty, no bytes"),
    "text": (b"hello, I am no picture", "not a picture"),
    "truncated png": (png(noise(64, 64))[:3000], "truncated or damaged"),
    "header only": (png(noise(64, 64))[:40], "truncated or damaged|not a picture"),
    "truncated jpeg": ("jpeg", "truncated or damaged"),
    "damaged png": (png(noise(64, 64))[:200] + b"\0" * 5000, "truncated or damaged"),
    "zero width": (Image.new("RGB", (0, 5)), "zero-sized, 0x5"),
    "zero in a file": (png_claiming(0, 5), "zero-sized|not a picture"),
    "bomb": (png_claiming(12_000, 12_000), "decompression bomb"),
    "huge bomb": (png_claiming(100_000, 100_000), "decompression bomb"),
    "data without comma": ("data:image/png;base64", "needs a comma"),
    "bad base64": ("data:image/png;base64,@@@", "not valid base64"),
    "data that is text": ("data:text/plain,hello", "not a picture"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "EPS is a program"),
    "ftp": ("ftp://127.0.0.1/a.png", "ftp URLs are not supported"),
    "file url": ("file:///etc/hostname", "file URLs are not supported"),
    "array": (np.zeros((4, 4, 3), np.uint8), "PIL.Image.fromarray"),
    "number": (7, "not int"),
    "none": (None, "not NoneType"),
    "http with a bad port": ("http://127.0.0.1:port/a.png", "cannot be fetched"),
    "http without host": ("http:///a.png", "cannot be fetched"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(name: str) -> None:
    source, expected = BAD[name]
    if isinstance(source, str) and source == "jpeg":
        file = io.BytesIO()
        noise(64, 64).save(file, "JPEG")
        source = file.getvalue()[:1500]
    with pytest.raises(SeekVLError, match=expected) as caught:
        open_picture(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_limits_are_configurable() -> None:
    with pytest.raises(SeekVLError, match=r"20x10 px are 200 pixels.* limit of 100"):
        open_picture(noise(20, 10), limits=PictureLimits(max_pixels=100))


class Pages(http.server.BaseHTTPRequestHandler):
    """A tiny server of good and bad pictures."""

    def do_GET(self) -> None:
        data = png(noise(20, 10))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/ok")
            self.end_headers()
        elif self.path == "/to-file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif self.path == "/to-ftp":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/x")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/slow":
            threading.Event().wait(1.0)
        else:
            self.send_response(200)
            length = len(data) * (2 if self.path == "/short" else 1)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(b"<html>" if self.path == "/page" else data)

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/ok", "/moved", "/图 1.png?a=b%20c&d=[e]"])
def test_http(server: str, path: str) -> None:
    assert open_picture(server + path).tobytes() == noise(20, 10).tobytes()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/missing", "answered 404"),
        ("/to-file", "cannot be fetched|answered 302"),
        ("/to-ftp", "cannot be fetched"),
        ("/page", "sent|not a picture"),
        ("/short", "cannot be fetched|sent"),
        ("/slow", "within 0.3 s"),
    ],
)
def test_http_failures(server: str, path: str, expected: str) -> None:
    with pytest.raises(SeekVLError, match=expected):
        open_picture(server + path, limits=PictureLimits(timeout=0.3))


def test_http_byte_limit(server: str) -> None:
    with pytest.raises(SeekVLError, match="more than 100 bytes"):
        open_picture(server + "/ok", limits=PictureLimits(max_bytes=100))


def test_nobody_listens() -> None:
    with pytest.raises(SeekVLError, match="cannot be fetched"):
        open_picture("http://127.0.0.1:9/a.png")
