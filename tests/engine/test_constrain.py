from importlib.util import find_spec
from pathlib import Path

import pytest

import seekvl
from seekvl.engine.constrain import constraint_for
from seekvl.engine.constrain_boxes import BoxConstraint
from seekvl.engine.constrain_choices import ChoiceConstraint
from seekvl.engine.constrain_json import JsonConstraint
from seekvl.engine.request import Form
from seekvl.processing.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_file(Path(seekvl.__file__).parent / "weights" / "nano" / "tokenizer.json")
NEEDED = pytest.mark.skipif(find_spec("llguidance") is None, reason="needs the extra json")


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (None, type(None)),
        ("boxes", BoxConstraint),
        ("box_first", BoxConstraint),
        (["yes", "no"], ChoiceConstraint),
        (("yes",), ChoiceConstraint),
        pytest.param("json", JsonConstraint, marks=NEEDED),
        pytest.param({"type": "object"}, JsonConstraint, marks=NEEDED),
    ],
)
def test_every_form_has_its_constraint(form: Form | None, kind: type) -> None:
    constraint = constraint_for(form, TOKENIZER, end_id=TOKENIZER.eos_id, room=99)
    assert isinstance(constraint, kind)
    if constraint is not None:
        assert not constraint.over
