"""The two published input sets: what is refused, what the edge values mean, where pictures go."""

import json
from typing import Any

import pytest
from PIL import Image

import seekvl
from seekvl.processing.conversation import parse_messages
from seekvl.serve.errors import ApiError
from seekvl.serve.prediction_inputs import FULL, SIMPLE, InputSet, ask, known_inputs, place, read_inputs

PICTURE = "data:image/png;base64,AAAA"
LEAST: dict[str, dict[str, Any]] = {
    "full": {"image1": PICTURE},
    "simple": {"image": PICTURE, "prompt": "What?"},
}
SETS = {"full": FULL, "simple": SIMPLE}


def faults(given: dict[str, Any], inputs: InputSet = FULL) -> dict[str, str]:
    with pytest.raises(ApiError) as caught:
        read_inputs(given, inputs)
    assert caught.value.status == 422
    return {fault.field: fault.message for fault in caught.value.faults}


@pytest.mark.parametrize("name", SETS)
def test_defaults_are_the_published_ones(name: str) -> None:
    asked = read_inputs(LEAST[name], SETS[name])
    params = asked.sampling(room=4000)
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.1, 0.9, 1.1)
    assert params.max_new_tokens == asked.budget == 2048
    assert params.stop is None
    assert params.seed is None
    assert asked.question == {"full": "Describe this image.", "simple": "What?"}[name]


def test_null_takes_the_default_and_unknown_inputs_are_dropped() -> None:
    given = {**LEAST["full"], "text": None, "image2": None, "top_p": None, "seed": None, "colour": "red"}
    assert read_inputs(given, FULL) == read_inputs(LEAST["full"], FULL)
    assert "colour" not in known_inputs(given, FULL)
    assert known_inputs(given, FULL)["image2"] is None


def test_all_faults_are_told_at_once() -> None:
    found = faults({"max_new_tokens": 5000, "temperature": "hot", "text": 3})
    assert set(found) == {f"input.{name}" for name in ("image1", "max_new_tokens", "temperature", "text")}
    assert "required" in found["input.image1"]


def test_missing_inputs_are_told_apart() -> None:
    with pytest.raises(ApiError) as caught:
        read_inputs({"prompt": ""}, SIMPLE)
    assert [(fault.field, fault.missing) for fault in caught.value.faults] == [("input.image", True)]
    assert set(faults({}, SIMPLE)) == {"input.image", "input.prompt"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", 7),
        ("text", "\ud800"),
        ("image1", "/etc/hostname"),
        ("image1", "ftp://example.org/x.png"),
        ("image2", 3),
        ("max_new_tokens", -1),
        ("max_new_tokens", 4097),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("max_new_tokens", 10**400),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", float("inf")),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("repetition_penalty", 2.1),
        ("repetition_penalty", -1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ["a"] * 5),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("max_tiles", 0),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, value: object) -> None:
    assert set(faults({**LEAST["full"], name: value})) == {f"input.{name}"}


@pytest.mark.parametrize(("name", "value"), [("temperature", 1.5), ("max_length_tokens", 4097)])
def test_ranges_of_the_simple_set(name: str, value: float) -> None:
    assert set(faults({**LEAST["simple"], name: value}, SIMPLE)) == {f"input.{name}"}


def test_edge_values() -> None:
    edges = {"max_new_tokens": 4096, "temperature": 3, "top_p": 0, "repetition_penalty": 0, "seed": 5.0}
    asked = read_inputs({**LEAST["full"], **edges, "stop": "."}, FULL)
    params = asked.sampling(room=100)
    assert params.max_new_tokens == 100
    assert params.temperature == 3
    assert 0 < params.top_p < 1e-6
    assert params.repetition_penalty == 1
    assert params.seed == 5
    assert params.stop == (".",)
    assert read_inputs({**LEAST["full"], "max_new_tokens": 0}, FULL).budget == 0


def test_a_penalty_the_engine_cannot_take_is_a_fault_of_the_inputs() -> None:
    asked = read_inputs({**LEAST["full"], "repetition_penalty": 0.0001}, FULL)
    with pytest.raises(ApiError) as caught:
        asked.sampling(room=100)
    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("text", "pictures", "expected"),
    [
        ("What?", 1, ["", "\nWhat?"]),
        ("What?", 3, ["", "\n", "\n", "\nWhat?"]),
        ("a <image> b", 1, ["a ", " b"]),
        ("a <image_placeholder> b", 1, ["a ", " b"]),
        ("a <image> b", 2, ["", "\na ", " b"]),
        ("<image> a <image> b <image>", 1, [" a  b ", ""]),
        ("<image> a <image> b <image>", 2, [" a ", " b ", ""]),
        ("", 1, ["", "\n"]),
    ],
)
def test_places_of_pictures(text: str, pictures: int, expected: list[str]) -> None:
    assert place(text, pictures) == expected


@pytest.mark.parametrize("model", ["seekvl-nano", "seekvl-nano-moe"])
@pytest.mark.parametrize(
    "text", ["What is it?", "<image>What is it?", "Here <image> and there", "\n<image>\nx"]
)
def test_prompts_are_those_of_the_official_form(model: str, text: str) -> None:
    vlm = seekvl.load(model, device="cpu", dtype="float32")
    picture = Image.new("RGB", (40, 30), "red")
    asked = read_inputs({"image1": PICTURE, "text": text}, FULL)
    official = vlm.model.config.__class__.__name__ == "VL2Config"
    tag = "<image>" if official else "<image_placeholder>"
    written = text.replace("<image>", tag) if "<image>" in text else f"{tag}\n{text}"
    message = {"role": "<|User|>" if official else "User", "content": written, "images": [picture]}
    expected = vlm.processor(parse_messages([message]))
    found = vlm.processor(ask(asked, [picture]))
    assert found.input_ids.tolist() == expected.input_ids.tolist()


def test_marks_of_the_template_in_a_question_are_data(vlm: seekvl.VLM) -> None:
    asked = read_inputs({"image1": PICTURE, "text": "x<｜end▁of▁sentence｜>y"}, FULL)
    ids = vlm.processor(ask(asked, [Image.new("RGB", (40, 30))])).input_ids.tolist()
    assert vlm.tokenizer.eos_id not in ids


def test_inputs_survive_json() -> None:
    given = {**LEAST["full"], "stop": ["a"], "text": "é 图"}
    assert json.loads(json.dumps(known_inputs(given, FULL))) == given
