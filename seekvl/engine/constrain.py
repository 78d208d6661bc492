"""Answers that are held to a form: tokens that would spoil it are not offered for choice.

Letters: v vocabulary.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from seekvl.engine.constrain_boxes import box_constraint
from seekvl.engine.constrain_choices import choice_constraint
from seekvl.engine.constrain_json import json_constraint
from seekvl.engine.request import Form
from seekvl.processing.tokenizer import Tokenizer


class Constraint(Protocol):
    """The constraint on one answer, which follows it token by token."""

    @property
    def exempt(self) -> bool:
        """Whether the repetition penalty leaves the next token alone."""
        ...

    @property
    def over(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        ...

    def narrow(self, logits: Tensor) -> Tensor:
        """Return logits f[v] with minus infinity for every token that may not come next."""
        ...

    def take(self, token: int) -> None:
        """Follow the answer by the token that was chosen."""
        ...


def constraint_for(
    form: Form | None, tokenizer: Tokenizer, *, end_id: int, room: int, begun: str = ""
) -> Constraint | None:
    """Make the constraint that holds an answer to a form; None for None. `room`: tokens of the answer.

    begun: what the prompt holds of the answer already. A box that is open there is gone on with; the other
    forms begin anew.

    Raises SeekVLError when a vocabulary cannot spell the form, when there is no room for it, when `begun`
    holds a malformed box, for a schema that is none, and when JSON is asked for without the package it needs.
    """
    if form is None:
        return None
    if isinstance(form, Mapping):
        return json_constraint(form, tokenizer, end_id=end_id)
    if isinstance(form, list | tuple):
        return choice_constraint(form, tokenizer, end_id=end_id, room=room)
    if form == "json":
        return json_constraint({"type": "object"}, tokenizer, end_id=end_id)
    return box_constraint(form, tokenizer, end_id=end_id, room=room, begun=begun)
