"""Three hundred requests that mean no good: each ends in its 4xx, and the next good request is answered.

They are made in tables: a name, how it is sent, and the statuses that are right; None is a connection that
the server closed without a word.
"""

import base64
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from seekvl.serve import guard, run
from tests.serve.conftest import MODEL, Running, chat_body

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
SIGN = (Path(__file__).parents[2] / "examples" / "sign.png").read_bytes()
Send = Callable[[Running, httpx.Client], int | None]


@dataclass(frozen=True)
class Hostile:
    name: str
    send: Send
    right: tuple[int | None, ...] = (400,)


def post(name: str, body: object, *right: int, path: str = CHAT) -> Hostile:
    """A body that is JSON; NaN and lone surrogates are written as they are."""
    text = json.dumps(body).encode()
    return posted(name, text, *right, path=path)


def posted(name: str, text: bytes, *right: int, path: str = CHAT, kind: str = "application/json") -> Hostile:
    def send(server: Running, client: httpx.Client) -> int:
        headers = {"content-type": kind}
        return client.post(server.url + path, content=text, headers=headers).status_code

    return Hostile(name, send, right or (400,))


def asked(name: str, method: str, path: str, *right: int, **headers: str) -> Hostile:
    """A request without a body, its path sent as it is written."""
    lines = [f"{key}: {value}" for key, value in ({"host": "localhost"} | headers).items()]
    text = "\r\n".join((f"{method} {path} HTTP/1.1", *lines, "connection: close", "", ""))
    return wire(name, text.encode("latin-1"), *right)


def wire(name: str, text: bytes, *right: int | None) -> Hostile:
    """Bytes as they go over the wire; the caller says no more, and waits."""

    def send(server: Running, client: httpx.Client) -> int | None:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(text)
            try:
                found = connection.recv(4096)
            except ConnectionResetError:
                return None
            return int(found.split()[1]) if found else None

    return Hostile(name, send, right or (400,))


def cut(name: str, text: bytes) -> Hostile:
    """Bytes after which the caller hangs up; nobody hears the answer."""

    def send(server: Running, client: httpx.Client) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(text)

    return Hostile(name, send, (None,))


def shown(url: object) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


ADDRESSES = (
    *(
        f"{scheme}://{host}{port}/x.png"
        for scheme in ("http", "https")
        for host in (
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "localhost",
            "localhost.",
            "[::1]",
            "[::ffff:7f00:1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "user@127.0.0.1",
            "1.1.1.1@127.0.0.1",
            "169.254.169.254",
            "10.0.0.1",
            "0",
            "①②⑦.⓪.⓪.①",
        )
        for port in ("", ":22")
    ),
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "FILE:///proc/self/environ",
    "/etc/passwd",
    "../../etc/passwd",
    "ftp://127.0.0.1/x.png",
    "gopher://127.0.0.1:25/_HELO",
    "dict://127.0.0.1:11211/stat",
    "jar:http://127.0.0.1!/",
    "javascript:alert(1)",
    "blob:http://127.0.0.1/x",
    "http://127.0.0.1:99999/",
    "http://[::1/",
    "http://127.0.0.1\r\nX: y/",
    "http://127.0.0.1\\@1.1.1.1/",
    "http:///",
    "http:",
    "://",
    "",
    "a" * 100_000,
    "http://" + "a" * 100_000,
    "\ud800",
)


def addresses() -> Iterator[Hostile]:
    for url in ADDRESSES:
        yield post(f"address {url[:40]!r}", shown(url))
    part = {"type": "input_image", "image_url": "http://169.254.169.254/"}
    body = {"model": MODEL, "input": [{"role": "user", "content": [part]}]}
    yield post("address in a response", body, path=RESPONSES)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    zeros = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")


