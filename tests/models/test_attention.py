import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seekvl.models import attention
from seekvl.models.attention import (
    BLOCK,
    CPU_SCORES,
    _last_rows_unwritten,
    attend,
    attend_in_blocks,
    materialised,
)

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(t: int, *, s: int | None = None, e: int = 12, w: int = 8, heads: int = 2) -> Inputs:
    torch.manual_seed(t)
    q, k, v = torch.randn(2, 2, t, e), torch.randn(2, heads, s or t, e), torch.randn(2, heads, s or t, w)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def slow(q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor, scale: float) -> Tensor:
    """Attend token by token, in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[2]):
        places = seen[i].nonzero().flatten()
        scores = (q[:, :, i : i + 1].double() * k[:, :, places].double()).sum(-1) * scale
        out[:, :, i] = (scores.softmax(-1).unsqueeze(-1) * v[:, :, places].double()).sum(2)
    return out


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("width", [8, 12, 16])
def test_attend_is_its_formula(width: int, heads: int) -> None:
    q, k, v = inputs(7, w=width, heads=heads)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    odd = torch.eye(7, dtype=torch.bool) | (torch.arange(7) == 2)
    for seen, given in ((causal, {"causal": True}), (odd, {"mask": odd}), (torch.ones_like(odd), {})):
        expected = slow(q, k, v, seen=seen, scale=12**-0.5)
        torch.testing.assert_close(attend(q, k, v, **given).double(), expected, rtol=0, atol=1e-5)
    third = slow(q, k, v, seen=causal, scale=1 / 3)
    torch.testing.assert_close(attend(q, k, v, causal=True, scale=1 / 3).double(), third, rtol=0, atol=1e-5)


@pytest.mark.parametrize("w", [8, 12])
def test_new_tokens_see_the_past_and_themselves(w: int) -> None:
    """Causal with fewer new tokens than visible ones: the new ones are the last."""
    q, k, v = inputs(7, w=w)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[4:]
    expected = slow(q[:, :, 4:], k, v, seen=seen, scale=12**-0.5)
    for _ in range(2):  # the second time with a mask that is kept
        found = attend(q[:, :, 4:], k, v, causal=True)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("w", [8, 12])
def test_the_mask_that_is_never_written_out_is_the_same(w: int) -> None:
    """What CUDA's flash kernel takes; here torch writes it out after all."""
    q, k, v = inputs(7, w=w)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[4:]
    expected = slow(q[:, :, 4:], k, v, seen=seen, scale=12**-0.5)
    found = F.scaled_dot_product_attention(q[:, :, 4:], k, v, attn_mask=_last_rows_unwritten(3, 7))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def gradients(out: Tensor, given: Inputs) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return torch.autograd.grad((out.float() * weights).sum(), given)


@pytest.mark.parametrize("t", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
@pytest.mark.parametrize("causal", [True, False])
def test_materialised_scores_equal_the_fused_kernel_forward_and_backward(t: int, causal: bool) -> None:
    given = inputs(t)
    q, k, v = given
    ours = materialised(q, k, v, causal=causal, scale=0.3)
    theirs = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 4)), is_causal=causal, scale=0.3)[..., :8]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for name, one, other in zip("qkv", gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)


def test_more_keys_than_queries() -> None:
    q, k, v = inputs(3, s=9)
    expected = slow(q, k, v, seen=torch.ones(3, 9, dtype=torch.bool), scale=12**-0.5)
    torch.testing.assert_close(
        materialised(q, k, v, causal=False, scale=None).double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("t", [5, BLOCK + 9])
def test_bfloat16_learns_what_float32_learns(t: int) -> None:
    given = inputs(t)
    half = tuple(x.detach().bfloat16().requires_grad_() for x in given)
    exact, rough = attend(*given, causal=True), attend(*half, causal=True)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.03)
    expected = gradients(exact, given)
    scale = max(grad.abs().max() for grad in expected)
    for one, other in zip(gradients(rough, half), expected, strict=True):
        torch.testing.assert_close(one.float() / scale, other / scale, rtol=0, atol=0.03)


