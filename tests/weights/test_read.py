import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seekvl.runtime import SeekVLError
from seekvl.weights import read
from seekvl.weights.config import read_config
from seekvl.weights.key_map import KeyMap, Target
from seekvl.weights.load import load_model
from seekvl.weights.read import INDEX, SINGLE, load_tensors, read_folder, read_header

GOLDEN = Path(__file__).parents[1] / "golden"
Copy = Callable[[str], Path]
Change = Callable[[dict[str, torch.Tensor]], None]

EMBED = "language_model.model.embed_tokens.weight"
NORM = "language_model.model.norm.weight"


def load(folder: Path, *, dtype: str = "float32") -> torch.nn.Module:
    return load_model(folder, config=read_config(folder), device="cpu", dtype=dtype)


def change(folder: Path, how: Change) -> None:
    tensors = load_file(folder / SINGLE)
    how(tensors)
    save_file(tensors, folder / SINGLE)


def write_raw(path: Path, header: object, body: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["vl1-siglip", "vl1-hybrid"])
def test_weights_arrive_bit_for_bit_in_the_wanted_dtype(name: str, dtype: str) -> None:
    folder = GOLDEN / name
    state = load(folder, dtype=dtype).state_dict()
    stored = {
        key: value for path in folder.glob("model*.safetensors") for key, value in load_file(path).items()
    }
    assert torch.equal(state["language.embed_tokens.weight"], stored[EMBED].to(getattr(torch, dtype)))
    assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}
    assert not any(value.is_meta for value in state.values())


def test_writing_into_loaded_weights_never_reaches_the_file(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    before = (folder / SINGLE).read_bytes()
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / SINGLE).read_bytes() == before
    assert torch.equal(load(folder).state_dict()["language.norm.weight"], load_file(folder / SINGLE)[NORM])


