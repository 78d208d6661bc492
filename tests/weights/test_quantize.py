import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from seekvl.models.moe import Experts
from seekvl.models.quantized import (
    GROUP,
    KINDS,
    Kind,
    QuantizedExperts,
    QuantizedLinear,
    quantized_modules,
    unpack,
)
from seekvl.models.vl2 import AnyVL
from seekvl.presets import CHECKPOINTS
from seekvl.runtime import SeekVLError
from seekvl.weights import quantize as room
from seekvl.weights.load import load_checkpoint
from seekvl.weights.quantize import (
    OUTPUT_LIMIT,
    WEIGHT_LIMIT,
    candidates,
    numbers_of,
    output_errors,
    quantize_matrix,
    quantize_model,
    quantize_module,
    quantized_parts,
    saved_bytes,
    saved_vision_bytes,
    summary,
)

GOLDEN = Path(__file__).parents[1] / "golden"
EACH = pytest.mark.parametrize("kind", KINDS)
TOLD = tuple(
    f"language.{name}"
    for name in ("lm_head", "layers.0.attn.q_proj", "layers.0.mlp.gate_proj", "layers.0.mlp.down_proj")
)
"""Linear layers of a language model, of several sizes."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def loaded(folder: str) -> AnyVL:
    return load_checkpoint(GOLDEN / folder, device="cpu", dtype="float32").model


def fresh(folder: str) -> AnyVL:
    return copy.deepcopy(loaded(folder))


@EACH
@pytest.mark.parametrize("shape", [(1, 3), (17, 65), (50, 300)], ids=str)
def test_a_matrix_in_pieces_equals_the_matrix_at_once(
    kind: Kind, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = randn(*shape)
    packed, error = quantize_matrix(weight, kind)
    stored = unpack(packed, kind=kind, rows=shape[0], width=shape[1])
    assert error == pytest.approx(float((stored - weight).norm() / weight.norm()), rel=1e-5)
    assert error < (0.01 if kind == "int8" else 0.1)
    monkeypatch.setattr(room, "CHUNK", 1)
    again, same = quantize_matrix(weight, kind)
    assert torch.equal(again, packed)
    assert same == pytest.approx(error)


@EACH
def test_numbers_of_any_size_are_met(kind: Kind) -> None:
    for size in (1e-30, 1e-6, 1e6, 1e30):
        weight = randn(20, 64) * size
        packed, _ = quantize_matrix(weight, kind)
        stored = unpack(packed, kind=kind, rows=20, width=64)
        assert (stored / size - weight / size).norm() < 0.1 * (weight / size).norm()


@EACH
def test_a_module_keeps_its_bias_and_every_expert(kind: Kind) -> None:
    linear = nn.Linear(64, 20)
    layer, error = quantize_module(linear, kind)
    assert isinstance(layer, QuantizedLinear)
    assert layer.bias is linear.bias
    assert error == quantize_matrix(linear.weight, kind)[1]
    experts = next(module for module in loaded("vl2-tiny-like").modules() if isinstance(module, Experts))
    stack, worst = quantize_module(experts, kind)
    assert isinstance(stack, QuantizedExperts)
    for name in ("gate_proj", "up_proj", "down_proj"):
        for expert, matrix in enumerate(getattr(experts, name)):
            assert (stack.unpacked(name, expert) - matrix).norm() <= worst * matrix.norm() * (1 + 1e-4)


@EACH
@pytest.mark.parametrize("folder", ["vl1-siglip", "vl1-hybrid", "vl2-tiny-like", "vl2-base-like"])
def test_what_is_quantised_and_what_stays(folder: str, kind: Kind) -> None:
    model = loaded(folder)
    found = candidates(model, kind)
    language = {name: what for name, what in found.items() if name.startswith("language.")}
    assert set(language.values()) == {kind}
    assert set(found.values()) == {kind, "int8"}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    latent = {name for name in linear if name.endswith("kv_b_proj")}
    assert set(found) == linear - latent | experts
    assert bool(latent) == (folder == "vl2-base-like")
    assert "language.lm_head" in found
    assert not any("gate" in name and "gate_proj" not in name for name in found), "routers stay"


@EACH
def test_a_model_becomes_smaller_and_stays_near(kind: Kind) -> None:
    plain, model = loaded("vl1-siglip"), fresh("vl1-siglip")
    done: list[tuple[int, int]] = []
    matrices = quantize_model(model, kind, progress=lambda one, all_: done.append((one, all_)))
    assert done[-1] == (len(matrices), len(matrices)) == (len(done), len(done))
    kinds = {matrix.name: matrix.kind for matrix in matrices if matrix.kind is not None}
    assert {name: module.kind for name, module in quantized_modules(model).items()} == kinds
    assert sum(summary(matrices).values()) == len(matrices)
    for matrix in matrices:
        assert matrix.kind is None or (matrix.error is not None and matrix.error <= WEIGHT_LIMIT[matrix.kind])
        inside = matrix.name.startswith("language.")
        assert (matrix.output_error is None) == inside
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted, found = plain(ids), model(ids)
    assert (found - wanted).norm() < (0.05 if kind == "int8" else 0.4) * wanted.norm()


def test_the_model_is_left_alone_where_parts_are_asked_for() -> None:
    model = fresh("vl1-siglip")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = list(quantized_parts(model, "int4"))
    assert any(part is not None for _, part in parts)
    assert not quantized_modules(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_outputs_decide_in_the_vision_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel a thousand times the others: int8 loses these in the inputs of the layer behind."""
    monkeypatch.setattr(room, "OUTPUT_LIMIT", 0.02)
    model = fresh("vl1-siglip")
    errors = output_errors(model, ["vision.blocks.0.mlp.fc1", "vision.blocks.0.mlp.fc2"])
    assert all(0.005 < error < 0.02 for error in errors.values())
    with torch.no_grad():
        model.get_parameter("vision.blocks.0.norm2.bias")[0] = 3000.0
        model.get_parameter("vision.blocks.0.mlp.fc1.weight")[:, 0] = 0.0
    matrices = {matrix.name: matrix for matrix in quantize_model(model, "int8")}
    bad = matrices["vision.blocks.0.mlp.fc1"]
    assert bad.kind is None
    assert bad.output_error is not None
    assert bad.output_error > 0.02
    assert "outputs would be off by" in bad.reason
    assert isinstance(model.get_submodule(bad.name), nn.Linear)
    assert matrices["vision.blocks.0.mlp.fc2"].kind == "int8"


