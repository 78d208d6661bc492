"""Attention over the cache beside the slow way, and the Triton kernels beside both.

Without a GPU the Triton kernels run in Triton's interpreter, where that is asked for and triton installed:

    TRITON_INTERPRET=1 pytest tests/engine/gpu/test_kernels.py
"""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seekvl.engine.gpu.kernels import attend_rows
from tests.engine.gpu.conftest import CUDA

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 runs it in Triton's interpreter"
)
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=CUDA)]
HALVES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SHAPES = {  # rows, heads, key-value heads, width of keys, of values, columns
    "heads of their own": (3, 4, 4, 12, 12, 200),
    "shared heads": (2, 6, 2, 16, 16, 90),
    "true widths": (1, 2, 2, 128, 128, 70),
    "a latent": (3, 5, 1, 8, 20, 150),
    "a true latent": (2, 16, 1, 64, 512, 100),
}


class Case:
    """Queries, a cache of five rows, and which of them are asked."""

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        n, h, k, e, w, s = SHAPES[name]
        generator = torch.Generator().manual_seed(n * s)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.q, self.keys, self.values = draw(n, h, e), draw(5, k, s, e), draw(5, k, s, w)
        self.latent_q = draw(n, h, w) / 4 if "latent" in name else None
        self.slots = torch.tensor([4, 1, 2][:n], device=device)
        self.columns = torch.tensor([37, s - 1, 0][:n], device=device)

    def expected(self) -> Tensor:
        """Attend row by row and head by head, in float64."""
        out = torch.zeros(*self.q.shape[:2], self.values.shape[3], dtype=torch.float64)
        shared = self.q.shape[1] // self.keys.shape[1]
        for row, (slot, column) in enumerate(zip(self.slots.tolist(), self.columns.tolist(), strict=True)):
            for head in range(self.q.shape[1]):
                keys, values = (
                    side[slot, head // shared, : column + 1].double().cpu()
                    for side in (self.keys, self.values)
                )
                scores = keys @ self.q[row, head].double().cpu()
                if self.latent_q is not None:
                    scores = scores + values @ self.latent_q[row, head].double().cpu()
                out[row, head] = (0.2 * scores).softmax(-1) @ values
        return out

    def attended(self, attend: Callable[..., Tensor]) -> Tensor:
        """What a kernel makes of it."""
        places = {"slots": self.slots, "columns": self.columns}
        return attend(self.q, self.keys, self.values, **places, scale=0.2, latent_q=self.latent_q)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_its_formula(name: str) -> None:
    case = Case(name)
    found = case.attended(attend_rows)
    torch.testing.assert_close(found.double(), case.expected(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_attention_in_parts(
    name: str,
    dtype: torch.dtype,
    device: str,
    multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton_kernels = pytest.importorskip("seekvl.engine.gpu.triton_kernels", exc_type=ImportError)
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter takes bfloat16 for whole numbers in a product")
    monkeypatch.setattr(triton_kernels, "_multiprocessors", lambda _device: multiprocessors)
    case = Case(name, dtype=dtype, device=device)
    found = case.attended(triton_kernels.attend_rows)
    assert (found.dtype, found.device.type) == (dtype, device)
    torch.testing.assert_close(found.double().cpu(), case.expected(), rtol=0, atol=HALVES[dtype])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_experts_of_few_tokens(dtype: torch.dtype, device: str) -> None:
    triton_kernels = pytest.importorskip("seekvl.engine.gpu.triton_kernels", exc_type=ImportError)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    x, gate, up, down = draw(3, 300), draw(5, 19, 300), draw(5, 19, 300), draw(5, 300, 19)
    experts = torch.tensor([[0, 4], [3, 3], [1, 0]], device=device)
    found = triton_kernels.slot_experts(x, experts, gate=gate, up=up, down=down)
    assert found.shape == (3, 2, 300)
    for token in range(3):
        for place, expert in enumerate(experts[token].tolist()):
            row, g, u, d = (
                tensor.double().cpu() for tensor in (x[token], gate[expert], up[expert], down[expert])
            )
            wanted = d @ (F.silu(g @ row) * (u @ row))
            torch.testing.assert_close(
                found[token, place].double().cpu(), wanted, rtol=0, atol=HALVES[dtype] / 4
            )
