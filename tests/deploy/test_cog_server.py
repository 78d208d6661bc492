"""The predictor behind Cog's own server, as its image would run it: `make test-clients` brings it."""

import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import seekvl
from tests.serve.test_run import free_port

pytest.importorskip("coglet", reason="Cog's server is not installed: make test-clients brings it")

ROOT = Path(__file__).parents[2]
SIGN = ROOT / "examples" / "sign.png"
WORD = "What does the sign say?"
READY_SECONDS = 180


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Cog's server in a folder with the two files, as they are copied into an image."""
    folder, port = tmp_path_factory.mktemp("image"), free_port()
    for name in ("cog.yaml", "predict.py"):
        shutil.copy(ROOT / "deploy" / name, folder)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    modules = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    told = {"PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}  # what `cog build` sets
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    env = {**os.environ, **told, "PATH": path, "PYTHONPATH": modules}
    with subprocess.Popen(command, cwd=folder, env=env) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def ready(url: str) -> str:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        try:
            found = httpx.get(f"{url}/health-check", trust_env=False, timeout=10).json()
        except httpx.TransportError:
            found = {"status": "STARTING"}
        if found["status"] == "READY":
            return url
        assert found["status"] == "STARTING", found
        time.sleep(0.2)
    raise AssertionError(f"Cog was not ready within {READY_SECONDS} s")


def predict(url: str, **inputs: Any) -> dict[str, Any]:
    image = "data:image/png;base64," + base64.b64encode(SIGN.read_bytes()).decode()
    asked = {"input": {"image": image, "prompt": WORD, **inputs}}
    return httpx.post(f"{url}/predictions", json=asked, trust_env=False, timeout=120).json()


def test_it_says_what_the_library_says(ready: str) -> None:
    found = predict(ready, temperature=0, repetition_penalty=1)
    assert (found["status"], found["output"]) == ("succeeded", seekvl.load().ask(SIGN, WORD).text)


def test_edge_values_of_the_published_inputs(ready: str) -> None:
    edge = {"temperature": 0, "top_p": 0, "repetition_penalty": 0}
    assert predict(ready, **edge, max_length_tokens=0)["output"] == ""
    assert predict(ready, **edge, max_length_tokens=3)["status"] == "succeeded"


@pytest.mark.parametrize("wrong", [{"prompt": None}, {"temperature": "hot"}, {"image": None}])
def test_bad_inputs_are_refused(ready: str, wrong: dict[str, Any]) -> None:
    found = predict(ready, **wrong)
    assert found.get("status") == "failed" or "detail" in found, found
