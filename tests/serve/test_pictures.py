"""Pictures of requests: what is refused before it is decoded, and what is seen of the others."""

import asyncio
import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import seekvl
from seekvl.processing.pad_image import upright
from seekvl.serve import pictures
from seekvl.serve.errors import ApiError
from seekvl.serve.fetch import FetchError, TooLargeError
from seekvl.serve.pictures import PictureDesk, check_pixels, read_data_url, read_file_url
from seekvl.serve.settings import Settings
from tests.serve.conftest import MODEL, Running, Start

EXAMPLES = Path(__file__).parents[2] / "examples"
SIGN = (EXAMPLES / "sign.png").read_bytes()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(*urls: str, **fields: object) -> dict[str, object]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "Where is the sign?"}]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 40,
        **fields,
    }


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (bomb(8001, 8000), "image_too_large"),
        (bomb(50_000, 50_000), "image_too_large"),
        (bomb(2**31 - 1, 2**31 - 1), "image_too_large"),
        (bomb(100, 100), "invalid_image"),
        (bomb(0, 5), "invalid_image"),
        (SIGN[:200], "invalid_image"),
        (b"\x89PNG\r\n\x1a\n", "invalid_image"),
        (b"GIF89a", "invalid_image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "invalid_image"),
        (b"RIFF\0\0\0\0WAVE", "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image"),
        (b"%PDF-1.7", "invalid_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "invalid_image"),
        (b"II*\0", "invalid_image"),
        (b"", "invalid_image"),
        (b"BM", "invalid_image"),
    ],
)
def test_no_picture_and_bombs_are_refused(server: Running, data: bytes, code: str) -> None:
    found = server.ask("POST", "/v1/chat/completions", json=shown(url_of(data)))
    assert found.status_code == 400
    error = found.json()["error"]
    assert (error["code"], error["param"]) == (code, "messages[0].content[0].image_url")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_is_known_by_its_content(server: Running, kind: str) -> None:
    data = encoded(Image.open(EXAMPLES / "sign.png").convert("RGB"), kind)
    url = "DATA:text/html;charset=x;BASE64," + base64.b64encode(data).decode()
    found = server.ask("POST", "/v1/chat/completions", json=shown(url)).json()
    assert found["usage"]["prompt_tokens_details"]["image_tokens"] == 100
    assert found["choices"][0]["message"]["grounding"]


def test_seventeen_pictures_are_too_many(server: Running) -> None:
    tiny = url_of(encoded(Image.new("RGB", (8, 8))))
    error = server.ask("POST", "/v1/chat/completions", json=shown(*[tiny] * 17)).json()["error"]
    assert error["code"] == "too_many_images"
    assert "17" in error["message"]
    bill = server.ask("POST", "/v1/chat/completions", json=shown(*[tiny] * 16, max_tokens=1))
    assert bill.status_code == 200


def test_a_picture_of_too_many_bytes(start: Start) -> None:
    server = start(max_picture_bytes=1000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    for url in (url_of(encoded(noise)), "data:image/png," + "a" * 3000):
        error = server.ask("POST", "/v1/chat/completions", json=shown(url)).json()["error"]
        assert error["code"] == "image_too_large"


def test_a_turned_picture_is_seen_upright(server: Running) -> None:
    sign = Image.open(EXAMPLES / "sign.png").convert("RGB").resize((640, 320))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    turned = encoded(sign.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())
    upright, found = (
        server.ask("POST", "/v1/chat/completions", json=shown(url_of(data))).json()
        for data in (encoded(sign), turned)
    )
    assert found["choices"] == upright["choices"]
    assert found["pictures"][0]["size"] == [640, 320]
    assert found["choices"][0]["message"]["grounding"][0]["box_px"][2] > 320


def test_transparent_pixels_are_laid_on_an_opaque_ground(server: Running, vlm: seekvl.VLM) -> None:
    art = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    art.paste((0, 0, 0, 255), (60, 100, 240, 140))
    found = server.ask("POST", "/v1/chat/completions", json=shown(url_of(encoded(art)), max_tokens=8)).json()
    alone = vlm.ask(art, "Where is the sign?", max_new_tokens=8)
    assert found["choices"][0]["message"]["content"] == alone.text


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    opened = asyncio.run(PictureDesk(Settings()).decode(encoded(grey), param="image"))
    assert np.array_equal(np.asarray(opened), np.arange(256, dtype=np.uint8).reshape(16, 16))
    clipped = asyncio.run(
        PictureDesk(Settings(preprocessing="official")).decode(encoded(grey), param="image")
    )
    assert clipped.mode.startswith("I")  # left to the reference's own conversion


def test_pixels_are_counted_from_the_header() -> None:
    check_pixels(bomb(1000, 1000), most=1_000_000)
    with pytest.raises(TooLargeError, match="1001x1000 px"):
        check_pixels(bomb(1001, 1000), most=1_000_000)


@pytest.mark.parametrize(
    ("url", "data"),
    [
        ("data:;base64,aGk=", b"hi"),
        ("data:image/png;base64,aG%6B%3d", b"hi"[:1] + b"i"),
        ("data:,hi", b"hi"),
        ("data:image/png;base64,aG\nk=", b"hi"),
    ],
)
def test_data_addresses(url: str, data: bytes) -> None:
    assert read_data_url(url, most=100) == data


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:;base64,a", "data:;base64,ä", "data:;base64,%ff"]
)
def test_broken_data_addresses(url: str) -> None:
    with pytest.raises(FetchError):
        read_data_url(url, most=100)


