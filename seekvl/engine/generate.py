"""Answers to some requests and nothing else: an engine that lives as long as they do."""

from collections.abc import Callable, Generator, Sequence

from seekvl.engine.budget import choose_limits
from seekvl.engine.engine import Engine
from seekvl.engine.request import Piece, Request
from seekvl.models.vl2 import AnyVL
from seekvl.processing.tokenizer import Tokenizer


def generate(
    model: AnyVL,
    tokenizer: Tokenizer,
    *,
    requests: Sequence[Request],
    chunk: int | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Generator[tuple[int, Piece], None, None]:
    """Answer requests together; yield (index of the request, its next piece) until each had its last piece.

    chunk: most prompt tokens in one forward pass, to bound memory; None as `budget.choose_limits` says.
    cancel: asked before every step; True ends all answers as "cancelled". Closing the iterator stops as well.
    An answer that reaches the model's longest sequence ends there, as "length".

    Raises SeekVLError, before anything is computed, for a prompt that leaves no room for an answer.
    """
    engine = Engine(model, tokenizer, limits=choose_limits(model, chunk=chunk))
    return engine.answer(requests, cancel=cancel)
