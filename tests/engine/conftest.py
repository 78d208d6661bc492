"""The smallest golden checkpoints as models to generate with: random weights, real tokenizer and template."""

from collections.abc import Callable
from pathlib import Path

import pytest

import seekvl
from seekvl.engine.request import Completion, Piece, Request, SamplingParams
from seekvl.processing.encode import ModelInput

GOLDEN = Path(__file__).parents[1] / "golden"
LONG = "Which of the two images is brighter? " * 6


@pytest.fixture(scope="session")
def vlm() -> seekvl.VLM:
    return seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32", preprocessing="official")


@pytest.fixture(scope="session")
def tiled() -> seekvl.VLM:
    """DeepSeek-VL2 with latent attention and experts."""
    return seekvl.load(GOLDEN / "vl2-small-like", device="cpu", dtype="float32", preprocessing="official")


@pytest.fixture(scope="session")
def prompts(vlm: seekvl.VLM) -> list[ModelInput]:
    """Prompts of different lengths: text, one picture, two pictures."""
    pictures = [str(GOLDEN / "images" / name) for name in ("grad_224x160.png", "tiny_5x3.png")]
    return [
        vlm.processor(LONG),
        vlm.processor([{"role": "user", "content": "Say it.", "images": pictures[:1]}]),
        vlm.processor([{"role": "user", "content": "Compare.", "images": pictures}]),
    ]


@pytest.fixture(scope="session")
def make() -> Callable[..., Request]:
    """Shorten what every test does: a request with some sampling parameters."""

    def request(inputs: ModelInput, *, end_id: int | None = None, **params: object) -> Request:
        return Request(inputs=inputs, params=SamplingParams(**params), end_id=end_id)  # type: ignore[arg-type]

    return request


@pytest.fixture(scope="session")
def finish() -> Callable[[list[tuple[int, Piece]]], list[Completion]]:
    """Sort the completions out of a stream of pieces, and check that the pieces add up."""

    def completions(pieces: list[tuple[int, Piece]]) -> list[Completion]:
        done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
        for index, completion in done.items():
            assert "".join(piece.text for row, piece in pieces if row == index) == completion.text
            ids = [piece.token_id for row, piece in pieces if row == index and piece.token_id is not None]
            assert ids == list(completion.token_ids)
        return [done[index] for index in sorted(done)]

    return completions
