"""DeepSeekMoE: a router sends each token to a few of many small SwiGLUs (2401.06066, sec. 3). It is the
feed-forward layer of DeepSeek-VL2 (2412.10302, sec. 2).

    scores = softmax or sigmoid (W x)
    y = sum over the k chosen of (weight * expert x) + shared x

The experts are stacked tensors. The slots of all tokens, k each, are sorted by expert once; then one grouped
matrix product does all experts, forward and backward. Counts and order never leave the device.

Letters: b rows, t tokens, n tokens of all rows, k experts a token, z slots (n * k), E experts, m width of an
expert, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seekvl.models.llama import Mlp
from seekvl.runtime import SeekVLError, check_positive

Scoring = Literal["softmax", "sigmoid"]
Choice = Literal["greedy", "group_limited", "noaux_tc"]

FEW_SLOTS = 16
"""Token slots up to which an accelerator multiplies with copies of the chosen experts, as in decoding. A CPU
does not: the grouped product reads each chosen expert in its place (0.33 of the time in float32, 0.59 in
bfloat16, for one token of the tiny model's layer).
"""

ALIGNMENT = 16
"""Bytes to which the rows of a grouped product must be aligned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """Experts and router."""

    experts: int
    """Routed experts E."""
    active: int
    """Experts k that see a token, besides the shared ones."""
    shared: int
    """Experts that see every token; they are one SwiGLU of their summed width."""
    width: int
    """Hidden channels m of one expert."""
    scoring: Scoring
    """How the router's logits become scores: softmax in tiny and small, sigmoid in base."""
    choice: Choice
    """How the k experts are picked from the scores; `noaux_tc` adds a bias per expert to the scores for the
    choice only, so that loads can be balanced without a loss (2408.15664).
    """
    groups: int = 1
    """Groups of experts the choice is limited to the best of; published is 1 everywhere."""
    kept_groups: int = 1
    normalise: bool = False
    """Whether the weights of the chosen are divided by their sum."""
    scale: float = 1.0
    """Factor on the weights of the chosen, after the normalisation."""
    aux_alpha: float = 0.001
    """Weight of the balance loss in training; 2412.10302 trains base with 0.0001."""
    aux_per_sequence: bool = True
    """Whether balance is asked of every sequence alone or of the batch as a whole."""

    def __post_init__(self) -> None:
        check_positive("MoE", self, or_zero=("shared", "aux_alpha"))
        for name, kinds in (("scoring", get_args(Scoring)), ("choice", get_args(Choice))):
            if getattr(self, name) not in kinds:
                raise SeekVLError(
                    f"MoE {name} {getattr(self, name)!r} is unknown; known are {', '.join(kinds)}"
                )
        if not 1 <= self.active <= self.experts:
            raise SeekVLError(f"MoE: {self.active} active experts of {self.experts}")
        if self.experts % self.groups:
            raise SeekVLError(f"MoE: {self.experts} experts do not make {self.groups} equal groups")
        if not 1 <= self.kept_groups <= self.groups:
            raise SeekVLError(f"MoE: {self.kept_groups} kept groups of {self.groups}")
        if self.choice == "noaux_tc" and self.experts < 2 * self.groups:
            raise SeekVLError(
                f"MoE: noaux_tc ranks a group by its two best experts, {self.experts} experts in "
                f"{self.groups} groups are too few"
            )


class Routing(NamedTuple):
    """What the router decided."""

    scores: Tensor
    """f32[..., E]: score of every expert, without bias."""
    experts: Tensor
    """i64[..., k]: the chosen ones, in no particular order."""
    weights: Tensor
    """f32[..., k]: what their outputs are multiplied by."""


class Gate(nn.Module):
    """The router. It computes in float32, whatever the weights are stored in and whatever autocast asks."""

    bias: nn.Parameter | None
    """[E], with `noaux_tc` only; `update_bias` moves it, no gradient does."""

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = _parameter(config.experts, width)
        biased = config.choice == "noaux_tc"
        self.bias = nn.Parameter(torch.zeros(config.experts), requires_grad=False) if biased else None

    def forward(self, x: Tensor) -> Routing:
        """Route x[..., d]. Gradients reach the gate through the weights of the chosen, with every choice."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # ... E
        scores = logits.softmax(dim=-1) if config.scoring == "softmax" else logits.sigmoid()
        ranking = scores if self.bias is None else scores + self.bias.float()
        if config.choice != "greedy":
            ranking = self._best_groups(ranking)
        experts = ranking.topk(config.active, dim=-1, sorted=False).indices  # ... k
        weights = (ranking if self.bias is None else scores).gather(-1, experts)
        if config.normalise and config.active > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(scores=scores, experts=experts, weights=weights * config.scale)

    def _best_groups(self, ranking: Tensor) -> Tensor:
        """Return f32[..., E] with 0 outside the best groups.

        The 0 is the reference's and not minus infinity: where biases make all of a kept group negative, an
        expert outside wins (golden moe-gate, sigmoid_noaux_negative_bias).
        """
        grouped = torch.unflatten(ranking, -1, (self.config.groups, -1))  # ... g E/g
        if self.config.choice == "group_limited":
            rank = grouped.amax(dim=-1)  # ... g
        else:
            rank = grouped.topk(2, dim=-1).values.sum(dim=-1)  # ... g
        best = rank.topk(self.config.kept_groups, dim=-1, sorted=False).indices
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(-2)


def expert_hits(routing: Routing, *, counted: Tensor | None = None) -> Tensor:
    """Return f32[b, t, E], 1 where a token goes to an expert; nothing for tokens not in `counted` bool[b, t].

    >>> routing = Routing(torch.zeros(1, 2, 3), torch.tensor([[[0, 2], [2, 1]]]), torch.ones(1, 2, 2))
    >>> expert_hits(routing).tolist()
    [[[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]]
    """
    hits = torch.zeros_like(routing.scores).scatter(-1, routing.experts, 1.0)
    return hits if counted is None else hits * counted.unsqueeze(-1)


def balance_loss(routing: Routing, config: MoeConfig, *, counted: Tensor | None = None) -> Tensor:
    """Return f32[], the auxiliary loss of a batch: least when every expert gets its share (2401.06066, sec.
    3.3).

        alpha * mean over rows of  sum over e (E / k * share of the tokens that chose e) * (mean score of e)

    With `aux_per_sequence` off the batch is one row. `counted` bool[b, t] leaves tokens out, such as padding;
    without it all count, pictures too.
    """
    hits, scores = expert_hits(routing, counted=counted), routing.scores  # b t E
    each = torch.ones_like(scores[..., :1]) if counted is None else counted.unsqueeze(-1).to(scores.dtype)
    scores = scores * each
    if not config.aux_per_sequence:
        hits, scores, each = (x.flatten(0, 1).unsqueeze(0) for x in (hits, scores, each))  # 1 n E
    tokens = each.sum(dim=1).clamp(min=1)  # b 1
    share = hits.sum(dim=1) / tokens * (config.experts / config.active)  # b E
    return config.aux_alpha * (share * (scores.sum(dim=1) / tokens)).sum(dim=-1).mean()


class RouterRecord:
    """What the routers of one forward did, for training: handed down through the layers and filled by them.

    A layer that runs twice, as under activation recompute, writes the same entries again.
    """

    def __init__(self, *, counted: Tensor | None = None) -> None:
        """Keep a record; `counted` bool[b, t] leaves tokens out of losses and loads, such as padding."""
        self.counted = counted
        self.losses: dict[int, Tensor] = {}
        """Balance loss f32[] of each MoE layer, with gradient."""
        self.loads: dict[int, Tensor] = {}
        """Tokens i64[E] each expert of each MoE layer saw."""

    def add(self, layer: int, routing: Routing, config: MoeConfig) -> None:
        """Note what the router of a layer decided for f[b, t, d]."""
        self.losses[layer] = balance_loss(routing, config, counted=self.counted)
        hits = expert_hits(routing, counted=self.counted).detach()
        self.loads[layer] = hits.sum(dim=(0, 1)).long()

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, "RouterRecord"]]) -> "RouterRecord":
        """Return the record of a batch whose rows went through the network in parts, each given with its
        rows: losses are means over rows, loads add up.

        With `MoeConfig.aux_per_sequence` that is what one part would have noted; without it balance is asked
        of every part alone.
        """
        whole, rows = cls(), sum(count for count, _ in parts)
        for layer in parts[0][1].losses:
            losses = [part.losses[layer] * (count / rows) for count, part in parts]
            whole.losses[layer] = torch.stack(losses).sum()
            whole.loads[layer] = torch.stack([part.loads[layer] for _, part in parts]).sum(dim=0)
        return whole

    def loss(self) -> Tensor:
        """Return f32[], the balance losses of all layers, to be added to the loss of the batch."""
        if not self.losses:
            raise SeekVLError("the record holds no router: give it to a forward of a model with experts")
        return torch.stack(list(self.losses.values())).sum()


@torch.no_grad()
def update_bias(gate: Gate, load: Tensor, *, gamma: float) -> None:
    """Move the choice towards experts that got less than the mean of the loads [E], by a step of gamma.

    This follows each optimiser step (2408.15664, sec. 3), with the loads of all micro-batches and devices
    summed; 2412.10302 uses 0.001 in stage 2 and leaves the bias alone in stages 1 and 3. Keep the bias in
    float32 for it: bfloat16 swallows such steps from 0.25 on.
    """
    if gate.bias is None:
        raise SeekVLError(
            f"a router with choice {gate.config.choice!r} has no bias to update; only noaux_tc has one"
        )
    load = load.to(gate.bias.device, torch.float32)
    gate.bias.add_(gamma * torch.sign(load.mean() - load))


class Experts(nn.Module):
    """All routed experts, stacked."""

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        self.gate_proj = _parameter(config.experts, config.width, width)
        self.up_proj = _parameter(config.experts, config.width, width)
        self.down_proj = _parameter(config.experts, width, config.width)

    def forward(self, x: Tensor, *, experts: Tensor, weights: Tensor) -> Tensor:
        """Return f[n, d]: what experts i64[n, k] make of x[n, d], summed in float32 by weights f32[n, k]."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        few = device != "cpu" and experts.numel() <= FEW_SLOTS
        outputs = (self.gathered if few else self.grouped)(x.to(dtype), experts)  # n k d
        return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(dtype)  # n d

    def grouped(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return f[n, k, d], the output of every slot: sort by expert, multiply in groups, sort back.

        experts [[2, 0], [0, 3]]    slots 2 0 0 3    sorted 0 0 2 3    ends of the groups 2 2 3 4
        """
        slots = experts.flatten()  # z
        order = slots.argsort(stable=True)
        every = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(slots[order], every, right=True, out_int32=True)  # E
        rows = x.index_select(0, order // experts.shape[1])  # z d
        hidden = _swiglu(*(_by_group(rows, weight, ends) for weight in (self.gate_proj, self.up_proj)))  # z m
        rows = _by_group(hidden, self.down_proj, ends)  # z d
        return torch.unflatten(rows.index_select(0, order.argsort()), 0, experts.shape)

    def gathered(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return f[n, k, d], the output of every slot, through a copy of the matrices each one needs."""
        slots = experts.flatten()  # z
        rows = x.repeat_interleave(experts.shape[1], dim=0).unsqueeze(2)  # z d 1
        gate, up, down = (
            weight.to(x.dtype).index_select(0, slots)
            for weight in (self.gate_proj, self.up_proj, self.down_proj)
        )
        hidden = _swiglu(gate @ rows, up @ rows)  # z m 1
        return torch.unflatten((down @ hidden).squeeze(2), 0, experts.shape)


class Moe(nn.Module):
    """Router, routed experts and shared experts, in the place of a decoder layer's SwiGLU."""

    def __init__(self, width: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(width, config)
        self.experts = Experts(width, config)
        self.shared = Mlp(width, config.shared * config.width) if config.shared else None

    def forward(self, x: Tensor, *, record: RouterRecord | None = None, layer: int = 0) -> Tensor:
        """Transform each position of x[b, t, d] alone; a record takes down what router number `layer` did."""
        routing: Routing = self.gate(x)
        if record is not None:
            record.add(layer, routing, self.config)
        experts, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)  # n k
        out: Tensor = self.experts(x.flatten(0, 1), experts=experts, weights=weights).unflatten(
            0, x.shape[:2]
        )
        return out if self.shared is None else out + self.shared(x)


def _parameter(*shape: int) -> nn.Parameter:
    """Make a matrix, or a stack of them, with numbers like those of a fresh `nn.Linear`."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(nn.init.uniform_(torch.empty(shape), -bound, bound))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; without gradients in the memory of gate, as fresh memory costs a CPU time."""
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


def _by_group(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return f[z, o]: rows f[z, i] times the matrix of their group; group e of weight [E, o, i] ends at row
    ends i32[E].
    """
    weight = weight.to(rows.dtype)
    there = hasattr(F, "grouped_mm") and (rows.dtype == torch.bfloat16 or not rows.is_cuda)
    if there and aligned(weight):  # CUDA has it for bfloat16
        return F.grouped_mm(rows, weight.mT, offs=ends)
    return _by_loop(rows, weight, ends)


def aligned(*weights: Tensor) -> bool:
    """Whether a grouped product can take stacks of matrices [E, o, i]: rows aligned, those of results too."""
    return all(
        side * weight.element_size() % ALIGNMENT == 0 for weight in weights for side in weight.shape[1:]
    )


def _by_loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Do as `_by_group` one group after the other, for a torch without grouped products and odd widths."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(torch.split(rows, sizes), weight.unbind(), strict=True)
    return torch.cat([part @ matrix.T for part, matrix in parts])
