"""What the tests of the kernels share; without a library they are skipped and say why."""

import pytest

from seekvl.engine.kernels.compiled import LEVELS, Library, library, missing


@pytest.fixture
def native() -> Library:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return library()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, native: Library) -> str:
    """Every level, where this machine executes it."""
    name = str(request.param)
    if name not in native.levels:
        pytest.skip(f"this machine does not execute {name}")
    return name
