"""Answers that are JSON, of any schema: the grammar is that of the package llguidance.

Letters: v vocabulary.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError, require

SPACE = r"[ \n]{0,8}"
"""What may stand between the words of JSON: enough to indent it, and no room to go on with for ever."""


class JsonConstraint:
    """The constraint on one answer; get one from `json_constraint`."""

    exempt = False

    def __init__(self, matcher: Any, *, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def over(self) -> bool:
        """Whether the JSON is whole and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def narrow(self, logits: Tensor) -> Tensor:
        """Return logits f[v] with minus infinity for every token that may not come next."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        allowed = torch.from_numpy(bits[: self._vocab_size].astype(bool)).to(logits.device)
        narrowed = torch.full_like(logits, -torch.inf)
        narrowed[: self._vocab_size] = logits[: self._vocab_size].masked_fill(~allowed, -torch.inf)
        return narrowed

    def take(self, token: int) -> None:
        """Follow the answer by the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        """Tell when the schema asks for more than the grammar's limits."""
        if self._matcher.is_error():
            raise SeekVLError(f"the JSON schema cannot be followed: {_first_line(self._matcher.get_error())}")


def json_constraint(schema: Mapping[str, object], tokenizer: Tokenizer, *, end_id: int) -> JsonConstraint:
    """Hold an answer to JSON that a schema allows.

    Raises SeekVLError without llguidance, and for what is no JSON schema or uses a keyword that it lacks.
    """
    package = require("llguidance", extra="json")
    try:
        grammar = package.LLMatcher.grammar_from_json_schema(
            json.dumps(dict(schema)), defaults={"whitespace_pattern": SPACE}
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise SeekVLError(f"constrain is no JSON schema: {_first_line(str(error))}") from error
    vocabulary = _vocabulary(tokenizer, end_id)
    matcher = package.LLMatcher(vocabulary, grammar, log_level=0)
    if matcher.is_error():
        raise SeekVLError(f"constrain is no JSON schema: {_first_line(matcher.get_error())}")
    return JsonConstraint(matcher, vocab_size=vocabulary.vocab_size)


class _Words:
    """A vocabulary as llguidance reads one."""

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        self.eos_token_id = end_id
        self.bos_token_id = tokenizer.bos_id
        spelled = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        silent = [token for token, text in enumerate(spelled) if not text or token == end_id]
        self.special_token_ids = silent
        self.tokens = list(spelled)
        for token in silent:
            self.tokens[token] = b"<special %d>" % token
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, end_id: int) -> Any:
    """Sort a tokenizer's vocabulary once."""
    package = require("llguidance", extra="json")
    return package.LLTokenizer(package.TokenizerWrapper(_Words(tokenizer, end_id)))


def _first_line(text: str) -> str:
    """Return the first line of a message that has something in it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "unknown")