def test_loading_in_the_stored_dtype_takes_no_private_memory(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file({"a": torch.ones(20_000_000)}, path)
    from seekvl.weights.read import map_file, mapped

    tensor = mapped(map_file(path), read_header(path)["a"])
    before = _private_mb()
    assert tensor.sum() == 20_000_000
    assert _private_mb() - before < 20


def _private_mb() -> float:
    """RssAnon of this process; 0 where the kernel does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def test_tensors_that_are_not_aligned_are_read_too(tmp_path: Path) -> None:
    values = torch.arange(3, dtype=torch.float32)
    header = {
        "a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [2, 14]},
    }
    path = write_raw(tmp_path / SINGLE, header, b"\0\0" + values.numpy().tobytes())
    from seekvl.weights.read import map_file, mapped

    assert torch.equal(mapped(map_file(path), read_header(path)["b"]), values)


def test_tensor_missing(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, lambda tensors: tensors.pop(NORM))  # type: ignore[arg-type]
    with pytest.raises(SeekVLError, match=f"1 tensors missing: {NORM}"):
        load(folder)


def test_tensors_surplus(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(2) for i in range(5)}))
    with pytest.raises(SeekVLError, match=r"5 tensors not known: extra\.0, extra\.1, extra\.2 and 2 more"):
        load(folder)


def test_tensor_of_another_shape(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(81)}))
    with pytest.raises(SeekVLError, match=rf"{NORM} \[81\] instead of \[80\]"):
        load(folder)


def test_unused_tensor_of_another_shape(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    key = "vision_model.vision_tower.attn_pool.latent"
    change(folder, lambda tensors: tensors.update({key: torch.ones(1, 1, 7)}))
    with pytest.raises(SeekVLError, match=r"attn_pool\.latent"):
        load(folder)


def test_unused_tensors_may_be_absent_and_rotary_tables_present(copy: Copy) -> None:
    folder = copy("vl1-siglip")

    def how(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "attn_pool" in key]:
            del tensors[key]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change(folder, how)
    assert load(folder) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(copy: Copy, bad: float) -> None:
    folder = copy("vl1-siglip")
    change(folder, lambda tensors: tensors[EMBED].__setitem__((3, 4), bad))
    with pytest.raises(SeekVLError, match=f"{EMBED} has 1 values that are NaN or infinite"):
        load(folder)


def test_weights_that_overflow_the_wanted_dtype(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, lambda tensors: tensors[EMBED].__setitem__((3, 4), 1e6))
    with pytest.raises(SeekVLError, match=f"{EMBED} does not fit into torch.float16"):
        load(folder, dtype="float16")


def test_weights_of_the_other_layout(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    save_file(load_file(GOLDEN / "transformers-layout/deepseek_vl" / SINGLE), folder / SINGLE)
    with pytest.raises(SeekVLError, match=r"not the weights of this config\.json"):
        load(folder)


def test_integers_are_no_weights(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, lambda tensors: tensors.update({NORM: torch.ones(80, dtype=torch.int8)}))
    with pytest.raises(SeekVLError, match=f"{NORM} is stored as I8"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_file(copy: Copy, kept: int) -> None:
    folder = copy("vl1-siglip")
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:kept])
    with pytest.raises(SeekVLError, match=r"is empty|is cut short"):
        load(folder)


def test_bytes_behind_the_last_tensor(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    with (folder / SINGLE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(SeekVLError, match="bytes behind its last tensor"):
        load(folder)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
GARBLED = [
    (b"{not json", "garbled header"),
    (b"\xff\xfe\xfd", "garbled header"),
    ([1, 2], "garbled header"),
    ({"a": 3}, "header entry of 'a' is garbled"),
    ({"a": {"dtype": "F32"}}, "header entry of 'a' is garbled"),
    ({"a": ENTRY | {"data_offsets": [0, 4]}}, "cannot lie in 4 bytes"),
    ({"a": ENTRY | {"shape": [2, -1]}}, "cannot lie"),
    ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "cannot lie|garbled|bytes behind"),
    ({"a": ENTRY, "b": ENTRY}, "overlap or leave gaps"),
    ({"a": ENTRY | {"shape": [math.inf]}}, "header entry of 'a' is garbled"),
    ({"a": ENTRY | {"dtype": ["F32"]}}, r"stored as \['F32'\]"),
    (b'{"a": ' + b"9" * 5000 + b"}", "garbled header"),
    (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', "tensor a stands twice"),
]


@pytest.mark.parametrize(("header", "message"), GARBLED)
def test_garbled_header(tmp_path: Path, header: object, message: str) -> None:
    path = write_raw(tmp_path / SINGLE, header, b"\0" * 8)
    with pytest.raises(SeekVLError, match=message):
        read_header(path)


def test_shard_missing(copy: Copy) -> None:
    folder = copy("vl1-hybrid")
    (folder / "model-00002-of-000003.safetensors").unlink()
    with pytest.raises(SeekVLError, match=r"shard model-00002-of-000003\.safetensors is missing"):
        load(folder)


def test_index_missing(copy: Copy) -> None:
    folder = copy("vl1-hybrid")
    (folder / INDEX).unlink()
    with pytest.raises(SeekVLError, match=f"neither {SINGLE} nor {INDEX}"):
        load(folder)


def _index(folder: Path, how: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    how(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_index_lacks_a_tensor(copy: Copy) -> None:
    folder = copy("vl1-hybrid")
    _index(folder, lambda places: places.pop(NORM))
    with pytest.raises(SeekVLError, match=f"{NORM} stands in .* does not have it"):
        load(folder)


def test_index_places_a_tensor_in_another_shard(copy: Copy) -> None:
    folder = copy("vl1-hybrid")
    _index(folder, lambda places: places.update({NORM: "model-00003-of-000003.safetensors"}))
    with pytest.raises(SeekVLError, match=f"{NORM} stands in .* places it in model-00003"):
        load(folder)


def test_index_has_a_tensor_no_shard_has(copy: Copy) -> None:
    folder = copy("vl1-hybrid")
    _index(folder, lambda places: places.update({"ghost": "model-00001-of-000003.safetensors"}))
    with pytest.raises(SeekVLError, match="places ghost in model-00001"):
        load(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "weights.bin", 7])
def test_index_points_out_of_the_folder(copy: Copy, shard: object) -> None:
    folder = copy("vl1-hybrid")
    _index(folder, lambda places: places.update({NORM: shard}))  # type: ignore[dict-item]
    with pytest.raises(SeekVLError, match="which is no shard beside the index"):
        load(folder)


def test_tensor_in_two_shards(copy: Copy) -> None:
    folder = copy("vl1-hybrid")
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(name for name in sorted(set(places.values()), reverse=True) if name != places[NORM])
    tensors = load_file(folder / other)
    tensors[NORM] = torch.ones(64, dtype=torch.float16)
    save_file(tensors, folder / other)
    with pytest.raises(SeekVLError, match=f"{NORM} stands"):
        load(folder)


def test_empty_index(copy: Copy) -> None:
    folder = copy("vl1-hybrid")
    (folder / INDEX).write_text("{}")
    with pytest.raises(SeekVLError, match="has no weight_map"):
        load(folder)


def test_single_file_and_index_together(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    (folder / INDEX).write_text("{}")
    with pytest.raises(SeekVLError, match="has both"):
        load(folder)


def test_pickles_are_refused(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SeekVLError, match=r"pickled weights \(pytorch_model\.bin\)"):
        load(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match="has no weights"):
        read_folder(tmp_path)


def test_both_spellings_of_a_siglip_key(copy: Copy) -> None:
    folder = copy("transformers-layout/deepseek_vl")
    key, old = "model.vision_model.post_layernorm.bias", "model.vision_model.vision_model.post_layernorm.bias"
    change(folder, lambda tensors: tensors.update({old: tensors[key].clone()}))
    with pytest.raises(SeekVLError, match=f"{key} stands twice"):
        load(folder)


def test_older_spelling_of_the_siglip_prefix_loads_the_same(copy: Copy) -> None:
    folder = copy("transformers-layout/deepseek_vl")
    wanted = load(folder).state_dict()

    def how(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("model.vision_model.")]:
            tensors[key.replace("vision_model.", "vision_model.vision_model.", 1)] = tensors.pop(key)

    change(folder, how)
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_large_weights_whose_sum_overflows(copy: Copy) -> None:
    folder = copy("vl1-siglip")
    change(folder, lambda tensors: tensors[EMBED].fill_(3e38))
    weight = load(folder).state_dict()["language.embed_tokens.weight"]
    assert weight.eq(3e38).all()


EXPERT = "language.model.layers.1.mlp.experts.7.down_proj.weight"
TILED = "model-00001-of-000001.safetensors"


def change_tiled(folder: Path, how: Change) -> None:
    """Change the tensors of a single shard, and its index with them."""
    tensors = load_file(folder / TILED)
    how(tensors)
    save_file(tensors, folder / TILED)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, TILED)}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_experts_are_stacked_bit_for_bit(dtype: str) -> None:
    folder = GOLDEN / "vl2-small-like"
    state = load(folder, dtype=dtype).state_dict()
    stored = {
        key: value
        for path in folder.glob("model*")
        if path.suffix == ".safetensors"
        for key, value in load_file(path).items()
    }
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack = state[f"language.layers.2.mlp.experts.{name}"]
        assert stack.shape[0] == 10
        for index, expert in enumerate(stack):
            wanted = stored[f"language.model.layers.2.mlp.experts.{index}.{name}.weight"]
            assert torch.equal(expert, wanted.to(getattr(torch, dtype)))
    assert torch.equal(state["view_separator"], stored["view_seperator"].to(getattr(torch, dtype)))
    assert not any(value.is_meta for value in state.values())


FAULTS: list[tuple[Change, str]] = [
    (lambda tensors: tensors.pop(EXPERT), f"1 tensors missing: {EXPERT}"),  # type: ignore[arg-type, return-value]
    (lambda tensors: tensors.update({EXPERT.replace(".7.", ".8."): tensors[EXPERT].clone()}), "not known: "),
    (lambda tensors: tensors.update({EXPERT: torch.ones(64, 47)}), r"\[64, 47\] instead of \[64, 48\]"),
    (lambda tensors: tensors[EXPERT].view(-1)[5].fill_(float("nan")), f"tensor {EXPERT} has 1 values"),  # type: ignore[func-returns-value]
    (lambda tensors: tensors.pop("view_seperator"), "missing: view_seperator"),  # type: ignore[arg-type, return-value]
    (lambda tensors: tensors.update({"tile_indicators": torch.ones(24, 64)}), "not known: tile_indicators"),
]


@pytest.mark.parametrize("index", range(len(FAULTS)))
def test_one_wrong_expert_of_many_is_named(copy: Copy, index: int) -> None:
    folder = copy("vl2-tiny-like")
    how, message = FAULTS[index]
    change_tiled(folder, how)
    with pytest.raises(SeekVLError, match=message):
        load(folder)


def test_weights_of_another_size_do_not_fit(copy: Copy) -> None:
    folder = copy("vl2-tiny-like")
    other = GOLDEN / "vl2-small-like"
    with pytest.raises(SeekVLError, match="do not fit the official layout"):
        load_model(other, config=read_config(folder), device="cpu", dtype="float32")


class _Layers(torch.nn.Module):
    """Two layers of 16 experts of 4 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.empty(16, 512, 2048, device="meta") for _ in range(2))


