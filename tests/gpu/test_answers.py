"""Answers, draws and prompt attention of a CUDA device beside those of the CPU; the bodies run there, too."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import seekvl
from seekvl.engine.generate import generate
from seekvl.engine.gpu.layers import accelerate_on_gpu
from seekvl.engine.request import Request, SamplingParams
from seekvl.engine.sampler import Sampler, choose
from seekvl.models.attention import attend
from tests.engine.gpu.conftest import CUDA
from tests.models.test_attention import slow
from tests.parity import test_generate as padded
from tests.parity import test_vl2_golden as tiled

DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", padded.NAMES)
@pytest.mark.parametrize("folder", padded.FOLDERS)
def test_greedy_ids_of_the_reference(folder: str, name: str, device: str) -> None:
    """Golden answers of the official code, all three of a case in one batch."""
    vlm = seekvl.load(GOLDEN / folder, device=device, dtype="float32", preprocessing="official")
    pieces = generate(vlm.model, vlm.tokenizer, requests=padded.three_ways(folder, name))
    done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
    padded.check(folder, name, [done[index] for index in range(3)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("folder", "name"), tiled.CASES)
def test_logits_of_the_reference(folder: str, name: str, device: str) -> None:
    """A DeepSeek-VL2 on the device beside the one on the CPU, which is held to golden logits elsewhere."""
    vlm = seekvl.load(GOLDEN / folder, device=device, dtype="float32", preprocessing="official")
    accelerate_on_gpu(vlm.model)
    inputs = tiled.encode(folder, name)
    found, wanted = (
        next(
            iter(
                piece.completion
                for _, piece in generate(
                    one,
                    vlm.tokenizer,
                    requests=[Request(inputs=inputs, params=SamplingParams(max_new_tokens=8))],
                )
                if piece.completion is not None
            )
        )
        for one in (vlm.model, tiled.model(folder))
    )
    assert found.token_ids == wanted.token_ids


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_draws_the_same_everywhere(device: str) -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3
    for params in (
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.7, top_p=0.9, top_k=40, seed=5),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
    ):
        drawn = []
        for place in ("cpu", device):
            sampler = Sampler(params=params, prompt=frozenset({3, 7}), generated=[11, 12])
            drawn.append([choose(logits.to(place), sampler) for _ in range(50)])
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize("width", [(128, 128), (192, 128)], ids=["heads", "latent"])
@pytest.mark.parametrize("new", [40, 9], ids=["first piece", "later piece"])
@pytest.mark.parametrize("device", DEVICES)
def test_prompts_attend_through_the_flash_kernel(new: int, width: tuple[int, int], device: str) -> None:
    """With every other kernel forbidden: a mask written out would fail here."""
    generator = torch.Generator().manual_seed(new)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, 4, tokens, channels, generator=generator).to(device, dtype)
        for tokens, channels in ((new, width[0]), (40, width[0]), (40, width[1]))
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.inference_mode():
        found = attend(q, k, v, causal=True)
    seen = torch.ones(new, 40, dtype=torch.bool).tril(40 - new)
    expected = slow(q.cpu(), k.cpu(), v.cpu(), seen=seen, scale=width[0] ** -0.5)
    bound = 2e-2 if device == "cuda" else 1e-5
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=bound)
