"""Pages of a PDF as pictures: what is drawn, and what strangers' files may not do."""

import base64
import io
import json
import os
import socket
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from seekvl.serve import pdf
from seekvl.serve.events import COMMENT, EventStream
from tests.serve.conftest import Running, wait_until

pytest.importorskip("pypdfium2")


def made(pages: int, size: tuple[int, int] = (60, 90)) -> bytes:
    """A PDF of plain pages, each of its own grey."""
    pictures = [Image.new("RGB", size, (20 * number,) * 3) for number in range(pages)]
    out = io.BytesIO()
    pictures[0].save(out, format="PDF", save_all=True, append_images=pictures[1:])
    return out.getvalue()


def ask(server: Running, data: bytes) -> httpx.Response:
    url = "data:application/pdf;base64," + base64.b64encode(data).decode()
    return server.ask("POST", "/v1/page/pdf", json={"pdf": url})


def events(answer: httpx.Response) -> list[dict[str, object]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def test_pages_come_in_order_with_their_numbers(server: Running) -> None:
    answer = ask(server, made(3))
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer)
    assert [(page["page"], page["pages"]) for page in found] == [(1, 3), (2, 3), (3, 3)]
    for number, page in enumerate(found):
        url = str(page["picture"])
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
            assert picture.format == "PNG"
            assert picture.size == (1024, 1536)
            level = picture.convert("L").getpixel((500, 700))
        assert level == pytest.approx(20 * number, abs=4)


def test_a_long_pdf_is_drawn_in_part(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "MOST_PAGES", 2)
    assert [(page["page"], page["pages"]) for page in events(ask(server, made(4)))] == [(1, 4), (2, 4)]


def test_absurd_pages_are_bounded(server: Running) -> None:
    huge = made(1).replace(b"/MediaBox [ 0 0 60.0 90.0 ]", b"/MediaBox [ 0 0 9e9 90.0 ]")
    huge = huge.replace(b"/MediaBox [0 0 60.0 90.0]", b"/MediaBox [0 0 9e9 90.0]")
    answer = ask(server, huge)
    assert answer.status_code in (200, 400)
    for page in events(answer) if answer.status_code == 200 else []:
        with Image.open(io.BytesIO(base64.b64decode(str(page["picture"]).partition(",")[2]))) as picture:
            assert max(picture.size) <= pdf.SIDE + 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no PDF"),
        (b"\x89PNG\r\n\x1a\n", "no PDF"),
        (b"%PDF-1.7", "damaged"),
        (b"%PDF-1.7\n" + b"\x00" * 5000, "damaged"),
    ],
)
def test_what_is_no_pdf_is_told(server: Running, data: bytes, words: str) -> None:
    answer = ask(server, data)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "invalid_pdf"


@pytest.mark.parametrize("body", [{}, {"pdf": 3}, {"pdf": ""}, {"pdf": "/etc/passwd"}, {"pdf": "data:,x"}])
def test_a_pdf_is_given_by_its_bytes(server: Running, body: dict[str, object]) -> None:
    assert server.ask("POST", "/v1/page/pdf", json=body).status_code == 400


def test_a_worker_that_hangs_is_ended(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(pdf, "WORKER", slow)
    monkeypatch.setattr(pdf, "SECONDS", 0.5)
    began = time.monotonic()
    answer = ask(server, made(1))
    assert answer.status_code == 400
    assert "was not drawn within 0.5 s" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 10


def test_a_worker_that_dies_is_told(server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text("import os\nos.abort()\n")
    monkeypatch.setattr(pdf, "WORKER", dying)
    answer = ask(server, made(1))
    assert answer.status_code == 400
    assert "takes too much" in answer.json()["error"]["message"]


def test_pages_that_are_long_in_coming_are_waited_for_with_comments(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "slow.py"
    page = (
        "print(json.dumps({'page': %d, 'pages': 2, 'bytes': 1}), flush=True); print('x', end='', flush=True)"
    )
    slow.write_text(f"import json, time\n{page % 1}\ntime.sleep(1)\n{page % 2}\n")
    monkeypatch.setattr(pdf, "WORKER", slow)
    monkeypatch.setattr(EventStream.__init__, "__kwdefaults__", {"ended": lambda: None, "seconds": 0.2})
    answer = ask(server, made(1))
    assert [page["page"] for page in events(answer)] == [1, 2]
    lines = [line for line in answer.text.splitlines() if line]
    first, last = (number for number, line in enumerate(lines) if line.startswith("data: "))
    assert first == 0
    assert set(lines[1:last]) == {COMMENT.decode().strip()}  # one may come behind it, too


@pytest.mark.parametrize("reads", [True, False])
def test_who_leaves_early_ends_the_worker(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reads: bool
) -> None:
    ended, slow = tmp_path / "pid", tmp_path / "slow.py"
    head = "json.dumps({'page': 1, 'pages': 2, 'bytes': 1})"
    slow.write_text(
        f"import json, os, pathlib, time\npathlib.Path({str(ended)!r}).write_text(str(os.getpid()))\n"
        f"time.sleep({0 if reads else 0.5})\nprint({head} + '\\nx', end='', flush=True)\ntime.sleep(50)\n"
    )
    monkeypatch.setattr(pdf, "WORKER", slow)
    url = "data:application/pdf;base64," + base64.b64encode(made(1)).decode()
    asked = httpx.Request("POST", f"{server.url}/v1/page/pdf", json={"pdf": url})
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        lines = [f"{name.decode()}: {value.decode()}" for name, value in asked.headers.raw]
        connection.sendall(
            "\r\n".join(("POST /v1/page/pdf HTTP/1.1", *lines, "", "")).encode() + asked.read()
        )
        if reads:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: ended.exists() and ended.read_text() != "")
    wait_until(lambda: pdf._drawn == 0)
    wait_until(lambda: not runs(int(ended.read_text())))


def runs(process: int) -> bool:
    """Whether a process is there, be it one that has ended and was not looked after yet."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_only_so_many_are_drawn_at_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "_drawn", pdf.MOST_PDFS)
    answer = ask(server, made(1))
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
