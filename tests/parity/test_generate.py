"""Generation against what the official code generated (greedy, float32, CPU): the ids must be exactly the same."""

import json
from dataclasses import replace
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
    return processor(
        [
            message | {"images": [picture(image) for image in message.get("images", [])]}
            for message in content["conversation"]
        ]
    )


def answer(folder: str, *requests: Request) -> list[Completion]:
    vlm = load(folder)
    pieces = generate(vlm.model, vlm.tokenizer, requests=requests)
    done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
    return [done[index] for index in range(len(requests))]


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_greedy_ids_and_text(folder: str, name: str) -> None:
    request = Request(inputs=encode(folder, name), params=SamplingParams(max_new_tokens=16), strip=False)
    (done,) = answer(folder, request)
    assert list(done.token_ids) == expected(folder)[f"{name}/generated_ids"][0].tolist()
    assert done.text == case(folder, name)["generated_text"][0]
    assert done.finish_reason == "length"


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_an_end_token_ends(folder: str, name: str) -> None:
    stop = case(folder, name)["stop_token_id"]
    inputs = replace(encode(folder, name))
    (done,) = answer(folder, Request(inputs=inputs, params=SamplingParams(max_new_tokens=16), end_id=stop))
    assert [*done.token_ids, stop] == expected(folder)[f"{name}/generated_ids_with_stop"][0].tolist()
    assert done.finish_reason == "stop"


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_the_repetition_penalty_counts_generated_tokens_only(folder: str, name: str) -> None:
    key = f"{name}/generated_ids_repetition_penalty_1.3"
    if key not in expected(folder):
        pytest.skip("left out of the golden data: a gap between two tokens is too small")
    params = SamplingParams(max_new_tokens=16, repetition_penalty=1.3)
    (done,) = answer(folder, Request(inputs=encode(folder, name), params=params))
    assert list(done.token_ids) == expected(folder)[key][0].tolist()


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_ragged_batch_equals_the_padded_one(folder: str, penalty: float) -> None:
    batch = case(folder, "batch_pad")
    params = SamplingParams(max_new_tokens=16, repetition_penalty=penalty)
    done = answer(
        folder, *[Request(inputs=encode(folder, name), params=params) for name in batch["of_cases"]]
    )
    key = "batch_pad/generated_ids" + ("" if penalty == 1.0 else f"_repetition_penalty_{penalty}")
    if key not in expected(folder):
        pytest.skip("left out of the golden data: a gap between two tokens is too small")
    assert [list(one.token_ids) for one in done] == expected(folder)[key].tolist()


@pytest.mark.parametrize("folder", FOLDERS)
def test_rows_of_a_batch_end_one_by_one(folder: str) -> None:
    batch = case(folder, "batch_pad")
    stop, pad = batch["stop_token_id"], batch["pad_id"]
    params = SamplingParams(max_new_tokens=16)
    requests = [
        Request(inputs=encode(folder, name), params=params, end_id=stop) for name in batch["of_cases"]
    ]
    for one, row in zip(
        answer(folder, *requests), expected(folder)["batch_pad/generated_ids_with_stop"].tolist(), strict=True
    ):
        ended = [stop] if one.finish_reason == "stop" else []
        padded = [*one.token_ids, *ended]
        assert padded + [pad] * (16 - len(padded)) == row


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_logits_of_the_prompt(folder: str, name: str) -> None:
    logits = prompt_logits(load(folder).model, encode(folder, name))
    assert torch.allclose(logits[-1], expected(folder)[f"{name}/logits_last"][0], atol=1e-4, rtol=0)
    if name == "single":
        last = expected(folder)["single/logits_all"][0]
        assert torch.allclose(logits[-len(last) :], last, atol=1e-4, rtol=0)
