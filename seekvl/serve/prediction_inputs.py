"""The two published input sets of the predictions API, as data, and how inputs become a question.

    full      text, image1, image2, image3, ... -> {"img_out": picture or null, "text_out": text}
    simple    image, prompt, ...                -> text

Names, order, defaults and ranges of the published inputs are a contract; ours stand behind them and have
defaults. In both, pictures go where the text has placeholders. Where it has fewer than there are pictures,
the missing ones are put in front, a line each; of more, the first surplus ones are deleted.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from seekvl.engine.request import SamplingParams
from seekvl.processing.conversation import (
    PLACEHOLDER,
    SHORT_PLACEHOLDER,
    Conversation,
    Message,
    Part,
    Picture,
    Text,
)
from seekvl.runtime import SeekVLError
from seekvl.serve.errors import Fault, invalid

Kind = Literal["string", "file", "integer", "number", "strings"]
Value = str | int | float | tuple[str, ...] | None

MOST_STOPS = 4
ADDRESS = re.compile(r"(?:data|https?|file):|/v1/files/", re.IGNORECASE)
"""How the address of a picture begins; a bare path is none."""
PLACE = re.compile(f"{PLACEHOLDER}|{SHORT_PLACEHOLDER}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input."""

    name: str
    kind: Kind
    text: str
    """What clients are told of it."""
    default: Value = None
    required: bool = False
    least: float | None = None
    most: float | None = None
    published: bool = True
    """Whether clients are told the range; the published schema has none for some inputs that need one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSet:
    """The inputs of one model, in order, and which of them mean what."""

    inputs: tuple[Input, ...]
    question: str
    pictures: tuple[str, ...]
    budget: str
    drawn: bool
    """Whether the output is an object with a drawn picture, rather than a text."""


TEMPERATURE = "Randomness of the answer; 0 takes the likeliest words every time."
TOP_P = "Draw among the likeliest words that together have this probability."
PENALTY = "Above 1 makes words that were said less likely to come again; 0 and 1 are off."
BUDGET = "Most tokens of the answer."
EXTRAS = (
    Input(
        name="seed",
        kind="integer",
        text="Makes a random answer repeatable.",
        least=-(2**63),
        most=2**63 - 1,
        published=False,
    ),
    Input(name="stop", kind="strings", text=f"The answer ends before these texts; at most {MOST_STOPS}."),
    Input(
        name="max_tiles",
        kind="integer",
        text="Most tiles a picture is cut into, for DeepSeek-VL2.",
        least=1,
        published=False,
    ),
)
FULL = InputSet(
    inputs=(
        Input(name="text", kind="string", text="Question or instruction.", default="Describe this image."),
        Input(name="image1", kind="file", text="First picture.", required=True),
        Input(name="image2", kind="file", text="Second picture."),
        Input(name="image3", kind="file", text="Third picture."),
        Input(name="max_new_tokens", kind="integer", text=BUDGET, default=2048, least=0, most=4096),
        Input(name="temperature", kind="number", text=TEMPERATURE, default=0.1, least=0, published=False),
        Input(name="top_p", kind="number", text=TOP_P, default=0.9, least=0, most=1, published=False),
        Input(name="repetition_penalty", kind="number", text=PENALTY, default=1.1, least=0, most=2),
        *EXTRAS,
    ),
    question="text",
    pictures=("image1", "image2", "image3"),
    budget="max_new_tokens",
    drawn=True,
)
SIMPLE = InputSet(
    inputs=(
        Input(name="image", kind="file", text="Picture.", required=True),
        Input(name="prompt", kind="string", text="Question or instruction.", required=True),
        Input(name="temperature", kind="number", text=TEMPERATURE, default=0.1, least=0, most=1),
        Input(name="top_p", kind="number", text=TOP_P, default=0.9, least=0, most=1),
        Input(name="repetition_penalty", kind="number", text=PENALTY, default=1.1, least=0, most=2),
        Input(name="max_length_tokens", kind="integer", text=BUDGET, default=2048, least=0, most=4096),
        *EXTRAS,
    ),
    question="prompt",
    pictures=("image",),
    budget="max_length_tokens",
    drawn=False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a prediction asks for, checked."""

    question: str
    question_input: str
    """Name of the input that it came in."""
    pictures: tuple[tuple[str, str], ...]
    """Name of the input and address of each picture."""
    budget: int
    """Most tokens of the answer; 0: none is wanted."""
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    max_tiles: int | None
    drawn: bool

    def sampling(self, *, room: int) -> SamplingParams:
        """Return how the answer is sampled; `room` is what the context leaves. Raises ApiError."""
        try:
            return SamplingParams(
                max_new_tokens=max(1, min(self.budget, room)),
                temperature=self.temperature,
                top_p=self.top_p or 1e-9,  # 0: the likeliest alone
                repetition_penalty=self.repetition_penalty or 1.0,  # 0 is off
                seed=self.seed,
                stop=tuple(text for text in self.stop if text) or None,
            )
        except SeekVLError as error:
            raise invalid(Fault("input", str(error))) from error


