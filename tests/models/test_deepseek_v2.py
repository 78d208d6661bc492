from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seekvl.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from seekvl.models.llama import Attention, Llama, LlamaConfig, Mlp, packed_mask
from seekvl.models.mla import Mla, MlaConfig
from seekvl.models.moe import Moe, MoeConfig, RouterRecord
from seekvl.runtime import SeekVLError
from tests.models.test_llama import GrowingCache

MOE = MoeConfig(experts=6, active=2, shared=1, width=16, scoring="softmax", choice="greedy")
TINY = DeepseekV2Config(
    vocab_size=50, width=32, layers=3, heads=4, kv_heads=4, mlp_width=48, mla=None, moe=MOE, dense_first=1
)
BASE = replace(
    TINY,
    mla=MlaConfig(kv_rank=12, nope_width=8, rope_width=4, value_width=6),
    moe=replace(MOE, scoring="sigmoid", choice="noaux_tc", normalise=True, scale=2.0),
)
CONFIGS = [TINY, BASE]


def make(config: DeepseekV2Config) -> DeepseekV2:
    torch.manual_seed(0)
    return DeepseekV2(config)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_changes_nothing(config: DeepseekV2Config) -> None:
    model = make(config)
    x = torch.randn(1, 9, 32)
    whole = model(x)
    cache = GrowingCache()
    steps = [model(x[:, :4], cache=cache)]
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)[None, None]
    steps.append(model(x[:, 4:7], positions=torch.arange(4, 7)[None], mask=mask, cache=cache))
    steps += [model(x[:, t : t + 1], positions=torch.tensor([[t]]), cache=cache) for t in (7, 8)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)
    found = tuple((slot.shape[1], slot.shape[3]) for slot in cache.layers[2])
    assert found == config.cache_shape


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_different_lengths_decode_as_alone(config: DeepseekV2Config) -> None:
    model = make(config)
    x = torch.randn(2, 6, 32)
    alone = [model(x[:1])[:, -1:], model(x[1:, :4])[:, -1:]]
    cache = GrowingCache()
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    model(x[:, :5], mask=(causal & keep[:, None]).unsqueeze(1) | torch.eye(5, dtype=torch.bool), cache=cache)
    last = torch.stack((x[0, 5:], x[1, 3:4]))
    seen = torch.cat((keep, torch.tensor([[True], [True]])), 1)[:, None, None]
    found = model(last, positions=torch.tensor([[5], [3]]), mask=seen, cache=cache)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_batch_equals_single_rows(config: DeepseekV2Config) -> None:
    model = make(config)
    x = torch.randn(3, 6, 32)
    for n in range(3):
        torch.testing.assert_close(model(x)[n : n + 1], model(x[n : n + 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_packed_documents_equal_documents_alone_in_loss_and_gradient(config: DeepseekV2Config) -> None:
    model = make(config)
    ids, lengths = torch.randint(0, 50, (11,)), (4, 7)

    def grads(losses: list[Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        torch.stack(losses).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone = [model(model.embed_tokens(part)[None]).square().sum() for part in ids.split(lengths)]
    documents = torch.tensor([[0] * 4 + [1] * 7])
    positions = torch.tensor([[*range(4), *range(7)]])
    packed = model(model.embed_tokens(ids)[None], positions=positions, mask=packed_mask(documents))
    loss = packed.square().sum()
    torch.testing.assert_close(loss, alone[0] + alone[1], rtol=1e-5, atol=1e-4)
    found, expected = grads([loss]), grads(alone)
    assert {name for name, _ in model.named_parameters()} - set(found) <= {
        "lm_head.weight",
        "layers.1.mlp.gate.bias",
        "layers.2.mlp.gate.bias",
    }
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-4)


def test_without_latent_and_experts_it_is_the_llama_decoder() -> None:
    model = make(replace(TINY, moe=None))
    llama = Llama(LlamaConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=4, mlp_width=48))
    llama.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.equal(model(x), llama(x))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [Mlp, Moe, Moe]),
        ({"dense_first": 0}, [Moe, Moe, Moe]),
        ({"dense_first": 3}, [Mlp, Mlp, Mlp]),
        ({"moe_every": 2}, [Mlp, Mlp, Moe]),
        ({"moe": None}, [Mlp, Mlp, Mlp]),
    ],
)
def test_which_layers_have_experts(change: dict[str, object], expected: list[type]) -> None:
    config = replace(TINY, **change)  # type: ignore[arg-type]
    assert [type(layer.mlp) for layer in make(config).layers] == expected


def test_the_two_kinds_of_attention() -> None:
    assert type(make(TINY).layers[0].attn) is Attention
    assert type(make(BASE).layers[0].attn) is Mla
    assert TINY.cache_shape == ((4, 8), (4, 8))
    assert BASE.cache_shape == ((1, 4), (1, 12))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_record_takes_down_every_router(config: DeepseekV2Config) -> None:
    model, x = make(config), torch.randn(2, 5, 32)
    record = RouterRecord()
    assert torch.equal(model(x, record=record), model(x))
    assert set(record.losses) == set(record.loads) == {1, 2}
    assert [int(load.sum()) for load in record.loads.values()] == [20, 20]
    record.loss().backward()
    for layer in (1, 2):
        assert model.layers[layer].mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_recompute_changes_neither_loss_nor_gradient(
    config: DeepseekV2Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make(config), torch.randn(2, 5, 32)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        record = RouterRecord()
        (model(x, record=record).square().mean() + record.loss()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return grads | {f"load {layer}": load for layer, load in record.loads.items()}

    plain = run()
    for layer in model.layers:
        forward = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda x, forward=forward, **k: checkpoint(forward, x, use_reentrant=False, **k)
        )
    again = run()
    assert set(again) == set(plain)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


@pytest.mark.parametrize("start", [0, 253, 4088])
@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half])
@pytest.mark.parametrize("config", CONFIGS)
def test_positions_stay_exact_after_a_cast(
    config: DeepseekV2Config, cast: Callable[[nn.Module], nn.Module], start: int
) -> None:
    low = cast(make(replace(config, moe=None)))  # rounding may change the choice of an expert
    dtype = low.norm.weight.dtype
    exact = make(replace(config, moe=None))
    exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    x = torch.randn(1, 8, 32).to(dtype)
    positions = torch.arange(start, start + 8)[None]
    error = low(x, positions=positions).float() - exact(x.float(), positions=positions)
    assert float(error.detach().abs().max()) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert not list(low.buffers())


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TINY, {"heads": 5}, "not divisible"),
        (TINY, {"kv_heads": 3}, "evenly"),
        (TINY, {"width": 36, "heads": 12, "kv_heads": 12}, "even width"),
        (BASE, {"kv_heads": 2}, "kv_heads 2 cannot be"),
        (BASE, {"moe_every": 0}, "moe_every 0"),
        (BASE, {"dense_first": -1}, "dense_first -1"),
    ],
)
def test_impossible_dimensions_are_refused(
    config: DeepseekV2Config, change: dict[str, object], message: str
) -> None:
    with pytest.raises(SeekVLError, match=message):
        replace(config, **change)  # type: ignore[arg-type]
