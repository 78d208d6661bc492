"""Prompts, ids, masks, labels, grids and tiles of DeepSeek-VL2 against what the published code computed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from seekvl.processing.conversation import parse_messages
from seekvl.processing.encode import ModelInput, Processor
from seekvl.processing.picture import open_picture
from seekvl.processing.template import DEEPSEEK_VL2
from seekvl.processing.tile_image import (
    GRIDS_9,
    TileImageConfig,
    choose_grid,
    plan_grid,
    prepare_tiles,
    tile_count,
    visual_tokens,
)
from seekvl.processing.tokenizer import EOS, GROUNDING_MARKS, VL2_ADDED, VL2_IMAGE, VL2_PAD, Tokenizer
from seekvl.runtime import SeekVLError

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("vl2-tiny-like", "vl2-small-like", "vl2-base-like")


def read(path: str) -> Any:
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


def picture(name: str) -> Path:
    return GOLDEN / "images" / f"{name}.png"


def sha(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def in_bytes(pixels: Tensor) -> Tensor:
    return torch.round((pixels * 0.5 + 0.5) * 255).to(torch.uint8)


def official_tiles(pixels: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
    """Repeat the tile of each picture with a single one: the reference computes it twice."""
    parts = pixels.split([tile_count(grid) for grid in grids])
    return torch.cat([part.repeat(2, 1, 1, 1) if len(part) == 1 else part for part in parts])


def image_config(folder: str) -> TileImageConfig:
    stored = read(f"{folder}/processor_config.json")
    side = stored["candidate_resolutions"][0][0]
    return TileImageConfig(
        image_size=side,
        grids=tuple((width // side, height // side) for width, height in stored["candidate_resolutions"]),
        patch_size=stored["patch_size"],
        downsample=stored["downsample_ratio"],
        mean=tuple(stored["image_mean"]),
        std=tuple(stored["image_std"]),
    )


def processor(folder: str) -> Processor:
    tokenizer = Tokenizer.from_file(
        GOLDEN / folder / "tokenizer.json", image=VL2_IMAGE, pad=VL2_PAD, added=VL2_ADDED
    )
    return Processor(tokenizer, image_config(folder), DEEPSEEK_VL2, preprocessing="official")


def encode(process: Processor, case: dict[str, Any]) -> ModelInput:
    """Encode a stored case; the prompt with a template is a conversation of one turn."""
    pictures = [picture(name) for name in case["images"]]
    if not case.get("apply_sft_format", True):
        return process.encode_prompt(case["prompt_argument"], pictures=pictures)
    messages = case.get("conversation")
    if messages is None:
        messages = [{"role": "<|User|>", "content": case["prompt_argument"], "images": case["images"]}]
    shown = [
        {**message, "images": [picture(name) for name in message.get("images", [])]} for message in messages
    ]
    return process.encode(parse_messages(shown), train=case.get("inference_mode") is False)


def printed(case: dict[str, Any]) -> str:
    """Return the stored prompt without what the reference prints but does not feed."""
    text: str = case["sft_format"]
    if case["name"] == "turns_two_images":
        return text.replace("user:", "<|User|>:").replace("assistant:", "<|Assistant|>:")
    if case["name"] == "system_role":
        return text.replace("system: ", "").replace("reader.\n\n", "reader.").replace(EOS, "\n\n")
    return text.removeprefix(f"{case.get('system_prompt', '')}\n\n")


@pytest.mark.parametrize("folder", FOLDERS)
def test_cases(folder: str) -> None:
    process = processor(folder)
    with safe_open(GOLDEN / folder / "cases.safetensors", framework="pt") as tensors:
        keys = set(tensors.keys())
        for case in read(f"{folder}/cases.json")["cases"]:
            name = case["name"]
            if name == "batch_pad":
                continue
            inputs = encode(process, case)
            assert inputs.input_ids.tolist() == case["input_ids"], name
            assert inputs.image_mask.tolist() == tensors.get_tensor(f"{name}/images_seq_mask")[0].tolist()
            assert list(inputs.bill.image_tokens) == case["num_image_tokens"]
            assert inputs.grids is not None
            assert [list(grid) for grid in inputs.grids] == case["images_spatial_crop"][: len(case["images"])]
            assert inputs.prompt == printed(case), name
            labels = inputs.input_ids.masked_fill(inputs.image_mask, -100)
            assert labels.tolist() == case["target_ids"]
            if not case["images"]:
                assert inputs.pixels is None
                continue
            assert inputs.normalized
            assert inputs.pixels is not None
            tiles = official_tiles(inputs.pixels, inputs.grids)
            assert sha(tiles) == case["tiles_float32_sha256"], name
            if f"{name}/tiles_u8" in keys:
                assert torch.equal(in_bytes(tiles), tensors.get_tensor(f"{name}/tiles_u8"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_answers_are_learnt_as_with_a_masked_prompt(folder: str) -> None:
    process = processor(folder)
    case = next(case for case in read(f"{folder}/cases.json")["cases"] if case["name"] == "train")
    inputs = encode(process, case)
    assert inputs.loss_weights is not None
    labels = inputs.input_ids.masked_fill(inputs.loss_weights == 0, -100)
    assert labels[1:].tolist() == case["target_ids_with_mask_prompt_true"][1:]  # BOS is never predicted


@pytest.mark.parametrize("folder", FOLDERS)
def test_batch_rows_are_the_single_inputs(folder: str) -> None:
    process = processor(folder)
    cases = {case["name"]: case for case in read(f"{folder}/cases.json")["cases"]}
    with safe_open(GOLDEN / folder / "cases.safetensors", framework="pt") as tensors:
        padded = tensors.get_tensor("batch_pad/input_ids")
        attended = tensors.get_tensor("batch_pad/attention_mask").bool()
        for row, name in enumerate(cases["batch_pad"]["of_cases"]):
            ids = encode(process, cases[name]).input_ids
            assert padded[row][attended[row]].tolist() == ids.tolist()


@pytest.mark.parametrize("folder", FOLDERS)
def test_grids_with_the_candidates_of_the_checkpoint(folder: str) -> None:
    config = image_config(folder)
    table = read(f"{folder}/cases.json")["best_resolution_table"]["rows"]
    assert len(table) == 60
    for width, height, best_width, best_height in table:
        columns, rows = choose_grid(width, height, grids=config.grids, tile=config.image_size)
        assert (columns * config.image_size, rows * config.image_size) == (best_width, best_height)


def test_published_sizes() -> None:
    config = image_config("vl2-processor-published")
    assert config.grids == GRIDS_9
    table = read("vl2-processor-published/cases.json")["best_resolution_table"]["rows"]
    assert len(table) == 86
    for width, height, _, _, columns, rows, tiles, tokens in table:
        grid = choose_grid(width, height, grids=config.grids, tile=384)
        assert grid == (columns, rows), (width, height)
        assert visual_tokens(grid, config) == tokens
        assert tile_count(grid) == (1 if grid == (1, 1) else tiles)


def test_published_tiles() -> None:
    config = image_config("vl2-processor-published")
    for case in read("vl2-processor-published/cases.json")["images"]:
        image = open_picture(picture(case["image"]))
        grid = plan_grid(image.size, config, pictures=1 if case["cropping"] else 3)
        assert list(grid) == case["spatial_crop"]
        assert visual_tokens(grid, config) == case["n_image_tokens"]
        tiles = official_tiles(prepare_tiles(image, config, grid=grid, mode="official").pixels, (grid,))
        assert sha(tiles) == case["tiles_float32_sha256"], case["image"]
        with Image.open(GOLDEN / "vl2-processor-published" / case["tiles_file"]) as stored:
            column = np.asarray(stored.convert("RGB"))
        assert np.array_equal(in_bytes(tiles).permute(0, 2, 3, 1).reshape(column.shape).numpy(), column)


@pytest.mark.parametrize("folder", FOLDERS)
def test_tokenizer(folder: str) -> None:
    stored, tokenizer = read(f"{folder}/cases.json"), processor(folder).tokenizer
    ids = stored["ids"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (ids["bos"], ids["eos"], ids["pad"])
    assert tokenizer.image_id == ids["image"]
    assert tokenizer.vocab_size == ids["tokenizer_len"]
    assert {text: tokenizer.token_id(text) for text in ids["special"]} == ids["special"]
    for case in stored["tokenizer"]:
        assert tokenizer.encode(case["text"], specials=True) == case["ids_no_special"]
        assert tokenizer.decode(case["ids"], skip_specials=False) == case["decoded"]
        assert tokenizer.decode(without_marks(tokenizer, case["ids"])) == case["decoded_skip_special"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_generated_text(folder: str) -> None:
    tokenizer = processor(folder).tokenizer
    with safe_open(GOLDEN / folder / "cases.safetensors", framework="pt") as tensors:
        for case in read(f"{folder}/cases.json")["cases"]:
            if "generated_text" not in case:
                continue
            rows = tensors.get_tensor(f"{case['name']}/generated_ids").tolist()
            texts = [tokenizer.decode(without_marks(tokenizer, row)) for row in rows]
            assert texts == case["generated_text"]
            whole = [tokenizer.decode(row, skip_specials=False) for row in rows]
            assert whole == case["generated_text_with_special"]


def without_marks(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Drop the grounding marks, which the reference takes for specials."""
    marks = {tokenizer.token_id(mark) for mark in GROUNDING_MARKS}
    return [token for token in ids if token not in marks]


