"""transformers as a peer: the same folder, ids and pixels, asked and timed as seekvl is.

It has the models of DeepSeek-VL (SigLIP alone, and with SAM), not those of DeepSeek-VL2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seekvl.evals.clock import Clock, watch
from seekvl.processing.encode import ModelInput
from seekvl.runtime import require

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of two logits that the dtype explains, in standard deviations of the logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What transformers answered, and when."""

    tokens: list[int]
    """Of the first row."""
    vision: float
    """Seconds for the pictures: towers and adaptor."""
    times: list[float]
    """When the token of each step was there, in seconds after the call."""


class Transformers:
    """DeepSeek-VL in transformers, loaded from a folder in its layout; the making is the loading."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, clock: Clock) -> None:
        transformers = require("transformers", extra="transformers")
        kind = transformers.AutoConfig.from_pretrained(folder).model_type
        name = {
            "deepseek_vl": "DeepseekVLForConditionalGeneration",
            "deepseek_vl_hybrid": "DeepseekVLHybridForConditionalGeneration",
        }[kind]
        model_class: Any = getattr(transformers, name)
        began = clock()
        self.model = model_class.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.load = clock() - began
        """Seconds of loading."""
        self._begin(dtype=dtype, device=device, clock=clock)

    @classmethod
    def of(cls, model: Any, *, dtype: torch.dtype, device: torch.device, clock: Clock) -> "Transformers":
        """Return the same of a model of transformers that is there already."""
        peer = cls.__new__(cls)
        peer.model, peer.load = model, 0.0
        peer._begin(dtype=dtype, device=device, clock=clock)
        return peer

    def _begin(self, *, dtype: torch.dtype, device: torch.device, clock: Clock) -> None:
        """Take down how to feed and time the model."""
        self._dtype, self._device, self._clock = dtype, device, clock
        self._vision = self._watch()

    def _watch(self) -> Callable[[], float]:
        """Time towers and adaptor."""
        inner: Any = self.model.model
        towers: list[nn.Module] = [inner.vision_model]
        if hasattr(inner, "high_res_vision_model"):
            towers.append(inner.high_res_vision_model)
        return watch(towers, inner.aligner, clock=self._clock)

    def answer(self, inputs: ModelInput, *, count: int, rows: int = 1) -> Reply:
        """Answer a prompt, as often as there are rows at once, with exactly so many tokens."""
        from transformers import LogitsProcessor, LogitsProcessorList

        clock, times = self._clock, list[float]()

        class Stopwatch(LogitsProcessor):
            """Notes when the logits of each token are there."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                times.append(clock())
                return scores

        asked = self._fed(inputs, rows=rows)
        began = clock()
        with torch.inference_mode():
            out = self.model.generate(
                **asked,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
                do_sample=False,
                logits_processor=LogitsProcessorList([Stopwatch()]),
            )
        tokens = out[0, len(inputs.input_ids) :].tolist()
        return Reply(tokens=tokens, vision=self._vision(), times=[moment - began for moment in times])

    def logits(self, inputs: ModelInput, *, tokens: list[int]) -> Tensor:
        """Return the logits f32[k, v] before each of k tokens that follow the prompt."""
        asked = self._fed(inputs, rows=1)
        follow = torch.tensor([tokens], device=self._device)
        asked["input_ids"] = torch.cat((asked["input_ids"], follow), dim=1)
        asked["attention_mask"] = torch.ones_like(asked["input_ids"])
        with torch.inference_mode():
            out: Tensor = self.model(**asked, logits_to_keep=len(tokens) + 1).logits
        return out[0, :-1].float().cpu()

    def _fed(self, inputs: ModelInput, *, rows: int) -> dict[str, Tensor]:
        """Return our prompt under transformers' names."""
        ids = inputs.input_ids.to(self._device).expand(rows, -1).clone()
        assert inputs.pixels is not None
        assert inputs.normalized, "this layout normalises in the processor"
        pixels, low = (
            None if part is None else part.to(self._device, self._dtype).expand(rows, -1, -1, -1)
            for part in (inputs.pixels, inputs.low_pixels)
        )
        assert pixels is not None
        pictures = {"pixel_values": pixels}
        if low is not None:
            pictures = {"pixel_values": low, "high_res_pixel_values": pixels}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}


def disagreement(ours: Tensor, theirs: Tensor, *, tokens: list[int], dtype: torch.dtype) -> str | None:
    """Say where two programs do not compute the same; None where they do.

    ours f32[v]: the logits after the prompt. theirs f32[k, v]: those before each of our greedy tokens. Each
    token has to be the peer's likeliest, or tied with it within what the dtype explains.

    >>> logits = torch.tensor([[0.0, 1.0, -1.0], [3.0, 0.0, 1.0]])
    >>> disagreement(logits[0], logits, tokens=[1, 0], dtype=torch.float32)
    >>> disagreement(logits[0], logits, tokens=[1, 2], dtype=torch.float32)
    'token 2 of 2: the peer finds another one likelier by 1.309 standard deviations (at most 0.01)'
    """
    limit = TOLERANCE[dtype]
    spread = theirs.std(dim=1)
    apart = float((ours - theirs[0]).abs().max() / spread[0])
    if not apart <= limit:
        return f"logits after the prompt differ by {apart:.3f} standard deviations (at most {limit})"
    chosen = theirs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    margins = (theirs.max(dim=1).values - chosen) / spread
    for number, margin in enumerate(margins.tolist(), start=1):
        if not margin <= limit:
            return (
                f"token {number} of {len(tokens)}: the peer finds another one likelier by {margin:.3f} "
                f"standard deviations (at most {limit})"
            )
    return None