def pictures() -> Iterator[Hostile]:
    for width, height in (
        (10_000, 10_000),
        (65_535, 65_535),
        (2**31 - 1, 1),
        (1, 2**31 - 1),
        (0, 0),
        (2**31, 5),
    ):
        yield post(f"bomb {width}x{height}", shown(data_url(png(width, height))))
    gif = (
        b"GIF89a"
        + struct.pack("<HH", 65_535, 65_535)
        + b"\0\0\0,"
        + struct.pack("<HHHH", 0, 0, 65_535, 65_535)
    )
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
    yield post("GIF bomb", shown(data_url(gif + b"\0\x02\x02\x44\x01\0;")))
    yield post("BMP bomb", shown(data_url(bmp)))
    for end in range(10, len(SIGN) - 100, len(SIGN) // 12):
        yield post(f"PNG cut at {end}", shown(data_url(SIGN[:end])))
    magics = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF\xff\xff\0\0WEBP")
    for seed in range(8):
        noise = random.Random(seed).randbytes(300)
        for magic in magics:
            yield post(f"noise {seed} after {magic[:4]!r}", shown(data_url(magic + noise)))
    for kind in (b"%PDF-1.7", b"<svg/>", b"%!PS", b"II*\0", b"\0\0\1\0", b"PK\3\4", b"\x7fELF", b""):
        yield post(f"no picture {kind!r}", shown(data_url(kind)))
    for url in (
        "data:",
        "data:,",
        "data:;base64,",
        "data:;base64,====",
        "data:;base64,\u00e9",
        "data:image/png;base64",
    ):
        yield post(f"data {url!r}", shown(url))
    many = [{"type": "image_url", "image_url": {"url": data_url(SIGN)}}] * 17
    yield post("17 pictures", {"model": MODEL, "messages": [{"role": "user", "content": many}]})


WRONG: dict[str, tuple[object, ...]] = {
    "model": (None, 5, [], {}, ""),
    "messages": (None, 5, "hi", {}, [], [None], [[]], [5], ["hi"], [{}], [{"role": 5}], [{"role": "user"}]),
    "temperature": ("hot", [], {}, True, -1, 2.01, float("nan"), float("inf"), "0.5", 10**400),
    "top_p": ("x", -0.1, 1.01, float("nan"), True),
    "top_k": (0, -1, 1.5, "5", True),
    "n": (0, 9, -1, 1.5, "1", True, 10**30),
    "max_tokens": (0, -1, 1.5, "5", True, []),
    "max_completion_tokens": (0, -5, "x"),
    "seed": (1.5, "x", 2**63, -(2**63) - 1, True, []),
    "stop": (5, [5], ["a"] * 5, {}, [None]),
    "logprobs": ("yes", 1, []),
    "top_logprobs": (-1, 21, "x", 3),
    "stream": ("yes", 1, []),
    "stream_options": (5, [], {"include_usage": "yes"}),
    "response_format": (5, "json", [], {}, {"type": "xml"}, {"type": "json_schema"}),
    "tools": (5, "x", {}, [{"type": "function"}]),
    "frequency_penalty": (-2.1, 2.1, "x", float("nan")),
    "presence_penalty": (-3, 3, []),
    "repetition_penalty": (-1, 2.1, "x"),
    "max_tiles": (0, -1, "x", 1.5),
    "grounding": (5, "x", {"strip_tags": "yes"}),
    "ignore_eos": ("yes", 1),
}
CONTENTS: tuple[object, ...] = (
    5,
    {},
    [5],
    [None],
    [[]],
    [{}],
    [{"type": "video"}],
    [{"type": "text"}],
    [{"type": "text", "text": 5}],
    [{"type": "text", "text": "\ud800"}],
    [{"type": "image_url"}],
    [{"type": "image_url", "image_url": 5}],
    [{"type": "image_url", "image_url": {}}],
    [{"type": "image_url", "image_url": {"url": 5}}],
    [{"type": "image_url", "image_url": {"url": None}}],
    [{"type": "image_url", "image_url": {"url": data_url(SIGN), "detail": "enormous"}}],
    [{"type": "image_url", "image_url": [data_url(SIGN)]}],
    None,
    "\udfff",
)


def wrong_types() -> Iterator[Hostile]:
    for field, values in WRONG.items():
        for value in values:
            yield post(f"{field} {str(value)[:20]}", chat_body(**{field: value}), 400, 404)
    for content in CONTENTS:
        yield post(f"content {str(content)[:60]}", chat_body(messages=[{"role": "user", "content": content}]))
    for name in ("input", "instructions", "max_output_tokens", "text", "previous_response_id"):
        for value in (5.5, [5], {"format": 5}):
            body = {"model": MODEL, "input": "hi", name: value}
            yield post(f"response {name} {value}", body, path=RESPONSES)


def much() -> Iterator[Hostile]:
    for mark in ("<image>", "<image_placeholder>", "<|User|>", "<|ref|>", "<｜end▁of▁sentence｜>"):
        body = chat_body(messages=[{"role": "user", "content": mark * 10_000}])
        yield post(f"10,000 times {mark}", body)
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    yield post(
        "10,000 pictures", {"model": MODEL, "messages": [{"role": "user", "content": [part] * 10_000}]}
    )
    yield post("100,000 turns", chat_body(messages=[5] * 100_000))
    yield post("a long text", chat_body(messages=[{"role": "user", "content": "a " * 500_000}]))
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}}
    for name, schema in (
        ("deep schema", deep),
        ("large schema", {"enum": ["x" * 80_000]}),
        ("schema elsewhere", {"$ref": "http://127.0.0.1:22/schema.json"}),
        ("schema in a file", {"$ref": "file:///etc/passwd"}),
        ("no schema", {"type": "nothing"}),
        ("broken pattern", {"type": "string", "pattern": "("}),
    ):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield post(name, chat_body(response_format=form))
    for path in (f"/v1/models/{'a' * 5000}", f"/v1/models/{'a/' * 2000}", "/v1/models/%00", "/v1/models/%ff"):
        yield asked(f"model {path[:30]}", "GET", path, 404)


