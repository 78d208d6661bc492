"""Makes seekvl/weights/selfcheck from the golden vectors: python tests/weights/make_selfcheck.py."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TARGET = ROOT / "seekvl" / "weights" / "selfcheck"

MINIATURES = {"vl1-hybrid": ("single_zh", "text_only"), "vl2-small-like": ("two", "grounding_turns")}
"""Checkpoints that are taken whole, with the cases asked of each."""
TENSORS = (
    "input_ids",
    "vision_features_high_every_5th",
    "vision_features_low_every_5th",
    "image_token_embeds",
    "logits_last",
    "generated_ids",
)

ROUTERS = ("vl2-base-like", "vl2-tiny-like")
"""Checkpoints of which attention and router of the first layer with experts are taken."""
FIRST = "language.model.layers.1."
CONFIGS = ("config.json", "processor_config.json", "tokenizer_config.json", "special_tokens_map.json")

ANSWERS = ("one box", "one label, two boxes", "two labels", "chinese text around", "no spaces")


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "images").mkdir(parents=True)
    for name in MINIATURES:
        miniature(GOLDEN / name, TARGET / name)
    for name in ROUTERS:
        router(GOLDEN / name, TARGET / name)
    parsed = json.loads((GOLDEN / "grounding-parse" / "cases.json").read_text(encoding="utf-8"))["cases"]
    answers = {case["name"]: case for case in parsed}
    write_json(TARGET / "grounding.json", {name: boxes_of(answers[name]) for name in ANSWERS})


def miniature(source: Path, target: Path) -> None:
    """Copy a checkpoint, and what the reference computed in its cases."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("cases"):
            shutil.copyfile(path, target / path.name)
    every = {case["name"]: case for case in json.loads((source / "cases.json").read_text("utf-8"))["cases"]}
    cases = {name: every[name] for name in MINIATURES[source.name]}
    write_json(target / "expected.json", {name: said(case) for name, case in cases.items()})
    values = load_file(source / "cases.safetensors")
    keys = [f"{name}/{tensor}" for name in cases for tensor in TENSORS]
    write_tensors(target / "expected.safetensors", {key: values[key] for key in keys if key in values})
    for image in (image for case in cases.values() for image in case["images"]):
        shutil.copyfile(GOLDEN / "images" / f"{image}.png", TARGET / "images" / f"{image}.png")


def said(case: dict[str, Any]) -> dict[str, Any]:
    """What is not a tensor of a case: its conversation, its prompt, the digest of its pixels."""
    turns = [
        turn | {"images": [f"{image}.png" for image in turn.get("images", [])]}
        for turn in case["conversation"]
    ]
    entry = {"conversation": turns, "prompt": case["prompt"] if "prompt" in case else case["sft_format"]}
    if "pixel_values_sha256" in case and case["images"]:
        (entry["pixels_sha256"],) = case["pixel_values_sha256"]
    elif "tiles_float32_sha256" in case:
        entry["pixels_sha256"] = case["tiles_float32_sha256"]
    return entry


def router(source: Path, target: Path) -> None:
    """Copy attention and router of a layer, what goes into it, and where its router sends each token."""
    target.mkdir()
    for name in CONFIGS:
        shutil.copyfile(source / name, target / name)
    weights: dict[str, Tensor] = {}
    for path in sorted(source.glob("model-*.safetensors")):
        weights |= {key: value for key, value in load_file(path).items() if key.startswith(FIRST)}
    parts = {key: value for key, value in weights.items() if "expert" not in key}
    write_tensors(target / "layer.safetensors", parts)
    values = load_file(source / "cases.safetensors")
    expected = {
        "hidden": values["small/debug/llm_hidden_states"][1],
        "experts": values["small/debug/moe_0_topk_idx_sorted"],
        "weights": values["small/debug/moe_0_topk_weight"],
    }
    write_tensors(target / "expected.safetensors", expected)


def boxes_of(case: dict[str, Any]) -> dict[str, Any]:
    """An answer and the boxes that the reference reads in it."""
    return {
        "answer": case["response"],
        "boxes": [[label, *box] for label, box in zip(case["labels"], case["boxes"], strict=True)],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    path.chmod(0o644)


if __name__ == "__main__":
    main()
