"""The predictions API in the hosted shape, asked by the real replicate client."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import replicate
from replicate.exceptions import ModelError, ReplicateError

import seekvl
from seekvl.serve import prediction_request
from seekvl.serve.hosted import finished, wait_seconds
from seekvl.serve.records import Prediction
from tests.serve.conftest import Running, Start
from tests.serve.predicting import (  # noqa: F401 - fixtures
    FULL,
    KEYS,
    SIGN,
    SIMPLE,
    WHERE,
    WORD,
    Receiver,
    client_of,
    endless,
    full,
    receiver,
    simple,
    until,
)

LONG = {**full(), "max_new_tokens": 4096, "temperature": 1}


@pytest.fixture
def client(server: Running) -> replicate.Client:
    return client_of(server)


@pytest.fixture
def slow(start: Start, receiver: Receiver) -> Iterator[tuple[Running, dict[str, Any]]]:  # noqa: F811
    """A server and inputs whose picture comes when `receiver.open` is set."""
    server = start(fetch_hosts=("127.0.0.1",))
    yield server, full(image1=f"{receiver.url}/sign.png")
    receiver.open.set()


def test_run_with_files_and_plain(client: replicate.Client, vlm: seekvl.VLM) -> None:
    expected = vlm.ask(SIGN, WHERE, repetition_penalty=1.1).text
    for picture in (SIGN, SIGN.open("rb"), full()["image1"]):
        output = client.run(FULL, input=full(WHERE, image1=picture))
        assert output["text_out"] == expected
        assert output["img_out"].read().startswith(b"\x89PNG")
    plain = client.run(FULL, input=full(WORD), use_file_output=False)
    assert plain == {"img_out": None, "text_out": "WALL"}
    as_data = {"image": SIGN.open("rb"), "prompt": WORD}
    assert client.run(SIMPLE, input=as_data, file_encoding_strategy="base64") == "WALL"
    assert client.run(SIMPLE, input=simple(), wait=False) == "WALL"


def test_run_of_a_version_asks_for_its_schema(client: replicate.Client) -> None:
    for model, given in ((FULL, full()), (SIMPLE, simple())):
        version = client.models.get(model).latest_version
        output = client.run(f"{model}:{version.id}", input=given)
        assert output == {FULL: {"img_out": None, "text_out": "WALL"}, SIMPLE: "WALL"}[model]


def test_versions(client: replicate.Client) -> None:
    found = client.models.get(SIMPLE)
    (version,) = found.versions.list()
    assert version.id == found.latest_version.id
    assert found.versions.get(version.id) == version
    schemas = version.openapi_schema["components"]["schemas"]
    assert list(schemas["Input"]["properties"])[:2] == ["image", "prompt"]
    assert version.id != client.models.get(FULL).latest_version.id
    with pytest.raises(ReplicateError) as caught:
        found.versions.get("0" * 64)
    assert caught.value.status == 404
    assert caught.value.title
    assert caught.value.detail


def test_models_and_how_often_they_ran(client: replicate.Client) -> None:
    assert [f"{each.owner}/{each.name}" for each in client.models.list()] == [FULL, SIMPLE]
    before = client.models.get(FULL).run_count
    client.run(FULL, input=full())
    assert client.models.get(FULL).run_count == before + 1
    with pytest.raises(ReplicateError) as caught:
        client.models.get("nobody/nothing")
    assert (caught.value.status, caught.value.title) == (404, "Not found")


def test_names_come_with_their_slash_encoded_too(server: Running) -> None:
    plain, encoded = (server.ask("GET", f"/v1/models/{name}") for name in (FULL, FULL.replace("/", "%2F")))
    assert plain.status_code == encoded.status_code == 200
    assert plain.json() == encoded.json()
    path = f"/v1/models/{SIMPLE.replace('/', '%2F')}/predictions"
    made = server.ask("POST", path, json={"input": simple()}, headers={"Prefer": "wait"})
    assert made.json()["output"] == "WALL"


def test_create_wait_and_get(client: replicate.Client, server: Running) -> None:
    version = client.models.get(FULL).latest_version
    for wanted in (version, version.id, f"{FULL}:{version.id}", FULL):
        prediction = client.predictions.create(version=wanted, input=full())
        assert prediction.status == "starting"
        assert (prediction.model, prediction.version) == (FULL, version.id)
        prediction.wait()
        assert prediction.status == "succeeded"
        assert prediction.output == {"img_out": None, "text_out": "WALL"}
        assert prediction.metrics["predict_time"] > 0
    again = client.predictions.get(prediction.id)
    assert again.urls["get"] == f"{server.url}/v1/predictions/{prediction.id}"
    raw = server.ask("GET", f"/v1/predictions/{prediction.id}").json()
    assert set(raw) == KEYS
    assert set(raw["urls"]) == {"get", "cancel", "stream", "web"}


def test_prefer_wait_holds_the_reply(client: replicate.Client, server: Running) -> None:
    reply = server.ask(
        "POST", f"/v1/models/{FULL}/predictions", json={"input": full()}, headers={"Prefer": "wait"}
    )
    assert reply.status_code == 201
    assert reply.json()["status"] == "succeeded"
    version = client.models.get(FULL).latest_version
    assert client.predictions.create(version=version, input=full(), wait=5).status == "succeeded"


def test_a_wait_that_runs_out_says_starting(
    slow: tuple[Running, dict[str, Any]],
    receiver: Receiver,  # noqa: F811
) -> None:
    server, given = slow
    began = time.monotonic()
    version = client_of(server).models.get(FULL).latest_version
    prediction = client_of(server).predictions.create(version=version, input=given, wait=1)
    assert time.monotonic() - began < 10
    assert prediction.status == "starting"
    assert prediction.output is None
    receiver.open.set()
    prediction.wait()
    assert prediction.status == "succeeded"


@pytest.mark.usefixtures("endless")
def test_a_wait_that_runs_out_while_it_answers_says_starting_too(client: replicate.Client) -> None:
    version = client.models.get(FULL).latest_version
    prediction = client.predictions.create(version=version, input=LONG, wait=1)
    assert (prediction.status, prediction.output) == ("starting", None)
    assert client.predictions.get(prediction.id).status == "processing"
    prediction.cancel()
    assert prediction.status == "canceled"
    assert prediction.output["text_out"]
    before = client.predictions.get(prediction.id)
    assert client.predictions.cancel(prediction.id).dict() == before.dict()  # it has ended, nothing changes


def test_cancel_before_the_picture_has_come(slow: tuple[Running, dict[str, Any]]) -> None:
    server, given = slow
    client = client_of(server)
    prediction = client.models.predictions.create(FULL, input=given)
    prediction.cancel()
    assert (prediction.status, prediction.output, prediction.error) == ("canceled", None, None)
    assert server.server.service.vlm.engine.metrics().running == 0


def test_cancel_after_a_time(slow: tuple[Running, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    server, given = slow
    monkeypatch.setattr(prediction_request, "LEAST_DURATION", 1)
    path, body = f"/v1/models/{FULL}/predictions", {"input": given}
    made = server.ask("POST", path, json=body, headers={"Cancel-After": "1s"}).json()
    found = f"/v1/predictions/{made['id']}"
    until(lambda: server.ask("GET", found).json()["status"] == "canceled")
    refused = server.ask("POST", path, json=body, headers={"Cancel-After": "soon"})
    assert refused.status_code == 422
    assert "Cancel-After: 'soon' is no duration" in refused.json()["detail"]


@pytest.mark.parametrize("prefer", ["wait=2", "wait"])
def test_hanging_up_on_a_held_reply_stops_it(slow: tuple[Running, dict[str, Any]], prefer: str) -> None:
    server, given = slow
    path, headers = f"{server.url}/v1/models/{FULL}/predictions", {"Prefer": prefer}
    with httpx.Client(trust_env=False, timeout=1.0) as http, pytest.raises(httpx.ReadTimeout):
        http.post(path, json={"input": given}, headers=headers)
    until(lambda: server.ask("GET", "/v1/predictions").json()["results"][0]["status"] == "canceled")


def test_what_fails_raises(client: replicate.Client) -> None:
    bad = full(image1="data:image/png;base64,AAAA")
    with pytest.raises(ModelError, match="no picture"):
        client.run(FULL, input=bad, wait=False)
    with pytest.raises(ReplicateError) as caught:
        client.run(FULL, input=bad)
    assert caught.value.status == 422
    assert caught.value.detail.startswith("- input.image1: ")


def test_wrong_inputs_are_all_named(client: replicate.Client) -> None:
    with pytest.raises(ReplicateError) as caught:
        client.run(FULL, input={"max_new_tokens": 5000, "temperature": "hot"})
    assert (caught.value.status, caught.value.title) == (422, "Input validation failed")
    lines = [line.partition(": ")[0] for line in caught.value.detail.split("\n")]
    assert lines == ["- input.image1", "- input.max_new_tokens", "- input.temperature"]


@pytest.mark.parametrize("version", [None, "0" * 64, "nobody/nothing:1"])
def test_an_unknown_version(server: Running, version: str | None) -> None:
    reply = server.ask("POST", "/v1/predictions", json={"version": version, "input": full()})
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith("- version: ")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/predictions/unknown"),
        ("POST", "/v1/predictions/unknown/cancel"),
        ("GET", "/v1/predictions/unknown/stream"),
        ("POST", "/v1/models/nobody/nothing/predictions"),
        ("GET", "/v1/models/nobody/nothing/versions"),
    ],
)
def test_what_is_unknown(server: Running, method: str, path: str) -> None:
    body = {"json": {"input": full()}} if path.endswith("predictions") else {}
    reply = server.ask(method, path, **body)
    assert reply.status_code == 404
    assert set(reply.json()) == {"type", "title", "detail", "status"}
    assert reply.json()["status"] == 404


def test_errors_of_the_door_are_in_the_same_form(start: Start) -> None:
    server = start(api_keys=("secret",))
    with pytest.raises(ReplicateError) as caught:
        client_of(server).predictions.list()
    assert (caught.value.status, caught.value.title) == (401, "Unauthenticated")
    known = replicate.Client(base_url=server.url, api_token="secret")
    assert known.run(SIMPLE, input=simple()) == "WALL"
    assert server.ask("GET", "/v1/webhooks/default/secret").status_code == 401


def test_pages_newest_first(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekvl.serve.store.PAGE", 2)
    client = client_of(start())
    made = [
        client.predictions.create(version=SIMPLE, input=simple(max_length_tokens=0), wait=True).id
        for _ in range(5)
    ]
    pages = [[each.id for each in page] for page in replicate.pagination.paginate(client.predictions.list)]
    assert pages == [made[:2:-1], made[2:0:-1], made[:1]]


def test_a_cursor_that_is_none(server: Running) -> None:
    assert server.ask("GET", "/v1/predictions?cursor=x").status_code == 422


def test_a_stream_joined_is_the_answer(client: replicate.Client) -> None:
    expected = client.run(FULL, input=full(WHERE), use_file_output=False)["text_out"]
    for model, given in ((FULL, full(WHERE)), (SIMPLE, simple(WHERE))):
        found = list(client.stream(model, input=given))
        assert "".join(map(str, found)) == expected
        assert found[-1].event.value == "done"
        assert found[-1].data == "{}"
        assert [each.id for each in found] == [str(number) for number in range(len(found))]


def test_a_late_reader_gets_it_from_the_start(client: replicate.Client, server: Running) -> None:
    prediction = client.predictions.create(version=FULL, input=full(WHERE), stream=True)
    prediction.wait()
    found = list(prediction.stream())
    assert "".join(map(str, found)) == prediction.output["text_out"]
    raw = server.ask("GET", f"/v1/predictions/{prediction.id}/stream").text
    assert "event: logs\nid: 0\ndata: picture 1 of 290x200 px was scaled" in raw


@pytest.mark.usefixtures("endless")
def test_a_reader_who_leaves_does_not_stop_it(client: replicate.Client) -> None:
    prediction = client.predictions.create(version=FULL, input=LONG)
    reading = prediction.stream()
    next(each for each in reading if each.event.value == "output")
    reading.close()
    time.sleep(0.3)
    prediction.reload()
    assert prediction.status == "processing"
    second = prediction.stream()  # of a run that is stopped while it is read
    first = next(second)
    prediction.cancel()
    *_, last = second
    assert first.id == "0"
    assert (last.event.value, json.loads(last.data)) == ("done", {"reason": "canceled"})


def test_the_stream_of_a_failure_raises(client: replicate.Client, server: Running) -> None:
    bad = full(image1="data:image/png;base64,AAAA")
    prediction = client.predictions.create(version=FULL, input=bad)
    with pytest.raises(RuntimeError, match="no picture"):
        list(prediction.stream())
    prediction.wait()
    raw = server.ask("GET", f"/v1/predictions/{prediction.id}/stream").text
    assert raw.endswith('event: done\nid: 1\ndata: {"reason": "error"}\n\n')


def test_lines_of_a_stream_survive_the_client() -> None:
    text = "a\n\nb\u2028c\x0bd"
    found = Prediction(id="x", model=SIMPLE, version="1", input={}, output=text, status="succeeded")

    async def read() -> bytes:
        return b"".join([event async for event in finished(found)])

    sent = asyncio.run(read())
    assert sent.startswith(b"event: output\nid: 0\ndata: a\ndata: \ndata: b\ndata: c\ndata: d\n\n")


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("", None),
        ("respond-async", None),
        ("wait", 60),
        ("wait=7", 7),
        ("Wait = 7", 7),
        ("wait=0", 1),
        ("wait=99", 60),
        ("wait=x", None),
        ("respond-async, wait=3", 3),
        ("await", None),
    ],
)
def test_how_long_a_reply_is_held(prefer: str, seconds: int | None) -> None:
    assert wait_seconds(prefer) == seconds


def test_expired_predictions_are_gone(start: Start) -> None:
    server = start(prediction_seconds=0.5)
    client = client_of(server)
    prediction = client.predictions.create(version=SIMPLE, input=simple(), wait=True)
    until(lambda: server.ask("GET", f"/v1/predictions/{prediction.id}").status_code == 404, seconds=10)
    assert client.predictions.list().results == []


def test_an_answer_that_looks_like_an_address_is_taken_as_one(client: replicate.Client) -> None:
    """The client makes a file of any text that begins so; it is accepted, and nothing is added."""
    transformed = replicate.helpers.transform_output({"text_out": "data: one, two"}, client)
    assert str(transformed["text_out"]) == "data: one, two"
