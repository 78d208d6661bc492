"""The predictions API in Cog's style, asked by a plain HTTP client."""

import base64
import concurrent.futures
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import seekvl
from seekvl.processing.draw import draw_boxes
from tests.serve.conftest import Running, Start
from tests.serve.predicting import (  # noqa: F401 - fixtures
    FULL,
    KEYS,
    SIGN,
    WHERE,
    WORD,
    Receiver,
    data_url,
    endless,
    full,
    receiver,
    simple,
    until,
)

LONG = {**full(), "max_new_tokens": 4096, "temperature": 1}


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        yield client


def client_of(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=60)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream: name and data."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        assert not any(line.startswith("id:") for line in lines)
        if lines:
            name, data = lines
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_discovery(http: httpx.Client) -> None:
    found = http.get("/").json()
    assert set(found) - {"routes"} == {
        "docs_url",
        "openapi_url",
        "healthcheck_url",
        "predictions_url",
        "predictions_idempotent_url",
        "predictions_cancel_url",
    }
    assert http.get(found["openapi_url"]).status_code == 200
    assert http.get(found["healthcheck_url"]).json()["status"] in ("READY", "BUSY")


def test_the_document_describes_the_served_model(server: Running, start: Start) -> None:
    properties = server.ask("GET", "/openapi.json").json()["components"]["schemas"]["Input"]["properties"]
    assert next(iter(properties)) == "text"
    other = start(cog_inputs="simple")
    schemas = other.ask("GET", "/openapi.json").json()["components"]["schemas"]
    assert list(schemas["Input"]["properties"])[:2] == ["image", "prompt"]
    assert schemas["Output"]["type"] == "string"
    found = other.ask("POST", "/predictions", json={"input": simple()}).json()
    assert found["output"] == "WALL"


def test_a_prediction_waits_and_has_all_keys(http: httpx.Client, vlm: seekvl.VLM) -> None:
    given = full(WHERE, seed=3)
    reply = http.post("/predictions", json={"input": {**given, "unknown": 1}})
    assert reply.status_code == 200
    found = reply.json()
    assert set(found) == KEYS
    assert found["input"] == given
    assert (found["status"], found["error"]) == ("succeeded", None)
    expected = vlm.ask(SIGN, WHERE, repetition_penalty=1.1)
    assert found["output"]["text_out"] == expected.text
    assert found["metrics"]["predict_time"] > 0
    assert found["metrics"]["output_token_count"] == expected.usage.completion_tokens
    assert found["metrics"]["boxes"][0]["box"] == list(expected.boxes[0].corners)
    assert found["created_at"] <= found["started_at"] <= found["completed_at"]
    assert http.get(f"/v1/predictions/{found['id']}").json() == found


def test_the_drawn_picture_is_a_png_of_the_boxes(http: httpx.Client, vlm: seekvl.VLM) -> None:
    found = http.post("/predictions", json={"input": full(WHERE)}).json()["output"]
    head, _, body = found["img_out"].partition(",")
    assert head == "data:image/png;base64"
    drawn = Image.open(io.BytesIO(base64.b64decode(body)))
    assert drawn.format == "PNG"
    with Image.open(SIGN) as picture:
        expected = draw_boxes(picture, vlm.ask(SIGN, WHERE, repetition_penalty=1.1).boxes)
        assert drawn.size == picture.size
    assert drawn.convert("RGB").tobytes() == expected.tobytes()


def test_boxes_are_drawn_on_the_upright_picture(http: httpx.Client, tmp_path: Path) -> None:
    with Image.open(SIGN) as picture:
        exif = Image.Exif()
        exif[0x0112] = 8  # lies on its side: turned a quarter on display
        picture.convert("RGB").transpose(Image.Transpose.ROTATE_270).save(tmp_path / "x.png", exif=exif)
        given = full(WHERE, image1=data_url(tmp_path / "x.png"))
        found = http.post("/predictions", json={"input": given}).json()["output"]
        drawn = Image.open(io.BytesIO(base64.b64decode(found["img_out"].partition(",")[2])))
        assert drawn.size == picture.size


def test_without_boxes_there_is_no_picture(http: httpx.Client) -> None:
    found = http.post("/predictions", json={"input": full(WORD)}).json()
    assert found["output"] == {"img_out": None, "text_out": "WALL"}


