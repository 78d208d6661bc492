"""DeepSeek-VL2 golden checkpoints, from files to greedy ids, against the official code (CPU, float32)."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import seekvl
from seekvl.data.collate import collate
from seekvl.engine.cache import KVCache
from seekvl.engine.forward import embed_prompt, prefill
from seekvl.engine.generate import generate
from seekvl.engine.request import Completion, Request, SamplingParams
from seekvl.engine.score import prompt_logits
from seekvl.models.vl2 import VL2
from seekvl.processing.conversation import parse_messages
from seekvl.processing.encode import ModelInput
from seekvl.processing.tokenizer import GROUNDING_MARKS
from seekvl.train.objective import next_token_loss

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("vl2-tiny-like", "vl2-small-like", "vl2-base-like")
NAMES = (
    *("small", "wide", "tall", "two", "three", "text_only", "grounding_turns", "turns_two_images"),
    *("system_role", "system_prompt_argument", "prompt_raw", "prompt_sft"),
)
CASES = [(folder, name) for folder in FOLDERS for name in NAMES]
CHUNKS = [("wide", 7), ("wide", 32), ("wide", 512), ("text_only", 5), ("grounding_turns", 16)]

FEATURES = 3e-5
LOGITS = 1e-4
PLAIN = SamplingParams(max_new_tokens=16)
PENALISED = SamplingParams(max_new_tokens=16, repetition_penalty=1.1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def load(folder: str, dtype: str = "float32") -> seekvl.VLM:
    return seekvl.load(GOLDEN / folder, device="cpu", dtype=dtype, preprocessing="official")


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


def messages(content: dict[str, Any]) -> list[dict[str, Any]]:
    if "prompt_argument" in content:
        pictures = [picture(image) for image in content["images"]]
        return [{"role": "<|User|>", "content": content["prompt_argument"], "images": pictures}]
    return [
        turn | {"images": [picture(image) for image in turn.get("images", [])]}
        for turn in content["conversation"]
    ]


@cache
def encode(folder: str, name: str) -> ModelInput:
    """A case's prompt as model input."""
    content, processor = case(folder, name), load(folder).processor
    if content.get("apply_sft_format") is False:
        pictures = [picture(image) for image in content["images"]]
        return processor.encode_prompt(content["prompt_argument"], pictures=pictures)
    return processor(messages(content))


def model(folder: str, dtype: str = "float32") -> VL2:
    found = load(folder, dtype).model
    assert isinstance(found, VL2)
    return found


def answer(folder: str, requests: Sequence[Request], *, chunk: int | None = None) -> list[Completion]:
    vlm = load(folder)
    pieces = generate(vlm.model, vlm.tokenizer, requests=requests, chunk=chunk)
    done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
    return [done[index] for index in range(len(requests))]


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.float() - wanted).abs().max())


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_from_words_to_logits(folder: str, name: str) -> None:
    inputs, values, network = encode(folder, name), expected(folder), model(folder)
    assert torch.equal(inputs.input_ids[None], values[f"{name}/input_ids"])
    assert torch.equal(inputs.image_mask[None], values[f"{name}/images_seq_mask"])
    if inputs.pixels is not None:
        assert inputs.grids is not None
        rows = network.encode_pictures(inputs.pixels, grids=inputs.grids)
        assert worst(rows, values[f"{name}/image_token_embeds"]) < FEATURES
    assert worst(embed_prompt(network, inputs), values[f"{name}/inputs_embeds"]) < FEATURES
    logits = prompt_logits(network, inputs)
    assert worst(logits[-1:], values[f"{name}/logits_last"]) < LOGITS
    if f"{name}/logits_all" in values:
        assert worst(logits[None], values[f"{name}/logits_all"]) < LOGITS


def three_ways(folder: str, name: str, *, stop: int) -> list[Request]:
    """Free running, with the end token the golden data uses, and with a repetition penalty."""
    inputs = encode(folder, name)
    return [
        Request(inputs=inputs, params=PLAIN, strip=False),
        Request(inputs=inputs, params=PLAIN, end_id=stop),
        Request(inputs=inputs, params=PENALISED, penalise_prompt=True),
    ]


def without_marks(folder: str, ids: Sequence[int]) -> str:
    """The text of an answer as the reference prints it, which takes grounding marks for specials."""
    tokenizer = load(folder).tokenizer
    marks = {tokenizer.token_id(mark) for mark in GROUNDING_MARKS}
    return tokenizer.decode([token for token in ids if token not in marks])


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_answers_together(folder: str, name: str) -> None:
    golden, content = expected(folder), case(folder, name)
    stop = content["stop_token_id"]
    free, stopped, penalised = answer(folder, three_ways(folder, name, stop=stop))
    assert list(free.token_ids) == golden[f"{name}/generated_ids"][0].tolist()
    assert without_marks(folder, free.token_ids) == content["generated_text"][0]
    assert free.finish_reason == "length"
    until = golden[f"{name}/generated_ids_with_stop"][0].tolist()
    assert [*stopped.token_ids, stop] == until
    key = f"{name}/generated_ids_repetition_penalty_1.1"
    assert (key in golden) != ("repetition_penalty_omitted" in content)
    if key in golden:
        assert list(penalised.token_ids) == golden[key][0].tolist()