def test_only_learning_in_bfloat16_on_a_cpu_is_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers must be the same numbers as ever."""
    calls: list[torch.dtype] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Tensor:
        calls.append(q.dtype)
        return materialised(q, k, v, causal=causal, scale=scale)

    monkeypatch.setattr(attention, "materialised", spy)
    q, k, v = inputs(6)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    attend(q, k, v, causal=True)
    attend(*half, causal=True)
    with torch.no_grad():
        attend(half[0].requires_grad_(), *half[1:], causal=True)
    attend(*half, mask=torch.ones(6, 6, dtype=torch.bool))
    assert calls == []
    attend(*half, causal=True)
    assert calls == [torch.bfloat16]


def heads(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


@pytest.mark.parametrize("limit", [1, 40, 100, 200, CPU_SCORES])
def test_blocks_of_any_size_equal_the_whole(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven queries and keys of four heads: from one query at a time to everything at once."""
    monkeypatch.setattr(attention, "CPU_SCORES", limit)
    q, k, v = (x.detach() for x in inputs(7, w=12))
    added = torch.randn(4, 7, 7)
    sizes: list[int] = []

    def bias(these: slice, now: slice) -> Tensor:
        sizes.append(added[these, now].numel())
        return added[these, now].clone()

    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=added.view(2, 2, 7, 7), scale=0.3)
    ours = attend_in_blocks(heads(q), heads(k), heads(v), bias=bias, scale=0.3).view_as(whole)
    assert sum(sizes) == 4 * 7 * 7
    assert max(sizes) <= max(limit, 7)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)
    half = [heads(x).bfloat16() for x in (q, k, v)]
    rough = attend_in_blocks(*half, bias=lambda *block: added[block].bfloat16(), scale=0.3)
    torch.testing.assert_close(rough.float().view_as(whole), whole, rtol=0, atol=0.03)
    plain = attend_in_blocks(heads(q), heads(k), heads(v)).view_as(whole)
    torch.testing.assert_close(plain, attend(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_learning_takes_one_block_whose_gradients_are_those_of_the_whole(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CPU_SCORES", 1)
    added = torch.randn(4, 7, 7)
    exact = tuple(x.detach().requires_grad_() for x in (*inputs(7, w=12), added))
    q, k, v, extra = exact
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=extra.view(2, 2, 7, 7))
    rounded = tuple(x.detach().to(dtype, copy=True).requires_grad_() for x in exact)
    q, k, v, extra = rounded
    blocks: list[tuple[slice, ...]] = []

    def bias(*block: slice) -> Tensor:
        blocks.append(block)
        return extra[block].clone()

    ours = attend_in_blocks(heads(q), heads(k), heads(v), bias=bias).view_as(whole)
    assert (len(blocks), ours.dtype) == (1, dtype)
    torch.testing.assert_close(ours.float(), whole, rtol=0, atol=tolerance)
    for one, other in zip(gradients(ours, rounded), gradients(whole, exact), strict=True):
        largest = other.abs().max()
        torch.testing.assert_close(one.float() / largest, other / largest, rtol=0, atol=tolerance)


def test_only_answers_in_bfloat16_on_a_cpu_to_all_tokens_go_by_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[torch.Size] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
        shapes.append(q.shape)
        return attend_in_blocks(q, k, v, scale=scale)

    monkeypatch.setattr(attention, "attend_in_blocks", spy)
    q, k, v = inputs(6, w=12)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    attend(q, k, v)
    attend(*half, causal=True)
    attend(*half, mask=torch.ones(6, 6, dtype=torch.bool))
    attend(half[0][:, :, :1], *half[1:])
    assert shapes == []
    out = attend(*half)
    assert shapes == [(4, 6, 12)]
    torch.testing.assert_close(out.float(), attend(q, k, v), rtol=0, atol=0.03)
