"""Experts kept busy alike: how uneven a step was, and the correction bias moved against it (2408.15664;
2412.10302, hyper-parameter table).
"""

from typing import TypeGuard

import torch
from torch import nn

from seekvl.models.moe import Moe, RouterRecord, update_bias
from seekvl.models.vl import VL
from seekvl.models.vl2 import VL2, AnyVL
from seekvl.runtime import SeekVLError


def has_experts(model: AnyVL) -> TypeGuard[VL2]:
    """Whether any layer of a network is a mixture of experts."""
    if isinstance(model, VL):
        return False
    config = model.config.language
    return any(config.has_experts(layer) for layer in range(config.layers))


def busiest(record: RouterRecord) -> float:
    """Return what the fullest expert got over the mean of its layer, in the layer where that is most.

    1 is perfect balance; E / k, all experts over active ones, is what an expert gets that every token goes
    to. Nothing counted gives 0.
    """
    loads = torch.stack(list(record.loads.values())).float()  # layers E
    return float((loads.amax(dim=1) / loads.mean(dim=1).clamp(min=1e-20)).max())


def move_biases(model: nn.Module, record: RouterRecord | None, *, gamma: float) -> None:
    """Move the correction bias of every router by gamma, towards the experts a step left idle.

    Raises SeekVLError where there is no such bias to move, and for one that is not kept in float32, in which
    steps this small would be lost.
    """
    if record is None or not isinstance(model, VL2):
        raise SeekVLError(
            f"the stage moves router biases by {gamma}, but its loss saw no router of "
            f"{type(model).__name__}; leave bias_gamma out"
        )
    for layer, load in record.loads.items():
        mlp = model.language.layers[layer].mlp
        assert isinstance(mlp, Moe)
        bias = mlp.gate.bias
        if bias is not None and bias.dtype != torch.float32:
            raise SeekVLError(
                f"the router bias of layer {layer} is kept in {bias.dtype}, which swallows steps of {gamma}; "
                "train in float32 with precision 'bfloat16'"
            )
        update_bias(mlp.gate, load, gamma=gamma)
