from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from seekvl.data.collate import Part
from seekvl.models.moe import RouterRecord
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import SeekVLError
from seekvl.train import objective
from seekvl.train.objective import ROW_STEP, next_token_loss
from tests.train.conftest import LENGTH, ROWS, Toy, tiny_vl, tiny_vl2


def reference(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """Sum the losses token by token."""
    total = count = 0.0
    for row in range(ids.shape[0]):
        for place in range(1, ids.shape[1]):
            log_probs = logits[row, place - 1].double().log_softmax(0)
            total -= float(weights[row, place]) * float(log_probs[ids[row, place]])
            count += float(weights[row, place])
    return total, count


@pytest.mark.parametrize("pictures", [False, True])
def test_equals_the_slow_sum_over_tokens(pictures: bool) -> None:
    model, batch = tiny_vl(), Toy(pictures=pictures)(0)
    weights = torch.rand(batch.loss_weights.shape).round(decimals=1) * (
        torch.rand(batch.loss_weights.shape) > 0.4
    )
    batch = replace(batch, loss_weights=weights)
    with torch.no_grad():
        logits = model(batch.input_ids, image_mask=batch.image_mask, pixels=batch.pixels)
        loss = next_token_loss(model, batch)
    total, count = reference(logits, batch.input_ids, weights)
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert float(loss.weight) == pytest.approx(count, rel=1e-6)
    assert float(loss.mean()) == pytest.approx(total / count, rel=1e-5)


def test_gradient_equals_that_of_the_whole_head() -> None:
    model, batch = tiny_vl(), Toy()(0)
    next_token_loss(model, batch).mean().backward()
    fast = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    logits = model(batch.input_ids)[:, -2]
    torch.nn.functional.cross_entropy(logits, batch.input_ids[:, -1]).backward()
    for name, grad in fast.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad)


def test_tokens_without_weight_that_nobody_sees_have_no_effect() -> None:
    model, batch = tiny_vl(), Toy()(0)
    weights = torch.zeros_like(batch.loss_weights)
    weights[:, 4] = 1.0
    batch = replace(batch, loss_weights=weights)
    other = batch.input_ids.clone()
    other[:, 5:] = 1
    with torch.no_grad():
        assert torch.equal(
            next_token_loss(model, batch).total, next_token_loss(model, replace(batch, input_ids=other)).total
        )


def test_first_token_cannot_be_predicted() -> None:
    model, batch = tiny_vl(), Toy()(0)
    weights = torch.zeros_like(batch.loss_weights)
    weights[:, 0] = 1.0
    loss = next_token_loss(model, replace(batch, loss_weights=weights))
    assert float(loss.weight) == 0.0


def test_no_weight_at_all_gives_zero_and_zero_gradients() -> None:
    model, batch = tiny_vl(), Toy()(0)
    mean = next_token_loss(model, replace(batch, loss_weights=torch.zeros_like(batch.loss_weights))).mean()
    mean.backward()
    assert float(mean.detach()) == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_only_supervised_rows_pass_the_head() -> None:
    model, batch = tiny_vl(), Toy()(0)
    seen: list[int] = []
    model.language.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    next_token_loss(model, batch)
    assert ROWS < ROW_STEP
    assert seen == [ROW_STEP]


def test_pictures_prepared_for_the_other_family_are_refused() -> None:
    batch = replace(Toy(pictures=True)(0), grids=((1, 1),))
    with pytest.raises(SeekVLError, match="the batch holds tiles, which VL does not take"):
        next_token_loss(tiny_vl(), batch)


def test_balance_losses_are_minimised_but_not_told() -> None:
    model, batch = tiny_vl2(), Toy()(0)
    loss = next_token_loss(model, batch)
    assert loss.record is not None
    record = RouterRecord()
    with torch.no_grad():
        model.hidden(model.embed(batch.input_ids), record=record)
        logits = model(batch.input_ids)[:, -2]
        plain = torch.nn.functional.cross_entropy(logits, batch.input_ids[:, -1])
    assert record.loss() > 1e-3
    assert loss.mean().item() == pytest.approx(plain.item(), rel=1e-5)
    assert loss.minimised().item() == pytest.approx((plain + record.loss()).item(), rel=1e-5)
    tripled = next_token_loss(model, replace(batch, loss_weights=3 * batch.loss_weights))
    assert tripled.minimised().item() == pytest.approx(loss.minimised().item(), rel=1e-5)
    nothing = next_token_loss(model, replace(batch, loss_weights=torch.zeros_like(batch.loss_weights)))
    assert nothing.minimised().item() == 0.0


def test_balance_of_no_weight_is_bit_equal_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_record = next_token_loss(tiny_vl2(aux_alpha=0.0), Toy()(0))
    monkeypatch.setattr(objective, "has_experts", lambda model: False)
    without = next_token_loss(tiny_vl2(aux_alpha=0.0), Toy()(0))
    assert (with_record.record is None, without.record is None) == (False, True)
    assert torch.equal(with_record.minimised(), without.minimised())


def test_routers_do_not_count_padding() -> None:
    model, batch = tiny_vl2(), Toy()(0)
    present = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    present[:, LENGTH // 2 :] = False
    weights = batch.loss_weights.roll(LENGTH // 2, dims=1)
    short = next_token_loss(model, replace(batch, present=present, loss_weights=weights)).record
    assert short is not None
    assert int(short.loads[1].sum()) == ROWS * LENGTH // 2
    half = RouterRecord()
    model.hidden(model.embed(batch.input_ids[:, : LENGTH // 2]), record=half)
    assert torch.equal(short.loads[1], half.loads[1])
    torch.testing.assert_close(short.loss(), half.loss())


def test_a_network_without_experts_has_no_record() -> None:
    assert next_token_loss(tiny_vl(), Toy()(0)).record is None


@pytest.mark.parametrize("make", [tiny_vl, tiny_vl2])
def test_parts_of_a_batch_give_its_loss_gradients_and_loads(make: Callable[[], AnyVL]) -> None:
    batch, short = Toy()(0), LENGTH // 2
    present, weights = batch.present.clone(), batch.loss_weights.clone()
    present[:6, short:] = False
    weights[:6] = weights[:6].roll(LENGTH - short, dims=1)
    batch = replace(batch, present=present, loss_weights=weights)
    results = []
    for parts in (batch.parts, (Part(6, short), Part(ROWS - 6, LENGTH))):
        model = make()
        loss = next_token_loss(model, replace(batch, parts=parts))
        loss.minimised().backward()
        results.append((loss, {name: each.grad for name, each in model.named_parameters()}))
    (whole, expected), (cut, found) = results
    torch.testing.assert_close(cut.minimised(), whole.minimised())
    torch.testing.assert_close(found, expected)
    assert (cut.record is None) == (whole.record is None)
    if cut.record is not None and whole.record is not None:
        assert torch.equal(cut.record.loads[1], whole.record.loads[1])
        assert int(cut.record.loads[1].sum()) == 6 * short + (ROWS - 6) * LENGTH
