import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import seekvl
from seekvl.engine import forward
from seekvl.engine.kernels.accelerate import MOST_ROWS, accelerate
from seekvl.engine.kernels.compiled import library, missing
from seekvl.engine.score import HEAD_ROWS, Score, prompt_logits, score_continuations
from seekvl.models.llama import Llama
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError
from tests.engine.conftest import GOLDEN, LONG

LEVELS = () if missing() else library().levels


def slow_logprob(vlm: seekvl.VLM, inputs: ModelInput, ids: Sequence[int]) -> float:
    """The obvious way: the whole sequence through the whole network."""
    tokens = torch.cat((inputs.input_ids, torch.tensor(ids)))[None]
    mask = torch.cat((inputs.image_mask, torch.zeros(len(ids), dtype=torch.bool)))[None]
    with torch.inference_mode():
        rows = vlm.model(tokens, image_mask=mask, pixels=inputs.pixels, normalized=inputs.normalized)[
            0
        ].log_softmax(-1)
    start = len(inputs.input_ids) - 1
    return sum(float(rows[start + i, token]) for i, token in enumerate(ids))


def test_scores_equal_teacher_forcing(vlm: seekvl.VLM, prompts: list[ModelInput]) -> None:
    continuations = [[5], [7, 8, 9], list(range(40, 60)), [5]]
    for inputs in prompts:
        scores = score_continuations(vlm.model, inputs, continuations=continuations)
        for score, ids in zip(scores, continuations, strict=True):
            assert score.logprob == pytest.approx(slow_logprob(vlm, inputs, ids), abs=1e-3)
            assert score.tokens == len(ids)
            assert score.perplexity == pytest.approx(math.exp(-score.logprob / len(ids)))
        assert scores[0] == scores[3]


def test_a_continuation_longer_than_the_head_takes_at_once(
    vlm: seekvl.VLM, prompts: list[ModelInput]
) -> None:
    ids = [i % 600 for i in range(HEAD_ROWS + 30)]
    (score,) = score_continuations(vlm.model, prompts[0], continuations=[ids])
    assert score.logprob == pytest.approx(slow_logprob(vlm, prompts[0], ids), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vl1-siglip", "vl2-small-like"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_scores_as_torch_does(name: str, dtype: torch.dtype, level: str) -> None:
    model = seekvl.load(GOLDEN / name, device="cpu", dtype=dtype)
    inputs = model.processor(LONG)
    continuations = [[5], [7, 8, 9], list(range(40, 80))]
    accelerate(model.model.language, level="off")
    wanted = score_continuations(model.model, inputs, continuations=continuations)
    accelerate(model.model.language, level=level)
    found = score_continuations(model.model, inputs, continuations=continuations)
    for ours, theirs in zip(found, wanted, strict=True):
        apart = 1e-4 if dtype == torch.float32 else 0.1 * theirs.tokens**0.5  # bfloat16 logits of size 4
        assert ours.logprob == pytest.approx(theirs.logprob, abs=apart)


def test_the_prompt_is_read_once_and_continuations_alone(
    vlm: seekvl.VLM, prompts: list[ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    if vlm.kernels not in MOST_ROWS:
        pytest.skip("torch reads prompts on this machine")
    read: list[tuple[int, int]] = []

    def noting(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(network: Llama, embeds: Tensor, *, start: int, **more: Any) -> Tensor | None:
            read.append((start, len(embeds)))
            return function(network, embeds, start=start, **more)

        return call

    for name in ("prompt_logits", "prompt_hidden"):
        monkeypatch.setattr(forward, name, noting(getattr(forward, name)))
    monkeypatch.setattr(Llama, "forward", None)
    score_continuations(vlm.model, prompts[1], continuations=[[5], [7, 8, 9], list(range(40, 60)), [1, 2]])
    length = len(prompts[1].input_ids)
    assert read == [(0, length), (length, 2), (length, 19), (length, 1)]


def test_hopeless_perplexity_is_infinite_and_no_crash() -> None:
    assert Score(logprob=-1e6, tokens=1).perplexity == math.inf


def test_bad_continuations_are_named(vlm: seekvl.VLM, prompts: list[ModelInput]) -> None:
    with pytest.raises(SeekVLError, match="continuation 2 of 2 has no tokens"):
        score_continuations(vlm.model, prompts[0], continuations=[[1], []])
    with pytest.raises(SeekVLError, match=r"continuation 1: .* 17,000 exceed .* 16,384"):
        score_continuations(vlm.model, prompts[0], continuations=[[1] * 17_000])


def test_logits_of_all_positions(vlm: seekvl.VLM, prompts: list[ModelInput]) -> None:
    inputs = prompts[2]
    logits = prompt_logits(vlm.model, inputs)
    with torch.inference_mode():
        expected = vlm.model(
            inputs.input_ids[None],
            image_mask=inputs.image_mask[None],
            pixels=inputs.pixels,
            normalized=inputs.normalized,
        )
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected[0], atol=2e-5, rtol=0)


def test_logits_are_float32_whatever_torch_makes_by_default(
    vlm: seekvl.VLM, prompts: list[ModelInput]
) -> None:
    torch.set_default_dtype(torch.float16)
    try:
        assert prompt_logits(vlm.model, prompts[0]).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
