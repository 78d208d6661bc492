"""Holders of different keys: what one has, another neither sees nor stops."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import seekvl
from seekvl.serve.guard import owner_name
from seekvl.serve.records import Prediction, iso
from tests.serve.conftest import Running, Start, chat_body, running
from tests.serve.predicting import KEYS, SIGN, SIMPLE, full, simple, until
from tests.serve.predicting import endless as endless
from tests.serve.test_store import do, prediction, uploaded

PREDICTIONS = f"/v1/models/{SIMPLE}/predictions"
LONG = full(max_new_tokens=4096)


class Holder:
    """Who holds a key of a server."""

    def __init__(self, server: Running, key: str) -> None:
        self.server, self.key = server, key

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return self.server.ask(method, path, headers=headers, **options)

    def predict(self, **more: Any) -> dict[str, Any]:
        """Run a prediction to its end."""
        reply = self.ask("POST", PREDICTIONS, json={"input": simple(**more)}, headers={"prefer": "wait"})
        assert reply.status_code == 201
        return reply.json()

    def upload(self) -> dict[str, Any]:
        reply = self.ask("POST", "/v1/files", files={"content": SIGN.read_bytes()})
        assert reply.status_code == 201
        return reply.json()


@pytest.fixture(scope="module")
def locked(vlm: seekvl.VLM) -> Iterator[Running]:
    with running(vlm, api_keys=("first", "second"), grace_seconds=1.0) as started:
        yield started


@pytest.fixture
def first(locked: Running) -> Holder:
    return Holder(locked, "first")


@pytest.fixture
def second(locked: Running) -> Holder:
    return Holder(locked, "second")


def test_predictions_of_others_are_not_there(first: Holder, second: Holder) -> None:
    made = first.predict()
    here = f"/v1/predictions/{made['id']}"
    assert first.ask("GET", here).json() == made
    assert set(made) == KEYS, "whose it is, is not told"
    for method, path in (("GET", here), ("GET", f"{here}/stream"), ("POST", f"{here}/cancel")):
        reply, unknown = (second.ask(method, path.replace(made["id"], name)) for name in (made["id"], "none"))
        assert reply.status_code == unknown.status_code == 404
        assert reply.text.replace(made["id"], "none") == unknown.text
    listed = [each["id"] for each in second.ask("GET", "/v1/predictions").json()["results"]]
    assert made["id"] not in listed
    assert made["id"] in [each["id"] for each in first.ask("GET", "/v1/predictions").json()["results"]]


@pytest.mark.usefixtures("endless")
def test_running_predictions_of_others_are_not_stopped(first: Holder, second: Holder) -> None:
    begun = first.ask("POST", "/predictions", json={"input": LONG}, headers={"prefer": "respond-async"})
    name = begun.json()["id"]
    for path in (f"/v1/predictions/{name}/cancel", f"/predictions/{name}/cancel"):
        assert second.ask("POST", path).status_code == 404
    assert second.ask("GET", f"/v1/predictions/{name}/stream").status_code == 404
    until(lambda: first.ask("GET", f"/v1/predictions/{name}").json()["status"] == "processing")
    assert first.ask("POST", f"/predictions/{name}/cancel").status_code == 200
    assert first.ask("GET", f"/v1/predictions/{name}").json()["status"] == "canceled"


@pytest.mark.usefixtures("endless")
def test_two_may_choose_one_id(first: Holder, second: Holder) -> None:
    asked = {"json": {"input": LONG}, "headers": {"prefer": "respond-async"}}
    assert first.ask("PUT", "/predictions/job-1", **asked).status_code == 202
    other = {"json": {"input": full(max_new_tokens=1)}}
    ended = second.ask("PUT", "/predictions/job-1", **other)
    assert (ended.status_code, ended.json()["status"]) == (200, "succeeded"), "it is its own"
    assert first.ask("GET", "/v1/predictions/job-1").json()["status"] in ("starting", "processing")
    assert first.ask("POST", "/predictions/job-1/cancel").status_code == 200
    assert first.ask("GET", "/v1/predictions/job-1").json()["status"] == "canceled"
    assert second.ask("GET", "/v1/predictions/job-1").json() == ended.json()


def test_files_of_others_are_not_there(first: Holder, second: Holder) -> None:
    made = first.upload()
    here = f"/v1/files/{made['id']}"
    for method, path in (("GET", here), ("GET", f"{here}/content"), ("DELETE", here)):
        assert second.ask(method, path).status_code == 404
    assert second.ask("GET", "/v1/files").json()["results"] == []
    assert first.ask("GET", f"{here}/content").content == SIGN.read_bytes()
    assert "owner" not in made


def test_files_of_others_are_no_pictures(first: Holder, second: Holder) -> None:
    url = first.upload()["urls"]["get"]
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    ways: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": chat_body(messages=[{"role": "user", "content": parts}], max_tokens=1),
        "/predictions": {"input": full(image1=url, max_new_tokens=1)},
        "/v1/page/picture": {"url": url},
    }
    for path, body in ways.items():
        refused = second.ask("POST", path, json=body)
        assert refused.status_code in (400, 422)
        assert "not kept here" in refused.text
        assert first.ask("POST", path, json=body).status_code == 200


def test_no_route_was_forgotten(first: Holder, second: Holder) -> None:
    names = {"{prediction_id}": first.predict()["id"], "{file_id}": first.upload()["id"]}
    paths = first.ask("GET", "/v1/openapi.json").json()["paths"]
    asked = 0
    for path, methods in paths.items():
        for method in methods:
            for mark, name in names.items():
                if mark in path and method != "put":  # which makes one
                    asked += 1
                    assert second.ask(method.upper(), path.replace(mark, name)).status_code == 404
    assert asked >= 7
    for name in names.values():
        assert any(
            first.ask("GET", f"/v1/{kind}/{name}").status_code == 200 for kind in ("predictions", "files")
        )


def test_secrets_of_webhooks_are_not_shared(first: Holder, second: Holder, start: Start) -> None:
    path = "/v1/webhooks/default/secret"
    secrets = [holder.ask("GET", path).json()["key"] for holder in (first, second, first)]
    assert secrets[0] == secrets[2] != secrets[1]
    given = start(api_keys=("first", "second"), webhook_secret="whsec_AAEC")
    for key in ("first", "second"):
        assert Holder(given, key).ask("GET", path).json() == {"key": "whsec_AAEC"}, "the operator said so"


def test_a_key_is_known_again_after_a_restart_and_is_not_in_the_store(
    vlm: seekvl.VLM, tmp_path: Path
) -> None:
    key, other = "a-long-key-that-nobody-guesses", "another"
    where = f"sqlite:///{tmp_path}/store.db"
    with running(vlm, store=where, api_keys=(key, other)) as server:
        made, file = Holder(server, key).predict(), Holder(server, key).upload()
    for path in tmp_path.iterdir():
        assert key.encode() not in path.read_bytes()
    with running(vlm, store=where, api_keys=(other, key)) as server:
        again, stranger = Holder(server, key), Holder(server, other)
        for path in (f"/v1/predictions/{made['id']}", f"/v1/files/{file['id']}"):
            assert again.ask("GET", path).status_code == 200
            assert stranger.ask("GET", path).status_code == 404
    with running(vlm, store=where) as server:  # which wants no key any more
        assert server.ask("GET", f"/v1/predictions/{made['id']}").status_code == 404


def test_where_no_key_is_wanted_everybody_sees_everything(server: Running) -> None:
    made = Holder(server, "any").predict()
    for key in ("any", "other"):
        found = Holder(server, key).ask("GET", f"/v1/predictions/{made['id']}")
        assert found.json() == made


@pytest.mark.parametrize("kept", ["memory", "file"])
def test_the_store_keeps_owners_apart(kept: str, tmp_path: Path) -> None:
    async def work(store: Any) -> None:
        for owner in ("x", "y"):
            for number in range(3):
                one = prediction(f"p{number}", at=number, output=owner)
                one.owner = owner
                await store.save(one)
        found = await store.prediction("p1", owner="x")
        assert (found.output, found.owner) == ("x", "x")
        page, _ = await store.predictions(cursor=None, owner="y")
        assert [(each.id, each.output) for each in page] == [("p0", "y"), ("p1", "y"), ("p2", "y")]
        assert await store.prediction("p1") is None
        assert (await store.predictions(cursor=None))[0] == []
        await store.forget("p1", owner="x")
        assert await store.prediction("p1", owner="x") is None
        assert await store.prediction("p1", owner="y") is not None
        await store.add_file(uploaded("f"), b"1234")
        assert await store.file_data("f", owner="x") is None
        assert await store.delete_file("f", owner="x") is False
        assert await store.file_data("f") == b"1234"

    do(work, store=None if kept == "memory" else f"sqlite:///{tmp_path}/store.db")


def test_bounds_count_all_owners_and_push_out_the_oldest() -> None:
    async def work(store: Any) -> list[str]:
        for at, owner in ((3, "x"), (2, "y"), (1, "x")):
            one = prediction("p" if owner == "y" else f"p{at}", at=at)
            one.owner = owner
            await store.save(one)
        pages = [(await store.predictions(cursor=None, owner=owner))[0] for owner in ("x", "y")]
        return [each.id for page in pages for each in page]

    assert do(work, max_predictions=2) == ["p1", "p"]


FORMER = """
CREATE TABLE predictions
    (id TEXT PRIMARY KEY, created REAL NOT NULL, ended REAL, size INTEGER NOT NULL, record TEXT NOT NULL);
