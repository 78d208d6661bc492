import pytest
import torch

from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, AnyVL
from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_initialise import initialise


@pytest.mark.parametrize("make", [lambda: VL(nano.MODEL), lambda: VL2(nano_moe.MODEL)])
def test_initialisation_depends_on_the_seed_alone(make) -> None:
    first, again, other = (make() for _ in range(3))
    initialise(first, seed=1)
    torch.rand(100)
    initialise(again, seed=1)
    initialise(other, seed=2)
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.language.lm_head.weight, other.language.lm_head.weight)


def spread(model: AnyVL, name: str) -> float:
    return float(dict(model.named_parameters())[name].detach().std())


def test_experts_are_filled_by_the_inputs_of_one_matrix() -> None:
    model = VL2(nano_moe.MODEL)
    initialise(model, seed=0)
    block = "language.layers.1.mlp"
    usual = spread(model, "language.layers.0.mlp.up_proj.weight")
    assert spread(model, f"{block}.experts.up_proj") == pytest.approx(usual, rel=0.02)
    # what writes to the stream starts smaller, and has fewer inputs than up_proj
    assert spread(model, f"{block}.experts.down_proj") == pytest.approx(
        spread(model, f"{block}.shared.down_proj.weight"), rel=0.03
    )
    assert not model.language.layers[1].mlp.gate.bias.any()
    for row in (model.image_newline, model.view_separator):
        assert float(row.detach().norm()) == pytest.approx(1.0, rel=0.25)
