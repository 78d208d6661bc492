"""Options name what the rooms below know."""

from typing import get_args

from seekvl.cli import options
from seekvl.processing.pad_image import PREPROCESSING
from seekvl.runtime import DTYPES
from seekvl.weights.load import NANO


def choices(option: object) -> tuple[str, ...]:
    """Return the values an option may take."""
    return get_args(get_args(option)[0])


def test_choices_are_those_of_the_owners() -> None:
    assert choices(options.Preprocessing) == tuple(PREPROCESSING)
    assert choices(options.Dtype) == ("auto", *DTYPES)
    assert options.NANO == NANO
