"""Uploaded files: both clients' forms, expiry, bounds, and inputs that name them."""

import datetime
import hashlib
import io
from pathlib import Path

import openai
import pytest
import replicate
from replicate.exceptions import ReplicateError

from tests.serve.conftest import Running, Start
from tests.serve.predicting import FULL, SIGN, SIMPLE, client_of, full, simple, until


@pytest.fixture
def client(server: Running) -> replicate.Client:
    return client_of(server)


def test_the_life_of_a_file(client: replicate.Client, server: Running) -> None:
    made = client.files.create(SIGN, metadata={"of": "a test"})
    data = SIGN.read_bytes()
    assert (made.name, made.content_type, made.size) == ("sign.png", "image/png", len(data))
    assert made.checksums == {"sha256": hashlib.sha256(data).hexdigest()}
    assert made.metadata == {"of": "a test"}
    assert made.urls == {"get": f"{server.url}/v1/files/{made.id}"}
    created, expires = map(datetime.datetime.fromisoformat, (made.created_at, made.expires_at))
    assert expires - created == datetime.timedelta(hours=24)
    assert client.files.get(made.id) == made
    assert made in client.files.list()
    assert server.ask("GET", f"/v1/files/{made.id}/content").content == data
    assert client.files.delete(made.id) is True
    for path in (f"/v1/files/{made.id}", f"/v1/files/{made.id}/content"):
        assert server.ask("GET", path).status_code == 404
    with pytest.raises(ReplicateError) as caught:
        client.files.delete(made.id)
    assert caught.value.status == 404
    assert made.id not in [each.id for each in client.files.list()]


def test_the_form_of_the_openai_client(server: Running) -> None:
    client = openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0)
    made = client.files.create(file=SIGN.open("rb"), purpose="vision")
    assert (made.object, made.filename, made.purpose) == ("file", "sign.png", "vision")
    assert made.bytes == SIGN.stat().st_size
    assert made.expires_at - made.created_at == 86_400
    assert client.files.retrieve(made.id) == made
    assert made.id in [each.id for each in client.files.list()]
    assert client.files.content(made.id).read() == SIGN.read_bytes()
    client.files.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_inputs_name_files_of_this_server_by_any_of_its_names(client: replicate.Client) -> None:
    made = client.files.create(io.BytesIO(SIGN.read_bytes()))
    assert (made.name, made.content_type) == ("file", "application/octet-stream")  # told by its content
    path = f"/v1/files/{made.id}"
    for url in (made.urls["get"], f"http://other.example:1{path}", path, f"{path}/content"):
        assert client.run(SIMPLE, input=simple(image=url)) == "WALL"


def test_chat_reads_files_too(server: Running, client: replicate.Client) -> None:
    made = client.files.create(SIGN)
    parts = [
        {"type": "image_url", "image_url": {"url": made.urls["get"]}},
        {"type": "text", "text": "What does the sign say?"},
    ]
    body = {"model": FULL, "messages": [{"role": "user", "content": parts}], "temperature": 0}
    found = server.ask("POST", "/v1/chat/completions", json=body).json()
    assert found["choices"][0]["message"]["content"] == "WALL"


def test_a_file_that_is_gone_is_not_fetched(server: Running, client: replicate.Client) -> None:
    made = client.files.create(SIGN)
    client.files.delete(made.id)
    reply = server.ask("POST", "/predictions", json={"input": full(image1=made.urls["get"])})
    assert reply.status_code == 422
    assert "not kept here" in reply.json()["detail"][0]["msg"]


def test_files_expire(start: Start) -> None:
    server = start(file_seconds=0.5)
    made = client_of(server).files.create(SIGN)
    until(lambda: server.ask("GET", f"/v1/files/{made.id}").status_code == 404, seconds=10)
    assert client_of(server).files.list() == []


def test_all_files_together_are_bounded(start: Start) -> None:
    size = SIGN.stat().st_size
    client = client_of(start(max_file_bytes=2 * size))
    first = client.files.create(SIGN)
    client.files.create(SIGN)
    with pytest.raises(ReplicateError) as caught:
        client.files.create(SIGN)
    assert caught.value.status == 413
    client.files.delete(first.id)
    client.files.create(SIGN)


def test_a_file_that_is_too_large(start: Start, tmp_path: Path) -> None:
    server = start(max_body=1000)
    (tmp_path / "x").write_bytes(b"x" * 2000)
    with pytest.raises(ReplicateError) as caught:
        client_of(server).files.create(tmp_path / "x")
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"files": {"other": b"x"}}, 422),
        ({"data": {"content": "words"}}, 422),
        ({"json": {}}, 422),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"content": b"--x\r\nbroken", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 422),
        ({"files": {"content": b"x"}, "data": {"metadata": "{"}}, 422),
        ({"files": {"content": b"x"}, "data": {"metadata": "[1]"}}, 422),
        ({"files": {"content": b"x"}, "data": {"metadata": '{"a": NaN}'}}, 422),
        ({"files": [("content", b"x"), ("content", b"y")]}, 400),
    ],
)
def test_forms_that_hold_no_file(server: Running, form: dict[str, object], status: int) -> None:
    reply = server.ask("POST", "/v1/files", **form)
    assert reply.status_code == status
    assert set(reply.json()) == {"type", "title", "detail", "status"}


def test_a_field_for_each_note_and_for_name_and_type(server: Running) -> None:
    form = {
        "filename": "a sign.png",
        "type": "image/png",
        "metadata[of]": "a sign",
        "metadata": '{"by": "me"}',
    }
    found = server.ask("POST", "/v1/files", files={"content": ("upload", b"abc")}, data=form).json()
    assert (found["name"], found["content_type"]) == ("a sign.png", "image/png")
    assert found["metadata"] == {"of": "a sign", "by": "me"}


def test_odd_names_are_harmless(server: Running) -> None:
    name = 'a/../"<script>\n图.html'
    made = server.ask("POST", "/v1/files", files={"content": (name, b"<b>", "text/html")}).json()
    reply = server.ask("GET", f"/v1/files/{made['id']}/content")
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_foreign_pages_cannot_upload(server: Running, start: Start) -> None:
    form = {"files": {"content": b"x"}}
    own = {"Origin": server.url}
    assert server.ask("POST", "/v1/files", headers=own, **form).status_code == 201
    foreign = {"Origin": "https://example.org"}
    assert server.ask("POST", "/v1/files", headers=foreign, **form).status_code == 403
    friend = start(cors_origins=("https://example.org",))
    assert friend.ask("POST", "/v1/files", headers=foreign, **form).status_code == 201
