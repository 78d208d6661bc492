"""Fetching what strangers name: every spelling of an address that is not public, and servers that lie."""

import asyncio
import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpcore2 as httpcore
import pytest

from seekvl.serve.fetch import FetchError, Rules, TooLargeError, Web, is_public

PICTURE = (Path(__file__).parents[2] / "examples" / "sign.png").read_bytes()
PRIVATE = (
    "127.0.0.1",
    "127.1.2.3",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:7f00:1",
    "::ffff:8.8.8.8",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fec0::1",
    "ff02::1",
)


def rules(*allowed: str, most: int = 1_000_000, seconds: float = 5.0) -> Rules:
    return Rules(allowed=allowed, max_bytes=most, seconds=seconds)


def get(url: str, *allowed: str, **limits: Any) -> bytes:
    return asyncio.run(Web(rules(*allowed, **limits)).get(url))


@pytest.mark.parametrize("address", PRIVATE)
def test_no_address_inside_is_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "193.99.144.80", "2606:4700::1111", "2a00:1450::1"]
)
def test_addresses_of_the_open_internet_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.fixture
def nobody_connects(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let no connection begin; return the addresses that were tried."""
    tried: list[str] = []

    async def connect(self: object, host: str, port: int, **_: Any) -> Any:
        tried.append(host)
        raise httpcore.ConnectError("not in a test")

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    return tried


def names(monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> list[str]:
    """Resolve these names only; return those that were asked for."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        asked.append(name)
        if name in known:
            return [found for address in known[name] for found in real(address, port, *rest, **more)]
        if name.rstrip(".").endswith("example"):
            raise socket.gaierror("unknown")
        return real(host, port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://localhost/",
        "http://localhost./",
        "http://LOCALHOST:8000/",
        "http://[::1]/",
        "http://[::ffff:7f00:1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1%25lo]/",
        "http://user@127.0.0.1/",
        "http://user:password@1.1.1.1/",
        "http://1.1.1.1@127.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://0/",
        "http://0.0.0.0:8000/",
        "http://10.0.0.1/",
        "http://192.168.0.1:80/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://①②⑦.⓪.⓪.①/",
        "http://127。0。0。1/",
        "http://mixed.example/",
        "http://inside.example/",
        "http://unknown.example/",
        "https://inside.example/",
        "http:///x.png",
        "http://",
        "http:127.0.0.1",
        "//127.0.0.1/",
        "ftp://inside.example/",
        "gopher://inside.example/",
        "file:///etc/hostname",
        "http://inside.example:99999/",
        "http://inside.example:port/",
        "http://[::1/",
        "http://ex ample/",
        "http://inside.example/\r\nHost: other",
        "http://inside.example\\@1.1.1.1/",
        "http://" + "a" * 5000 + "/",
        "http://" + "a" * 300 + ".example/",
        "http://" + "a." * 500 + "example/",
    ],
)
def test_nothing_inside_is_asked(
    url: str, nobody_connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, {"inside.example": ["127.0.0.1"], "mixed.example": ["1.1.1.1", "10.0.0.1"]})
    with pytest.raises(FetchError) as caught:
        get(url)
    assert nobody_connects == []
    assert "127.0.0.1" not in str(caught.value)  # the error tells nothing of this network


def test_the_connection_goes_to_the_address_that_was_checked(
    nobody_connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = names(monkeypatch, {"outside.example": ["1.1.1.1"]})
    with pytest.raises(FetchError):
        get("http://outside.example/")
    assert asked == ["outside.example"]  # once: a second answer might be another
    assert nobody_connects == ["1.1.1.1"]


def test_no_proxy_of_the_environment_is_used(
    nobody_connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(FetchError):
        get("http://1.1.1.1/")
    assert nobody_connects == ["1.1.1.1"]


def test_with_a_list_nothing_else_is_fetched(
    nobody_connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = ["10.0.0.1"]
    names(monkeypatch, {"listed.example": inside, "listed.example.": inside, "other.example": ["1.1.1.1"]})
    for url in ("http://other.example/", "http://1.1.1.1/", "http://not-listed.example/"):
        with pytest.raises(FetchError, match=r"not one that may be fetched|no address"):
            get(url, "listed.example", "10.1.0.0/16")
    assert nobody_connects == []
    for url in ("http://listed.example/", "http://LISTED.example./", "http://10.1.2.3/"):
        with pytest.raises(FetchError, match="cannot be reached"):
            get(url, "listed.example", "10.1.0.0/16")
    assert len(nobody_connects) >= 2


class Shop(http.server.BaseHTTPRequestHandler):
    """A server with all the habits that one can have."""

    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        getattr(self, kind)(rest)

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: bytes, *, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def good(self, _: str) -> None:
        self.send(PICTURE, content_length=len(PICTURE))

    def unsized(self, _: str) -> None:
        self.send(PICTURE)

    def cut(self, _: str) -> None:
        self.send(PICTURE[:100], content_length=len(PICTURE))

    def longer(self, _: str) -> None:
        self.send(PICTURE, content_length=10)

    def endless(self, _: str) -> None:
        self.send(b"")
        for _ in range(2000):
            self.wfile.write(b"x" * 10_000)

    def slow(self, _: str) -> None:
        self.send(b"", content_length=100)
        for _ in range(50):  # each read is in time, all of them are not
            self.wfile.write(b"x")
            time.sleep(0.1)

    def silent(self, _: str) -> None:
        time.sleep(3)

    def missing(self, _: str) -> None:
        self.send(b"", status=404)

    def to(self, rest: str) -> None:
        self.send(b"", status=302, location=rest)

    def hops(self, left: str) -> None:
        after = f"/hops/{int(left) - 1}" if int(left) else "/good"
        self.send(b"", status=307, location=after)

    def nowhere(self, _: str) -> None:
        self.send(b"", status=302)


@pytest.fixture(scope="module")
def shop() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["good", "unsized", "hops/2", "to//good"])
def test_what_may_be_fetched_is(shop: str, path: str) -> None:
    assert get(f"{shop}/{path}", "127.0.0.1") == PICTURE


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("hops/3", "more than 3 times"),
        ("nowhere", "does not say where"),
        ("missing", "answered 404"),
        ("cut", "breaks off"),
        ("to/https://127.0.0.1/", "another scheme"),
        ("to/file:///etc/hostname", "another scheme"),
        ("to/ftp://127.0.0.1/", "another scheme"),
        ("to/http://127.0.0.2/", "not one that may be fetched"),
        ("to/http://169.254.169.254/", "not one that may be fetched"),
        ("to/http://user@127.0.0.1/", "user name"),
    ],
)
def test_what_leads_astray_is_refused(shop: str, path: str, why: str) -> None:
    with pytest.raises(FetchError, match=why):
        get(f"{shop}/{path}", "127.0.0.1")


def test_a_length_that_lies_gives_no_more_than_it_says(shop: str) -> None:
    assert get(f"{shop}/longer", "127.0.0.1") == PICTURE[:10]


def test_too_much_is_left_unread(shop: str) -> None:
    began = time.monotonic()
    with pytest.raises(TooLargeError, match="more than 50,000 bytes"):
        get(f"{shop}/endless", "127.0.0.1", most=50_000)
    with pytest.raises(TooLargeError):
        get(f"{shop}/good", "127.0.0.1", most=len(PICTURE) - 1)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("path", ["slow", "silent"])
def test_time_is_counted_in_all(shop: str, path: str) -> None:
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"no complete answer within 0\.5 s"):
        get(f"{shop}/{path}", "127.0.0.1", seconds=0.5)
    assert time.monotonic() - began < 2.5
