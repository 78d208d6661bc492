"""Several replicas, as far as it goes without Ray; tests/serve/test_cluster.py runs them."""

import importlib.util
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import seekvl
from seekvl.cli.main import app
from seekvl.engine.handle import DeadlinePassed, EngineStopped
from seekvl.engine.request import Piece, SamplingParams
from seekvl.processing.conversation import parse_messages
from seekvl.processing.encode import ModelInput
from seekvl.runtime import PromptTooLongError, SeekVLError
from seekvl.serve.deploy import join, share
from seekvl.serve.metrics import COUNTERS, counted
from seekvl.serve.replica import portable
from seekvl.serve.replicas import BEGINNING, Front, Remote, conversation_key, load_replicas
from seekvl.serve.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = Settings(replicas=2, device="cpu", dtype="float32")

Turns = Callable[..., ModelInput]


@pytest.fixture(scope="module")
def front() -> Front:
    return load_replicas(SETTINGS)


@pytest.fixture
def turns(vlm: seekvl.VLM) -> Turns:
    def encode(picture: str | None, *texts: str) -> ModelInput:
        """A conversation whose first turn shows a picture."""
        messages: list[dict[str, Any]] = [
            {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
        ]
        if picture is not None:
            messages[0]["images"] = [str(EXAMPLES / picture)]
        return vlm.processor(messages)

    return encode


def test_a_picture_leads_all_its_questions_to_one_place(turns: Turns) -> None:
    asked = turns("sign.png", "What does the sign say?")
    later = turns("sign.png", "What does the sign say?", "WALL", "Where is it?")
    assert conversation_key(asked) == conversation_key(later)
    assert conversation_key(asked) == conversation_key(turns("sign.png", "Where is the sign?"))
    assert conversation_key(asked) != conversation_key(turns("chart.png", "What does the sign say?"))


def test_words_lead_where_their_beginning_does(turns: Turns) -> None:
    long = "one two three four five six seven eight nine ten " * 8
    asked = turns(None, long)
    assert len(asked.input_ids) > BEGINNING
    assert conversation_key(asked) == conversation_key(turns(None, long, "Yes.", "And then?"))
    assert conversation_key(asked) != conversation_key(turns(None, "zero " + long))


def test_a_prompt_is_the_same_without_the_weights(front: Front, vlm: seekvl.VLM) -> None:
    asked = parse_messages(
        [{"role": "user", "content": "Where is it?", "images": [str(EXAMPLES / "sign.png")]}]
    )
    params = SamplingParams(seed=3)
    here, there = front.prepare(asked, params), vlm.prepare(asked, params)
    assert torch.equal(here.inputs.input_ids, there.inputs.input_ids)
    assert torch.equal(here.inputs.pixels, there.inputs.pixels)  # type: ignore[arg-type]
    same = {"inputs": there.inputs, "preprocess_seconds": there.preprocess_seconds}
    assert replace(here, **same) == there
    assert pickle.loads(pickle.dumps(here)).inputs.prompt == there.inputs.prompt


def test_what_is_wrong_is_known_before_it_is_sent(front: Front) -> None:
    request = front.prepare(parse_messages("Hello."), SamplingParams(constrain={"type": "no such type"}))
    with pytest.raises(SeekVLError):
        front.engine.submit(request, client="a")
    with pytest.raises(EngineStopped):  # nothing was started
        front.engine.submit(front.prepare(parse_messages("Hello."), SamplingParams()), client="a")
    assert not front.engine.alive
    assert front.engine.drain(0.0)


def test_a_cancelled_answer_ends_with_what_has_come(front: Front) -> None:
    woken: list[Any] = []
    request = front.prepare(parse_messages("Hello."), SamplingParams())
    remote = Remote(request, notify=woken.append)
    assert remote.waiting
    assert remote.poll() is None
    remote.put([])
    assert not remote.waiting
    assert not woken  # nothing to be read yet
    remote.put([Piece(text="He", token_id=5), Piece(text="llo", token_id=6)])
    remote.cancel()
    remote.put([Piece(text="!", token_id=7)])  # was under way
    pieces = [remote.poll() for _ in range(4)]
    assert [piece and piece.text for piece in pieces] == ["He", "llo", "", None]
    ended = pieces[2].completion  # type: ignore[union-attr]
    assert ended is not None
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("Hello", (5, 6), "cancelled")
    assert ended.usage.prompt_tokens == request.inputs.bill.total
    assert woken == [[remote], [remote]]


def test_an_answer_that_fails_raises_where_it_is_drawn(front: Front) -> None:
    remote = Remote(front.prepare(parse_messages("Hello."), SamplingParams()), notify=None)
    remote.put([Piece(text="He", token_id=5), DeadlinePassed("too late")])
    assert remote.poll() is not None
    with pytest.raises(DeadlinePassed, match="too late"):
        remote.poll()


@pytest.mark.parametrize("error", [SeekVLError("a"), PromptTooLongError("b"), EngineStopped("c")])
def test_errors_of_ours_are_sent_as_they_are(error: Exception) -> None:
    sent = pickle.loads(pickle.dumps(portable(error)))
    assert type(sent) is type(error)
    assert str(sent) == str(error)


def test_other_errors_are_sent_in_words() -> None:
    class Local(Exception):  # noqa: N818 - cannot be pickled
        pass

    assert str(pickle.loads(pickle.dumps(portable(Local("boom"))))) == "Local: boom"


@pytest.mark.parametrize(
    ("changes", "machines", "each"),
    [
        ({"device": "auto"}, [{"CPU": 8.0}], {"num_cpus": 4.0}),
        ({"device": "auto"}, [{"CPU": 8.0, "GPU": 2.0}], {"num_cpus": 1.0, "num_gpus": 1.0}),
        ({"device": "cpu"}, [{"CPU": 3.0, "GPU": 2.0}], {"num_cpus": 1.0}),
        (
            {"device": "cpu", "replicas": 3},
            [{"CPU": 5.0}, {"CPU": 3.0}, {"object_store": 1.0}],
            {"num_cpus": 2.0},
        ),
    ],
)
def test_a_replica_gets_its_part(
    changes: dict[str, Any], machines: list[dict[str, float]], each: dict[str, float]
) -> None:
    assert share(replace(SETTINGS, **changes), machines) == each


@pytest.mark.parametrize(
    ("changes", "found", "words"),
    [
        ({"device": "cuda"}, {"CPU": 8.0, "GPU": 1.0}, "2 replicas need as many GPUs; the cluster has 1"),
        ({"device": "cpu"}, {"CPU": 1.0}, "2 replicas need as many CPU cores; the cluster has 1"),
        ({"device": "cuda:1"}, {"CPU": 8.0, "GPU": 2.0}, "use cpu, cuda or auto, not cuda:1"),
    ],
)
def test_what_a_cluster_does_not_have_is_told(
    changes: dict[str, Any], found: dict[str, float], words: str
) -> None:
    with pytest.raises(SeekVLError, match=words):
        share(replace(SETTINGS, **changes), [found])


def test_figures_carry_the_name_of_their_replica(vlm: seekvl.VLM) -> None:
    now = replace(vlm.engine.metrics(), prefix_hits=3, cache_bytes=10)
    of_two = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in counted([(["a"], now), (["b"], now)], labels=["replica"])
        for sample in metric.samples
    }
    assert of_two["seekvl_prefix_cache_hits_total", "b"] == 3
    assert of_two["seekvl_memory_bytes", "a", "cache"] == 10
    alone = [sample for metric in counted([([], now)], labels=[]) for sample in metric.samples]
    assert len(alone) == len(COUNTERS) + 2
    assert {"replica"}.isdisjoint(name for sample in alone for name in sample.labels)


def test_no_model_no_server() -> None:
    with pytest.raises(SeekVLError, match="replicas is 0"):
        Settings(replicas=0)
    with pytest.raises(SeekVLError, match="/nowhere"):
        load_replicas(replace(SETTINGS, model="/nowhere"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    done = CliRunner().invoke(app, ["serve", "--replicas", "2"])
    assert done.exit_code == 1
    assert done.stderr == "error: this needs the package ray: pip install 'seekvl[cluster]'\n"
    with pytest.raises(SeekVLError, match="cluster"):
        join(SETTINGS)
