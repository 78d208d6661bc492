"""The door: names, keys, types and sizes of what comes in, asked with raw sockets where clients would not."""

import json
import logging
import re
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from seekvl.serve import guard
from tests.serve.conftest import Running, Start, chat_body, wait_until

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def raw(server: Running, request: bytes, *, seconds: float = 30.0) -> bytes:
    """Send bytes and return all that comes back until the server hangs up."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def head(server: Running, *lines: str, path: str = CHAT) -> bytes:
    """The head of a POST."""
    host = server.url.removeprefix("http://")
    return "\r\n".join((f"POST {path} HTTP/1.1", f"host: {host}", *lines, "", "")).encode()


@pytest.fixture(scope="module")
def locked(vlm: object) -> Iterator[Running]:
    from tests.serve.conftest import running

    with running(vlm, api_keys=("first", "second"), cors_origins=("https://app.example",)) as started:
        yield started


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/seekvl/seekvl-nano"),
        ("POST", CHAT),
        ("GET", "/v1/openapi.json"),
        ("GET", "/nowhere"),
        ("OPTIONS", CHAT),
        ("HEAD", "/v1/models"),
    ],
)
@pytest.mark.parametrize(
    "key", [None, "Bearer third", "Basic first", "Bearer", "Bearer first second", "first"]
)
def test_no_route_opens_without_a_key(locked: Running, method: str, path: str, key: str | None) -> None:
    found = locked.ask(method, path, headers={"authorization": key} if key else {})
    assert found.status_code == 401
    assert found.headers["www-authenticate"] == "Bearer"
    assert found.headers["x-request-id"].startswith("req_")


def test_no_route_was_forgotten(locked: Running) -> None:
    paths = locked.server.config.app.openapi()["paths"]
    assert CHAT in paths
    for method, path in ((method.upper(), path) for path, methods in paths.items() for method in methods):
        if path in guard.OPEN or path == "/metrics" or path.startswith(guard.PAGE):
            continue
        asked = re.sub(r"{[^}]*}", "x", path)
        found = locked.ask(method, asked, headers=JSON, content=b"{}" if method == "POST" else b"")
        assert found.status_code == 401, (method, path)


@pytest.mark.parametrize("key", ["Bearer first", "Token second", "bearer  second"])
def test_every_key_opens_in_either_spelling(locked: Running, key: str) -> None:
    assert locked.ask("GET", "/v1/models", headers={"authorization": key}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/health-check", "/metrics"])
def test_health_needs_no_key(locked: Running, path: str) -> None:
    assert locked.ask("GET", path).status_code == 200


def test_figures_can_be_locked(start: Start) -> None:
    assert start(api_keys=("k",), open_metrics=False).ask("GET", "/metrics").status_code == 401


def test_the_client_raises_its_own_class_for_a_wrong_key(locked: Running) -> None:
    client = openai.OpenAI(base_url=locked.v1, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"


def test_only_listed_origins_may_ask(locked: Running) -> None:
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    good = locked.ask("OPTIONS", CHAT, headers={"origin": "https://app.example", **asking})
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in good.headers
    bad = locked.ask("OPTIONS", CHAT, headers={"origin": "https://evil.example", **asking})
    assert bad.status_code == 400
    assert "access-control-allow-origin" not in bad.headers
    refused = locked.ask("GET", "/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"  # the page can read why


def test_without_a_list_no_origin_may_ask(server: Running) -> None:
    found = server.ask("GET", "/v1/models", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in found.headers
    asking = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert server.ask("OPTIONS", CHAT, headers=asking).status_code == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("localhost.", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:80@evil.example", 403),
        ("0.0.0.0", 403),
        ("", 403),
    ],
)
def test_a_rebound_name_is_refused(server: Running, host: str, status: int) -> None:
    found = raw(server, f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert int(found.split()[1]) == status


def test_other_names_can_be_allowed(start: Start) -> None:
    server = start(allowed_hosts=("vision.example",))
    assert server.ask("GET", "/v1/models", headers={"host": "vision.example:8000"}).status_code == 200
    assert server.ask("GET", "/v1/models", headers={"host": "other.example"}).status_code == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_only_json_is_read(server: Running, kind: str) -> None:
    found = server.ask("POST", CHAT, content=json.dumps(chat_body()), headers={"content-type": kind})
    assert found.status_code == 415
    assert found.json()["error"]["code"] == "unsupported_media_type"


def test_json_may_say_its_letters(server: Running) -> None:
    found = server.ask(
        "POST",
        CHAT,
        content=json.dumps(chat_body(max_tokens=1)),
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert found.status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"model": "\xff"}', b"1" * 5000, b""]
)
def test_what_is_no_json_is_told(server: Running, body: bytes) -> None:
    found = server.ask("POST", CHAT, content=body, headers=JSON)
    assert found.status_code == 400
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_beyond_the_limit_is_refused_by_its_length(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LINGER_SECONDS", 1.0)
    server = start(max_body=100_000)
    client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
    messages = [{"role": "user", "content": "a" * 3_000_000}]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="m", messages=messages)
    assert caught.value.status_code == 413
    assert caught.value.body["code"] == "request_too_large"
    chunked = httpx.post(
        server.url + CHAT, content=(b"a" * 50_000 for _ in range(40)), headers=JSON, trust_env=False
    )
    assert chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "request_too_large"
    huge = raw(server, head(server, "content-type: application/json", "content-length: 99999999999999999999"))
    assert b" 4" in huge.split(b"\r\n")[0]


def test_a_body_that_never_ends_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    found = raw(server, head(server, "content-type: application/json", "content-length: 100") + b'{"model"')
    assert found.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "lines", [("content-length: 5", "content-length: 6"), ("content-length: -1",), ("a" * 70_000,)]
)
def test_heads_that_make_no_sense_are_refused(server: Running, lines: tuple[str, ...]) -> None:
    assert raw(server, head(server, "content-type: application/json", *lines)).startswith(b"HTTP/1.1 400")


def test_connections_are_kept(server: Running) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for path in ("/health", "/v1/models", "/nowhere"):
            assert "connection" not in client.get(path).headers
        assert "connection" not in client.post(CHAT, json={}).headers


def test_a_head_is_told_what_a_get_would_be(server: Running) -> None:
    found = server.ask("HEAD", "/v1/models")
    assert (found.status_code, found.content) == (200, b"")
    assert int(found.headers["content-length"]) == len(server.ask("GET", "/v1/models").content)
    assert server.ask("HEAD", CHAT).status_code == 405
    assert server.ask("OPTIONS", "/v1/models").status_code == 405


def test_a_fault_of_ours_has_an_id_and_is_not_tried_again(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(server.server.service, "prepare", broken)
        client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=5)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**chat_body())
    assert caught.value.response.headers["x-request-id"] in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "secret" not in caught.value.message
    assert "secret detail" in caplog.text
    assert server.chat(max_tokens=1).status_code == 200


def test_one_line_a_request_and_no_word_of_it(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="seekvl.access"):
        found = server.chat(messages=[{"role": "user", "content": "my secret"}], max_tokens=2)
        name = found.headers["x-request-id"]

        def lines() -> list[str]:
            told = [record.getMessage() for record in caplog.records if record.name == "seekvl.access"]
            return [line for line in told if line.startswith(f"{name} ")]

        wait_until(lambda: bool(lines()))  # it is written when the answer is on its way
    (line,) = lines()
    assert line.startswith(f"{name} POST {CHAT} 200 ")
    assert f"{found.json()['usage']['prompt_tokens']} + 2 tokens in " in line
    assert "secret" not in line
