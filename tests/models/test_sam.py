import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seekvl.models import attention
from seekvl.models.sam import PixelNorm, Sam, SamConfig, WindowAttention, in_windows
from seekvl.runtime import SeekVLError

CONFIG = SamConfig(
    image_size=96,
    patch_size=8,
    width=16,
    layers=3,
    heads=2,
    mlp_width=32,
    window=5,
    global_layers=(1, 2),
    neck_channels=8,
    downsample_channels=(12, 16),
    resize_side=16,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)


@pytest.fixture
def tower() -> Sam:
    torch.manual_seed(0)
    tower = Sam(CONFIG).eval()
    for name, parameter in tower.named_parameters():
        if "rel_pos" in name or "pos_embed" in name or "hd_alpha" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return tower


def attention_by_hand(module: WindowAttention, x: Tensor) -> Tensor:
    """Decomposed relative attention of one square x[w, w, c], one query at a time."""
    side, heads = module.side, module.heads
    qkv = module.qkv(x).view(side * side, 3, heads, -1)
    out = torch.zeros(side * side, heads, qkv.shape[-1])
    for head in range(heads):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        for i in range(side * side):
            row, column = divmod(i, side)
            logits = torch.empty(side * side)
            for j in range(side * side):
                r, c = divmod(j, side)
                logits[j] = q[i] @ k[j] / math.sqrt(q.shape[-1])
                logits[j] += q[i] @ module.rel_pos_h[row - r + side - 1]
                logits[j] += q[i] @ module.rel_pos_w[column - c + side - 1]
            out[i, head] = logits.softmax(0) @ v
    return module.proj(out.flatten(1)).view(side, side, -1)


def test_window_attention_equals_the_definition(tower: Sam) -> None:
    x = torch.randn(2, 5, 5, 16)
    attention = tower.blocks[0].attn
    for n in range(2):
        torch.testing.assert_close(attention(x)[n], attention_by_hand(attention, x[n]), rtol=1e-4, atol=1e-5)


def plain_attention(module: WindowAttention, x: Tensor) -> Tensor:
    """Attention over squares x[n, w, w, c] with the bias of all pairs in memory."""
    q, k, v = rearrange(module.qkv(x), "n y x (three h e) -> three n h (y x) e", three=3, h=module.heads)
    place = torch.arange(module.side)
    offset = place[:, None] - place + module.side - 1
    grid = rearrange(q, "n h (y x) e -> n h y x e", y=module.side)
    rows = torch.einsum("nhyxe,yse->nhyxs", grid, module.rel_pos_h[offset])
    columns = torch.einsum("nhyxe,xse->nhyxs", grid, module.rel_pos_w[offset])
    bias = rearrange(rows[..., :, None] + columns[..., None, :], "n h y x a b -> n h (y x) (a b)")
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out: Tensor = module.proj(rearrange(x, "n h (y x) e -> n y x (h e)", y=module.side))
    return out


