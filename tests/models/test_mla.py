from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seekvl.models.llama import rotary_table
from seekvl.models.mla import Mla, MlaConfig, rotate_pairs
from seekvl.runtime import SeekVLError
from tests.models.test_llama import GrowingCache

CONFIG = MlaConfig(kv_rank=12, nope_width=6, rope_width=4, value_width=8)
WIDE_VALUES = replace(CONFIG, value_width=14)
HEADS, WIDTH, THETA = 3, 20, 10000.0


def make(config: MlaConfig = CONFIG) -> Mla:
    torch.manual_seed(0)
    model = Mla(WIDTH, heads=HEADS, config=config)
    with torch.no_grad():
        model.kv_a_norm.weight.uniform_(0.5, 1.5)
        for name in ("q_proj", "kv_a_proj"):
            getattr(model, name).weight.mul_(3)  # sharp attention, in which positions matter
    return model


def table(positions: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_table(positions, width=CONFIG.rope_width, theta=THETA)


def run(
    model: Mla, x: Tensor, *, start: int = 0, mask: Tensor | None = None, cache: GrowingCache | None = None
) -> Tensor:
    positions = torch.arange(start, start + x.shape[1])[None].expand(x.shape[:2])
    out: Tensor = model(x, table=table(positions), mask=mask, cache=cache, layer=0)
    return out


def turn(x: Tensor, position: int) -> Tensor:
    """Rotate neighbouring channels of x[p], seen as complex numbers."""
    exponents = torch.arange(0, len(x), 2).double() / len(x)
    angles = position / THETA**exponents
    pairs = torch.view_as_complex(x.unflatten(0, (-1, 2)).double().contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten().to(x.dtype)


def slow(model: Mla, x: Tensor, *, start: int = 0) -> Tensor:
    """Rows, heads, tokens and visible tokens in loops; keys and values made from the published shapes."""
    config, rows = model.config, []
    n, p = config.nope_width, config.rope_width
    for row in x:
        low = model.kv_a_proj(row)
        latent = low[:, : config.kv_rank]
        latent = latent / (latent.float().square().mean(-1, keepdim=True) + 1e-6).sqrt().to(x.dtype)
        latent = latent * model.kv_a_norm.weight
        shared = [turn(key, start + i) for i, key in enumerate(low[:, config.kv_rank :])]
        queries = model.q_proj(row).view(len(row), HEADS, n + p)
        kv = model.kv_b_proj(latent).view(len(row), HEADS, n + config.value_width)
        outs = []
        for i in range(len(row)):
            heads = []
            for h in range(HEADS):
                place = turn(queries[i, h, n:], start + i)
                scores = [queries[i, h, :n] @ kv[j, h, :n] + place @ shared[j] for j in range(i + 1)]
                shares = (torch.stack(scores).float() / (n + p) ** 0.5).softmax(0).to(x.dtype)
                heads.append(sum(shares[j] * kv[j, h, n:] for j in range(i + 1)))
            outs.append(model.o_proj(torch.cat(heads)))
        rows.append(torch.stack(outs))
    return torch.stack(rows)


def gradients(model: Mla, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = forward(x)
    torch.manual_seed(9)
    (out.float() * torch.randn(out.shape)).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 5
    return {"output": out.detach(), "input": x.grad} | grads


@pytest.mark.parametrize("config", [CONFIG, WIDE_VALUES])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)], ids=["float32", "bfloat16"]
)
def test_equals_the_slow_version_forward_and_backward(
    config: MlaConfig, length: int, dtype: torch.dtype, atol: float
) -> None:
    model = make(config).to(dtype)
    x = torch.randn(2, length, WIDTH).to(dtype)
    found = gradients(model, lambda x: run(model, x), x)
    expected = gradients(model, lambda x: slow(model, x), x)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=atol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("config", [CONFIG, WIDE_VALUES])