def test_a_large_picture_is_drawn_smaller(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seekvl.serve.prediction_output.MOST_PIXELS", 10_000)
    found = http.post("/predictions", json={"input": full(WHERE)}).json()
    drawn = Image.open(io.BytesIO(base64.b64decode(found["output"]["img_out"].partition(",")[2])))
    assert drawn.width * drawn.height <= 10_000
    assert "the drawn picture was scaled from 290x200" in found["logs"]


def test_the_drawn_picture_can_be_uploaded(start: Start, receiver: Receiver) -> None:  # noqa: F811
    server = start(upload_url=f"{receiver.url}/drawn/")
    receiver.headers["Location"] = "https://example.org/kept.png?signed=1"
    found = server.ask("POST", "/predictions", json={"input": full(WHERE)}).json()
    assert found["output"]["img_out"] == "https://example.org/kept.png"
    (call,) = receiver.calls
    assert (call.method, call.path) == ("PUT", f"/drawn/{found['id']}.png")
    assert call.headers["content-type"] == "image/png"
    assert call.body.startswith(b"\x89PNG")
    receiver.statuses.append(500)
    failed = server.ask("POST", "/predictions", json={"input": full(WHERE)})
    assert failed.json()["status"] == "failed"
    assert "could not be uploaded" in failed.json()["error"]


def test_several_pictures_go_where_their_places_are(http: httpx.Client) -> None:
    given = full("<image> and", image2=data_url(), image3=data_url())
    found = http.post("/predictions", json={"input": given}).json()
    assert found["metrics"]["image_token_count"] == 300


def test_a_budget_of_nothing_is_an_empty_answer(http: httpx.Client) -> None:
    found = http.post("/predictions", json={"input": full(max_new_tokens=0)}).json()
    assert (found["status"], found["output"]) == ("succeeded", {"img_out": None, "text_out": ""})


def test_edge_values_are_served(http: httpx.Client) -> None:
    edges = {"repetition_penalty": 0, "top_p": 0, "temperature": 2, "max_new_tokens": 4096, "max_tiles": 2}
    found = http.post("/predictions", json={"input": full(WORD, **edges)}).json()
    assert found["status"] == "succeeded"
    assert "max_tiles does nothing here" in found["logs"]


def test_a_seed_repeats_and_stop_ends(http: httpx.Client) -> None:
    given = {"input": full("Describe the picture.", temperature=2, seed=5)}
    first, second = (http.post("/predictions", json=given).json()["output"] for _ in range(2))
    assert first == second
    whole = http.post("/predictions", json={"input": full("Describe the picture.")}).json()["output"]
    stopped = full("Describe the picture.", stop=["sign"])
    cut = http.post("/predictions", json={"input": stopped}).json()["output"]["text_out"]
    assert whole["text_out"].partition("sign")[0] == cut


def test_respond_async_begins_only(http: httpx.Client) -> None:
    reply = http.post("/predictions", json={"input": full()}, headers={"Prefer": "respond-async"})
    assert reply.status_code == 202
    found = reply.json()
    assert found["status"] == "starting"
    until(lambda: http.get(f"/v1/predictions/{found['id']}").json()["status"] == "succeeded")


def test_a_stream_of_events(http: httpx.Client) -> None:
    headers = {"Accept": "text/event-stream"}
    reply = http.post("/predictions", json={"input": full(WHERE)}, headers=headers)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = events(reply.text)
    names = [name for name, _ in found]
    assert names[0] == "start"
    assert names[-1] == "completed"
    assert set(names) == {"start", "log", "output", "metric", "completed"}
    last = found[-1][1]
    assert found[0][1] == {"id": last["id"], "status": "processing"}
    chunks = [data for name, data in found if name == "output"]
    assert [each["index"] for each in chunks] == list(range(len(chunks)))
    assert "".join(each["chunk"] for each in chunks) == last["output"]["text_out"]
    assert "".join(data["data"] for name, data in found if name == "log") == last["logs"]
    metrics = {data["name"]: data["value"] for name, data in found if name == "metric"}
    assert metrics == last["metrics"]
    assert last["status"] == "succeeded"
    assert last["output"]["img_out"].startswith("data:image/png")


def test_a_bad_request_is_no_stream(http: httpx.Client) -> None:
    headers = {"Accept": "text/event-stream"}
    assert http.post("/predictions", json={"input": {}}, headers=headers).status_code == 422
    bad = full(image1="data:image/png;base64,AAAA")
    assert http.post("/predictions", json={"input": bad}, headers=headers).status_code == 422


def test_an_id_of_the_callers(http: httpx.Client) -> None:
    reply = http.put("/predictions/my-own_1", json={"input": full()})
    assert (reply.status_code, reply.json()["id"]) == (200, "my-own_1")
    assert http.put("/predictions/my-own_1", json={"input": full()}).status_code == 200  # it runs anew
    assert http.post("/predictions", json={"id": "other", "input": full()}).json()["id"] == "other"
    assert http.put("/predictions/a", json={"id": "b", "input": full()}).status_code == 422
    for bad in ("a.b", "x" * 129, "%00", "a b"):
        assert http.put(f"/predictions/{bad}", json={"input": full()}).status_code == 422
    assert http.post("/predictions", json={"id": "../x", "input": full()}).status_code == 422


@pytest.mark.usefixtures("endless")
def test_an_id_that_runs_starts_nothing_new(http: httpx.Client) -> None:
    begun = {"input": LONG}
    prefer = {"Prefer": "respond-async"}
    assert http.put("/predictions/running", json=begun, headers=prefer).status_code == 202
    again = http.put("/predictions/running", json=begun)
    assert again.status_code == 202
    assert again.json()["status"] in ("starting", "processing")
    assert http.post("/predictions", json={"id": "running", **begun}).status_code == 409
    assert http.post("/predictions/running/cancel").json() == {}
    until(lambda: http.get("/v1/predictions/running").json()["status"] == "canceled")


@pytest.mark.usefixtures("endless")
def test_cancel_keeps_what_was_said(http: httpx.Client) -> None:
    http.put("/predictions/stop-me", json={"input": LONG}, headers={"Prefer": "respond-async"})
    until(lambda: http.get("/v1/predictions/stop-me").json()["output"])
    stopped = http.post("/predictions/stop-me/cancel")
    assert (stopped.status_code, stopped.json()) == (200, {})
    found = http.get("/v1/predictions/stop-me").json()
    assert (found["status"], found["error"]) == ("canceled", None)
    assert found["output"]["text_out"]
    for name in ("stop-me", "unknown"):  # it has ended; it never was
        refused = http.post(f"/predictions/{name}/cancel")
        assert (refused.status_code, refused.json()) == (404, {})


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_hanging_up_stops_a_waiting_prediction(start: Start, accept: str) -> None:
    server = start()
    engine = server.server.service.vlm.engine
    asked = {"json": {"input": LONG}, "headers": {"Accept": accept}}
    with client_of(server) as http:
        patience = httpx.Timeout(30, read=1.0)
        if accept == "application/json":
            with pytest.raises(httpx.ReadTimeout):
                http.post("/predictions", timeout=patience, **asked)
        else:
            with http.stream("POST", "/predictions", **asked) as reply:
                assert "event: output" in reply.iter_lines()  # then the reader leaves
    until(lambda: engine.metrics().ended.get("cancelled") == 1)
    assert engine.metrics().running == 0
    (only,) = server.ask("GET", "/v1/predictions").json()["results"]
    assert only["status"] == "canceled"


@pytest.mark.usefixtures("endless")
def test_a_full_queue_is_a_conflict(start: Start) -> None:
    server = start(queue=1, grace_seconds=1.0)
    engine, prefer = server.server.service.vlm.engine, {"Prefer": "respond-async"}
    begun: list[str] = []
    with client_of(server) as http:

        def refused(path: str, status: int) -> httpx.Response | None:
            """Ask once more; places are taken one after the other."""
            reply = http.post(path, json={"input": LONG}, headers=prefer)
            if reply.is_success:
                begun.append(reply.json()["id"])
                return None
            assert reply.status_code == status
            return reply if engine.metrics().running == engine.limits.rows else None

        found: list[httpx.Response | None] = []
        until(lambda: found.append(refused("/predictions", 409)) or found[-1])
        assert len(begun) >= engine.limits.rows
        assert found[-1].json()["error"].startswith("At capacity - ")
        assert found[-1].json()["status"] == "failed"
        until(lambda: found.append(refused(f"/v1/models/{FULL}/predictions", 429)) or found[-1])
        assert int(found[-1].headers["Retry-After"]) > 0
        assert found[-1].json()["status"] == 429
        assert http.get("/health-check").json()["status"] == "BUSY"
        for name in begun:
            http.post(f"/predictions/{name}/cancel")
        until(lambda: engine.metrics().running == 0)
        assert http.post("/predictions", json={"input": full(max_new_tokens=1)}).status_code == 200


def test_before_it_is_ready(start: Start) -> None:
    server = start()
    server.server.service.phase = "starting"
    try:
        for method, path in (("POST", "/predictions"), ("PUT", "/predictions/a")):
            reply = server.ask(method, path, json={"input": full()})
            assert reply.status_code == 503
            assert reply.json()["status"] == "failed"
            assert isinstance(reply.json()["error"], str)
        assert server.ask("GET", "/openapi.json").status_code == 503
        assert server.ask("GET", "/health-check").json()["status"] == "STARTING"
    finally:
        server.server.service.phase = "ready"


@pytest.mark.parametrize("body", [{}, {"input": None}, {"input": {}}, None])
def test_a_missing_input_is_told_as_cog_does(http: httpx.Client, body: object) -> None:
    reply = http.post("/predictions", json=body)
    assert reply.status_code == 422
    (fault,) = reply.json()["detail"]
    assert fault["loc"] == ["body", "input", "image1"]
    assert fault["type"] == "value_error.missing"


def test_all_wrong_inputs_are_told_at_once(http: httpx.Client) -> None:
    given = full(max_new_tokens=-1, top_p=2, repetition_penalty="x", temperature=None)
    reply = http.post("/predictions", json={"input": given, "webhook": "file:///etc/passwd"})
    assert reply.status_code == 422
    places = [tuple(fault["loc"]) for fault in reply.json()["detail"]]
    wrong = ("max_new_tokens", "top_p", "repetition_penalty")
    assert places == [("body", "webhook"), *(("body", "input", name) for name in wrong)]
    assert all(fault["type"] and fault["msg"] for fault in reply.json()["detail"])


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"input": {}}', "text/plain", 415),
        (b"a=1", "application/x-www-form-urlencoded", 415),
        (b"[]", "application/json", 422),
        (b'{"input": []}', "application/json", 422),
        (b'{"input": {"text": "\\ud800", "image1": "data:,x"}}', "application/json", 422),
        (b'{"input": {"temperature": NaN, "image1": "data:,x"}}', "application/json", 422),
        (b'{"webhook_events_filter": ["all"], "input": {}}', "application/json", 422),
        (b'{"id": 5}', "application/json", 422),
    ],
)
def test_bodies_that_cannot_be_read(http: httpx.Client, body: bytes, kind: str, status: int) -> None:
    reply = http.post("/predictions", content=body, headers={"Content-Type": kind})
    assert reply.status_code == status
    assert reply.json()["detail"]


