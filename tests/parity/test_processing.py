"""Prompts, ids, masks and pixels against what the published code and transformers computed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from seekvl.processing.encode import Processor
from seekvl.processing.pad_image import PadImageConfig, prepare_picture, resized_size
from seekvl.processing.picture import open_picture
from seekvl.processing.template import DEEPSEEK, render_pairs
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError

GOLDEN = Path(__file__).parents[1] / "golden"
SIDES = {"vl1-siglip": 6, "vl1-hybrid": 24}
IMAGES = GOLDEN / "images"


def read(path: str) -> Any:
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


def sha(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def picture(name: str) -> Path:
    return IMAGES / f"{name}.png"


def official_config(path: str, side: int) -> PadImageConfig:
    stored = read(path)
    return PadImageConfig(
        image_size=stored["image_size"],
        patch_slots_side=side,
        min_size=stored["min_size"],
        mean=tuple(stored["image_mean"]),
        std=tuple(stored["image_std"]),
        do_normalize=stored["do_normalize"],
        background=tuple(stored["background_color"]),
        rescale_factor=stored["rescale_factor"],
    )


def transformers_config(folder: str, side: int) -> PadImageConfig:
    stored = read(f"transformers-layout/{folder}/preprocessor_config.json")
    hybrid = "high_res_size" in stored
    prefix = "high_res_" if hybrid else ""
    return PadImageConfig(
        image_size=stored[f"{prefix}size"]["height"],
        patch_slots_side=side,
        mean=tuple(stored[f"{prefix}image_mean"]),
        std=tuple(stored[f"{prefix}image_std"]),
        do_normalize=True,
        background=tuple(stored[f"{prefix}background_color"]),
        low_size=stored["size"]["height"] if hybrid else None,
        low_mean=tuple(stored["image_mean"]),
        low_std=tuple(stored["image_std"]),
    )


def processor(folder: str) -> Processor:
    config = official_config(f"{folder}/preprocessor_config.json", SIDES[folder])
    return Processor(
        Tokenizer.from_file(GOLDEN / folder / "tokenizer.json"), config, DEEPSEEK, preprocessing="official"
    )


@pytest.mark.parametrize("size", ["384", "1024"])
def test_published_pixels_are_bit_exact(size: str) -> None:
    config = official_config(f"vl1-processor-published/preprocessor_config_{size}.json", 24)
    stored = read("vl1-processor-published/cases.json")[size]
    assert config.pad_colour == tuple(stored["background_color"])
    for case in stored["images"]:
        prepared = prepare_picture(open_picture(picture(case["image"])), config, mode="official")
        assert sha(prepared.pixels) == case["pixel_values_sha256"], case["image"]


@pytest.mark.parametrize("size", ["384", "1024"])
def test_resize_table(size: str) -> None:
    config = official_config(f"vl1-processor-published/preprocessor_config_{size}.json", 24)
    table = read("vl1-processor-published/cases.json")[size]["resize_table"]["rows"]
    assert len(table) > 20
    for width, height, new_height, new_width, rounding_differs in table:
        assert resized_size(width, height, config, mode="official") == (new_width, new_height)
        rounded = resized_size(width, height, config, mode="transformers")
        assert (rounded != (new_width, new_height)) == rounding_differs


@pytest.mark.parametrize("folder", SIDES)
def test_cases(folder: str) -> None:
    process, cases = processor(folder), read(f"{folder}/cases.json")["cases"]
    with safe_open(GOLDEN / folder / "cases.safetensors", framework="pt") as tensors:
        for case in cases:
            if case["name"] == "batch_pad":
                continue
            if "conversation" in case:
                messages = [
                    {**message, "images": [picture(name) for name in message.get("images", [])]}
                    for message in case["conversation"]
                ]
                inputs = process(messages)
            else:
                shown = [picture(name) for name in case["images"]]
                inputs = process.encode_prompt(case["prompt_argument"], pictures=shown)
            name = case["name"]
            assert inputs.prompt == case["prompt"], name
            assert torch.equal(inputs.input_ids, tensors.get_tensor(f"{name}/input_ids")[0]), name
            assert list(inputs.bill.image_tokens) == case["num_image_tokens"]
            assert torch.equal(inputs.image_mask, inputs.input_ids == process.tokenizer.image_id)
            hashes = [] if inputs.pixels is None else [sha(pixels) for pixels in inputs.pixels]
            assert hashes == case.get("pixel_values_sha256", []), name


@pytest.mark.parametrize("folder", SIDES)
def test_image_masks(folder: str) -> None:
    process = processor(folder)
    seen = 0
    with safe_open(GOLDEN / folder / "cases.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  a safetensors file is no mapping
            if not key.endswith("/images_seq_mask") or key.startswith("batch"):
                continue
            name = key.partition("/")[0]
            ids = tensors.get_tensor(f"{name}/input_ids")[0]
            expected = tensors.get_tensor(key)[0].bool()
            assert torch.equal(ids == process.tokenizer.image_id, expected)
            seen += 1
    assert seen >= 5


@pytest.mark.parametrize("folder", SIDES)
def test_single_pixels(folder: str) -> None:
    config = official_config(f"{folder}/preprocessor_config.json", SIDES[folder])
    for case in read(f"{folder}/cases.json")["pixels"]:
        image = open_picture(picture(case["image"]))
        width, height = resized_size(image.width, image.height, config, mode="official")
        assert [height, width] == case["resized_hw"]
        pixels = prepare_picture(image, config, mode="official").pixels
        assert sha(pixels) == case["pixel_values_sha256"], case["image"]


@pytest.mark.parametrize("folder", SIDES)
def test_templates(folder: str) -> None:
    stored, process = read(f"{folder}/cases.json"), processor(folder)
    for case in stored["templates"]:
        pairs = [
            (turn["role"], turn["content"]) if isinstance(turn, dict) else tuple(turn)
            for turn in case["conversation"]
        ]
        prompt = render_pairs(pairs, system=case.get("system_prompt", stored["system_prompt"]))
        assert prompt == case["prompt"]
        assert process.encode_prompt(prompt).input_ids.tolist() == case["input_ids"]


@pytest.mark.parametrize("folder", SIDES)
def test_tokenizer(folder: str) -> None:
    stored, tokenizer = read(f"{folder}/cases.json"), processor(folder).tokenizer
    ids = stored["ids"]
    assert tokenizer.bos_id == ids["bos"]
    assert tokenizer.eos_id == ids["eos"]
    assert tokenizer.pad_id == ids["pad"]
    assert tokenizer.image_id == ids["image"]
    assert tokenizer.vocab_size == ids["tokenizer_len"]
    for case in stored["tokenizer"]:
        assert tokenizer.encode(case["text"], specials=True) == case["ids_no_special"]
        assert tokenizer.decode(case["ids"], skip_specials=False) == case["decoded"]
        assert tokenizer.decode(case["ids"]) == case["decoded_skip_special"]


@pytest.mark.parametrize("folder", SIDES)
def test_generated_text(folder: str) -> None:
    tokenizer = processor(folder).tokenizer
    with safe_open(GOLDEN / folder / "cases.safetensors", framework="pt") as tensors:
        for case in read(f"{folder}/cases.json")["cases"]:
            rows = tensors.get_tensor(f"{case['name']}/generated_ids").tolist()
            assert [tokenizer.decode(row) for row in rows] == case["generated_text"]
            whole = [tokenizer.decode(row, skip_specials=False) for row in rows]
            assert whole == case["generated_text_with_special"]


@pytest.mark.parametrize("folder", SIDES)
def test_odd_inputs(folder: str) -> None:
    """What the reference guesses about is refused; the rest equals it."""
    process = processor(folder)
    odd = {case["what"]: case for case in read(f"{folder}/cases.json")["odd_inputs"]}

    def ask(what: str, pictures: int) -> Any:
        first, *rest = odd[what]["input"]
        return process([{**first, "images": [picture("tiny_5x3")] * pictures}, *rest])

    with pytest.raises(SeekVLError, match="2 <image_placeholder> in its text but 1 pictures"):
        ask("two placeholders, one image", 1)
    with pytest.raises(SeekVLError, match="1 <image_placeholder> in its text but 2 pictures"):
        ask("one placeholder, two images", 2)
    with pytest.raises(SeekVLError, match="unknown role 'Human'"):
        ask("unknown role names are inserted literally", 0)
    with pytest.raises(SeekVLError, match="turn 1 \\(user\\) is empty"):
        ask("empty user content", 0)
    with pytest.raises(SeekVLError, match="message 2 has no content \\(None\\)"):
        ask("assistant content None", 0)
    in_front = ask("no placeholder, one image", 1)
    assert in_front.prompt.endswith("User: <image_placeholder>a\n\nAssistant:")
    assert int(in_front.image_mask.sum()) == process.picture_tokens
    inside = ask("placeholder inside a longer word", 1)
    expected = odd["placeholder inside a longer word"]["result"]
    assert inside.prompt == expected["prompt"]
    assert len(inside.input_ids) == expected["n_input_ids"]
    ends_with_user = ask("conversation ending with a user message", 0)
    expected = odd["conversation ending with a user message"]["result"]
    assert ends_with_user.prompt == expected["prompt"] + "\n\nAssistant:"


@pytest.mark.parametrize(("folder", "side"), [("deepseek_vl", 6), ("deepseek_vl_hybrid", 24)])
def test_transformers(folder: str, side: int) -> None:
    config = transformers_config(folder, side)
    tokenizer = Tokenizer.from_file(GOLDEN / "transformers-layout" / folder / "tokenizer.json")
    process = Processor(tokenizer, config, DEEPSEEK, preprocessing="transformers")
    official = {"deepseek_vl": "vl1-siglip", "deepseek_vl_hybrid": "vl1-hybrid"}[folder]
    asked = {case["name"]: case for case in read(f"{official}/cases.json")["cases"]}
    for case in read(f"transformers-layout/{folder}/cases.json")["cases"]:
        source = asked[case["name"]]
        if "conversation" in source:
            messages = [
                {**message, "images": [picture(name) for name in message.get("images", [])]}
                for message in source["conversation"]
            ]
            inputs = process(messages)
        else:
            shown = [picture(name) for name in source["images"]]
            inputs = process.encode_prompt(source["prompt_argument"], pictures=shown)
        ids = case["input_ids"]
        assert inputs.input_ids.tolist() == (ids[0] if isinstance(ids[0], list) else ids), case["name"]
        if inputs.pixels is None:
            continue
        assert inputs.normalized
        hashes = case["pixel_sha256"]
        if inputs.low_pixels is None:
            assert sha(inputs.pixels) == hashes["pixel_values"]
        else:
            assert sha(inputs.pixels) == hashes["high_res_pixel_values"]
            assert sha(inputs.low_pixels) == hashes["pixel_values"]
