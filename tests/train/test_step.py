import pytest
import torch

from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2
from seekvl.runtime import SeekVLError
from seekvl.train.objective import Loss, next_token_loss
from seekvl.train.optimizer import make_optimizer
from seekvl.train.stage import Group
from seekvl.train.step import StepResult, autocast, take_step
from tests.train.conftest import EXPERTS, LANGUAGE, Toy, tiny_vl, tiny_vl2, toy_stage


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
    def constant(model: VL, batch: object) -> Loss:
        return Loss(total=torch.ones(()), weight=torch.ones(()))

    with pytest.raises(SeekVLError, match="no parameter that learns has a part in the loss"):
        step(tiny_vl(), objective=constant)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(SeekVLError, match="precision 'int8' is unknown"):
        step(tiny_vl(), precision="int8")


def sparse_step(model: VL2, **fields: object) -> StepResult:
    optimizer = make_optimizer(toy_stage(groups=EXPERTS), model)
    given = {"objective": next_token_loss, "lr": 1e-3, "grad_clip": 1.0, "optimizer": optimizer}
    return take_step(model, Toy()(0), **{**given, **fields})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_router_biases_move_after_the_step_by_the_loads_seen_in_it(precision: str) -> None:
    model = tiny_vl2()
    gate = model.language.layers[1].mlp.gate
    with torch.no_grad(), autocast(torch.device("cpu"), precision=precision):
        record = next_token_loss(model, Toy()(0)).record
    assert record is not None
    load = record.loads[1].float()
    result = sparse_step(model, bias_gamma=0.25, precision=precision)
    assert gate.bias.dtype == torch.float32
    assert torch.equal(gate.bias, 0.25 * torch.sign(load.mean() - load))
    assert result.expert_load == pytest.approx(float(load.max() / load.mean()))


@pytest.mark.parametrize("gamma", [None, 0.0])
def test_without_a_step_biases_stay_bit_for_bit(gamma: float | None) -> None:
    model = tiny_vl2()
    model.language.layers[1].mlp.gate.bias += 0.1
    before = model.language.layers[1].mlp.gate.bias.clone()
    sparse_step(model, bias_gamma=gamma)
    assert torch.equal(model.language.layers[1].mlp.gate.bias, before)


def test_a_step_that_is_not_finite_moves_no_bias() -> None:
    def broken(model: VL2, batch: object) -> Loss:
        loss = next_token_loss(model, batch)
        return loss._replace(total=loss.total * float("nan"))

    model = tiny_vl2()
    assert sparse_step(model, objective=broken, bias_gamma=0.25).skipped
    assert not model.language.layers[1].mlp.gate.bias.any()


def test_balance_is_unknown_without_experts() -> None:
    assert step(tiny_vl()).expert_load is None
    with pytest.raises(SeekVLError, match=r"moves router biases by 0\.1, but its loss saw no router of VL"):
        step(tiny_vl(), bias_gamma=0.1)


def test_a_step_follows_the_balance_losses_of_routers() -> None:
    moved = []
    for alpha in (0.0, 1.0):
        model = tiny_vl2(aux_alpha=alpha)
        before = model.language.layers[1].mlp.gate.weight.clone()
        result = sparse_step(model)
        moved.append(model.language.layers[1].mlp.gate.weight - before)
        assert result.loss == pytest.approx(next_token_loss(tiny_vl2(), Toy()(0)).mean().item(), rel=1e-6)
    assert not torch.equal(*moved)
