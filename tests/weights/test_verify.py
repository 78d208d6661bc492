from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seekvl.weights.verify import verify_folder

GOLDEN = Path(__file__).parents[1] / "golden"
Copy = Callable[[str], Path]
Edit = Callable[..., None]


NAMES = [
    "vl1-siglip",
    "vl1-hybrid",
    "transformers-layout/deepseek_vl",
    "transformers-layout/deepseek_vl_hybrid",
    "vl2-tiny-like",
    "vl2-small-like",
    "vl2-base-like",
]


@pytest.mark.parametrize("name", NAMES)
def test_golden_folders_are_whole(name: str) -> None:
    report = verify_folder(GOLDEN / name)
    assert report.ok, report.lines()
    assert [check.name for check in report.checks] == [
        "folder",
        "config",
        "files",
        "keys",
        "dtypes",
        "numbers",
        "tokenizer",
        "template",
    ]


def failures(folder: Path) -> dict[str, str]:
    report = verify_folder(folder)
    assert all("\n" not in line for line in report.lines())
    return {check.name: check.detail for check in report.checks if not check.ok}


def change(folder: Path, key: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {key: value}, folder / "model.safetensors")


def test_no_such_folder() -> None:
    assert list(failures(GOLDEN / "nowhere")) == ["folder"]


def test_wrong_config_stops_the_rest(copy: Copy, edit: Edit) -> None:
    folder = copy("vl1-siglip")
    edit(folder / "config.json", "model_type", "llava")
    assert list(failures(folder)) == ["config"]


def test_cut_weights_still_let_the_tokenizer_be_checked(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert list(failures(folder)) == ["files"]
    assert verify_folder(folder).checks[-1].name == "template"


def test_several_faults_are_all_listed(copy: Copy, edit: Edit) -> None:
    folder = copy("vl1-siglip")
    tensors = load_file(folder / "model.safetensors")
    change(
        folder, "language_model.lm_head.weight", tensors["language_model.model.embed_tokens.weight"].clone()
    )
    edit(folder / "config.json", "torch_dtype", "bfloat16")
    found = failures(folder)
    assert list(found) == ["dtypes", "numbers"]
    assert "config.json says bfloat16" in found["dtypes"]
    assert "tied" in found["numbers"]


def test_a_few_tensors_of_another_dtype_are_listed(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, "language_model.model.norm.weight", torch.ones(80, dtype=torch.bfloat16))
    assert failures(folder) == {}
    assert any("F32, 1 BF16" in check.detail for check in verify_folder(folder).checks)


def test_not_finite_in_an_unused_tensor_too(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, "vision_model.vision_tower.attn_pool.latent", torch.full((1, 1, 64), float("nan")))
    assert list(failures(folder)) == ["numbers"]


def test_a_tokenizer_that_loses_spaces_is_noticed(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    broken = text.replace(
        '"normalizer": null', '"normalizer": {"type": "Strip", "strip_left": true, "strip_right": true}'
    )
    if broken == text:
        broken = text.replace(
            '"normalizer":null', '"normalizer":{"type":"Strip","strip_left":true,"strip_right":true}'
        )
    assert broken != text
    path.write_text(broken, encoding="utf-8")
    assert list(failures(folder)) == ["template"]


def test_a_tiled_family_says_what_its_smallest_picture_costs() -> None:
    details = {check.name: check.detail for check in verify_folder(GOLDEN / "vl2-small-like").checks}
    assert "pictures in tiles of 76 px, at least 25 tokens" in details["config"]
    assert "13 known to be unused" in details["keys"]
    assert "picture 643" in details["tokenizer"]


def test_one_damaged_expert_of_many_is_named(copy: Copy) -> None:
    folder = copy("vl2-small-like")
    key = "language.model.layers.2.mlp.experts.9.up_proj.weight"
    path = next(path for path in folder.glob("*.safetensors") if key in load_file(path))
    tensors = load_file(path)
    tensors[key][3, 4] = float("inf")
    save_file(tensors, path)
    assert list(failures(folder)) == ["numbers"]
    assert key in failures(folder)["numbers"]
