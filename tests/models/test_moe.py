import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seekvl.models import moe
from seekvl.models.moe import Gate, Moe, MoeConfig, RouterRecord, balance_loss, expert_hits, update_bias
from seekvl.runtime import SeekVLError

GOLDEN = Path(__file__).parents[1] / "golden" / "moe-gate"
GATES = [case["name"] for case in json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))]
CHOICES = {"greedy": "greedy", "group_limited_greedy": "group_limited", "noaux_tc": "noaux_tc"}

TINY = MoeConfig(experts=8, active=3, shared=2, width=16, scoring="softmax", choice="greedy")
GROUPS = replace(TINY, choice="group_limited", groups=4, kept_groups=2, scale=1.5)
BASE = replace(TINY, scoring="sigmoid", choice="noaux_tc", groups=4, kept_groups=2, normalise=True, scale=2.0)
CONFIGS = [TINY, GROUPS, BASE]
WIDTH = 24


def make(config: MoeConfig, *, seed: int = 0) -> Moe:
    torch.manual_seed(seed)
    model = Moe(WIDTH, config)
    if model.gate.bias is not None:
        model.gate.bias.copy_(torch.randn(config.experts) / 4)
    return model


def slow_choice(gate: Gate, scores: Tensor) -> list[tuple[int, Tensor]]:
    """The experts of one token and their weights, by sorting numbers."""
    config, each = gate.config, scores.tolist()
    if gate.bias is not None:
        each = [score + float(bias) for score, bias in zip(each, gate.bias, strict=True)]
    size = config.experts // config.groups
    if config.choice != "greedy":
        parts = [sorted(each[size * g : size * (g + 1)], reverse=True) for g in range(config.groups)]
        value = [part[0] if config.choice == "group_limited" else part[0] + part[1] for part in parts]
        kept = sorted(range(config.groups), key=lambda g: -value[g])[: config.kept_groups]
        each = [score if e // size in kept else 0.0 for e, score in enumerate(each)]
    chosen = sorted(range(config.experts), key=lambda e: -each[e])[: config.active]
    weights = [scores[e] for e in chosen]
    if config.normalise and config.active > 1:
        weights = [weight / torch.stack(weights).sum() for weight in weights]
    return [(e, weight * config.scale) for e, weight in zip(chosen, weights, strict=True)]


def slow_moe(model: Moe, x: Tensor) -> Tensor:
    """Router and experts for one token after the other."""
    rows = []
    for token in x.flatten(0, 1):
        logits = model.gate.weight.float() @ token.float()
        scores = logits.softmax(0) if model.config.scoring == "softmax" else logits.sigmoid()
        total = torch.zeros(x.shape[-1])
        for e, weight in slow_choice(model.gate, scores):
            gate, up, down = (
                stack[e]
                for stack in (model.experts.gate_proj, model.experts.up_proj, model.experts.down_proj)
            )
            total = total + weight * (down @ (F.silu(gate @ token) * (up @ token))).float()
        shared = model.shared
        assert shared is not None
        rest = shared.down_proj(F.silu(shared.gate_proj(token)) * shared.up_proj(token))
        rows.append(total.to(x.dtype) + rest)
    return torch.stack(rows).view_as(x)


def gradients(model: Moe, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of input and parameters, of a loss in which every number counts differently."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = forward(x)
    torch.manual_seed(9)
    (out.float() * torch.randn(out.shape)).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad} | grads


def tokens(situation: str, model: Moe) -> Tensor:
    """Tokens f[2, 5, d], or one, such that experts stay empty or one expert is in every token's choice."""
    torch.manual_seed(4)
    if situation == "one token":
        return torch.randn(1, 1, WIDTH)
    x = torch.randn(2, 5, WIDTH)
    if situation == "empty experts":
        return x[:1, :1].expand(2, 5, WIDTH).contiguous()
    if situation == "one expert for all":
        with torch.no_grad():
            model.gate.weight[5] = 0
            model.gate.weight[5, 0] = 10
        x[..., 0] = 1.0
    return x


@pytest.mark.parametrize("situation", ["ordinary", "one token", "empty experts", "one expert for all"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.choice)
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)], ids=["float32", "bfloat16"]
)
def test_equals_the_slow_version_forward_and_backward(
    config: MoeConfig, situation: str, dtype: torch.dtype, atol: float
) -> None:
    model = make(config)
    x = tokens(situation, model).to(dtype)
    model = model.to(dtype)
    found = gradients(model, model, x)
    slow = gradients(model, lambda x: slow_moe(model, x), x)
    assert (
        set(found)
        == set(slow)
        == {
            "output",
            "input",
            "gate.weight",
            *(f"experts.{name}_proj" for name in ("gate", "up", "down")),
            *(f"shared.{name}_proj.weight" for name in ("gate", "up", "down")),
        }
    )
    for name in found:
        torch.testing.assert_close(
            found[name], slow[name], rtol=atol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_one_expert_can_have_every_token_and_others_none() -> None:
    model = make(replace(TINY, active=1))
    x = tokens("one expert for all", model)
    record = RouterRecord()
    found = model(x, record=record)
    assert record.loads[0].tolist() == [0, 0, 0, 0, 0, 10, 0, 0]
    torch.testing.assert_close(found, slow_moe(model, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_ways_to_multiply_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model = make(TINY).to(dtype)
    x = torch.randn(2, 5, WIDTH).to(dtype)

    def by(way: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        experts = model.gate(x).experts.flatten(0, 1)
        return gradients(model, lambda x: way(x.flatten(0, 1), experts), x)

    grouped, gathered = by(model.experts.grouped), by(model.experts.gathered)
    monkeypatch.setattr(F, "grouped_mm", lambda *_, **__: pytest.fail("there is no grouped product"))
    monkeypatch.delattr(F, "grouped_mm")
    looped = by(model.experts.grouped)
    atol = 2e-5 if dtype == torch.float32 else 3e-2
    for name, values in grouped.items():
        torch.testing.assert_close(gathered[name], values, rtol=atol, atol=atol)
        torch.testing.assert_close(looped[name], values, rtol=atol, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("situation", ["ordinary", "one token", "empty experts", "one expert for all"])
@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.choice)
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)], ids=["float32", "bfloat16"]
)
def test_answers_equal_the_slow_version_for_few_and_many_tokens(
    config: MoeConfig, situation: str, count: int, dtype: torch.dtype, atol: float
) -> None:
    model = make(config)
    x = (
        tokens(situation, model).flatten(0, 1)[:count].unsqueeze(1).to(dtype)
    )  # rows of one token, as in decoding
    model = model.to(dtype)
    torch.testing.assert_close(model(x), slow_moe(model, x), rtol=atol, atol=atol)


def test_autocast_decodes_in_its_dtype_too() -> None:
    model = make(TINY)
    x = torch.randn(1, 1, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0, atol=3e-2)


def test_no_loop_over_experts_where_widths_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "_by_loop", lambda *_: pytest.fail("a loop over experts"))
    make(TINY)(torch.randn(1, 7, WIDTH))