ODD = {
    "two tags, one image": "2 <image> in its text but 1 pictures",
    "one tag, two images": "1 <image> in its text but 2 pictures",
    "image tag in the assistant's message": "1 <image> in its text but 0 pictures",
    "system message that is not first": "may only be the first message",
    "empty user content": "turn 1 \\(user\\) is empty",
    "two assistant messages in a row": "two assistant messages in a row",
    "two user messages in a row": "two user messages in a row",
    "user content is not a string (number)": "message 1 has content of int",
    "prompt mode: two tags, one image": "the prompt has 2 <image> but 1 pictures",
}
"""What the reference guesses about, or fails at without a word, and how it is refused here."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_odd_inputs(folder: str) -> None:
    process, seen = processor(folder), 0
    for case in read(f"{folder}/cases.json")["odd_inputs"]:
        what, given, shown = case["what"], case["input"], [picture("tiny_5x3")] * case["n_images"]

        def ask(given: Any = given, shown: Any = shown, what: str = what) -> ModelInput:
            if isinstance(given, str) and "with template" not in what:
                return process.encode_prompt(given, pictures=shown)
            turns = [{"role": "<|User|>", "content": given}] if isinstance(given, str) else given
            return process([{**turns[0], "images": shown} if shown else turns[0], *turns[1:]])

        if what in ODD:
            with pytest.raises(SeekVLError, match=ODD[what]):
                ask()
        elif "result" in case and what != "no tag, one image":
            assert ask().input_ids.tolist() == case["result"]["input_ids"], what
        else:
            continue
        seen += 1
    assert seen >= 13


def test_a_picture_without_a_tag_is_seen_all_the_same() -> None:
    """The reference drops it and answers blind."""
    process = processor("vl2-tiny-like")
    for role in ("<|User|>", "user"):
        inputs = process([{"role": role, "content": "a", "images": [picture("tiny_5x3")]}])
        assert inputs.prompt == "<|User|>: <image>\na\n\n<|Assistant|>:"
        assert int(inputs.image_mask.sum()) == process.picture_tokens