@pytest.mark.parametrize("limit", [1000, attention.CPU_SCORES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_and_late_padding_equal_the_plain_form_forward_and_backward(
    tower: Sam, layer: int, dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain form pads before the projection, and has all scores and biases in memory. In bfloat16 we are
    about as far from float32 as it is, though our scores are rounded, like those of the official code.
    """
    monkeypatch.setattr(attention, "CPU_SCORES", limit)
    module = tower.blocks[layer].attn
    torch.nn.init.normal_(module.qkv.bias)
    module.bfloat16()
    x = torch.randn(2, 12, 12, 16).bfloat16()

    def learned(run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        module.to(dtype).zero_grad()
        source = x.to(dtype, copy=True).requires_grad_()
        out = run(source)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
        grads = [source.grad, *(parameter.grad for parameter in module.parameters())]
        with torch.no_grad():
            answer = run(source)
        tensors = out.detach(), answer, *(grad for grad in grads if grad is not None)
        return [tensor.float().clone() for tensor in tensors]

    def plain(x: Tensor) -> Tensor:
        if layer:
            return plain_attention(module, x)
        return in_windows(x, 5, lambda square: plain_attention(module, square))

    exact, theirs, ours = learned(plain, torch.float32), learned(plain, dtype), learned(module, dtype)
    assert len(exact) == len(theirs) == len(ours) == 9
    for one, other, expected in zip(ours, theirs, exact, strict=True):
        allowed = 4 * (other - expected).norm() + 1e-5 * expected.norm()
        assert (one - expected).norm() <= allowed


def test_a_tower_learns_under_autocast(tower: Sam) -> None:
    """Weights in float32, products in bfloat16: how nano trains."""
    torch.nn.init.normal_(tower.blocks[0].attn.qkv.bias)
    pixels = torch.rand(1, 3, 96, 96)
    exact = tower(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tower(pixels)
    torch.testing.assert_close(
        rough.float() / exact.abs().max(), exact / exact.abs().max(), rtol=0, atol=0.05
    )
    for out in (exact, rough):
        tower.zero_grad()
        out.float().square().sum().backward()
        grads = [parameter.grad.clone() for parameter in tower.parameters() if parameter.grad is not None]
        assert len(grads) == len(list(tower.parameters()))
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        if out is exact:
            expected = norm
    torch.testing.assert_close(norm, expected, rtol=0.05, atol=0)


def test_windows_see_zero_padding_and_nothing_of_each_other() -> None:
    x = torch.randn(1, 12, 12, 4)
    seen: list[Tensor] = []

    def spy(windows: Tensor) -> Tensor:
        seen.append(windows)
        return windows

    assert torch.equal(in_windows(x, 5, spy), x)
    (windows,) = seen
    assert windows.shape == (9, 5, 5, 4)
    assert torch.equal(windows[0], x[0, :5, :5])
    assert torch.equal(windows[5][:, :2], x[0, 5:10, 10:12])
    assert not windows[8][2:].any()
    assert not windows[8][:, 2:].any()


def test_the_stream_is_contiguous(tower: Sam) -> None:
    """In the layout of a convolution every sum and norm would copy it."""
    seen: list[Tensor] = []
    for block in tower.blocks:
        block.register_forward_hook(lambda _module, inputs, output: seen.extend((inputs[0], output)))
        block.attn.proj.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    tower(torch.rand(2, 3, 96, 96))
    assert len(seen) == 9
    assert all(x.is_contiguous() for x in seen)


def test_a_batch_equals_single_pictures(tower: Sam) -> None:
    pixels = torch.rand(2, 3, 96, 96)
    together = tower(pixels)
    assert together.shape == (2, 16, 16)
    for n in range(2):
        torch.testing.assert_close(together[n : n + 1], tower(pixels[n : n + 1]), rtol=0, atol=1e-5)


def test_the_side_branch_takes_the_first_global_block_scaled_by_alpha(tower: Sam) -> None:
    pixels = torch.rand(1, 3, 96, 96)
    with_branch = tower(pixels)
    taken: list[Tensor] = []
    tower.blocks[1].register_forward_hook(lambda _module, _inputs, output: taken.append(output))
    tower.neck_hd.register_forward_hook(lambda _module, inputs, _output: taken.append(inputs[0]))
    tower(pixels)
    assert torch.equal(taken[0], taken[1])
    branch = tower.downsample(tower.neck_hd(taken[0])).flatten(2).transpose(1, 2)
    alpha = tower.hd_alpha.item()
    torch.nn.init.zeros_(tower.hd_alpha)
    torch.testing.assert_close(with_branch, tower(pixels) + alpha * branch, rtol=0, atol=1e-5)


def test_the_resize_is_done_in_float32_whatever_the_dtype(
    tower: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[torch.dtype] = []
    interpolate = torch.nn.functional.interpolate

    def spy(x: Tensor, **options: object) -> Tensor:
        dtypes.append(x.dtype)
        return interpolate(x, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("seekvl.models.sam.F.interpolate", spy)
    out = tower.bfloat16()(torch.rand(1, 3, 96, 96, dtype=torch.bfloat16))
    assert dtypes == [torch.float32]
    assert out.dtype == torch.bfloat16


def test_pixel_norm_equals_layer_norm_over_channels() -> None:
    norm = PixelNorm(6, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 4, 4)
    expected = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(norm(x), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_layers": (3,)}, "global_layers"),
        ({"global_layers": ()}, "global_layers"),
        ({"resize_side": 18}, "multiple of 4"),
        ({"image_size": 100}, "multiple of its patch"),
        ({"heads": 3}, "not divisible"),
        ({"pixel_mean": None}, "both pixel_mean and pixel_std"),
    ],
)
def test_impossible_dimensions_are_refused(change: dict[str, object], message: str) -> None:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | change
    with pytest.raises(SeekVLError, match=message):
        SamConfig(**fields)  # type: ignore[arg-type]


def test_another_picture_side_is_refused(tower: Sam) -> None:
    with pytest.raises(SeekVLError, match="3 x 96 x 96"):
        tower(torch.rand(1, 3, 96, 88))