def test_odd_widths_take_the_loop() -> None:
    config = replace(TINY, width=15)
    model = make(config)
    x = torch.randn(1, 7, WIDTH)
    torch.testing.assert_close(model(x), slow_moe(model, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.choice)
def test_a_batch_equals_single_rows(config: MoeConfig) -> None:
    model = make(config)
    x = torch.randn(3, 4, WIDTH)
    for n in range(3):
        torch.testing.assert_close(model(x)[n : n + 1], model(x[n : n + 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GATES)
def test_gate_equals_the_reference(name: str) -> None:
    case = next(
        c for c in json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8")) if c["name"] == name
    )
    values, said = load_file(GOLDEN / "cases.safetensors"), case["config"]
    config = MoeConfig(
        experts=said["n_routed_experts"],
        active=said["num_experts_per_tok"],
        shared=0,
        width=8,
        scoring=said["scoring_func"],
        choice=CHOICES[said["topk_method"]],  # type: ignore[arg-type]
        groups=said["n_group"],
        kept_groups=said["topk_group"],
        normalise=said["norm_topk_prob"],
        scale=said["routed_scaling_factor"],
        aux_alpha=0.01,
    )
    gate = Gate(said["hidden_size"], config)
    gate.load_state_dict(
        {"weight": values[f"{name}/weight"]}
        | ({"bias": values[f"{name}/e_score_correction_bias"]} if gate.bias is not None else {})
    )
    routing = gate(values[f"{name}/hidden"])
    order = routing.experts.argsort(dim=-1)
    assert torch.equal(routing.experts.gather(-1, order).flatten(0, 1), values[f"{name}/topk_idx_sorted"])
    weights = routing.weights.gather(-1, order).flatten(0, 1)
    torch.testing.assert_close(weights, values[f"{name}/topk_weight"], rtol=0, atol=1e-6)
    for per_sequence in (True, False):
        key = f"aux_loss_alpha_0.01_seq_aux_{str(per_sequence).lower()}"
        if key in case:
            loss = balance_loss(routing, replace(config, aux_per_sequence=per_sequence))
            assert loss.item() == pytest.approx(case[key], abs=1e-7)


def test_gate_computes_in_float32_whatever_its_dtype_or_autocast() -> None:
    gate = make(BASE).gate
    x = torch.randn(1, 6, WIDTH).bfloat16()
    exact = gate(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gate(x.float())
    assert torch.equal(cast.scores, exact.scores)
    rounded = gate.bfloat16()
    found = rounded(x)
    logits = F.linear(x.float(), rounded.weight.float())
    assert found.scores.dtype == found.weights.dtype == torch.float32
    assert torch.equal(found.scores, logits.sigmoid())


def test_autocast_computes_the_experts_in_its_dtype() -> None:
    model = make(TINY)
    x = torch.randn(2, 3, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0, atol=3e-2)
    out.float().square().sum().backward()
    assert model.experts.up_proj.grad is not None
    assert model.experts.up_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.choice)
def test_the_router_learns_in_every_mode(config: MoeConfig, training: bool) -> None:
    model = make(config).train(training)
    record = RouterRecord()
    (model(torch.randn(2, 5, WIDTH), record=record).square().sum() + record.loss()).backward()
    assert model.gate.weight.grad is not None
    assert model.gate.weight.grad.abs().sum() > 0
    assert model.gate.bias is None or model.gate.bias.grad is None


def slow_balance(scores: Tensor, hits: Tensor, config: MoeConfig) -> Tensor:
    """The formula of one row, expert by expert."""
    length, total = len(scores), torch.zeros(())
    for e in range(config.experts):
        share = float(hits[:, e].sum()) / (length * config.active / config.experts)
        total = total + share * scores[:, e].mean()
    return config.aux_alpha * total


@pytest.mark.parametrize("per_sequence", [True, False])
def test_balance_loss_is_its_formula(per_sequence: bool) -> None:
    config = replace(TINY, aux_per_sequence=per_sequence)
    routing = make(config).gate(torch.randn(2, 5, WIDTH))
    hits = F.one_hot(routing.experts, config.experts).sum(-2)
    if per_sequence:
        expected = torch.stack([slow_balance(routing.scores[i], hits[i], config) for i in range(2)]).mean()
    else:
        expected = slow_balance(routing.scores.flatten(0, 1), hits.flatten(0, 1), config)
    torch.testing.assert_close(balance_loss(routing, config), expected)
    assert torch.equal(expert_hits(routing), hits.float())


@pytest.mark.parametrize("per_sequence", [True, False])
def test_padding_can_be_left_out_of_losses_and_loads(per_sequence: bool) -> None:
    model = make(replace(TINY, aux_per_sequence=per_sequence))
    x = torch.randn(1, 6, WIDTH)
    padded = RouterRecord(counted=torch.tensor([[True] * 4 + [False] * 2]))
    model(x, record=padded)
    alone = RouterRecord()
    model(x[:, :4], record=alone)
    torch.testing.assert_close(padded.loss(), alone.loss())
    assert torch.equal(padded.loads[0], alone.loads[0])
    assert int(alone.loads[0].sum()) == 4 * TINY.active


def test_recompute_changes_neither_loss_nor_gradient() -> None:
    def run(model: Moe, *, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
        record, x = RouterRecord(), torch.ones(1, 5, WIDTH, requires_grad=True)
        torch.manual_seed(2)
        x = x * torch.randn(1, 5, WIDTH)
        if recompute:
            out = checkpoint(model, x, record=record, layer=3, use_reentrant=False)
        else:
            out = model(x, record=record, layer=3)
        loss = out.square().sum() + record.loss()
        loss.backward()
        assert model.gate.weight.grad is not None
        return loss.detach(), model.gate.weight.grad, record.loads[3]

    config = replace(TINY, aux_alpha=1.0)
    for plain, again in zip(
        run(make(config), recompute=False), run(make(config), recompute=True), strict=True
    ):
        torch.testing.assert_close(again, plain)


def test_bias_moves_towards_idle_experts_by_one_step() -> None:
    gate = make(BASE).gate
    assert gate.bias is not None
    before = gate.bias.clone()
    update_bias(gate, torch.tensor([9, 1, 4, 4, 4, 4, 4, 2]), gamma=0.25)
    steps = torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(gate.bias - before, 0.25 * steps)
    with pytest.raises(SeekVLError, match="no bias"):
        update_bias(make(TINY).gate, torch.ones(8), gamma=0.1)


def test_bias_updates_even_out_the_loads() -> None:
    model = make(replace(BASE, groups=1, kept_groups=1))
    assert model.gate.bias is not None
    x = torch.randn(1, 400, WIDTH)
    spread = []
    for _ in range(200):
        record = RouterRecord()
        model(x, record=record)
        load = record.loads[0]
        spread.append(int(load.max() - load.min()))
        update_bias(model.gate, load, gamma=0.005)
    assert max(spread[-20:]) < spread[0] / 4


def test_an_empty_record_has_no_loss() -> None:
    with pytest.raises(SeekVLError, match="no router"):
        RouterRecord().loss()


def test_without_shared_experts() -> None:
    model = make(replace(TINY, shared=0))
    assert model.shared is None
    x = torch.randn(1, 3, WIDTH)
    with_shared = make(TINY)
    assert with_shared.shared is not None
    torch.testing.assert_close(model(x), with_shared(x) - with_shared.shared(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring": "relu"}, "scoring 'relu'"),
        ({"choice": "gready"}, "choice 'gready' is unknown; known are greedy"),
        ({"active": 9}, "9 active experts of 8"),
        ({"groups": 3}, "3 equal groups"),
        ({"groups": 2, "kept_groups": 3}, "3 kept groups of 2"),
        ({"choice": "noaux_tc", "groups": 8}, "too few"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]
