import copy
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seekvl.models.moe import Experts
from seekvl.models.quantized import KINDS, Kind, QuantizedExperts, quantized_modules
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import SeekVLError
from seekvl.weights import calibrate as room
from seekvl.weights import effects
from seekvl.weights.calibrate import calibrated_parts
from seekvl.weights.effects import Passage, allowed_shift, measure, standing, unit_of
from seekvl.weights.load import Checkpoint, load_checkpoint
from seekvl.weights.quantize import Matrix, packed_bytes, quantize_matrix, quantize_model
from seekvl.weights.read_quantized import stored_matrices
from seekvl.weights.save_quantized import save_quantized

GOLDEN = Path(__file__).parents[1] / "golden"
EACH = pytest.mark.parametrize("kind", KINDS)
FOLDERS = ("vl1-siglip", "vl2-tiny-like", "vl2-base-like")


@cache
def loaded(folder: str) -> Checkpoint:
    return load_checkpoint(GOLDEN / folder, device="cpu", dtype="float32")


@cache
def passages(folder: str, *, places: int = 4, n: int = 16) -> tuple[Passage, ...]:
    """Words at random: what stands in the place of pictures is no less random."""
    model, made = loaded(folder).model, []
    for index in range(n):
        ids = torch.randint(0, 200, (20 + index,), generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            made.append(Passage(embeds=model.embed(ids[None])[0], places=places))
    return tuple(made)


def calibrated(folder: str, kind: Kind, *, agreement: float | None = None) -> list[Matrix]:
    return [
        matrix
        for matrix, _ in calibrated_parts(loaded(folder).model, kind, passages(folder), agreement=agreement)
    ]


@EACH
@pytest.mark.parametrize("folder", FOLDERS)
def test_all_of_a_language_model_and_nothing_of_the_towers(folder: str, kind: Kind) -> None:
    model = copy.deepcopy(loaded(folder).model)
    parts = calibrated_parts(model, kind, passages(folder))
    matrices = quantize_model(model, kind, parts=parts)
    kinds = {matrix.name: matrix.kind for matrix in matrices if matrix.kind is not None}
    assert kinds == {name: part.kind for name, part in quantized_modules(model).items()}
    assert all(name.startswith("language.") for name in kinds)
    for matrix in matrices:
        if matrix.kind is None:
            assert matrix.reason, matrix.name
        else:
            assert matrix.output_error is not None
            assert 0 < matrix.output_error <= room.OUTPUT_LIMIT[matrix.kind]
            assert matrix.moved is not None
            assert math.isfinite(matrix.moved)
    assert "towers are no faster" in next(m.reason for m in matrices if m.name.startswith("vision."))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        wanted, found = loaded(folder).model(ids), model(ids)
    if folder != "vl2-base-like":  # whose routers, of random weights, choose other experts at a touch
        assert (found - wanted).norm() < (0.05 if kind == "int8" else 0.4) * wanted.norm()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("vl1-siglip", "language.layers.0.attn.v_proj"),
        ("vl1-siglip", "language.layers.1.mlp.down_proj"),
        ("vl1-siglip", "language.lm_head"),
        ("vl2-tiny-like", "language.layers.1.mlp.experts"),
        ("vl2-base-like", "language.layers.2.attn.o_proj"),
    ],
)
def test_what_moves_gaps_is_what_putting_it_there_moves(
    folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "NEAR", math.inf)
    monkeypatch.setattr(room, "OUTPUT_LIMIT", {"int8": 1.0})
    some = passages(folder, places=1)
    model = loaded(folder).model
    matrix, part = next(x for x in calibrated_parts(model, "int8", some) if x[0].name == name)
    assert part is not None
    changed = copy.deepcopy(model)
    changed.set_submodule(name, part)
    _, measured = room._split(some)
    moves = []
    for passage in measured:
        with torch.no_grad():
            before, after = (m.head(m.hidden(passage.embeds[None]))[0, -1] for m in (model, changed))
        first, second = before.topk(2).indices.tolist()
        moves.append(abs(float((after - before)[first] - (after - before)[second])))
    wanted = math.sqrt(math.pi / 2) * sum(moves) / len(moves)
    assert matrix.moved == pytest.approx(wanted, rel=0.1)


def size(model: AnyVL, matrices: Iterable[Matrix]) -> int:
    total = 0
    for matrix in matrices:
        module = model.get_submodule(matrix.name)
        plain = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        total += plain if matrix.kind is None else packed_bytes(module, matrix.kind)
    return total


