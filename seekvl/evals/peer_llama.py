"""llama.cpp as a peer, through the package llama-cpp-python: the language model alone, from a GGUF file.

It is given the token ids of our prompts, and has no pictures: towers and adaptor are not in the file
(`evals.gguf`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seekvl.evals.clock import Clock
from seekvl.evals.peers import Reply
from seekvl.runtime import require


class LlamaCpp:
    """A LLaMA in llama.cpp; the making is the loading."""

    def __init__(self, file: Path, *, positions: int, threads: int, clock: Clock) -> None:
        """positions: tokens the cache has room for, and most tokens of a call."""
        self._library = require("llama_cpp", extra="llama")
        began = clock()
        self._model: Any = self._library.Llama(
            str(file),
            n_ctx=positions,
            n_batch=positions,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.load = clock() - began
        """Seconds of loading."""
        self._clock = clock

    def answer(self, prompt: Sequence[int], *, count: int) -> Reply:
        """Answer a prompt with exactly so many tokens, each the likeliest."""
        tokens, times = list[int](), list[float]()
        began = self._clock()
        self._model.reset()
        self._model.eval(prompt)
        while True:
            tokens.append(int(self._logits().argmax()))
            times.append(self._clock() - began)
            if len(tokens) == count:
                return Reply(tokens=tokens, vision=0.0, times=times)
            self._model.eval(tokens[-1:])

    def logits(self, prompt: Sequence[int], *, tokens: Sequence[int]) -> Tensor:
        """Return the logits f32[k, v] before each of k tokens that follow the prompt, fed one by one."""
        self._model.reset()
        rows = []
        for fed in (prompt, *([token] for token in tokens[:-1])):
            self._model.eval(fed)
            rows.append(torch.from_numpy(self._logits().copy()))
        return torch.stack(rows)

    def _logits(self) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Return the logits f32[v] after the last token, in llama.cpp's own memory."""
        pointer = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),))
