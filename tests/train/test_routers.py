import pytest
import torch

from seekvl.models.moe import RouterRecord
from seekvl.runtime import SeekVLError
from seekvl.train.routers import busiest, has_experts, move_biases
from tests.train.conftest import tiny_vl, tiny_vl2


def record(**loads: list[int]) -> RouterRecord:
    """Make a record with the loads of layers, given as layer1=[...]."""
    made = RouterRecord()
    made.loads = {int(name.removeprefix("layer")): torch.tensor(load) for name, load in loads.items()}
    return made


def test_the_busiest_expert_is_that_of_the_most_uneven_layer() -> None:
    assert busiest(record(layer1=[4, 4, 4, 4])) == 1.0
    assert busiest(record(layer1=[4, 4, 4, 4], layer2=[6, 6, 4, 0], layer3=[5, 4, 4, 3])) == 1.5
    assert busiest(record(layer1=[8, 0, 0, 0])) == 4.0
    assert busiest(record(layer1=[0, 0, 0, 0])) == 0.0


def test_which_networks_have_experts() -> None:
    assert has_experts(tiny_vl2())
    assert not has_experts(tiny_vl())


def test_every_router_moves_by_its_own_loads() -> None:
    model = tiny_vl2()
    move_biases(model, record(layer1=[9, 1, 5, 5]), gamma=0.5)
    assert model.language.layers[1].mlp.gate.bias.tolist() == [-0.5, 0.5, 0, 0]


def test_a_bias_of_low_precision_is_refused() -> None:
    model = tiny_vl2().bfloat16()
    with pytest.raises(
        SeekVLError, match=r"layer 1 is kept in torch.bfloat16, which swallows steps of 0.001"
    ):
        move_biases(model, record(layer1=[9, 1, 5, 5]), gamma=0.001)


def test_a_router_without_bias_is_refused() -> None:
    with pytest.raises(SeekVLError, match="'greedy' has no bias to update"):
        move_biases(tiny_vl2(choice="greedy"), record(layer1=[9, 1, 5, 5]), gamma=0.001)


def test_a_loss_that_saw_no_router_is_refused() -> None:
    with pytest.raises(SeekVLError, match="its loss saw no router of VL2; leave bias_gamma out"):
        move_biases(tiny_vl2(), None, gamma=0.001)