@EACH
def test_the_less_answers_may_change_the_less_is_saved(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = loaded("vl1-siglip").model, []
    for allowed in (0.0, 0.02, 0.05, math.inf):
        monkeypatch.setattr(room, "allowed_shift", lambda gaps, agreement, allowed=allowed: allowed)
        matrices = calibrated("vl1-siglip", kind, agreement=0.5)
        language = [matrix for matrix in matrices if matrix.name.startswith("language.")]
        sizes.append(size(model, language))
        moved = {unit_of(m.name): m.moved for m in language if m.kind is not None}
        assert sum(one**2 for one in moved.values() if one is not None) <= allowed**2
        kinds = {m.name: m.kind for m in language}
        for name in kinds:
            assert kinds[name] == kinds[name.replace("gate_proj", "up_proj")], "they share their format"
        if allowed == 0:
            assert set(kinds.values()) == {None}
            assert "more than the answers allow" in language[0].reason
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert size(model, calibrated("vl1-siglip", kind)[-22:]) == sizes[-1]


def test_no_answer_may_change_and_nothing_is_quantised() -> None:
    assert not any(matrix.kind for matrix in calibrated("vl2-tiny-like", "int4", agreement=1.0))


def test_an_expert_that_saw_few_tokens_is_rounded_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("vl2-tiny-like").model
    monkeypatch.setattr(room, "COVERED", 10**6)
    alone = {m.name: (m, part) for m, part in calibrated_parts(model, "int4", passages("vl2-tiny-like"))}
    monkeypatch.setattr(room, "COVERED", 1)
    seen = {m.name: (m, part) for m, part in calibrated_parts(model, "int4", passages("vl2-tiny-like"))}
    names = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    assert names
    for name in names:
        module, (matrix, part) = model.get_submodule(name), alone[name]
        assert isinstance(module, Experts)
        assert isinstance(part, QuantizedExperts)
        assert matrix.bare == tuple(range(len(module.gate_proj)))
        wanted = quantize_matrix(module.gate_proj[0].detach(), part.kind)[0]
        assert torch.equal(part.gate_proj[0], wanted)
        other, (told, _) = seen[name][1], seen[name]
        assert isinstance(other, QuantizedExperts)
        assert not torch.equal(other.gate_proj, part.gate_proj)
        assert len(told.bare) < len(matrix.bare)


def test_outputs_that_would_be_too_far_off_keep_a_matrix_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "OUTPUT_LIMIT", {"int8": 0.02, "int4": 1e-4})
    kinds = {matrix.kind for matrix in calibrated("vl1-siglip", "int4") if matrix.name.startswith("language")}
    assert kinds == {"int8"}
    monkeypatch.setattr(room, "OUTPUT_LIMIT", {"int8": 1e-4})
    for matrix in calibrated("vl1-siglip", "int8"):
        assert matrix.kind is None
        if matrix.name.startswith("language."):
            assert "outputs would be off by" in matrix.reason


def test_a_mixture_is_saved_and_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "allowed_shift", lambda gaps, agreement: 0.1)
    checkpoint = loaded("vl2-tiny-like")
    model = copy.deepcopy(checkpoint.model)
    some = passages("vl2-tiny-like")
    matrices = save_quantized(
        checkpoint.model,
        tmp_path,
        kind="int4",
        config=checkpoint.config,
        tokenizer=checkpoint.folder / "tokenizer.json",
        parts=calibrated_parts(checkpoint.model, "int4", some, agreement=0.5),
    )
    assert {matrix.kind for matrix in matrices} == {None, "int8", "int4"}
    assert stored_matrices(tmp_path, kind="int4") == matrices
    quantize_model(model, "int4", parts=calibrated_parts(model, "int4", some, agreement=0.5))
    back = load_checkpoint(tmp_path, device="cpu", dtype="float32").model
    ids = torch.arange(25)[None]
    with torch.no_grad():
        assert torch.equal(back(ids), model(ids))


def test_what_filled_rows_up_changes_nothing() -> None:
    """A long passage among short ones: the same as each alone, but for the order of sums."""
    model = loaded("vl2-tiny-like").model
    short = passages("vl2-tiny-like")
    long = Passage(embeds=torch.cat([passage.embeds for passage in short[:4]]), places=3)
    for _, part in calibrated_parts(model, "int8", [long, *short]):
        if part is not None:
            assert all(tensor.isfinite().all() for tensor in part.buffers() if tensor.dtype != torch.uint8)
    gaps: list[Tensor] = measure(model, [long, *short], forms={})
    alone = measure(model, [short[3]], forms={})[0]
    assert any(gap.shape == alone.shape and torch.allclose(gap, alone, atol=1e-4) for gap in gaps)


def test_expected_answers() -> None:
    gaps = [torch.tensor([0.0, 9.0]), torch.tensor([9.0]), torch.tensor([0.0, 0.0])]
    assert standing(gaps, 0.1) == pytest.approx((0.5 + 1.0 + 0.25) / 3)
    assert allowed_shift(gaps, agreement=0.0) == math.inf
    even = [torch.tensor([0.001 * index]) for index in range(1000)]
    for agreement in (0.98, 0.95):
        assert standing(even, allowed_shift(even, agreement=agreement)) == pytest.approx(agreement, abs=2e-3)
    assert allowed_shift(even, agreement=0.998) == pytest.approx(allowed_shift(even, agreement=0.996) / 2)
    assert allowed_shift(even, agreement=1.0) == 0.0


def test_bad_calls() -> None:
    model, some = loaded("vl1-siglip").model, passages("vl1-siglip")
    for agreement in (-0.1, 1.5, math.nan):
        with pytest.raises(SeekVLError, match="give a share of answers, 0 to 1"):
            next(calibrated_parts(model, "int8", some, agreement=agreement))
    with pytest.raises(SeekVLError, match="needs two answers or more"):
        next(calibrated_parts(model, "int8", some[:1]))
    with pytest.raises(SeekVLError, match="needs two answers or more"):
        next(calibrated_parts(model, "int8", [Passage(embeds=some[0].embeds, places=0)] * 3))
    bad = Passage(embeds=some[0].embeds * torch.nan, places=1)
    with pytest.raises(SeekVLError, match="q_proj cannot be quantised: its inputs hold numbers that are NaN"):
        next(calibrated_parts(model, "int8", [bad, *some]))
    done = copy.deepcopy(model)
    quantize_model(done, "int8")
    with pytest.raises(SeekVLError, match="is quantised already"):
        next(calibrated_parts(done, "int8", some))