def test_stacking_experts_takes_the_weights_and_one_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        f"{layer}.{index}": torch.full((512, 2048), 1.0 + index) for layer in (0, 1) for index in range(16)
    }
    save_file(tensors, tmp_path / SINGLE)
    del tensors
    targets = {
        f"{layer}.{index}": Target(parameter=f"layers.{layer}", operation="expert", index=index)
        for layer in (0, 1)
        for index in range(16)
    }
    key_map = KeyMap(layout="official", targets=targets, unused={}, prefixes={})
    seen: list[float] = []
    checked = read.require_finite

    def watched(filled: torch.Tensor, *, key: str, source: torch.Tensor) -> None:
        checked(filled, key=key, source=source)
        seen.append(_resident_mb())

    monkeypatch.setattr(read, "require_finite", watched)
    model, before = _Layers(), _resident_mb()
    load_tensors(model, tmp_path, key_map=key_map, dtype=torch.float32, device=torch.device("cpu"))
    assert [layer[5, 0, 0].item() for layer in model.layers] == [6.0, 6.0]
    assert max(seen) - before < 128 + 4 + 12  # MB: all experts, one in the file, and some slack


class _Words(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed, self.layer = torch.nn.Embedding(16384, 1024), torch.nn.Linear(1024, 16384, bias=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_of_an_embedding_only_the_rows_that_are_read_take_memory(tmp_path: Path) -> None:
    names = ("embed.weight", "layer.weight")
    tensors = {name: torch.full((16384, 1024), 1.5) for name in names}  # 64 MiB each
    save_file(tensors, tmp_path / SINGLE)
    del tensors
    targets = {name: Target(parameter=name) for name in names}
    key_map = KeyMap(layout="official", targets=targets, unused={}, prefixes={})
    model, before = _Words(), _resident_mb()
    load_tensors(model, tmp_path, key_map=key_map, dtype=torch.float32, device=torch.device("cpu"))
    assert _resident_mb() - before < 64 + 16
    assert model.embed.weight.sum() == model.layer.weight.sum() == 1.5 * 2**24
    assert _resident_mb() - before > 128 - 16


def _resident_mb() -> float:
    """Memory of this process, mapped files included; 0 where the kernel does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
