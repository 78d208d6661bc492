r"""The prompt formats: a conversation as a line-up of words, control tokens and picture slots.

    DeepSeek-VL    {system}\n\nUser: {question}\n\nAssistant: {answer}<EOS>User: {question}\n\nAssistant:
    DeepSeek-VL2   {system}<|User|>: {question}\n\n<|Assistant|>:{answer}<EOS><|User|>: {question}\n\n ...

No newline follows the end token and no space the last colon; BOS is not part of the template. Separators
alternate by the index of the message. In DeepSeek-VL2 the names of the speakers are special tokens, and an
answer is encoded apart from the colon in front of it; the space between them is only printed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from seekvl.processing.conversation import PLACEHOLDER, Conversation, Message, Part, Picture
from seekvl.processing.tokenizer import EOS, VL2_IMAGE, VL2_ROLES

DEFAULT_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
"""System prompt of the published checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The words of a prompt format."""

    name: str = "deepseek"
    """Its name in `processor_config.json` (`sft_format`)."""
    user: str = "User"
    """What a user's turn starts with."""
    assistant: str = "Assistant"
    """What an assistant's turn starts with."""
    separators: tuple[str, str] = ("\n\n", EOS)
    """What follows messages of even and of odd index; the second is the end token of an answer."""
    system: str = DEFAULT_SYSTEM
    """System prompt of a conversation that brings none."""
    picture: str = PLACEHOLDER
    """How a picture's slots are written in the printed prompt."""
    role_tokens: bool = False
    """Whether `user` and `assistant` are special tokens: then nothing follows the system prompt, and an
    answer is encoded apart from the colon."""
    after_picture: str = ""
    """What ends the line of a picture that stands in front of a message and has no line end of its own."""


DEEPSEEK = Template()
"""The template of all published DeepSeek-VL checkpoints."""

DEEPSEEK_VL2 = Template(
    user=VL2_ROLES[0],
    assistant=VL2_ROLES[1],
    system="",
    picture=VL2_IMAGE,
    role_tokens=True,
    after_picture="\n",
)
"""The template of all published DeepSeek-VL2 checkpoints."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt."""

    text: str
    control: bool = False
    """Whether special tokens written in the text act as such."""
    answer: bool = False
    """Whether it is to be learnt: an answer of the assistant, or the end token after it."""
    picture: bool = False
    """Whether it stands for the slots of the next picture."""
    printed_only: bool = False
    """Whether it is printed but not fed; words in front of it and behind it are encoded apart."""


def render_pairs(
    pairs: Sequence[tuple[str, str | None]], *, system: str, template: Template = DEEPSEEK
) -> str:
    r"""Render (role word, text) pairs as the reference does: role words as given, separators by index.

    >>> render_pairs([("User", " hi "), ("Assistant", "")], system="")
    'User: hi\n\nAssistant:'
    """
    turns = [(role, [Piece(text)] if text else []) for role, text in pairs]
    return prompt_text(_line_up(turns, system=system, template=template))


def render(conversation: Conversation, *, template: Template, complete: bool = False) -> list[Piece]:
    """Line up a conversation.

    A conversation that ends with the user is followed by the assistant's name, to be continued. A last
    assistant message stays open, as the beginning of an answer; `complete` closes it with its end token
    instead.
    """
    words = {"user": template.user, "assistant": template.assistant}
    turns = [(words[message.role], _pieces(message, template=template)) for message in conversation.messages]
    closed = len(turns)
    if conversation.messages[-1].role == "user":
        turns.append((template.assistant, []))
    elif not complete:
        closed -= 1
    system = template.system if conversation.system is None else conversation.system
    return _line_up(turns, system=system, template=template, closed=closed)


def prompt_text(pieces: Sequence[Piece]) -> str:
    """Write out a prompt as one string, each picture as its placeholder."""
    return "".join(piece.text for piece in pieces)


def _pieces(message: Message, *, template: Template) -> list[Piece]:
    """Turn the parts of a message into pieces.

    Pictures in front get the line ends of the template, unless the message is of the official form, which
    places every letter itself.
    """
    pieces: list[Piece] = []
    in_front = bool(template.after_picture) and not message.control
    for part, following in zip(message.parts, (*message.parts[1:], None), strict=True):
        if isinstance(part, Picture):
            pieces.append(Piece(template.picture, picture=True))
            if in_front and not _ends_line(following, template.after_picture):
                pieces.append(Piece(template.after_picture))
        else:
            pieces.append(Piece(part.text, control=message.control, answer=message.role == "assistant"))
            in_front = False
    return pieces


def _ends_line(part: Part | None, end: str) -> bool:
    """Whether words begin with the line end a picture wants."""
    return part is not None and not isinstance(part, Picture) and part.text.startswith(end)


def _line_up(
    turns: Sequence[tuple[str, list[Piece]]], *, system: str, template: Template, closed: int | None = None
) -> list[Piece]:
    """Put role words and separators around each turn's content; turns from `closed` on get no separator."""
    first, second = template.separators
    pieces = _system(system, template=template)
    for index, (role, content) in enumerate(turns):
        content = _strip(content)
        pieces += [Piece(role, control=True), Piece(":")] if template.role_tokens else [Piece(f"{role}:")]
        if not content:
            continue
        answer = any(piece.answer for piece in content)
        pieces += [Piece(" ", answer=answer, printed_only=answer and template.role_tokens), *content]
        if closed is None or index < closed:
            pieces.append(Piece(second, control=True, answer=answer) if index % 2 else Piece(first))
    return _strip(pieces)


def _system(system: str, *, template: Template) -> list[Piece]:
    """Write the system prompt with what divides it from the first turn."""
    if template.role_tokens:
        return [Piece(system.strip())]
    return [Piece(system + template.separators[0])] if system else []


def _strip(pieces: Sequence[Piece]) -> list[Piece]:
    """Strip whitespace from both ends; a picture is no whitespace."""
    kept = [piece for piece in pieces if piece.text]
    while kept and not kept[0].picture:
        kept[0] = replace(kept[0], text=kept[0].text.lstrip())
        if kept[0].text:
            break
        kept.pop(0)
    while kept and not kept[-1].picture:
        kept[-1] = replace(kept[-1], text=kept[-1].text.rstrip())
        if kept[-1].text:
            break
        kept.pop()
    return kept
