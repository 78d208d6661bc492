import pytest
import torch

from seekvl.models.vl import VL
from seekvl.runtime import SeekVLError
from seekvl.train.objective import Loss, next_token_loss
from seekvl.train.optimizer import make_optimizer
from seekvl.train.stage import Group
from seekvl.train.step import StepResult, take_step
from tests.train.conftest import LANGUAGE, Toy, tiny_vl, toy_stage


def step(model: VL, **fields: object) -> StepResult:
    stage = toy_stage(groups=fields.pop("groups", LANGUAGE))
    given = {
        "objective": next_token_loss,
        "lr": 1e-3,
        "grad_clip": 1.0,
        "optimizer": make_optimizer(stage, model),
    }
    return take_step(model, Toy()(0), **{**given, **fields})


def test_update_equals_a_plain_adamw_step() -> None:
    model, plain = tiny_vl(), tiny_vl()
    result = step(model, grad_clip=0.01)
    plain.vision.requires_grad_(False)
    plain.adaptor.requires_grad_(False)
    optimizer = torch.optim.AdamW(plain.language.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    next_token_loss(plain, Toy()(0)).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.language.parameters(), 0.01)
    optimizer.step()
    assert result.grad_norm == pytest.approx(float(norm))
    assert result.grad_norm > 0.01
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_multiplier_scales_the_learning_rate() -> None:
    groups = (Group(pattern="language[.].*", lr=0.5), Group(pattern="(vision|adaptor)[.].*", frozen=True))
    half, whole, start = tiny_vl(), tiny_vl(), tiny_vl()
    step(half, groups=groups)
    step(whole)
    moved = whole.language.lm_head.weight - start.language.lm_head.weight
    torch.testing.assert_close(half.language.lm_head.weight - start.language.lm_head.weight, moved / 2)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_leave_the_model_alone(factor: float) -> None:
    def broken(model: VL, batch: object) -> Loss:
        loss = next_token_loss(model, batch)
        return Loss(total=loss.total * factor, weight=loss.weight)

    model = tiny_vl()
    assert step(model, objective=broken).skipped
    for (name, parameter), before in zip(model.named_parameters(), tiny_vl().parameters(), strict=True):
        assert torch.equal(parameter, before), name
        assert parameter.grad is None


def test_bfloat16_keeps_float32_parameters_and_nearly_the_loss() -> None:
    model = tiny_vl()
    exact = step(tiny_vl())
    rough = step(model, precision="bfloat16")
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    assert rough.loss != exact.loss
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_loss_no_learning_parameter_reaches_is_refused() -> None:
    def constant(model: VL, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(()), torch.ones(())

    with pytest.raises(SeekVLError, match="no parameter that learns has a part in the loss"):
        step(tiny_vl(), objective=constant)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(SeekVLError, match="precision 'int8' is unknown"):
        step(tiny_vl(), precision="int8")
