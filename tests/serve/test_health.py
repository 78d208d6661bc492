"""Alive, ready, Cog's check and the figures."""

import threading

import httpx
from fastapi.testclient import TestClient

import seekvl
from seekvl.runtime import SeekVLError
from seekvl.serve.app import create_app
from seekvl.serve.settings import Settings
from tests.serve.conftest import ENDLESS, SETTINGS, Running, chat_body, wait_until

FIGURES = (
    'seekvl_requests_total{route="/v1/chat/completions",status="200"}',
    "seekvl_requests_running",
    "seekvl_requests_waiting",
    "seekvl_prompt_tokens_total",
    "seekvl_image_tokens_total",
    "seekvl_generation_tokens_total",
    'seekvl_rejected_total{reason="model_not_found"}',
    "seekvl_canceled_total",
    "seekvl_vision_cache_queries_total",
    "seekvl_vision_cache_hits_total",
    "seekvl_prefix_cache_queries_total",
    "seekvl_prefix_cache_hits_total",
    'seekvl_memory_bytes{kind="cache"}',
    'seekvl_memory_bytes{kind="features"}',
    "seekvl_queue_seconds_bucket",
    "seekvl_image_load_seconds_bucket",
    "seekvl_vision_seconds_bucket",
    "seekvl_time_to_first_token_seconds_bucket",
    "seekvl_time_per_output_token_seconds_bucket",
    "seekvl_request_seconds_bucket",
)


def test_every_figure_has_its_name(server: Running) -> None:
    assert server.chat(max_tokens=2).status_code == 200
    assert server.chat(model="other").status_code == 404
    found = server.ask("GET", "/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    lines = found.text.splitlines()
    for name in FIGURES:
        assert any(line.startswith(name) for line in lines), name


def test_figures_count_what_was_done(server: Running) -> None:
    names = ("seekvl_prompt_tokens_total", "seekvl_generation_tokens_total", "seekvl_request_seconds_count")
    before = [server.figure(name) for name in names]
    usage = server.chat(max_tokens=3).json()["usage"]
    prompt, generated, requests = (server.figure(name) - was for name, was in zip(names, before, strict=True))
    assert (prompt, generated) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert requests >= 1


def test_a_server_that_is_ready_says_so(server: Running) -> None:
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    assert server.ask("GET", "/ready").json() == {"status": "ready"}
    found = server.ask("GET", "/health-check").json()
    assert found["status"] == "READY"
    assert found["setup"]["status"] == "succeeded"
    assert "ready after" in found["setup"]["logs"]
    assert found["version"]["seekvl"]


def test_all_slots_taken_is_busy(server: Running) -> None:
    rows = server.engine.limits.rows
    assert rows <= 8, "one request fills the engine of this test"
    body = chat_body(stream=True, n=rows, **ENDLESS)
    with httpx.stream("POST", server.v1 + "/chat/completions", json=body, trust_env=False) as answer:
        assert answer.status_code == 200
        wait_until(lambda: server.engine.metrics().running == rows)
        assert server.ask("GET", "/health-check").json()["status"] == "BUSY"
    wait_until(lambda: server.engine.metrics().running == 0)
    assert server.ask("GET", "/health-check").json()["status"] == "READY"


def test_a_model_that_is_still_loading(vlm: seekvl.VLM) -> None:
    go_on = threading.Event()

    def load(_: Settings) -> seekvl.VLM:
        go_on.wait(30)
        raise SeekVLError("there is no such model")

    with TestClient(create_app(SETTINGS, load=load), base_url="http://localhost") as client:
        assert client.get("/health").status_code == 200
        waiting = client.get("/ready")
        assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "5")
        assert client.get("/health-check").json()["status"] == "STARTING"
        refused = client.post("/v1/chat/completions", json=chat_body())
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "server_error"
        assert refused.headers["retry-after"]
        assert "seekvl_ready 0" in client.get("/metrics").text
        go_on.set()
        wait_until(lambda: client.get("/health-check").json()["status"] == "SETUP_FAILED")
        setup = client.get("/health-check").json()["setup"]
        assert setup["status"] == "failed"
        assert "there is no such model" in setup["logs"]
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
