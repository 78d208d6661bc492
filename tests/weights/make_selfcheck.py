"""Makes seekvl/weights/selfcheck from the golden vectors: python tests/weights/make_selfcheck.py."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SOURCE = GOLDEN / "vl1-hybrid"
TARGET = ROOT / "seekvl" / "weights" / "selfcheck"
CASES = ("single_zh", "text_only")
TENSORS = (
    "input_ids",
    "vision_features_high_every_5th",
    "vision_features_low_every_5th",
    "logits_last",
    "generated_ids",
)


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for path in SOURCE.iterdir():
        if not path.name.startswith("cases"):
            shutil.copyfile(path, TARGET / path.name)
    cases = {case["name"]: case for case in json.loads((SOURCE / "cases.json").read_text())["cases"]}
    tensors = load_file(SOURCE / "cases.safetensors")
    expected = {}
    for name in CASES:
        case = cases[name]
        turns = [
            turn | {"images": [f"{image}.png" for image in turn.get("images", [])]}
            for turn in case["conversation"]
        ]
        expected[name] = {"conversation": turns, "prompt": case["prompt"]}
        for image in case["images"]:
            shutil.copyfile(GOLDEN / "images" / f"{image}.png", TARGET / f"{image}.png")
            expected[name]["pixels_sha256"] = case["pixel_values_sha256"][0]
    kept = {
        f"{name}/{key}": tensors[f"{name}/{key}"]
        for name in CASES
        for key in TENSORS
        if f"{name}/{key}" in tensors
    }
    save_file(kept, TARGET / "expected.safetensors")
    (TARGET / "expected.safetensors").chmod(0o644)
    (TARGET / "expected.json").write_text(
        json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
