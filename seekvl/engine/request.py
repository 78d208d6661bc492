"""What is asked of the engine, and what it gives back."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from seekvl.engine.choices import Constrain
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError

FinishReason = Literal["stop", "length", "cancelled"]

PENALTIES = (0.001, 1000.0)
"""Least and greatest repetition penalty: far beyond what anybody means, and no logit overflows by them."""

Form: TypeAlias = Constrain | Literal["json"] | tuple[str, ...] | list[str] | Mapping[str, object]
"""The form an answer is held to, see `SamplingParams.constrain`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to end. Raises SeekVLError for a value that cannot be meant."""

    max_new_tokens: int = 512
    """Most tokens of an answer, 512 as in the reference; the model's longest sequence may end it earlier."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it before drawing."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have at least this probability."""
    top_k: int | None = None
    """Draw among this many likeliest tokens; None: all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already generated, at temperature 0 too.

    Tokens of the prompt do not count in DeepSeek-VL, whose reference feeds embeddings and never sees their
    ids; in DeepSeek-VL2 they do, see `Request.penalise_prompt`.
    """
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already generated, once each (as in the OpenAI API)."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens already generated, as often as they were."""
    seed: int | None = None
    """Makes draws repeatable; None: fresh ones each time."""
    stop: str | tuple[str, ...] | None = None
    """The answer ends before the first of these strings in its text, which has no leading whitespace."""
    constrain: Form | None = None
    """"boxes": the grounding of the answer is well-formed, whatever the model would say; "box_first": and the
    answer starts with a box. A list of texts: the answer is one of them. "json": it is a JSON object; a
    mapping: JSON that this JSON schema allows, which needs the extra `json`. None: no constraint.

    Only tokens with text are offered then. Cancelled answers may end inside of a box or text of the list, no
    others; JSON may also be cut by "length". Numbers of boxes are exempt from the penalties.
    """
    logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token of the answer and its own log-probability
    (`Piece.likelihood`); None tells nothing. They come from the raw logits: penalties, temperature and
    constraint have no part in them.
    """

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, least=1)
        _number("temperature", self.temperature)
        _number("top_p", self.top_p)
        _number("repetition_penalty", self.repetition_penalty)
        _number("presence_penalty", self.presence_penalty)
        _number("frequency_penalty", self.frequency_penalty)
        if self.temperature < 0:
            raise SeekVLError(
                f"temperature {self.temperature} is negative; use 0 for the likeliest token, or more"
            )
        if not 0 < self.top_p <= 1:
            raise SeekVLError(f"top_p {self.top_p} is outside of 0 < top_p <= 1; 1 keeps every token")
        least, most = PENALTIES
        if not least <= self.repetition_penalty <= most:
            raise SeekVLError(
                f"repetition_penalty {self.repetition_penalty} is outside of {least}..{most}; "
                "1 changes nothing"
            )
        if self.top_k is not None:
            _whole("top_k", self.top_k, least=1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, least=0)
        if self.seed is not None:
            _whole("seed", self.seed, least=None)
        for text in self.stops:
            if not isinstance(text, str) or not text:
                raise SeekVLError(f"stop holds {text!r}; each stop string needs at least one letter")
        if self.constrain is not None:
            _form(self.constrain)
            if self.stops:
                raise SeekVLError("a stop string may cut a box in two: use constrain or stop, not both")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            return (self.stop,)
        if not isinstance(self.stop, list | tuple):
            raise SeekVLError(
                f"stop is {type(self.stop).__name__}; use a string, or a tuple or list of strings"
            )
        return tuple(self.stop)

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is simply the one with the largest logit."""
        return self.temperature == 0 and not self.penalises and self.constrain is None

    @property
    def penalises(self) -> bool:
        """Whether tokens already generated change the next choice."""
        given = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return given != (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to be answered."""

    inputs: ModelInput
    params: SamplingParams
    end_id: int | None = None
    """Token that ends the answer; None: the tokenizer's end token."""
    strip: bool = True
    """Whether whitespace at the start of the answer is left out of its text.

    Prompts end in "Assistant:", so answers begin with a space. False where the prompt ends inside an answer.
    """
    begun: str = ""
    """What the prompt holds of the answer already; a box that is open there is gone on with."""
    penalise_prompt: bool = False
    """Whether the repetition penalty counts the tokens of the prompt too, the image token among them, as the
    reference does for DeepSeek-VL2.
    """
    preprocess_seconds: float = 0.0
    """What making `inputs` took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens spent."""

    prompt_tokens: int
    """All tokens of the prompt, pictures included."""
    image_tokens: int
    """Those that stand for pictures."""
    completion_tokens: int
    """Tokens generated, without the end token."""
    cached_tokens: int
    """Prompt tokens taken over from the turn before instead of being computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds spent."""

    preprocess: float
    """Template, tokens, pictures to pixels."""
    vision: float
    """Vision towers and adaptor."""
    prefill: float
    """The rest of the prompt, to the logits of the first token."""
    decode: float
    """Choosing tokens and all later forward passes; rows of a batch share them, and each counts them in full.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A finished answer."""

    token_ids: tuple[int, ...]
    """As generated, without the end token; tokens that spell a stop string are in."""
    text: str
    """Decoded, without specials of the template, cut before a stop string; see `Request.strip`."""
    pictures: int
    """Pictures in the prompt."""
    begun: str = ""
    """What the prompt held of the answer already; not in `text`."""
    finish_reason: FinishReason
    """"stop": end token or stop string; "length": `max_new_tokens`, or the model's longest sequence;
    "cancelled".
    """
    usage: Usage
    timings: Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """How likely a token was, by the raw logits; natural logarithms."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, the likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A step of a streamed answer; the texts of all pieces, joined, equal the answer's text."""

    text: str
    """Letters that are final now; often empty, while a letter or a possible stop string is incomplete."""
    token_id: int | None
    """The token just generated; None for a last piece without one."""
    likelihood: Likelihood | None = None
    """How likely that token was, where `SamplingParams.logprobs` asks for it."""
    completion: Completion | None = None
    """The whole answer, in the last piece only."""


def _whole(name: str, value: object, *, least: int | None) -> None:
    """Refuse what is no whole number, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise SeekVLError(f"{name} must be a whole number{bound}, not {value!r}")


def _number(name: str, value: object) -> None:
    """Refuse what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise SeekVLError(f"{name} must be a finite number, not {value!r}")


def _form(value: object) -> None:
    """Refuse what is no form of an answer."""
    if isinstance(value, list | tuple):
        if not value:
            raise SeekVLError("constrain is an empty list; give it the texts that may be the answer")
        for text in value:
            if not isinstance(text, str) or not text or text != text.strip():
                raise SeekVLError(
                    f"constrain lists {text!r}; each text needs letters, and no space at its ends, where "
                    "answers have none"
                )
            if not _is_unicode(text):
                raise SeekVLError(f"constrain lists {text!r}, which holds a lone surrogate")
    elif not isinstance(value, Mapping) and value not in (*get_args(Constrain), "json"):
        known = ", ".join(map(repr, (*get_args(Constrain), "json")))
        raise SeekVLError(f"constrain is {value!r}; use {known}, a list of texts, a JSON schema or None")


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