CREATE INDEX by_age ON predictions (created, id);
CREATE INDEX by_end ON predictions (ended, size, id);
CREATE TABLE files
    (id TEXT PRIMARY KEY, created REAL NOT NULL, expires REAL NOT NULL, size INTEGER NOT NULL,
     about TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO facts VALUES ('format', '1'), ('webhook_secret', 'whsec_AAEC');
"""
"""A store as it was before predictions had owners."""
RECORD = (
    '{"id": "p", "model": "o/n", "version": "v", "input": {}, "output": "x", "status": "succeeded", '
    '"error": null, "logs": "", "metrics": {}, "created_at": "TIME", "started_at": null, '
    '"completed_at": "TIME"}'
)
ABOUT = (
    '{"id": "f", "name": "a.png", "content_type": "image/png", "size": 4, "sha256": "", "metadata": {}, '
    '"purpose": null, "created": 1.0, "expires": 9e9}'
)


def test_a_store_of_before_is_gone_on_with(tmp_path: Path) -> None:
    path, now = tmp_path / "store.db", time.time()
    with sqlite3.connect(path) as former:
        former.executescript(FORMER)
        record = RECORD.replace("TIME", iso(now))
        former.execute("INSERT INTO predictions VALUES ('p', ?, ?, ?, ?)", (now, now, len(record), record))
        former.execute("INSERT INTO files VALUES ('f', 1.0, 9e9, 4, ?, ?)", (ABOUT, b"1234"))
    former.close()

    async def work(store: Any) -> Prediction:
        assert await store.file_data("f") == b"1234"
        assert (await store.file("f")).owner == ""
        assert await store.fact("webhook_secret", make=str) == "whsec_AAEC"
        assert await store.prediction("p", owner="x") is None
        return await store.prediction("p")

    for _ in range(2):  # the second time it is of the new form already
        found = do(work, store=f"sqlite:///{path}")
        assert (found.output, found.owner) == ("x", "")


def test_names_of_owners_are_told_apart() -> None:
    names = {owner_name(key) for key in ("a", "b", "a ", "A")}
    assert len(names) == 4
    assert all(len(name) == 32 and name != "" for name in names)
