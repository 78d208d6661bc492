"""What all tests share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _small_matrices_are_quantised() -> Iterator[None]:
    """Models of tests are tiny, and quantised all the same; `test_quantize` tests the limit."""
    from seekvl.weights import quantize

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "SMALLEST", 0)
        yield
