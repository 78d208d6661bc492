"""Golden checkpoints of both layouts, from files to logits, against the reference's values (float32, CPU)."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from seekvl.models.hybrid import Hybrid
from seekvl.processing.encode import ModelInput
from seekvl.weights.load import Checkpoint, load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["single", "single_zh", "multi", "multi_turn", "text_only", "prompt_mode"]
OFFICIAL = [(name, case) for name in ("vl1-siglip", "vl1-hybrid") for case in CASES]
TRANSFORMERS = [("deepseek_vl", case) for case in CASES]
TRANSFORMERS += [("deepseek_vl_hybrid", case) for case in ("single", "single_zh", "text_only")]

FEATURES = 3e-5
LOGITS = 1e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def load(folder: str, *, preprocessing: str, dtype: str = "float32") -> Checkpoint:
    return load_checkpoint(GOLDEN / folder, device="cpu", dtype=dtype, preprocessing=preprocessing)  # type: ignore[arg-type]


@cache
def tensors(folder: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / folder / "cases.safetensors")


@cache
def cases(folder: str) -> dict[str, dict[str, object]]:
    content = json.loads((GOLDEN / folder / "cases.json").read_text(encoding="utf-8"))
    return {case["name"]: case for case in content["cases"]}


def encode(checkpoint: Checkpoint, name: str, case: str) -> ModelInput:
    """Encode a golden conversation, or raw prompt, of an official folder."""
    said = cases(name)[case]
    pictures = [GOLDEN / "images" / f"{image}.png" for image in said["images"]]  # type: ignore[attr-defined]
    if "prompt_argument" in said:
        return checkpoint.processor.encode_prompt(str(said["prompt_argument"]), pictures=pictures)
    turns = [
        turn | {"images": [str(GOLDEN / "images" / f"{image}.png") for image in turn.get("images", [])]}
        for turn in said["conversation"]  # type: ignore[attr-defined]
    ]
    return checkpoint.processor(turns)


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max())


def expected(folder: str, case: str, name: str, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return found and expected values, both thinned to every fifth place where the golden file is."""
    values = tensors(folder)
    if f"{case}/{name}" in values:
        return found, values[f"{case}/{name}"]
    return found[:, ::5], values[f"{case}/{name}_every_5th"]


@pytest.mark.parametrize(("name", "case"), OFFICIAL)
def test_official_folder(name: str, case: str) -> None:
    checkpoint = load(name, preprocessing="official")
    model, inputs, values = checkpoint.model, encode(checkpoint, name, case), tensors(name)
    assert torch.equal(inputs.input_ids[None], values[f"{case}/input_ids"])
    assert torch.equal(inputs.image_mask[None], values[f"{case}/images_seq_mask"])
    features = None
    if inputs.pixels is not None:
        if isinstance(model.vision, Hybrid):
            high, low = model.vision(inputs.pixels, normalized=inputs.normalized)
            assert worst(*expected(name, case, "vision_features_high", high)) < FEATURES
            assert worst(*expected(name, case, "vision_features_low", low)) < FEATURES
            features = model.adaptor((high, low))
        else:
            single = model.vision(inputs.pixels, normalized=inputs.normalized)
            assert worst(*expected(name, case, "vision_features", single)) < FEATURES
            features = model.adaptor(single)
        assert worst(*expected(name, case, "projector_output", features)) < FEATURES
    embeds = model.embed(inputs.input_ids[None], image_mask=inputs.image_mask[None], image_features=features)
    assert worst(*expected(name, case, "inputs_embeds", embeds)) < FEATURES
    logits = model.head(model.hidden(embeds))
    assert worst(logits[:, -1], values[f"{case}/logits_last"]) < LOGITS
    if f"{case}/logits_all" in values:
        wanted = values[f"{case}/logits_all"]
        assert worst(logits[:, -wanted.shape[1] :], wanted) < LOGITS


@pytest.mark.parametrize(("name", "case"), TRANSFORMERS)
def test_transformers_folder(name: str, case: str) -> None:
    folder = f"transformers-layout/{name}"
    checkpoint = load(folder, preprocessing="transformers")
    official = "vl1-siglip" if name == "deepseek_vl" else "vl1-hybrid"
    inputs, values = encode(checkpoint, official, case), tensors(folder)
    said = cases(folder)[case]["input_ids"]
    assert inputs.input_ids.tolist() == (said[0] if isinstance(said[0], list) else said)  # type: ignore[index]
    model = checkpoint.model
    features = None
    if inputs.pixels is not None:
        features = model.encode_pictures(
            inputs.pixels, low_pixels=inputs.low_pixels, normalized=inputs.normalized
        )
        wanted = values[f"{case}/image_features"]
        step = features.shape[1] // wanted.shape[1]
        assert worst(features[:, ::step], wanted) < FEATURES
    embeds = model.embed(inputs.input_ids[None], image_mask=inputs.image_mask[None], image_features=features)
    logits = model.head(model.hidden(embeds)[:, -1])
    assert worst(logits, values[f"{case}/logits_last"]) < LOGITS


@pytest.mark.parametrize("name", ["vl1-siglip", "vl1-hybrid"])
def test_both_layouts_of_a_model_compute_the_same(name: str) -> None:
    """Equal weights, so equal to the last bit where the pixels are."""
    other = "deepseek_vl" if name == "vl1-siglip" else "deepseek_vl_hybrid"
    one = load(name, preprocessing="official")
    two = load(f"transformers-layout/{other}", preprocessing="official")
    a, b = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a.keys() == b.keys()
    inputs = encode(one, name, "prompt_mode"), encode(two, name, "prompt_mode")
    logits = [
        checkpoint.model(
            x.input_ids[None], image_mask=x.image_mask[None], pixels=x.pixels, normalized=x.normalized
        )
        for checkpoint, x in zip((one, two), inputs, strict=True)
    ]
    assert worst(*logits) < LOGITS


@pytest.mark.parametrize("name", ["vl1-siglip", "vl1-hybrid"])
def test_bfloat16_stays_near_float32(name: str) -> None:
    """Logits have a deviation of 1.3; bfloat16 keeps 8 bits, which moves them by a few hundredths, at most
    0.15.
    """
    checkpoint = load(name, preprocessing="official", dtype="bfloat16")
    inputs = encode(checkpoint, name, "prompt_mode")
    assert inputs.pixels is not None
    logits = checkpoint.model(
        inputs.input_ids[None],
        image_mask=inputs.image_mask[None],
        pixels=inputs.pixels.bfloat16(),
        normalized=inputs.normalized,
    )
    assert logits.dtype == torch.bfloat16
    difference = (logits[:, -1].float() - tensors(name)["prompt_mode/logits_last"]).abs()
    assert difference.max() < 0.15
    assert difference.mean() < 0.03
