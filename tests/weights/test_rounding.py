import pytest
import torch
from torch import Tensor

from seekvl.models.quantized import GROUP, KINDS, RANGE, Kind
from seekvl.runtime import SeekVLError
from seekvl.weights import rounding as room
from seekvl.weights.rounding import DAMPING, feedback_factor, feedback_values, int4_values, int8_values

EACH = pytest.mark.parametrize("kind", KINDS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, i: int, *, seed: int = 0) -> Tensor:
    """Inputs as they are: most of them lies in a few directions."""
    return randn(n, 12, seed=seed) @ randn(12, i, seed=1) + 0.3 * randn(n, i, seed=seed + 2)


def stored(values: Tensor, scales: Tensor, *, kind: Kind) -> Tensor:
    if kind == "int8":
        return values * scales[:, None]
    return values * scales.repeat_interleave(GROUP, dim=1)[:, : values.shape[1]]


def plain_values(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    return int8_values(weight) if kind == "int8" else int4_values(weight)


def test_int8_uses_every_step_of_a_row() -> None:
    weight = randn(9, 50)
    weight[3] = 0.0
    values, scales = int8_values(weight)
    assert values.abs().amax(dim=1).tolist() == [127] * 3 + [0] + [127] * 5
    wrong = (values * scales[:, None] - weight).abs()
    assert (wrong <= scales[:, None] * 0.501).all()


def test_int4_is_nearer_than_the_largest_number_alone_decides() -> None:
    weight = randn(40, 32 * 6)
    values, scales = int4_values(weight)
    assert (int(values.min()), int(values.max())) == (-8, 7)
    assert torch.equal(scales, scales.bfloat16().float())
    stored = (values.unflatten(1, (-1, GROUP)) * scales.unsqueeze(2)).flatten(1)
    groups = weight.unflatten(1, (-1, GROUP))
    plain = groups.abs().amax(dim=2, keepdim=True) / 7
    simple = (groups / plain).round() * plain
    ours, theirs = ((x - weight).square().sum() for x in (stored, simple.flatten(1)))
    assert ours < 0.85 * theirs


def test_int4_holds_what_it_can_hold_exactly() -> None:
    values = torch.randint(-8, 8, (5, 70), generator=torch.Generator().manual_seed(1))
    values[:, ::GROUP] = -8
    weight = values * 0.25
    found, scales = int4_values(weight)
    assert torch.equal(found, values.to(torch.int8))
    assert torch.equal(scales, torch.full((5, 3), 0.25))
    assert torch.equal(int4_values(-weight)[1], torch.full((5, 3), -0.25))
    nothing, scale = int4_values(torch.zeros(2, 32))
    assert not nothing.any()
    assert not scale.any()


@EACH
def test_outputs_are_nearer_where_errors_are_fed_back(kind: Kind) -> None:
    weight, x, others = randn(40, 200, seed=3), correlated(600, 200), correlated(300, 200, seed=50)
    wanted = others @ weight.T
    by_itself = others @ stored(*plain_values(weight, kind), kind=kind).T
    fed_back = others @ stored(*feedback_values(weight, kind, factor=feedback_factor(x)), kind=kind).T
    assert (fed_back - wanted).norm() < 0.7 * (by_itself - wanted).norm()


@EACH
def test_inputs_that_know_nothing_of_each_other_change_nothing(kind: Kind) -> None:
    weight = randn(20, 100)
    values, scales = feedback_values(weight, kind, factor=torch.eye(100) * 3.0)
    wanted, same = plain_values(weight, kind)
    assert torch.equal(scales, same)
    assert torch.equal(values, wanted)


def test_it_is_what_the_book_says() -> None:
    """One column after the other: the rest takes the least squares' answer to the error, by the inverse of
    its own curvature (2210.17323, eq. 2).
    """
    weight, x = randn(6, 40).double(), correlated(200, 40).double()
    curvature = x.T @ x
    curvature = curvature / curvature.diagonal().mean() + DAMPING * torch.eye(40)
    scale = weight.abs().amax(dim=1) / 127.0
    rest, values = weight.clone(), torch.empty(6, 40)
    for column in range(40):
        inverse = curvature[column:, column:].inverse()
        values[:, column] = (rest[:, column] / scale).round().clamp(*RANGE["int8"])
        error = (rest[:, column] - values[:, column] * scale) / inverse[0, 0]
        rest[:, column:] -= error[:, None] * inverse[0]
    found, scales = feedback_values(weight.float(), "int8", factor=feedback_factor(x.float()))
    assert torch.allclose(scales, scale.float())
    assert (found - values).abs().max() <= 1, "float32 may tip a number between two values"
    assert (found == values).float().mean() > 0.95


@EACH
def test_where_blocks_end_changes_next_to_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor = randn(12, 170), feedback_factor(correlated(400, 170))
    values, scales = feedback_values(weight, kind, factor=factor)
    monkeypatch.setattr(room, "BLOCK", 4 * GROUP)
    others, same = feedback_values(weight, kind, factor=factor)
    assert (values == others).float().mean() > 0.95
    assert torch.isclose(scales, same, rtol=0.05).float().mean() > 0.9  # of a tie either side may be taken


def test_inputs_of_every_kind() -> None:
    assert torch.equal(feedback_factor(torch.zeros(5, 8)), torch.eye(8))
    few = feedback_factor(randn(2, 8))
    assert few.isfinite().all()
    assert torch.equal(few, few.triu())
    silent = randn(50, 8)
    silent[:, 3] = 0.0
    weight = randn(4, 8)
    values, _ = feedback_values(weight, "int8", factor=feedback_factor(silent))
    assert torch.equal(values[:, 0], int8_values(weight)[0][:, 0])
    with pytest.raises(SeekVLError, match="its inputs hold numbers that are NaN or infinite"):
        feedback_factor(torch.tensor([[1.0, torch.nan]]))
