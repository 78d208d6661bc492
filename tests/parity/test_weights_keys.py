"""Key lists of the published files: both layouts map without a remainder, shapes included (meta device)."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from seekvl.models.vl import VLConfig
from seekvl.models.vl2 import VL2Config, on_meta
from seekvl.presets import CHECKPOINTS
from seekvl.weights.key_map import KeyMap, parameter_shapes
from seekvl.weights.official import official_map
from seekvl.weights.official_vl2 import vl2_map
from seekvl.weights.read import StoredTensor, match
from seekvl.weights.transformers_layout import transformers_map

KEYS = Path(__file__).parents[1] / "golden" / "keys"
SIZES = ["1.3b", "7b"]


def published(name: str) -> dict[str, list[int]]:
    content: dict[str, list[int]] = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    return content


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(on_meta(CHECKPOINTS[f"deepseek-ai/deepseek-vl-{size}-chat"].model))


def maps(size: str) -> tuple[KeyMap, KeyMap]:
    config = CHECKPOINTS[f"deepseek-ai/deepseek-vl-{size}-chat"].model
    assert isinstance(config, VLConfig)
    return official_map(config), transformers_map(config)


@pytest.mark.parametrize(("size", "tensors", "dropped"), [("1.3b", 529, 13), ("7b", 775, 17)])
def test_official_keys(size: str, tensors: int, dropped: int) -> None:
    keys, (key_map, _), ours = published(f"vl-{size}.official"), maps(size), shapes(size)
    assert len(keys) == tensors
    assert len(keys) - len(key_map.targets) == dropped
    wanted = {key: target.shape(ours[target.parameter]) for key, target in key_map.targets.items()}
    wanted |= {key: shape for key, shape in key_map.unused.items() if shape and "rotary" not in key}
    assert wanted == {key: tuple(shape) for key, shape in keys.items()}


@pytest.mark.parametrize(("size", "tensors"), [("1.3b", 612), ("7b", 854)])
@pytest.mark.parametrize("spelling", ["transformers", "transformers-published-disk"])
def test_transformers_keys_in_both_spellings(size: str, tensors: int, spelling: str) -> None:
    keys, (_, key_map), ours = published(f"vl-{size}.{spelling}"), maps(size), shapes(size)
    assert len(keys) == len(key_map.targets) == tensors
    places = {
        key: StoredTensor(file=Path("x"), dtype="F16", shape=tuple(shape), begin=0, end=0)
        for key, shape in keys.items()
    }
    assert set(match(places, key_map=key_map, shapes=ours)) == set(key_map.targets)


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_is_filled_exactly_once(size: str) -> None:
    for key_map in maps(size):
        filled: dict[str, list[str]] = {}
        for target in key_map.targets.values():
            filled.setdefault(target.parameter, []).append(target.operation)
        assert filled.keys() == shapes(size).keys()
        thirds = ["rows0of3", "rows1of3", "rows2of3"]
        assert all(len(found) == 1 or sorted(found) == thirds for found in filled.values())
        assert not set(key_map.targets) & set(key_map.unused)


@pytest.mark.parametrize("size", SIZES)
def test_official_to_transformers(size: str) -> None:
    """Following our two maps gives the published correspondence, operations included."""
    official, transformers = maps(size)
    operations = {"copy": "copy", "unsqueeze0": "squeeze0"}
    back: dict[str, list[list[str]]] = {}
    for key, target in transformers.targets.items():
        back.setdefault(target.parameter, []).append(
            [key, operations.get(target.operation, target.operation)]
        )
    table = json.loads(gzip.decompress((KEYS / f"vl-{size}.official-to-transformers.json.gz").read_bytes()))
    for key, wanted in table.items():
        found = back[official.targets[key].parameter] if key in official.targets else []
        assert sorted(found) == sorted(wanted)


def test_thirds_of_the_fused_rows_are_q_k_v_in_this_order() -> None:
    _, key_map = maps("1.3b")
    qkv = torch.arange(6.0)
    prefix = "model.vision_model.encoder.layers.0.self_attn"
    thirds = [key_map.targets[f"{prefix}.{name}_proj.bias"].of(qkv).tolist() for name in "qkv"]
    assert thirds == [[0, 1], [2, 3], [4, 5]]


def vl2_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a DeepSeek-VL2 list, whose experts stand as one key with a count."""
    shapes: dict[str, tuple[int, ...]] = {}
    content = json.loads(gzip.decompress((KEYS / f"{name}.official.json.gz").read_bytes()))
    for key, value in content["tensors"].items():
        if isinstance(value, dict):
            for index in range(value["count"]):
                shapes[key.replace("{e}", str(index))] = tuple(value["shape"])
        else:
            shapes[key] = tuple(value)
    assert len(shapes) == content["tensor_count"]
    return shapes


VL2_SIZES = [("vl2-tiny", 2582), ("vl2-small", 5639), ("vl2", 6973)]


@pytest.mark.parametrize(("name", "tensors"), VL2_SIZES)
def test_vl2_keys(name: str, tensors: int) -> None:
    keys, config = vl2_keys(name), CHECKPOINTS[f"deepseek-ai/deepseek-{name}"].model
    assert isinstance(config, VL2Config)
    key_map, ours = vl2_map(config), parameter_shapes(on_meta(config))
    assert (len(keys), len(keys) - len(key_map.targets)) == (tensors, 13)
    wanted = {key: target.shape(ours[target.parameter]) for key, target in key_map.targets.items()}
    assert wanted | key_map.unused == keys
    filled: dict[str, list[int]] = {}
    for target in key_map.targets.values():
        filled.setdefault(target.parameter, []).append(target.index)
    assert filled.keys() == ours.keys()
    for parameter, indices in filled.items():
        count = ours[parameter][0] if ".experts." in parameter else 1
        assert sorted(indices) == list(range(count)), parameter
