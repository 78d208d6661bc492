"""Options name what the rooms below know."""

from typing import get_args

from seekvl.cli import options
from seekvl.processing import choices as processing
from seekvl.processing.pad_image import PREPROCESSING
from seekvl.runtime import DTYPES
from seekvl.weights.load import NANO
from seekvl.weights.weight_only import GPU_KINDS


def choices(option: object) -> tuple[str, ...]:
    """Return the values an option may take."""
    return get_args(get_args(option)[0])


def test_choices_are_those_of_the_owners() -> None:
    assert get_args(options.Preprocessing)[0] is processing.Preprocessing
    assert choices(options.Preprocessing) == PREPROCESSING
    assert choices(options.Dtype) == ("auto", *DTYPES)
    assert get_args(choices(options.Quantize)[0]) == GPU_KINDS
    assert options.NANO == NANO
