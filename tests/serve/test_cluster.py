"""Two replicas on this machine, started with the real command and Ray Serve, asked by real clients."""

import base64
import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import replicate
from PIL import Image

import seekvl
from seekvl.weights.load import BUNDLED, NANO
from tests.serve.conftest import ENDLESS, MODEL, chat_body, wait_until
from tests.serve.predicting import FULL, SIGN, SIMPLE, WHERE, WORD, data_url, full, simple
from tests.serve.test_chat import shown
from tests.serve.test_run import process, ready

pytestmark = pytest.mark.slow
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'seekvl[cluster]'")

QUEUE = 4
FIGURE = re.compile(r'^(\w+)(?:\{replica="(\w+)"\})? ([\d.e+]+)$', re.MULTILINE)
REPLICA = "ray::ServeReplica"


@dataclass(frozen=True)
class Cluster:
    """A server that runs, with its replicas."""

    process: subprocess.Popen[str]
    url: str

    def figures(self, name: str) -> dict[str, float]:
        """Return a figure by replica; one without a label is that of ""."""
        time.sleep(1.5)  # the server asks its replicas now and then
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        return {replica: float(value) for found, replica, value in FIGURE.findall(text) if found == name}

    def answered(self, before: dict[str, float]) -> dict[str, float]:
        """Return how many prompts each replica has let in since then, those with none left out."""
        now = self.figures("seekvl_prefix_cache_queries_total")
        return {
            name: value - before.get(name, 0) for name, value in now.items() if value > before.get(name, 0)
        }

    def prompts(self) -> dict[str, float]:
        return self.figures("seekvl_prefix_cache_queries_total")

    def chat(self, **fields: object) -> httpx.Response:
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=chat_body(**fields), trust_env=False, timeout=120)

    def processes(self) -> list[psutil.Process]:
        """Return the server, Ray and the replicas."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def replicas(self) -> list[psutil.Process]:
        return [each for each in self.processes() if "".join(each.cmdline()).startswith(REPLICA)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with process("--replicas", "2", "--dtype", "float32", "--queue", str(QUEUE)) as (server, url):
        wait_until(lambda: ready(url) or server.poll() is not None, seconds=400)
        assert server.poll() is None, server.stderr and server.stderr.read()
        yield Cluster(server, url)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="any", max_retries=0)


@contextlib.contextmanager
def endless(cluster: Cluster, **fields: object) -> Iterator[Iterator[str]]:
    """An answer that goes on; its lines, of which some have come."""
    body = chat_body(stream=True, **ENDLESS, **fields)
    url = f"{cluster.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, trust_env=False, timeout=120) as answer:
        lines = answer.iter_lines()
        assert answer.status_code == 200
        for _ in range(6):
            next(lines)
        yield lines


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A checkpoint whose weights are cut short, which a replica finds out."""
    folder = shutil.copytree(BUNDLED[NANO], tmp_path / "broken")
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.truncate(1_000_000)
    return folder


def test_what_cannot_be_started_ends_it_with_one_line(broken: Path) -> None:
    for options, words in (
        (["--device", "cuda"], "2 replicas need as many GPUs; the cluster has 0"),
        (["--model", str(broken)], "model.safetensors is cut short: 1000000 bytes"),
    ):
        with process("--replicas", "2", *options) as (server, _):
            assert server.wait(300) == 1
            assert server.stderr is not None
            told = server.stderr.read()
        assert words in told
        assert "Traceback" not in told


def test_a_second_question_goes_where_the_picture_is_known(
    cluster: Cluster, client: openai.OpenAI, vlm: seekvl.VLM
) -> None:
    before, hits = cluster.prompts(), cluster.figures("seekvl_prefix_cache_hits_total")
    assert len(before) == 2
    for number, question in enumerate((WORD, WHERE)):
        found = client.chat.completions.create(
            model=MODEL, messages=shown("sign.png", question), temperature=0
        )
        assert found.choices[0].message.content == vlm.ask(SIGN, question).text
        assert (found.usage.prompt_tokens_details.cached_tokens > 100) == bool(number)
    (answered,) = cluster.answered(before).items()
    assert answered[1] == 2
    assert cluster.figures("seekvl_prefix_cache_hits_total")[answered[0]] > hits[answered[0]]


def test_every_dialect_goes_there_too(cluster: Cluster, client: openai.OpenAI) -> None:
    before = cluster.prompts()
    client.chat.completions.create(model=MODEL, messages=shown("sign.png", WORD), temperature=0)
    parts = [{"type": "input_image", "image_url": data_url()}, {"type": "input_text", "text": WORD}]
    item = {"role": "user", "content": parts}
    assert client.responses.create(model=MODEL, input=[item], temperature=0).output_text == "WALL"
    hosted = replicate.Client(base_url=cluster.url, api_token="any")
    with SIGN.open("rb") as file:  # is uploaded, and lies with the server
        assert hosted.run(SIMPLE, input={"image": file, "prompt": WORD, "temperature": 0}) == "WALL"
    assert hosted.run(FULL, input=full())["text_out"] == "WALL"
    found = httpx.post(f"{cluster.url}/predictions", json={"input": full()}, trust_env=False, timeout=60)
    assert found.json()["output"]["text_out"] == "WALL"
    assert list(cluster.answered(before).values()) == [5]