def test_ordinary_matrices_of_the_towers_are_quantised() -> None:
    """Eight bits leave 0.7 to 1.3 % of error in their outputs."""
    matrices = quantize_model(fresh("vl1-siglip"), "int8")
    tower = [matrix for matrix in matrices if matrix.name.startswith("vision.")]
    assert tower
    for matrix in tower:
        assert matrix.output_error is not None
        assert (matrix.kind is None) == (matrix.output_error > OUTPUT_LIMIT)
    assert sum(matrix.kind == "int8" for matrix in tower) > len(tower) / 2
    assert all(matrix.kind == "int8" for matrix in matrices if matrix.name.startswith("language."))


def test_what_gains_nothing_stays() -> None:
    model = fresh("vl1-siglip")
    model.language.layers[0].attn.q_proj = nn.Linear(3, 5, bias=False)
    matrices = {matrix.name: matrix for matrix in quantize_model(model, "int4")}
    small = matrices["language.layers.0.attn.q_proj"]
    assert small.kind is None
    assert small.reason == "int4 would take 576 bytes instead of 60"
    assert isinstance(model.get_submodule(small.name), nn.Linear)


def test_a_format_that_does_not_suit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("vl1-siglip")
    with torch.no_grad():
        weight = model.get_parameter("language.lm_head.weight")
        weight[:, ::GROUP] = 1.0
        weight[:, 1::GROUP] = -1.0
        weight[:, 2::2] = 1.0 / 15.9
        weight[:, 3::2] = 1.0 / 15.9
    monkeypatch.setitem(WEIGHT_LIMIT, "int4", 0.01)
    matrices = {matrix.name: matrix for matrix in quantize_model(model, "int4")}
    head = matrices["language.lm_head"]
    assert head.kind is None
    assert "weights would be off by" in head.reason