def test_files_are_read_below_the_folder_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a b.png").write_bytes(SIGN)
    (tmp_path / "secret.png").write_bytes(SIGN)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").mkdir()
    assert read_file_url(f"file://{root}/a%20b.png", root, most=10**6) == SIGN
    with pytest.raises(TooLargeError):
        read_file_url(f"file://{root}/a%20b.png", root, most=10)
    told = set()
    for path in (
        f"file://{tmp_path}/secret.png",
        f"file://{tmp_path}/missing.png",
        f"file://{root}/../secret.png",
        f"file://{root}/%2e%2e/secret.png",
        f"file://{root}/link.png",
        f"file://{root}/folder",
        f"file://{root}/missing.png",
        f"file://localhost{root}/a%20b.png",
        f"file://evil.example{root}/a%20b.png",
        f"file://{root}/a%00b.png",
        f"file://{root}/%ff",
        "file:///dev/zero",
        "file:",
    ):
        with pytest.raises(FetchError) as caught:
            read_file_url(path, root, most=10**6)
        told.add(str(caught.value))
    assert len(told) == 1  # whether it exists is not told


def test_fetching_can_be_switched_off(start: Start) -> None:
    error = start(fetch=False).ask("POST", "/v1/chat/completions", json=shown("https://1.1.1.1/x.png")).json()
    assert "fetches nothing" in error["error"]["message"]


def test_too_many_pictures_name_their_place() -> None:
    with pytest.raises(ApiError) as caught:
        PictureDesk(Settings(max_pictures=1)).check_count(2, param="messages")
    assert (caught.value.code, caught.value.param) == ("too_many_images", "messages")


def test_a_picture_that_comes_again_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = pictures.open_picture

    def noted(data: bytes, **options: Any) -> Image.Image:
        decoded.append(len(data))
        return real(data, **options)

    monkeypatch.setattr(pictures, "open_picture", noted)
    desk = PictureDesk(Settings())
    noise = Image.effect_noise((400, 400), 90).convert("RGB")  # more than is hashed in the event loop
    small, large = encoded(Image.new("RGB", (9, 9))), encoded(noise)
    assert len(small) < pictures.AT_ONCE < len(large)

    async def look(data: bytes) -> Image.Image:
        return await desk.open(url_of(data), param="image")

    for data in (small, large):
        first, again = asyncio.run(look(data)), asyncio.run(look(data))
        assert first is again
        assert first.tobytes() == real(data).tobytes()
    assert decoded == [len(small), len(large)]
    assert asyncio.run(look(encoded(Image.new("RGB", (9, 9), "red")))).getpixel((0, 0)) == (255, 0, 0)


def test_how_a_kept_picture_is_turned_was_read_already() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    held = io.BytesIO()
    Image.new("RGB", (40, 30)).save(held, format="PNG", exif=exif)
    opened = asyncio.run(PictureDesk(Settings()).decode(held.getvalue(), param="image"))
    assert opened._exif is not None
    assert opened._exif._loaded, "two threads that read it at once would see half of it"


def test_a_damaged_block_of_exif_is_found_damaged_by_everybody(caplog: pytest.LogCaptureFixture) -> None:
    held = io.BytesIO()
    Image.new("RGB", (40, 30)).save(held, format="PNG", exif=b"Exif\x00\x00no TIFF at all")
    desk = PictureDesk(Settings())
    for asked in (1, 2):
        opened = asyncio.run(desk.decode(held.getvalue(), param="image"))
        assert upright(opened).size == (40, 30)
        assert caplog.text.count("EXIF block cannot be read") == asked