def test_pictures_spread_over_the_replicas(cluster: Cluster) -> None:
    before = cluster.prompts()
    for grey in range(0, 240, 20):
        png = io.BytesIO()
        Image.new("RGB", (64, 64), (grey, grey, grey)).save(png, format="PNG")
        address = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        part = {"type": "image_url", "image_url": {"url": address}}
        found = cluster.chat(messages=[{"role": "user", "content": [part]}], max_tokens=1)
        assert found.status_code == 200
    answered = cluster.answered(before)
    assert len(answered) == 2  # one in 2,048 that all of them fall to one
    assert sum(answered.values()) == 12


def test_what_is_wrong_is_told_before_a_stream_begins(cluster: Cluster) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}
    found = cluster.chat(stream=True, response_format=form)
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "response_format"


def test_a_caller_who_hangs_up_frees_the_place(cluster: Cluster) -> None:
    cancelled = sum(cluster.figures("seekvl_canceled_total").values())
    with endless(cluster):
        assert cluster.figures("seekvl_requests_running") == {"": 1}
    wait_until(lambda: cluster.figures("seekvl_requests_running") == {"": 0}, seconds=20)
    wait_until(lambda: sum(cluster.figures("seekvl_canceled_total").values()) == cancelled + 1, seconds=20)


def test_a_prediction_can_be_cancelled(cluster: Cluster) -> None:
    hosted = replicate.Client(base_url=cluster.url, api_token="any")
    found = hosted.models.predictions.create(
        SIMPLE, input=simple("Tell me everything.", temperature=1, max_length_tokens=4096, seed=3)
    )
    found.cancel()
    wait_until(lambda: hosted.predictions.get(found.id).status in ("canceled", "succeeded"))
    wait_until(lambda: cluster.figures("seekvl_requests_running") == {"": 0}, seconds=20)


def test_too_many_are_refused(cluster: Cluster) -> None:
    with contextlib.ExitStack() as stack:
        for choices in (8, 8):  # one conversation: eight run and four wait where it is known, four elsewhere
            stack.enter_context(endless(cluster, n=choices))
        assert cluster.figures("seekvl_requests_running") == {"": 12}
        assert cluster.figures("seekvl_requests_waiting") == {"": 4}
        found = cluster.chat(n=QUEUE + 1)
        assert found.status_code == 429
        assert found.headers["retry-after"]
    wait_until(lambda: cluster.figures("seekvl_requests_running") == {"": 0}, seconds=20)


def test_nobody_else_can_reach_ray(cluster: Cluster) -> None:
    import grpc

    listening = {
        (each.pid, place.laddr.ip.removeprefix("::ffff:"), place.laddr.port)
        for each in cluster.processes()
        for place in each.net_connections()
        if place.status == psutil.CONN_LISTEN
    }
    open_ports = {(pid, port) for pid, ip, port in listening if not ip.startswith("127.")}
    assert {pid for pid, _ in open_ports} == {each.pid for each in cluster.replicas()}
    for _, port in open_ports:  # those of Ray Serve itself, which no setting binds to loopback
        call = grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=20)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_replica_that_is_killed_is_passed_over_and_replaced(cluster: Cluster) -> None:
    before = cluster.prompts()
    with endless(cluster) as lines:
        (where,) = cluster.answered(before)
        (dying,) = [each for each in cluster.replicas() if where in open_files(each)]
        dying.kill()
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"  # it had begun
    for picture, word in (("sign.png", "WALL"), ("chart.png", "YZ")):
        found = cluster.chat(messages=shown(picture, WORD))
        assert found.json()["choices"][0]["message"]["content"] == word
    assert ready(cluster.url)
    wait_until(lambda: len(set(cluster.prompts()) - {where}) == 2, seconds=300)
    assert cluster.chat(messages=shown("sign.png", WORD)).status_code == 200


def test_without_any_replica_it_is_not_ready_until_one_is_back(cluster: Cluster) -> None:
    for each in cluster.replicas():
        each.kill()
    wait_until(lambda: not ready(cluster.url), seconds=30)
    assert cluster.chat().status_code == 503
    wait_until(lambda: ready(cluster.url), seconds=300)
    assert cluster.chat().status_code == 200


def open_files(process: psutil.Process) -> str:
    """Return what tells a replica's name: its log."""
    return " ".join(file.path for file in process.open_files())


def test_a_signal_lets_answers_end_and_leaves_nothing_behind(cluster: Cluster) -> None:
    left = cluster.processes()
    with endless(cluster) as lines:
        cluster.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not ready(cluster.url))
        assert cluster.chat().status_code == 503
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert cluster.process.wait(60) == 0
    wait_until(lambda: not any(map(alive, left)), seconds=90)  # agents of Ray look for it now and then


def alive(process: psutil.Process) -> bool:
    """Tell whether a process runs; in a container the dead may stay listed."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