@pytest.mark.parametrize(
    "url",
    [
        "/etc/hostname",
        "file:///etc/hostname",
        "data:image/png;base64,AAAA",
        "data:image/svg+xml,<svg/>",
        "http://127.0.0.1:9/x.png",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost./x.png",
        f"/v1/files/file_{'0' * 32}",
    ],
)
def test_bad_pictures_name_their_input(http: httpx.Client, url: str) -> None:
    reply = http.post("/predictions", json={"input": full(image2=url)})
    assert reply.status_code == 422
    (fault,) = reply.json()["detail"]
    assert fault["loc"] == ["body", "input", "image2"]


def test_a_prompt_that_is_too_long_tells_the_bill(http: httpx.Client) -> None:
    reply = http.post("/predictions", json={"input": full("word " * 4000)})
    assert reply.status_code == 422
    (fault,) = reply.json()["detail"]
    assert fault["loc"] == ["body", "input", "text"]
    assert "tokens" in fault["msg"]


@pytest.mark.usefixtures("endless")
def test_a_budget_beyond_the_context_ends_with_it(http: httpx.Client, vlm: seekvl.VLM) -> None:
    words = "a " * 1800
    room = 2048 - len(vlm.processor(words).input_ids) - 110  # what the picture and its line end take
    given = full(words + "b " * (room - 30), max_new_tokens=4096)
    found = http.post("/predictions", json={"input": given}).json()
    assert found["status"] == "succeeded"
    assert found["metrics"]["finish_reason"] == "length"
    assert found["metrics"]["input_token_count"] + found["metrics"]["output_token_count"] <= 2048
    assert "the context of the model is full" in found["logs"]


