import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seekvl.models.quantized import KINDS, Kind, QuantizedExperts, QuantizedLinear, quantized_modules
from seekvl.runtime import SeekVLError
from seekvl.vlm import load
from seekvl.weights import read_quantized
from seekvl.weights.config import read_config
from seekvl.weights.load import load_checkpoint
from seekvl.weights.quantize import quantize_model
from seekvl.weights.read import SINGLE, STORED, read_header
from seekvl.weights.read_quantized import ALIGNMENT, METADATA, check_numbers, stored_matrices
from seekvl.weights.save import save_checkpoint
from seekvl.weights.save_quantized import save_quantized
from seekvl.weights.verify import verify_folder

GOLDEN = Path(__file__).parents[1] / "golden"
Made = Callable[..., Path]
Change = Callable[[dict[str, torch.Tensor], dict[str, str]], None]


@cache
def source(folder: str):  # type: ignore[no-untyped-def]
    return load_checkpoint(GOLDEN / folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A quantised folder of a golden checkpoint, made once; copy it before breaking it."""

    @cache
    def make(name: str, kind: Kind) -> Path:
        folder = tmp_path_factory.mktemp("quantised") / name.rpartition("/")[2]
        checkpoint = source(name)
        save_quantized(
            checkpoint.model,
            folder,
            kind=kind,
            config=checkpoint.config,
            tokenizer=checkpoint.folder / "tokenizer.json",
        )
        return folder

    return make


def change(folder: Path, how: Change) -> None:
    path = folder / SINGLE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    how(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["vl1-siglip", "vl1-hybrid", "vl2-tiny-like", "transformers-layout/deepseek_vl"]
)
def test_a_folder_opens_as_what_was_quantised_in_memory(written: Made, name: str, kind: Kind) -> None:
    folder = written(name, kind)
    back = load_checkpoint(folder, device="cpu", dtype="float32")
    here = load_checkpoint(GOLDEN / name, device="cpu", dtype="float32", quantize=kind)
    assert back.config.quantization == kind
    a, b = back.model.state_dict(), here.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    kinds = {name: module.kind for name, module in quantized_modules(back.model).items()}
    assert kinds == {
        matrix.name: matrix.kind for matrix in stored_matrices(folder) if matrix.kind is not None
    }
    assert kinds["language.lm_head"] == kind
    types = {type(module) for module in quantized_modules(back.model).values()}
    assert types == ({QuantizedLinear, QuantizedExperts} if name.startswith("vl2") else {QuantizedLinear})
    assert not any(parameter.requires_grad for parameter in back.model.parameters())


def test_packed_matrices_lie_in_lines_and_are_mapped(written: Made) -> None:
    folder = written("vl1-siglip", "int4")
    places = read_header(folder / SINGLE, dtypes=STORED)
    packed = [place for place in places.values() if place.dtype == "U8"]
    assert packed
    assert all(place.begin % ALIGNMENT == 0 for place in packed)
    assert (folder / SINGLE).stat().st_size < sum(
        path.stat().st_size for path in (GOLDEN / "vl1-siglip").glob("*.safetensors")
    )
    model = load_checkpoint(folder, device="cpu").model
    storage = {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    begins = sorted(tensor.data_ptr() % ALIGNMENT for tensor in model.buffers())
    assert begins[-1] == 0, "a page begins with a line"
    assert len(storage) <= len(packed)


def test_other_programs_can_read_the_file(written: Made) -> None:
    folder = written("vl1-siglip", "int8")
    tensors = load_file(folder / SINGLE)
    assert tensors["language.lm_head.packed"].dtype == torch.uint8
    model = load_checkpoint(folder, device="cpu", dtype="float32").model
    assert torch.equal(model.get_buffer("language.lm_head.packed"), tensors["language.lm_head.packed"])


def test_the_rest_takes_the_dtype_asked_for(written: Made) -> None:
    model = load_checkpoint(written("vl1-siglip", "int8"), device="cpu", dtype="bfloat16").model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.uint8, torch.bfloat16}


def test_quantize_of_a_quantised_folder(written: Made) -> None:
    folder = written("vl1-siglip", "int8")
    assert load_checkpoint(folder, device="cpu", quantize="int8").config.quantization == "int8"
    with pytest.raises(SeekVLError, match="'int4' was asked for, but this checkpoint is stored as int8"):
        load_checkpoint(folder, device="cpu", quantize="int4")
    with pytest.raises(SeekVLError, match="int8 in the format of the kernels is computed on the CPU alone"):
        load_checkpoint(folder, device="cuda")


def test_it_is_not_saved_in_a_layout_that_cannot_hold_it(written: Made, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(written("vl1-siglip", "int8"), device="cpu")
    arguments = {"config": checkpoint.config, "tokenizer": checkpoint.folder / "tokenizer.json"}
    with pytest.raises(SeekVLError, match="this model is quantised, and no layout holds that"):
        save_checkpoint(checkpoint.model, tmp_path / "plain", **arguments)
    with pytest.raises(SeekVLError, match="is quantised already"):
        save_quantized(checkpoint.model, tmp_path / "again", kind="int4", **arguments)
    assert not (tmp_path / "again" / "config.json").exists()


def test_a_plain_folder_of_a_model_that_was_quantised_is_plain(tmp_path: Path) -> None:
    checkpoint = source("vl1-siglip")
    save_checkpoint(
        checkpoint.model,
        tmp_path / "a",
        config=checkpoint.config,
        tokenizer=checkpoint.folder / "tokenizer.json",
    )
    assert read_config(tmp_path / "a").quantization is None


def test_verify_looks_at_a_quantised_folder(written: Made, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written("vl1-siglip", "int4"), folder)
    report = verify_folder(folder)
    assert report.ok
    (line,) = (check.detail for check in report.checks if check.name == "quantised weights")
    assert "modules int4" in line
    change(folder, lambda tensors, _: tensors["language.lm_head.packed"][0, :64].fill_(0xFF))
    (check,) = (check for check in verify_folder(folder).checks if check.name == "quantised weights")
    assert not check.ok
    assert "language.lm_head.packed has" in check.detail


@pytest.mark.parametrize("where", ["language.lm_head.packed", "language.layers.1.mlp.down_proj.packed"])
def test_a_damaged_scale_stops_the_first_answer(written: Made, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written("vl1-siglip", "int4"), folder)
    change(folder, lambda tensors, _: tensors[where][0, :64].fill_(0xFF))
    vlm = load(folder, device="cpu", dtype="float32")
    with pytest.raises(SeekVLError, match="not finite: nan; check the weights with `seekvl verify`"):
        vlm.chat("Who?", max_new_tokens=2)


def test_opening_reads_no_matrix(written: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: dict[str, torch.Size] = {}
    checked = read_quantized.require_finite

    def watched(filled: torch.Tensor, *, key: str, source: torch.Tensor) -> None:
        looked_at[key] = filled.shape
        checked(filled, key=key, source=source)

    monkeypatch.setattr(read_quantized, "require_finite", watched)
    folder = written("vl1-siglip", "int8")
    load_checkpoint(folder, device="cpu", dtype="float32")
    assert {len(shape) for shape in looked_at.values()} == {1}
    looked_at.clear()
    load_checkpoint(folder, device="cpu", dtype="bfloat16")
    assert "language.embed_tokens.weight" in looked_at, "what is converted is looked at"
    assert not any(key.endswith(".packed") for key in looked_at)
    looked_at.clear()
    model = load_checkpoint(folder, device="cpu", dtype="float32").model
    check_numbers(model)
    assert looked_at.keys() == model.state_dict().keys()


def without(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del tensors["language.layers.0.attn.q_proj.packed"]


def surplus(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["language.lm_head.weight"] = torch.zeros(3)


def half(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["language.layers.1.mlp.up_proj.weight"] = torch.zeros(4, 4)
    del tensors["language.layers.1.mlp.up_proj.packed"]


def shape(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["language.lm_head.packed"] = tensors["language.lm_head.packed"][:-1].clone()


def plain_dtype(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["language.lm_head.packed"] = tensors["language.lm_head.packed"].float()


def packed_dtype(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["language.norm.weight"] = tensors["language.norm.weight"].to(torch.uint8)


def not_finite(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["language.norm.weight"][0] = torch.nan


def edited(**values: object) -> Change:
    def edit(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata[METADATA] = json.dumps(json.loads(metadata[METADATA]) | values)

    return edit


def bare(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del metadata[METADATA]


def garbled(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata[METADATA] = '{"version": 1'


BROKEN: list[tuple[Change, str]] = [
    (without, r"1 tensors missing: language.layers.0.attn.q_proj.packed"),
    (surplus, r"1 tensors not known: language.lm_head.weight"),
    (half, r"1 tensors missing: language.layers.1.mlp.up_proj.packed; 1 tensors not known"),
    (shape, r"1 tensors of another shape: language.lm_head.packed"),
    (plain_dtype, r"language.lm_head.packed is stored as F32, expected U8"),
    (packed_dtype, r"language.norm.weight is stored as U8, expected F32, F16 or BF16"),
    (not_finite, r"language.norm.weight has 1 values that are NaN"),
    (edited(format="int8"), "is int8, version 1, but config.json says int4, version 1"),
    (edited(version=2), "is int4, version 2, but"),
    (edited(matrices={"language.nothing": {"kind": "int4"}}), "language.nothing is listed as int4, but"),
    (edited(matrices={"language.norm": {"kind": "int4"}}), "no such linear layer"),
    (edited(matrices={"language.lm_head": {"kind": "int3"}}), "language.lm_head is listed as int3"),
    (edited(matrices={"language.lm_head": {"sort": "int4"}}), "garbled quantization metadata"),
    (edited(matrices=[]), "garbled quantization metadata"),
    (bare, "holds plain weights, but config.json says they are quantised"),
    (garbled, "garbled quantization metadata"),
]


@pytest.mark.parametrize(("how", "message"), BROKEN)
def test_a_file_that_does_not_fit_is_refused_by_name(
    written: Made, tmp_path: Path, how: Change, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written("vl1-siglip", "int4"), folder)
    change(folder, how)
    with pytest.raises(SeekVLError, match=message):
        load_checkpoint(folder, device="cpu")


def test_a_file_that_is_cut_or_missing(written: Made, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written("vl1-siglip", "int4"), folder)
    data = (folder / SINGLE).read_bytes()
    for length in (len(data) - 64, 100, 0):
        (folder / SINGLE).write_bytes(data[:length])
        with pytest.raises(SeekVLError, match="cut short"):
            load_checkpoint(folder, device="cpu")
    (folder / SINGLE).unlink()
    with pytest.raises(SeekVLError, match=r"a quantised config.json but no model.safetensors"):
        load_checkpoint(folder, device="cpu")


CONFIGS: list[tuple[object, str]] = [
    ({"quant_method": "awq", "bits": 4}, "quant_method 'awq' is another program's"),
    ({"quant_method": "seekvl", "version": 9, "format": "int4"}, "version 9 of the format"),
    (
        {"quant_method": "seekvl", "version": 1, "format": "int2"},
        "format 'int2' is unknown; known are int8, int4",
    ),
    ({"quant_method": "seekvl", "version": 1, "format": "int4", "x": 1}, "unknown keys x"),
    ({"version": 1, "format": "int4"}, "quant_method is missing"),
    ([], "expected an object"),
]


@pytest.mark.parametrize(("section", "message"), CONFIGS)
def test_a_config_that_is_not_understood(
    written: Made, tmp_path: Path, edit: Callable[..., None], section: object, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written("vl1-siglip", "int4"), folder)
    edit(folder / "config.json", "quantization_config", section)
    with pytest.raises(SeekVLError, match=message):
        read_config(folder)


def test_plain_weights_under_a_quantised_config_and_the_reverse(
    written: Made, tmp_path: Path, edit: Callable[..., None]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written("vl1-siglip", "int4"), folder)
    edit(folder / "config.json", "quantization_config")
    with pytest.raises(SeekVLError, match="is stored as U8; weights are F32, F16, BF16"):
        load_checkpoint(folder, device="cpu")


def test_a_model_in_memory_says_what_became_of_it() -> None:
    checkpoint = load_checkpoint(GOLDEN / "vl2-tiny-like", device="cpu", dtype="float32")
    matrices = quantize_model(checkpoint.model, "int8")
    assert all(matrix.kind or matrix.reason for matrix in matrices)