@pytest.mark.parametrize("folder", FOLDERS)
def test_answers_alone(folder: str) -> None:
    for name in ("small", "two", "text_only"):
        golden = expected(folder)[f"{name}/generated_ids"][0].tolist()
        (free,) = answer(folder, three_ways(folder, name, stop=0)[:1])
        assert list(free.token_ids) == golden


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_ragged_batch_equals_the_padded_ones(folder: str) -> None:
    """Padded left or right, rows are the single runs; here no row is padded at all."""
    batch, golden = case(folder, "batch_pad"), expected(folder)
    prompts = [encode(folder, name) for name in batch["of_cases"]]
    stop = batch["stop_token_id"]
    done = answer(
        folder,
        [
            *[Request(inputs=inputs, params=PLAIN) for inputs in prompts],
            *[Request(inputs=inputs, params=PLAIN, end_id=stop) for inputs in prompts],
        ],
    )
    assert [list(one.token_ids) for one in done[:3]] == golden["batch_pad/generated_ids"].tolist()
    for one, row in zip(done[3:], golden["batch_pad/generated_ids_with_stop"].tolist(), strict=True):
        ids = [*one.token_ids, *([stop] if one.finish_reason == "stop" else [])]
        assert ids == row[: len(ids)]
        assert len(set(row[len(ids) :])) <= 1
    for side in ("batch_pad", "batch_pad_right"):
        mask = golden[f"{side}/attention_mask"]
        for row, inputs in enumerate(prompts):
            assert torch.equal(golden[f"{side}/input_ids"][row][mask[row]], inputs.input_ids)
            assert torch.equal(golden[f"{side}/images_seq_mask"][row][mask[row]], inputs.image_mask)
    mask = golden["batch_pad/attention_mask"]
    for row, inputs in enumerate(prompts):
        found = embed_prompt(model(folder), inputs)[0]
        assert worst(found, golden["batch_pad/inputs_embeds"][row][mask[row]]) < FEATURES


@pytest.mark.parametrize(("name", "chunk"), CHUNKS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_prefill_in_chunks(folder: str, name: str, chunk: int) -> None:
    """Logits, cache contents and greedy ids are those of the official incremental prefill."""
    golden, inputs, network = expected(folder), encode(folder, name), model(folder)
    held = KVCache(network.config.language, rows=1, device=torch.device("cpu"), dtype=torch.float32)
    logits = prefill(network, inputs, cache=held, row=0, chunk=chunk)
    assert worst(logits[None], golden[f"{name}/chunk_{chunk}/logits_last"]) < LOGITS
    assert worst(logits[None], golden[f"{name}/logits_last"]) < LOGITS
    for place, layer in (("0", 0), ("last", network.config.language.layers - 1)):
        key = f"{name}/chunk_{chunk}/cache_{place}"
        if f"{key}_k" in golden:
            seen = golden[f"{key}_k"].shape[2]
            assert worst(held._keys[layer][:, :, :seen], golden[f"{key}_k"]) < LOGITS
            assert worst(held._values[layer][:, :, :seen], golden[f"{key}_v"]) < LOGITS
    (free,) = answer(folder, three_ways(folder, name, stop=0)[:1], chunk=chunk)
    assert list(free.token_ids) == golden[f"{name}/generated_ids"][0].tolist()


@pytest.mark.parametrize("folder", FOLDERS)
def test_training_loss(folder: str) -> None:
    """With every token but pictures learnt, the mean loss is the one the official forward returns."""
    content, golden, vlm = case(folder, "train"), expected(folder), load(folder)
    inputs = vlm.processor.encode(parse_messages(messages(content)), train=True)
    assert torch.equal(inputs.input_ids[None], golden["train/input_ids"])
    answers = torch.tensor(content["target_ids_with_mask_prompt_true"]) != -100
    answers[0] = False  # nothing predicts the first token
    assert inputs.loss_weights is not None
    assert torch.equal(inputs.loss_weights.bool(), answers)
    learnt = (golden["train/labels"][0] != -100).float()
    batch = collate([replace(inputs, loss_weights=learnt)], lengths=(128,), pad_id=vlm.tokenizer.pad_id)
    with torch.no_grad():
        loss = next_token_loss(vlm.model, batch)
    assert float(loss.weight) == content["n_label_tokens_after_shift"]
    assert float(loss.mean()) == pytest.approx(content["loss"], abs=1e-5)
    assert worst(prompt_logits(vlm.model, inputs)[None], golden["train/logits_all"]) < LOGITS


@pytest.mark.parametrize("folder", FOLDERS)
def test_bfloat16_stays_near_float32(folder: str) -> None:
    """Logits have a deviation of 1.3; bfloat16 keeps 8 bits. An expert chosen by a hair may change, which
    moves single logits further than in a dense model.
    """
    half = model(folder, "bfloat16")
    for name in ("two", "text_only"):
        logits = prompt_logits(half, encode(folder, name))
        difference = (logits[-1:] - expected(folder)[f"{name}/logits_last"]).abs()
        assert difference.mean() < 0.06
        assert difference.max() < 0.4


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_object_users_hold_penalises_the_prompt(folder: str) -> None:
    content, golden = case(folder, "wide"), expected(folder)
    found = load(folder).chat(messages(content), max_new_tokens=16, repetition_penalty=1.1)
    assert found.token_ids == golden["wide/generated_ids_repetition_penalty_1.1"][0].tolist()
    assert found.usage.image_tokens == content["num_image_tokens"][0]