def test_bad_models_are_named() -> None:
    model = fresh("vl1-siglip")
    with pytest.raises(SeekVLError, match="quantize='int5' is unknown; use one of int8, int4"):
        quantize_model(model, "int5")  # type: ignore[arg-type]
    with torch.no_grad():
        model.get_parameter("language.layers.0.mlp.up_proj.weight")[3, 4] = torch.nan
    with pytest.raises(SeekVLError, match=r"language.layers.0.mlp.up_proj cannot be quantised: it holds"):
        quantize_model(model, "int4")
    model = fresh("vl1-siglip")
    quantize_model(model, "int8")
    with pytest.raises(SeekVLError, match="is quantised already"):
        quantize_model(model, "int8")
    with pytest.raises(SeekVLError, match="is for the CPU, and this model is on meta"):
        quantize_model(fresh("vl1-siglip").to("meta"), "int8")


@EACH
@pytest.mark.parametrize("folder", ["vl1-siglip", "vl2-tiny-like", "vl2-base-like"])
def test_saved_bytes_are_those_of_the_network(
    folder: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "OUTPUT_LIMIT", 1.0)
    before, model = loaded(folder), fresh(folder)
    quantize_model(model, kind)
    all_saved = sum(tensor.nbytes for tensor in before.state_dict().values())
    all_saved -= sum(tensor.nbytes for tensor in model.state_dict().values())
    saved = sum(tensor.nbytes for tensor in before.language.state_dict().values())
    saved -= sum(tensor.nbytes for tensor in model.language.state_dict().values())
    assert saved_bytes(before.config, kind, itemsize=4) == saved > 0
    assert saved_vision_bytes(before.config, kind, itemsize=4) == all_saved - saved > 0


def test_a_step_saves_on_the_experts_it_reads() -> None:
    config = loaded("vl2-tiny-like").config
    one, many, all_of_them = (saved_bytes(config, "int8", itemsize=4, rows=n) for n in (1, 4, None))
    assert one < many < all_of_them
    assert saved_bytes(config, "int8", itemsize=4, rows=10_000) == pytest.approx(all_of_them)
    dense = loaded("vl1-siglip").config
    assert saved_bytes(dense, "int8", itemsize=4, rows=1) == saved_bytes(dense, "int8", itemsize=4)


def test_matrices_that_lie_in_a_cache_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = sorted({numbers_of(loaded("vl1-siglip").get_submodule(name)) for name in TOLD})
    monkeypatch.setattr(room, "SMALLEST", numbers[-1])
    model = fresh("vl1-siglip")
    for matrix in quantize_model(model, "int8"):
        if matrix.name in TOLD:
            small = numbers_of(loaded("vl1-siglip").get_submodule(matrix.name)) < numbers[-1]
            assert (matrix.kind is None) is small
            assert ("numbers lie in a cache" in matrix.reason) is small
    assert not caplog.records
    saved = sum(tensor.nbytes for tensor in loaded("vl1-siglip").language.state_dict().values())
    saved -= sum(tensor.nbytes for tensor in model.language.state_dict().values())
    assert saved_bytes(model.config, "int8", itemsize=4) == saved > 0


def test_a_model_of_small_matrices_stays_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "SMALLEST", 1 << 18)
    model = load_checkpoint(device="cpu")
    for kind in KINDS:
        quantised = load_checkpoint(device="cpu", quantize=kind).model
        assert not quantized_modules(quantised)
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.model.state_dict().values(), quantised.state_dict().values(), strict=True)
        )
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        f"{kind} was asked for" for kind in KINDS
    ]
    assert "196,608 numbers" in caplog.text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_language_matrix_of_a_published_model_is_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CHECKPOINTS[name].model
    everything = saved_bytes(config, "int4", itemsize=2)
    monkeypatch.setattr(room, "SMALLEST", 1 << 18)
    assert saved_bytes(config, "int4", itemsize=2) == everything


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_where_it_is_asked_for(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "SMALLEST", 1 << 18)
    model = load_checkpoint(device="cpu", quantize=kind, smallest=0).model
    language = {name: part.kind for name, part in quantized_modules(model.language).items()}
    assert set(language.values()) == {kind}
    assert len(language) == 29
    assert not caplog.records
    some = load_checkpoint(device="cpu", quantize=kind, smallest=196_608).model
    assert list(quantized_modules(some.language)) == ["lm_head"]


@pytest.mark.parametrize("smallest", [-1, 1.5, "many"])
def test_a_smallest_matrix_that_cannot_be_meant(smallest: object) -> None:
    with pytest.raises(SeekVLError, match="give the numbers of a matrix, 0 for every matrix"):
        quantize_model(fresh("vl1-siglip"), "int8", smallest=smallest)  # type: ignore[arg-type]
