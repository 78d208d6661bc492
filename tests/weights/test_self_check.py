import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seekvl.runtime import SeekVLError
from seekvl.weights import self_check as module
from seekvl.weights.self_check import SELFCHECK, self_check

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

VL = "vl1-hybrid"
VL2 = "vl2-small-like"


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything the self-check reads, where it may be damaged."""
    folder = tmp_path / "selfcheck"
    shutil.copytree(SELFCHECK, folder)
    monkeypatch.setattr(module, "SELFCHECK", folder)
    return folder


def shift(path: Path, key: str, place: tuple[int, ...], by: float) -> None:
    """Move one number of a tensor file."""
    tensors = load_file(path)
    tensors[key][place] += by
    save_file(tensors, path)


def failures() -> dict[str, str]:
    report = self_check()
    assert report.ok == all(check.ok for check in report.checks)
    assert all("\n" not in line for line in report.lines())
    return {check.name: check.detail for check in report.checks if not check.ok}


def test_it_passes_on_this_installation_and_looks_at_both_families() -> None:
    report = self_check()
    assert report.ok, report.lines()
    names = [check.name for check in report.checks]
    assert len(names) == len(set(names)) == 25
    for case in (f"{VL} single_zh", f"{VL2} two", f"{VL2} grounding_turns"):
        pixels = "pixels" if case.startswith(VL) else "tiles"
        kinds = ("prompt", pixels, "vision", "logits", "greedy")
        assert [name for name in names if name.startswith(case)] == [f"{case}, {kind}" for kind in kinds]
    assert names[-3:] == [
        "vl2-base-like, attention and router",
        "vl2-tiny-like, attention and router",
        "grounding, boxes",
    ]


def test_it_looks_at_every_kind_of_attention_and_router() -> None:
    languages = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))["language_config"]
        for path in SELFCHECK.glob("vl2-*/config.json")
    }
    latent = {name: language.get("use_mla", True) for name, language in languages.items()}
    assert latent == {"vl2-base-like": True, "vl2-small-like": True, "vl2-tiny-like": False}
    choices = {name: language["topk_method"] for name, language in languages.items()}
    assert choices == {"vl2-base-like": "noaux_tc", "vl2-small-like": "greedy", "vl2-tiny-like": "greedy"}


def test_it_ships_small_and_whole() -> None:
    files = {path for path in SELFCHECK.rglob("*") if path.is_file()}
    sizes = {path: path.stat().st_size for path in files}
    assert sum(sizes.values()) < 3_400_000
    assert sum(size for path, size in sizes.items() if path.parent.name.startswith("vl2")) < 1_500_000
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["seekvl.weights"]
    shipped = {path for pattern in patterns for path in SELFCHECK.parent.glob(pattern)}
    assert files <= shipped


def test_it_is_made_of_the_golden_files() -> None:
    for folder in (SELFCHECK / VL, SELFCHECK / VL2):
        values = load_file(GOLDEN / folder.name / "cases.safetensors")
        expected = load_file(folder / "expected.safetensors")
        assert all(torch.equal(values[key], value) for key, value in expected.items())
    copied = [path for path in SELFCHECK.rglob("*") if (GOLDEN / path.relative_to(SELFCHECK)).is_file()]
    assert len(copied) > 25
    for path in copied:
        assert path.read_bytes() == (GOLDEN / path.relative_to(SELFCHECK)).read_bytes(), path
    for name in ("vl2-base-like", "vl2-tiny-like"):
        published: dict[str, torch.Tensor] = {}
        for path in (GOLDEN / name).glob("model-*.safetensors"):
            published |= load_file(path)
        layer = load_file(SELFCHECK / name / "layer.safetensors")
        assert all(torch.equal(published[key], value) for key, value in layer.items())


def test_a_network_that_is_a_little_off_is_noticed(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINIATURES", {VL: ("single_zh",)})
    for path in (vectors / VL).glob("model-*.safetensors"):
        tensors = load_file(path)
        for key in tensors:
            if key.endswith("hd_alpha_downsamples"):
                tensors[key] = tensors[key] * 1.01
        save_file(tensors, path)
    found = failures()
    assert list(found) == [f"{VL} single_zh, vision"]
    assert "differs by" in found[f"{VL} single_zh, vision"]


def test_a_router_that_is_a_little_off_is_noticed(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINIATURES", {})
    bias = "language.model.layers.1.mlp.gate.e_score_correction_bias"
    shift(vectors / "vl2-base-like" / "layer.safetensors", bias, (3,), 0.5)
    key = "language.model.layers.1.self_attn.k_proj.weight"
    shift(vectors / "vl2-tiny-like" / "layer.safetensors", key, (5, 6), 0.5)
    found = failures()
    assert list(found) == [
        "vl2-base-like, attention and router",
        "vl2-tiny-like, attention and router",
    ]
    assert "instead of" in found["vl2-base-like, attention and router"]


def test_a_damaged_vector_is_named_with_its_number(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINIATURES", {VL2: ("two", "grounding_turns")})
    shift(vectors / VL2 / "expected.safetensors", "two/image_token_embeds", (100, 7), 0.25)
    shift(vectors / VL2 / "expected.safetensors", "grounding_turns/logits_last", (0, 321), 0.5)
    shift(vectors / "vl2-base-like" / "expected.safetensors", "weights", (40, 2), 0.125)
    shift(vectors / "vl2-tiny-like" / "expected.safetensors", "experts", (1, 0), 1)
    path = vectors / "grounding.json"
    path.write_text(path.read_text(encoding="utf-8").replace("243", "244", 1), encoding="utf-8")
    found = failures()
    assert list(found) == [
        f"{VL2} two, vision",
        f"{VL2} grounding_turns, logits",
        "vl2-base-like, attention and router",
        "vl2-tiny-like, attention and router",
        "grounding, boxes",
    ]
    assert "differs by 2.5e-01" in found[f"{VL2} two, vision"]
    assert "number [100, 7] is " in found[f"{VL2} two, vision"]
    assert "number [0, 321] is " in found[f"{VL2} grounding_turns, logits"]
    assert "number [40, 2] is " in found["vl2-base-like, attention and router"]
    assert "number 3 of 189 is " in found["vl2-tiny-like, attention and router"]
    assert found["grounding, boxes"].startswith("one box: the boxes are ")


def test_damaged_ids_and_pixels_are_named(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINIATURES", {VL2: ("two", "grounding_turns")})
    monkeypatch.setattr(module, "ROUTERS", ())
    shift(vectors / VL2 / "expected.safetensors", "two/input_ids", (0, 7), 1)
    shift(vectors / VL2 / "expected.safetensors", "grounding_turns/generated_ids", (0, 9), 1)
    path = vectors / VL2 / "expected.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["grounding_turns"]["pixels_sha256"] = 64 * "0"
    path.write_text(json.dumps(said), encoding="utf-8")
    found = failures()
    assert list(found) == [
        f"{VL2} two, prompt",
        f"{VL2} grounding_turns, tiles",
        f"{VL2} grounding_turns, greedy",
    ]
    assert found[f"{VL2} two, prompt"].startswith("number 7 of 226 is ")
    assert "instead of 000000000000" in found[f"{VL2} grounding_turns, tiles"]
    assert found[f"{VL2} grounding_turns, greedy"].startswith("number 9 of 16 is ")


def test_files_that_are_cut_short_or_missing_are_failed_checks(vectors: Path) -> None:
    path = vectors / VL / "expected.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    (vectors / VL2 / "expected.json").write_text("{", encoding="utf-8")
    shutil.rmtree(vectors / "vl2-base-like")
    path = vectors / "vl2-tiny-like" / "layer.safetensors"
    tensors = load_file(path)
    del tensors["language.model.layers.1.mlp.gate.weight"]
    save_file(tensors, path)
    (vectors / "grounding.json").unlink()
    found = failures()
    assert list(found) == [
        f"{VL}, vectors",
        f"{VL2}, vectors",
        "vl2-base-like, attention and router",
        "vl2-tiny-like, attention and router",
        "grounding, boxes",
    ]
    assert "expected.safetensors cannot be read" in found[f"{VL}, vectors"]
    assert "not JSON" in found[f"{VL2}, vectors"]
    assert "instead of" in found["vl2-tiny-like, attention and router"]


def test_a_tensor_that_is_missing_is_named(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINIATURES", {VL2: ("two",)})
    monkeypatch.setattr(module, "ROUTERS", ())
    path = vectors / VL2 / "expected.safetensors"
    tensors = load_file(path)
    del tensors["two/image_token_embeds"]
    save_file(tensors, path)
    found = failures()
    assert list(found) == [f"{VL2} two, vision"]
    assert "no two/image_token_embeds" in found[f"{VL2} two, vision"]


def test_another_shape_and_nan_are_no_equality() -> None:
    one = torch.zeros(2, 3)
    assert module._compare(one, one, limit=0.0) == "largest difference 0.0e+00 (at most 0e+00)"
    with pytest.raises(SeekVLError, match=r"shape is \[2, 3\] instead of \[1, 3\]"):
        module._compare(one, one[:1], limit=1.0)
    broken = one.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(SeekVLError, match=r"differs by nan .* number \[1, 2\] is nan instead of 0"):
        module._compare(broken, one, limit=1.0)
    with pytest.raises(SeekVLError, match="2 numbers instead of 3"):
        module._same_ids([1, 2], torch.tensor([1, 2, 3]))