def paths() -> Iterator[Hostile]:
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/page/../../../etc/passwd",
        "/page/..%2f..%2f..%2fetc%2fpasswd",
        "/page/%2e%2e/%2e%2e/settings.py",
        "/page/....//....//etc/passwd",
        "/page//etc/passwd",
        "/page/%00",
        "/page/" + "a" * 3000,
        "/v1/models/../../../etc/passwd",
        "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
        "/etc/passwd",
        "//etc/passwd",
        "/v1//models/x/y",
        "/.git/config",
        "/.env",
        "/shutdown",
        "/v1/shutdown",
        "/docs",
        "/redoc",
        "/debug",
        "/admin",
        "/server-status",
        "/v1/chat/completions/../../nowhere",
        "/v1/engines",
    ):
        yield asked(f"path {path[:40]}", "GET", path, 404)
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW"):
        yield asked(f"{method} chat", method, CHAT, 405)


def hosts() -> Iterator[Hostile]:
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example:8000",
        "0.0.0.0",
        "169.254.169.254",
        "[::]",
        "localhost@evil.example",
        "localhost, evil.example",
        "localhost evil.example",
        "2130706433",
        "",
    ):
        yield asked(f"host {host!r}", "GET", "/v1/models", 403, 400, host=host)


def heads() -> Iterator[Hostile]:
    start = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
    for name, lines in {
        "two hosts": b"host: evil.example\r\n\r\n",
        "two lengths": b"content-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        "a negative length": b"content-length: -1\r\n\r\n",
        "a length in words": b"content-length: many\r\n\r\n",
        "a length with a sign": b"content-length: +5\r\n\r\n{}{}{",
        "a length of twenty digits": b"content-length: 99999999999999999999\r\n\r\n",
        "a length of a gigabyte": b"content-length: 1073741824\r\n\r\n",
        "a chunk without size": b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        "a chunk of endless size": b"transfer-encoding: chunked\r\n\r\nffffffffffffffffffffffff\r\n",
        "an unknown coding": b"transfer-encoding: gzip\r\n\r\n",
        "a head without colon": b"nonsense\r\n\r\n",
        "a head with a zero": b"x: a\0b\r\n\r\n",
        "a head with a blank": b"x y: z\r\n\r\n",
        "a head of 100 kB": b"x: " + b"a" * 100_000 + b"\r\n\r\n",
        "ten thousand heads": b"x: y\r\n" * 20_000 + b"\r\n",
    }.items():
        yield wire(name, start + lines, 400, 413, 415, None)
    for name, text in {
        "garbage": b"\x00\x01\x02\x03\r\n\r\n",
        "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
        "HTTP/9": b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n",
        "HTTP/2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "no version": b"GET /\r\n\r\n",
        "a path with blanks": b"GET /a b HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "another server's path": b"GET http://evil.example/ HTTP/1.1\r\nhost: evil.example\r\n\r\n",
        "bytes in a path": b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n",
    }.items():
        yield wire(name, text, 400, 403, 404, None)
    for number, end in enumerate(range(1, len(start), len(start) // 8)):
        yield cut(f"a head cut {number}", start[:end])
    body = json.dumps(chat_body()).encode()
    whole = start + b"content-length: %d\r\n\r\n" % len(body)
    for end in range(0, len(body), len(body) // 8):
        yield cut(f"a body cut at {end}", whole + body[:end])


def bodies() -> Iterator[Hostile]:
    good = json.dumps(chat_body()).encode()
    for end in range(1, len(good), len(good) // 12):
        yield posted(f"JSON cut at {end}", good[:end])
    for name, text in {
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "a number": b"1",
        "a text": b'"hi"',
        "NaN": b"NaN",
        "invalid UTF-8": b'{"model": "\xff\xfe"}',
        "overlong UTF-8": b'{"model": "\xc0\xaf"}',
        "UTF-16": good.decode().encode("utf-16-le")[:-1],
        "100,000 brackets": b"[" * 100_000,
        "100,000 nested lists": b"[" * 100_000 + b"]" * 100_000,
        "50,000 nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "a number of 10,000 digits": b'{"model": ' + b"1" * 10_000 + b"}",
        "an exponent": b'{"model": "x", "messages": 1e999999}',
        "two values": good + good,
        "a comment": b"/* hi */" + good,
        "single quotes": good.replace(b'"', b"'"),
        "a trailing comma": good[:-1] + b",}",
        "zeros": b"\0" * 1000,
        "a lone surrogate": b'{"model": "\\ud800", "messages": []}',
    }.items():
        yield posted(f"body: {name}", text, 400)
    for kind in (
        "text/plain",
        "text/html",
        "application/xml",
        "application/x-www-form-urlencoded",
        "x" * 1000,
    ):
        yield posted(f"type {kind[:20]}", good, 415, kind=kind)


def hostile() -> list[Hostile]:
    tables = (addresses, pictures, wrong_types, much, paths, hosts, heads, bodies)
    return [request for table in tables for request in table()]


def test_three_hundred_hostile_requests(server: Running) -> None:
    table = hostile()
    assert len(table) >= 300
    wrong: list[str] = []
    with httpx.Client(trust_env=False, timeout=60) as client:
        for request in table:
            found = request.send(server, client)
            if found not in request.right:
                wrong.append(f"{request.name}: {found} instead of {request.right}")
            good = client.post(server.url + CHAT, json=chat_body(max_tokens=1))
            if good.status_code != 200:
                wrong.append(f"{request.name}: the next good request got {good.status_code}")
    assert not wrong, "\n".join(wrong)
    assert server.engine.metrics().running == 0


def test_callers_who_never_finish_are_hung_up_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.4)
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.4)
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
    starts = (
        b"",
        b"P",
        head[:30],
        head,
        head + b"content-length: 100\r\n\r\n",
        head + b"content-length: 9\r\n\r\n{",
    )
    slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(10 * len(starts))]
    try:
        for connection, start in zip(slow, starts * 10, strict=True):
            connection.sendall(start)
        assert server.chat(max_tokens=1).status_code == 200  # they hold nobody up
        answers = [connection.recv(100) for connection in slow]
    finally:
        for connection in slow:
            connection.close()
    assert {answer[9:12] for answer in answers} == {b"", b"408"}