@pytest.mark.parametrize("new", [1, 3])
def test_absorbed_equals_expanded(config: MlaConfig, new: int) -> None:
    model = make(config)
    q = torch.randn(2, HEADS, new, config.nope_width)
    q_rope = torch.randn(2, HEADS, new, config.rope_width)
    k_rope, latent = torch.randn(2, 1, 7, config.rope_width), torch.randn(2, 1, 7, config.kv_rank)
    mask = torch.rand(2, 1, new, 7) < 0.6
    mask[..., 0] = True
    for visible in (mask, torch.ones_like(mask)):
        absorbed = model.absorbed(q, q_rope, k_rope=k_rope, latent=latent, mask=visible)
        expanded = model.expanded(q, q_rope, k_rope=k_rope, latent=latent, mask=visible)
        assert absorbed.shape == (2, HEADS, new, config.value_width)
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=2e-5)
    one = model.absorbed(q[:, :, :1], q_rope[:, :, :1], k_rope=k_rope, latent=latent, mask=None)
    every = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    two = model.expanded(q[:, :, :1], q_rope[:, :, :1], k_rope=k_rope, latent=latent, mask=every)
    torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


def test_one_new_token_is_absorbed_and_more_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ways = make(), []
    for way in ("absorbed", "expanded"):
        original = getattr(model, way)
        monkeypatch.setattr(
            model, way, lambda *a, original=original, way=way, **k: ways.append(way) or original(*a, **k)
        )
    run(model, torch.randn(1, 4, WIDTH))
    run(model, torch.randn(1, 1, WIDTH))
    assert ways == ["expanded", "absorbed"]


def test_a_cache_changes_nothing_and_holds_latents_alone() -> None:
    model = make()
    x = torch.randn(1, 9, WIDTH)
    whole = run(model, x)
    cache = GrowingCache()
    steps = [run(model, x[:, :4], cache=cache)]
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)[None, None]
    steps.append(run(model, x[:, 4:7], start=4, mask=mask, cache=cache))
    steps += [run(model, x[:, t : t + 1], start=t, cache=cache) for t in (7, 8)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)
    k, v = cache.layers[0]
    assert k.shape == (1, 1, 9, CONFIG.rope_width)
    assert v.shape == (1, 1, 9, CONFIG.kv_rank)


def test_a_batch_equals_single_rows() -> None:
    model = make()
    x = torch.randn(3, 6, WIDTH)
    for n in range(3):
        torch.testing.assert_close(run(model, x)[n : n + 1], run(model, x[n : n + 1]), rtol=0, atol=1e-5)


def test_pairs_are_neighbours_and_scores_do_not_see_the_order() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    tables = [rotary_table(torch.tensor([[p]]), width=8, theta=THETA) for p in (5, 2)]
    found = (rotate_pairs(q, *tables[0]) * rotate_pairs(k, *tables[1])).sum()
    expected = turn(q.flatten(), 5) @ turn(k.flatten(), 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    turned = turn(q.flatten(), 5)
    torch.testing.assert_close(
        rotate_pairs(q, *tables[0]).flatten(), torch.cat((turned[::2], turned[1::2])), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("start", [0, 253, 4088])
@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half])
def test_positions_stay_exact_after_a_cast(
    cast: Callable[[torch.nn.Module], torch.nn.Module], start: int
) -> None:
    low = cast(make().requires_grad_(False))
    dtype = low.q_proj.weight.dtype
    exact = make().requires_grad_(False)
    exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    x = torch.randn(1, 8, WIDTH).to(dtype)
    expected = run(exact, x.float(), start=start)
    found = run(low, x, start=start).float()
    error = float((found - expected).abs().max())
    assert error < (0.06 if dtype == torch.bfloat16 else 0.01)
    if start:  # what a table in bfloat16 would do, which the published code does after such a cast
        positions = torch.arange(start, start + 8).bfloat16()[None]
        broken = exact(x.float(), table=table(positions), mask=None, cache=None, layer=0)
        assert float((broken - expected).abs().max()) > 4 * error


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(SeekVLError, match="rope_width 5 is odd"):
        replace(CONFIG, rope_width=5)
    with pytest.raises(SeekVLError, match="kv_rank 0"):
        replace(CONFIG, kv_rank=0)
