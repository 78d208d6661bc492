"""Fresh random tiny models against transformers' own classes, weights going in both directions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seekvl.models.vl import VL
from seekvl.weights.config import read_config
from seekvl.weights.load import load_model
from seekvl.weights.save import save_checkpoint

transformers = pytest.importorskip("transformers", minversion="5.0")

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers-layout"
IMAGE = {"deepseek_vl": 682, "deepseek_vl_hybrid": 622}
"""Image token id in the golden tokenizer that each model borrows."""

ROWS = 700
NAMES = list(IMAGE)

FLOAT32 = 1e-5
"""Largest difference of a logit in float32; logits have a deviation near 1."""

BFLOAT16 = 0.12
"""Largest difference of a logit in bfloat16: both sides round to 8 bits at every step, in another order."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny(name: str) -> Any:
    """Make a transformers model of random weights, smaller than the golden ones: 4 x 4 visual tokens."""
    text: dict[str, object] = {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
    }
    text |= {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    text |= {"tie_word_embeddings": False}
    vision: dict[str, object] = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 16}
    vision |= {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"hidden_act": "gelu", "vision_use_head": False}
    values: dict[str, Any] = {"text_config": text, "vision_config": vision, "image_token_id": IMAGE[name]}
    values |= {"tie_word_embeddings": False}
    if name == "deepseek_vl":
        config = transformers.DeepseekVLConfig(**values)
        model = transformers.DeepseekVLForConditionalGeneration(config)
    else:
        values["high_res_vision_config"] = {
            "model_type": "sam_vision_model",
            "image_size": 160,
            "patch_size": 16,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "window_size": 4,
            "global_attn_indexes": [1, 2],
            "output_channels": 8,
        }
        config = transformers.DeepseekVLHybridConfig(**values)
        model = transformers.DeepseekVLHybridForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(20240311)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.12 if parameter.ndim > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and parameter.numel() > 1 else 0.0))
    return model.eval()


def settings(name: str) -> dict[str, object]:
    """Return the picture settings of the tiny models."""
    values: dict[str, object] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_size": 14}
    values |= {"size": {"height": 64, "width": 64}, "resample": 3}
    if name == "deepseek_vl_hybrid":
        values |= {"resample": 2, "high_res_resample": 3, "high_res_size": {"height": 160, "width": 160}}
        values |= {"high_res_image_mean": [0.48, 0.46, 0.41], "high_res_image_std": [0.27, 0.26, 0.28]}
    return values


def inputs(name: str) -> dict[str, Tensor]:
    """Make two pictures and a row of tokens with their slots."""
    generator = torch.Generator().manual_seed(7)
    slots = torch.full((16,), IMAGE[name])
    words = [torch.randint(0, 600, (n,), generator=generator) for n in (5, 3, 4)]
    values = {"input_ids": torch.cat((words[0], slots, words[1], slots, words[2]))[None]}
    values["pixel_values"] = torch.randn(2, 3, 64, 64, generator=generator)
    if name == "deepseek_vl_hybrid":
        values["high_res_pixel_values"] = torch.randn(2, 3, 160, 160, generator=generator)
    return values


def theirs(model: Any, values: dict[str, Tensor]) -> Tensor:
    floats = {key: value.to(model.dtype) for key, value in values.items() if key != "input_ids"}
    with torch.no_grad():
        logits: Tensor = model(input_ids=values["input_ids"], **floats).logits
    return logits


def ours(model: VL, values: dict[str, Tensor]) -> Tensor:
    dtype = model.language.norm.weight.dtype
    pixels, low = values["pixel_values"].to(dtype), None
    if "high_res_pixel_values" in values:
        pixels, low = values["high_res_pixel_values"].to(dtype), pixels
    ids = values["input_ids"]
    logits: Tensor = model(ids, image_mask=ids > 600, pixels=pixels, low_pixels=low, normalized=True)
    return logits


def folder_of(model: Any, name: str, path: Path) -> Path:
    """Save a transformers model with its own code, and the settings its processor would write."""
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(settings(name)))
    shutil.copyfile(GOLDEN / name / "tokenizer.json", path / "tokenizer.json")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_their_weights_in_our_network(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    folder = folder_of(model, name, tmp_path / "theirs")
    mine = load_model(folder, config=read_config(folder), device="cpu", dtype="float32")
    values = inputs(name)
    wanted = theirs(model, values)
    assert wanted.std() > 0.5
    assert (ours(mine, values) - wanted).abs().max() < FLOAT32
    half = load_model(folder, config=read_config(folder), device="cpu", dtype="bfloat16")
    assert (ours(half, values) - theirs(model.bfloat16(), values)).abs().max() < BFLOAT16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_our_weights_in_their_network(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny(name)
    folder = folder_of(source, name, tmp_path / "theirs")
    config = read_config(folder)
    mine = load_model(folder, config=config, device="cpu", dtype=dtype)
    saved = tmp_path / "ours"
    save_checkpoint(mine, saved, config=config, tokenizer=GOLDEN / name / "tokenizer.json")
    back, report = type(source).from_pretrained(saved, output_loading_info=True, dtype=dtype)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert back.config.tie_word_embeddings is False
    wanted = {key: value.to(dtype) for key, value in source.state_dict().items()}
    found = back.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    values = inputs(name)
    limit = FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert (ours(mine, values).float() - theirs(back.eval(), values).float()).abs().max() < limit


@pytest.mark.parametrize("name", NAMES)
def test_what_we_save_of_a_golden_model_runs_in_theirs(name: str, tmp_path: Path) -> None:
    """From the official layout through our code into transformers: the published map, end to end."""
    official = GOLDEN.parent / ("vl1-siglip" if name == "deepseek_vl" else "vl1-hybrid")
    config = read_config(official)
    model = load_model(official, config=config, device="cpu", dtype="float32")
    save_checkpoint(
        model, tmp_path / "ours", config=config, tokenizer=official / "tokenizer.json", layout="transformers"
    )
    back = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    golden = transformers.AutoModelForImageTextToText.from_pretrained(GOLDEN / name, dtype=torch.float32)
    wanted, found = golden.state_dict(), back.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted if ".head." not in key)
