import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seekvl.models.siglip import SiglipConfig
from seekvl.runtime import SeekVLError
from seekvl.weights import save as room
from seekvl.weights.config import Layout
from seekvl.weights.load import Checkpoint, layout_map, load_checkpoint
from seekvl.weights.save import save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [
    "vl1-siglip",
    "vl1-hybrid",
    "transformers-layout/deepseek_vl",
    "transformers-layout/deepseek_vl_hybrid",
]


def load(folder: Path, dtype: str = "auto") -> Checkpoint:
    return load_checkpoint(folder, device="cpu", dtype=dtype)


def save(checkpoint: Checkpoint, folder: Path, **changes: object) -> None:
    arguments = {"config": checkpoint.config, "tokenizer": checkpoint.folder / "tokenizer.json"} | changes
    save_checkpoint(checkpoint.model, folder, **arguments)  # type: ignore[arg-type]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: value for path in folder.glob("model*.safetensors") for key, value in load_file(path).items()
    }


def equal(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_exact(name: str, layout: Layout, shard_bytes: int, tmp_path: Path) -> None:
    source = load(GOLDEN / name)
    save(source, tmp_path / "saved", layout=layout, shard_bytes=shard_bytes)
    back = load(tmp_path / "saved")
    assert equal(source.model, back.model)
    assert back.config.layout == layout
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    if source.config.image.do_normalize and layout == "transformers":
        assert isinstance(back.config.model.vision, SiglipConfig)
        assert back.config.model.vision.pixel_mean == source.config.image.mean
    else:
        assert back.config.model == source.config.model
        assert back.config.image == source.config.image
    assert back.config.template == source.config.template


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_again_gives_the_published_tensors(name: str, tmp_path: Path) -> None:
    """Official to transformers to official (or the other way round): every used tensor, bit for bit."""
    source = load(GOLDEN / name, dtype="float32")
    other: Layout = "transformers" if source.config.layout == "official" else "official"
    save(source, tmp_path / "there", layout=other)
    there = load(tmp_path / "there", dtype="float32")
    save(there, tmp_path / "back", layout=source.config.layout, dtype=source.config.dtype)
    wanted, found = stored(GOLDEN / name), stored(tmp_path / "back")
    unused = layout_map(source.config).unused
    assert set(found) == {key for key in wanted if key not in unused}
    assert all(
        torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in found
    )


def test_unused_tensors_are_written_where_they_are_given(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    wanted = stored(GOLDEN / "vl1-siglip")
    unused = {key: wanted[key] for key in layout_map(source.config).unused if key in wanted}
    assert len(unused) == 13
    save(source, tmp_path / "saved", unused=unused)
    found = stored(tmp_path / "saved")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_dtype_is_converted_on_the_way(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    save(source, tmp_path / "saved", dtype=torch.bfloat16)
    back = load(tmp_path / "saved", dtype="bfloat16")
    assert back.config.dtype == torch.bfloat16
    assert {value.dtype for value in stored(tmp_path / "saved").values()} == {torch.bfloat16}


def test_index_counts_every_byte(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    save(source, tmp_path / "saved", shard_bytes=300_000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "saved")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()


def test_an_own_system_prompt_is_kept(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    config = replace(source.config, template=replace(source.config.template, system="Be brief."))
    save(source, tmp_path / "saved", config=config)
    assert load(tmp_path / "saved").config.template.system == "Be brief."


def test_a_checkpoint_in_the_way_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    save(source, tmp_path / "saved", shard_bytes=300_000)
    with pytest.raises(SeekVLError, match="already holds a checkpoint"):
        save(source, tmp_path / "saved")
    save(source, tmp_path / "saved", overwrite=True)
    assert equal(load(tmp_path / "saved").model, source.model)


def test_overwriting_the_folder_the_weights_are_mapped_from(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    save(source, tmp_path / "saved")
    mapped = load(tmp_path / "saved")
    save(mapped, tmp_path / "saved", overwrite=True, dtype=torch.float16)
    assert equal(mapped.model, source.model)


def test_interruption_leaves_no_half_written_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load(GOLDEN / "vl1-siglip")
    calls = iter([None])

    def interrupted(*arguments: object, **named: object) -> None:
        if next(calls, "stop") == "stop":
            raise KeyboardInterrupt
        original(*arguments, **named)  # type: ignore[arg-type]

    original = save_file
    monkeypatch.setattr(room, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(source, tmp_path / "saved", shard_bytes=300_000)
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert len(names) == 1
    assert names[0].startswith("model-00001-of-")
    with pytest.raises(SeekVLError, match=r"has no config\.json"):
        load(tmp_path / "saved")


def test_diverged_weights_are_not_saved(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    with torch.no_grad():
        source.model.language.norm.weight[3] = float("nan")
    with pytest.raises(SeekVLError, match=r"language_model\.model\.norm\.weight has 1 values that are NaN"):
        save(source, tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()


def _wrong(source: Checkpoint) -> Iterator[tuple[dict[str, object], str]]:
    vision = source.config.model.vision
    assert isinstance(vision, SiglipConfig)
    other = replace(source.config, model=replace(source.config.model, vision=replace(vision, gelu="tanh")))
    yield {"config": other}, "describes another model"
    yield {"dtype": torch.int8}, "not torch.int8"
    yield {"shard_bytes": 0}, "shard_bytes must be at least 1"
    yield {"unused": {"ghost": torch.ones(1)}}, "ghost is not among the unused tensors"
    yield {"tokenizer": Path("nowhere.json")}, "there is no tokenizer nowhere.json"
    yield {"config": replace(source.config, image_id=3)}, "has id 682, but config.json says image_token_id 3"


@pytest.mark.parametrize("index", range(6))
def test_wrong_requests_leave_nothing_behind(index: int, tmp_path: Path) -> None:
    source = load(GOLDEN / "vl1-siglip")
    changes, message = list(_wrong(source))[index]
    with pytest.raises(SeekVLError, match=message):
        save(source, tmp_path / "saved", **changes)
    assert not (tmp_path / "saved").exists()


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seekvl.models.adaptor import AdaptorConfig
    from seekvl.weights.official_config import write_official
    from seekvl.weights.transformers_layout import transformers_map

    source = load(GOLDEN / "vl1-siglip").config.model
    assert isinstance(source.vision, SiglipConfig)
    with pytest.raises(SeekVLError, match="the official layout cannot say gelu 'tanh'"):
        write_official(replace(source, vision=replace(source.vision, gelu="tanh")), dtype="float32")
    deep = replace(source, adaptor=AdaptorConfig(kind="mlp_gelu", input_width=64, width=80, depth=3))
    with pytest.raises(SeekVLError, match="no place for an adaptor 'mlp_gelu' of depth 3"):
        transformers_map(deep)


TILED = ["vl2-tiny-like", "vl2-small-like", "vl2-base-like"]


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
@pytest.mark.parametrize("name", TILED)
def test_round_trip_of_stacked_experts_gives_the_published_tensors(
    name: str, shard_bytes: int, tmp_path: Path
) -> None:
    source = load(GOLDEN / name, dtype="float32")
    wanted = stored(GOLDEN / name)
    unused = {key: wanted[key] for key in layout_map(source.config).unused}
    save(
        source,
        tmp_path / "saved",
        dtype=source.config.dtype,
        shard_bytes=shard_bytes,
        unused=unused,
    )
    found = stored(tmp_path / "saved")
    assert found.keys() == wanted.keys()
    assert all(
        torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted
    )
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    back = load(tmp_path / "saved", dtype="float32")
    assert equal(source.model, back.model)
    assert (back.config.model, back.config.image) == (source.config.model, source.config.image)
    assert (back.config.template, back.config.specials) == (source.config.template, source.config.specials)
    assert back.processor.tokenizer.image_id == source.processor.tokenizer.image_id


def test_the_correction_bias_is_kept(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl2-base-like")
    save(source, tmp_path / "saved")
    key = "language.model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(stored(tmp_path / "saved")[key], stored(GOLDEN / "vl2-base-like")[key])


def test_the_transformers_layout_has_no_vl2(tmp_path: Path) -> None:
    source = load(GOLDEN / "vl2-small-like")
    with pytest.raises(SeekVLError, match="the transformers layout has no DeepSeek-VL2"):
        save(source, tmp_path / "saved", layout="transformers")
    assert not (tmp_path / "saved").exists()