def test_more_pictures_than_are_taken(start: Start) -> None:
    given = full(image2=data_url(), image3=data_url())
    reply = start(max_pictures=2).ask("POST", "/predictions", json={"input": given})
    assert reply.status_code == 422
    assert "3 pictures, at most 2" in reply.json()["detail"][0]["msg"]


def test_what_fails_after_the_reply_is_data(http: httpx.Client) -> None:
    bad = full(image1="data:image/png;base64,AAAA")
    reply = http.post("/predictions", json={"input": bad}, headers={"Prefer": "respond-async"})
    assert reply.status_code == 202
    path = f"/v1/predictions/{reply.json()['id']}"
    until(lambda: http.get(path).json()["status"] == "failed")
    assert "no picture" in http.get(path).json()["error"]


def test_a_model_that_fails_is_data(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /x/y")

    monkeypatch.setattr(server.server.service.vlm, "prepare", broken)
    reply = server.ask("POST", "/predictions", json={"input": full()})
    assert reply.status_code == 200
    found = reply.json()
    assert found["status"] == "failed"
    assert found["output"] is None
    assert "secret" not in found["error"]


def test_many_at_once(http: httpx.Client) -> None:
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: http.post("/predictions", json={"input": full()}), range(8)))
    assert {reply.json()["output"]["text_out"] for reply in replies} == {"WALL"}
    assert time.monotonic() - began < 60