def known_inputs(given: Mapping[str, object], inputs: InputSet) -> dict[str, object]:
    """Return the inputs that mean something, as they were given; unknown ones are dropped silently."""
    return {each.name: given[each.name] for each in inputs.inputs if each.name in given}


def read_inputs(given: Mapping[str, object], inputs: InputSet) -> Asked:
    """Check the inputs of a prediction. Raises ApiError (422) with all that is wrong."""
    faults: list[Fault] = []
    values: dict[str, Value] = {}
    for each in inputs.inputs:
        try:
            values[each.name] = _read(given.get(each.name), each)
        except SeekVLError as error:
            missing = given.get(each.name) is None
            faults.append(Fault(f"input.{each.name}", str(error), missing=missing))
    if faults:
        raise invalid(*faults)
    named = [(name, values[name]) for name in inputs.pictures]
    question, seed, tiles = values[inputs.question], values["seed"], values["max_tiles"]
    stop = values["stop"]
    return Asked(
        question=str(question),
        question_input=f"input.{inputs.question}",
        pictures=tuple((f"input.{name}", address) for name, address in named if isinstance(address, str)),
        budget=int(_number(values[inputs.budget])),
        temperature=_number(values["temperature"]),
        top_p=_number(values["top_p"]),
        repetition_penalty=_number(values["repetition_penalty"]),
        seed=None if seed is None else int(_number(seed)),
        stop=stop if isinstance(stop, tuple) else (),
        max_tiles=None if tiles is None else int(_number(tiles)),
        drawn=inputs.drawn,
    )


def ask(asked: Asked, pictures: Sequence[Image.Image]) -> Conversation:
    """Put a question and its pictures together. Raises ApiError where there is nothing to answer."""
    stretches = place(asked.question, len(pictures))
    parts: list[Part] = [
        Text(stretches[0])
    ]  # words in front, if only none: every letter is placed by the rule
    for picture, stretch in zip(pictures, stretches[1:], strict=True):
        parts += [Picture(picture), Text(stretch)]
    try:
        return Conversation((Message("user", tuple(parts)),))
    except SeekVLError as error:
        raise invalid(Fault(asked.question_input, str(error))) from error


def place(text: str, pictures: int) -> list[str]:
    r"""Cut a text at the places of its pictures: one stretch more than there are pictures.

    >>> place("Compare.", 2), place("a <image> b <image> c", 1)
    (['', '\n', '\nCompare.'], ['a  b ', ' c'])
    """
    stretches = PLACE.split(text)
    missing = pictures - (len(stretches) - 1)
    if missing > 0:
        stretches[0] = "\n" + stretches[0]
        return ["", *["\n"] * (missing - 1), *stretches]
    surplus = -missing
    return ["".join(stretches[: surplus + 1]), *stretches[surplus + 1 :]]


def _read(value: object, each: Input) -> Value:
    """Return a value as its input wants it; None takes the default. Raises SeekVLError for a misfit."""
    if value is None:
        if each.required:
            raise SeekVLError("this input is required")
        return each.default
    if each.kind == "strings":
        return _strings(value)
    if each.kind in ("string", "file"):
        return _string(value, file=each.kind == "file")
    return _in_range(value, each)


def _in_range(value: object, each: Input) -> float:
    """Read a number; a whole one may be written with a point."""
    whole = each.kind == "integer"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SeekVLError(f"a {'whole ' * whole}number is wanted, not {_kind(value)}")
    shown = str(value)[:40]
    if not abs(value) <= sys.float_info.max or (whole and value != int(value)):
        raise SeekVLError(f"{shown} is no {'whole' if whole else 'finite'} number")
    if each.least is not None and value < each.least:
        raise SeekVLError(f"{shown} is below {each.least:g}, the least that is taken")
    if each.most is not None and value > each.most:
        raise SeekVLError(f"{shown} is above {each.most:g}, the most that is taken")
    return int(value) if whole else float(value)


def _string(value: object, *, file: bool) -> str:
    if not isinstance(value, str):
        raise SeekVLError(f"a string is wanted, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SeekVLError("the string holds half a letter (a lone surrogate)") from error
    if file and not ADDRESS.match(value):
        raise SeekVLError("a file is given by a data: or an https: address, or by one of an uploaded file")
    return value


def _strings(value: object) -> tuple[str, ...]:
    """Read a list of strings, or a single one."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > MOST_STOPS:
        raise SeekVLError(f"a list of at most {MOST_STOPS} strings is wanted")
    return tuple(_string(text, file=False) for text in listed)


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return value


def _kind(value: object) -> str:
    """Name the type of a JSON value."""
    names = {bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
