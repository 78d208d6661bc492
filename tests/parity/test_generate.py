"""Generation against the official code (greedy, float32, CPU): the ids must be exactly the same."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import seekvl
from seekvl.engine.generate import generate
from seekvl.engine.request import Completion, Request, SamplingParams
from seekvl.engine.score import prompt_logits
from seekvl.processing.encode import ModelInput

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("vl1-siglip", "vl1-hybrid")
NAMES = ("single", "single_zh", "multi", "multi_turn", "text_only", "prompt_mode")
CASES = [(folder, name) for folder in FOLDERS for name in NAMES]


@cache
def load(folder: str) -> seekvl.VLM:
    return seekvl.load(GOLDEN / folder, device="cpu", dtype="float32", preprocessing="official")


@cache
def expected(folder: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / folder / "cases.safetensors")


@cache
def case(folder: str, name: str) -> dict[str, Any]:
    cases = json.loads((GOLDEN / folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    found: dict[str, Any] = next(one for one in cases if one["name"] == name)
    return found


def picture(name: str) -> str:
    return str(GOLDEN / "images" / f"{name}.png")


@cache
def encode(folder: str, name: str) -> ModelInput:
    """A case's prompt as model input."""
    content, processor = case(folder, name), load(folder).processor
    if "prompt_argument" in content:
        pictures = [picture(image) for image in content["images"]]
        return processor.encode_prompt(content["prompt_argument"], pictures=pictures)
    return processor(messages(content))


def messages(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        message | {"images": [picture(image) for image in message.get("images", [])]}
        for message in content["conversation"]
    ]


def answer(folder: str, *requests: Request) -> list[Completion]:
    vlm = load(folder)
    pieces = generate(vlm.model, vlm.tokenizer, requests=requests)
    done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
    return [done[index] for index in range(len(requests))]


PLAIN = SamplingParams(max_new_tokens=16)
PENALISED = SamplingParams(max_new_tokens=16, repetition_penalty=1.3)


def three_ways(folder: str, name: str) -> list[Request]:
    """Free running, with the end token the golden data uses, and with a repetition penalty."""
    inputs, stop = encode(folder, name), case(folder, name)["stop_token_id"]
    return [
        Request(inputs=inputs, params=PLAIN, strip=False),
        Request(inputs=inputs, params=PLAIN, end_id=stop),
        Request(inputs=inputs, params=PENALISED),
    ]


def check(folder: str, name: str, done: list[Completion]) -> None:
    """Compare the three answers with the golden ones."""
    golden, content = expected(folder), case(folder, name)
    free, stopped, penalised = done
    assert list(free.token_ids) == golden[f"{name}/generated_ids"][0].tolist()
    assert free.text == content["generated_text"][0]
    assert free.finish_reason == "length"
    until = golden[f"{name}/generated_ids_with_stop"][0].tolist()
    assert [*stopped.token_ids, content["stop_token_id"]] == until
    assert stopped.finish_reason == "stop"
    key = f"{name}/generated_ids_repetition_penalty_1.3"
    assert (key in golden) != content.get("repetition_penalty_omitted", False)
    if key in golden:
        assert list(penalised.token_ids) == golden[key][0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_answers_alone(name: str) -> None:
    check("vl1-siglip", name, [answer("vl1-siglip", one)[0] for one in three_ways("vl1-siglip", name)])


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_answers_together(folder: str, name: str) -> None:
    check(folder, name, answer(folder, *three_ways(folder, name)))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_ragged_batch_equals_the_padded_one(folder: str) -> None:
    batch, golden = case(folder, "batch_pad"), expected(folder)
    prompts = [encode(folder, name) for name in batch["of_cases"]]
    stop, pad = batch["stop_token_id"], batch["pad_id"]
    done = answer(
        folder,
        *[Request(inputs=inputs, params=PLAIN) for inputs in prompts],
        *[Request(inputs=inputs, params=PLAIN, end_id=stop) for inputs in prompts],
        *[Request(inputs=inputs, params=PENALISED) for inputs in prompts],
    )
    assert [list(one.token_ids) for one in done[:3]] == golden["batch_pad/generated_ids"].tolist()
    for one, row in zip(done[3:6], golden["batch_pad/generated_ids_with_stop"].tolist(), strict=True):
        ids = [*one.token_ids, *([stop] if one.finish_reason == "stop" else [])]
        assert ids + [pad] * (16 - len(ids)) == row
    key = "batch_pad/generated_ids_repetition_penalty_1.3"
    assert [list(one.token_ids) for one in done[6:]] == golden[key].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_prompt(name: str) -> None:
    golden = expected("vl1-siglip")
    logits = prompt_logits(load("vl1-siglip").model, encode("vl1-siglip", name))
    assert torch.allclose(logits[-1], golden[f"{name}/logits_last"][0], atol=1e-4, rtol=0)
    if name == "single":
        assert torch.allclose(logits, golden["single/logits_all"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("layout", "names"),
    [("deepseek_vl", ("single", "multi", "multi_turn", "prompt_mode")), ("deepseek_vl_hybrid", ("single",))],
)
def test_transformers_preprocessing_gives_its_ids(layout: str, names: tuple[str, ...]) -> None:
    folder = GOLDEN / "transformers-layout" / layout
    official = "vl1-siglip" if layout == "deepseek_vl" else "vl1-hybrid"
    golden = load_file(folder / "cases.safetensors")
    vlm = seekvl.load(folder, device="cpu", dtype="float32", preprocessing="transformers")
    for name in names:
        content = case(official, name)
        if "prompt_argument" in content:
            pictures = [picture(image) for image in content["images"]]
            inputs = vlm.processor.encode_prompt(content["prompt_argument"], pictures=pictures)
        else:
            inputs = vlm.processor(messages(content))
        request = Request(inputs=inputs, params=PLAIN)
        *_, (_, last) = generate(vlm.model, vlm.tokenizer, requests=[request])
        assert last.completion is not None
        assert list(last.completion.token_ids) == golden[f"{name}/generated_ids"].flatten().tolist()
