"""What is said and shown: a conversation, and every form in which users hand one over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from PIL import Image

from seekvl.runtime import SeekVLError

Role = Literal["system", "user", "assistant"]
Source: TypeAlias = str | Path | bytes | Image.Image
Detail = Literal["auto", "low", "high"]
DETAILS: tuple[Detail, ...] = ("auto", "low", "high")

PLAIN_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
OFFICIAL_ROLES: dict[str, Role] = {
    "System": "system",
    "User": "user",
    "Assistant": "assistant",
    "<|System|>": "system",
    "<|User|>": "user",
    "<|Assistant|>": "assistant",
}
"""Roles of the official conversation form, of DeepSeek-VL and DeepSeek-VL2; text may hold control marks."""

PLACEHOLDER = "<image_placeholder>"
SHORT_PLACEHOLDER = "<image>"
PICTURE_KEYS = {"image": ("image", "url", "path"), "image_url": ("image_url",)}


@dataclass(frozen=True, slots=True)
class Text:
    """A stretch of words. Raises SeekVLError for what is no string."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise SeekVLError(f"the words of a message are a string, not {_kind(self.text)}")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is not opened yet: a path, an http(s) or data: URL, encoded bytes, or a PIL image.

    Raises SeekVLError for an unknown detail.
    """

    source: Source
    detail: Detail = "auto"
    """How closely DeepSeek-VL2 looks: "low" takes a single tile, "high" tiles however many pictures there
    are, "auto" follows the rule of the checkpoint. DeepSeek-VL sees every picture alike.
    """

    def __post_init__(self) -> None:
        if self.detail not in DETAILS:
            raise SeekVLError(f"the detail of a picture is 'auto', 'low' or 'high', not {self.detail!r}")


Part: TypeAlias = Text | Picture


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says in one turn. Raises SeekVLError for parts that are neither Text nor Picture."""

    role: Role
    parts: tuple[Part, ...]
    control: bool = False
    """True: special tokens written in the text act as such. False: the text is data, whatever it says."""

    def __post_init__(self) -> None:
        wrong = [part for part in self.parts if not isinstance(part, Text | Picture)]
        if wrong:
            raise SeekVLError(f"the parts of a message are Text and Picture, not {_kind(wrong[0])}")

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures of this message, in order."""
        return tuple(part for part in self.parts if isinstance(part, Picture))

    @property
    def empty(self) -> bool:
        """Whether there is neither a picture nor a visible letter."""
        return not any(isinstance(part, Picture) or part.text.strip() for part in self.parts)


@dataclass(frozen=True, slots=True)
class Conversation:
    """User and assistant in turn, the user first; a last assistant message is the beginning of the answer.

    Raises SeekVLError when it is empty, does not start with the user, does not alternate, or a message is
    empty.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    """The system prompt; None takes the checkpoint's own, "" goes without."""

    def __post_init__(self) -> None:
        if not self.messages:
            raise SeekVLError("the conversation is empty: it needs at least one user message")
        if self.system is not None and not isinstance(self.system, str):
            raise SeekVLError(f"the system prompt is a string or None, not {_kind(self.system)}")
        for index, message in enumerate(self.messages):
            if not isinstance(message, Message):
                raise SeekVLError(
                    f"turn {index + 1} is {_kind(message)}: give a Message, or use parse_messages"
                )
            _check_turn(message, index=index)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in order of appearance."""
        return tuple(picture for message in self.messages for picture in message.pictures)


def _check_turn(message: Message, *, index: int) -> None:
    """Refuse a message that may not stand at this place of a conversation."""
    place, expected = f"turn {index + 1}", "assistant" if index % 2 else "user"
    if message.role not in ("user", "assistant"):
        raise SeekVLError(
            f"{place} has the role {message.role!r}: after the start only 'user' and 'assistant' may speak"
        )
    if message.role != expected:
        reason = f"two {message.role} messages in a row" if index else "it starts with the assistant"
        raise SeekVLError(
            f"{place} is from the {message.role} where the {expected} should speak ({reason}): "
            "user and assistant must alternate, the user first"
        )
    if message.role == "assistant" and message.pictures:
        raise SeekVLError(
            f"{place} is from the assistant and holds a picture: only user messages may show pictures"
        )
    if message.empty:
        raise SeekVLError(f"{place} ({message.role}) is empty: give it text or a picture, or leave it out")


def parse_messages(messages: Sequence[Mapping[str, object]] | Conversation | str) -> Conversation:
    """Read a conversation from any accepted form.

    A string is one user message. A list holds messages `{"role": ..., "content": ...}`, where content is a
    string or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", "image" | "url" | "path":
    ...}`, `{"type": "image_url", "image_url": {"url": ...}}`. Neighbouring text parts are joined by one
    space. A string with an `"images"` list has them in front. The official form (roles User and Assistant, or
    <|User|> and <|Assistant|>) has `<image_placeholder>` or `<image>` where its pictures stand, or none and
    the pictures in front; a last assistant message without content asks for the answer, as leaving it out
    does. DeepSeek-VL2 takes plain roles for official ones: a string with an `"images"` list and as many
    `<image>` has them there, with no line end that is not written. An image part, or the mapping of an
    `image_url`, may say `"detail": "auto" | "low" | "high"`.

    Raises SeekVLError naming the message and what is wrong with it.

    >>> [part.text for part in parse_messages("hello").messages[0].parts]
    ['hello']
    """
    if isinstance(messages, Conversation):
        return messages
    if isinstance(messages, str):
        return Conversation((Message("user", (Text(messages),)),))
    _check_list(messages)
    read = [
        _read_message(message, place=f"message {index}") for index, message in enumerate(messages, start=1)
    ]
    system = None
    if read and read[0].role == "system":
        system = _system_text(read.pop(0))
    if read and read[-1].role == "assistant" and read[-1].empty and not read[-1].pictures:
        read.pop()
    for index, message in enumerate(read):
        if message.role == "system":
            raise SeekVLError(f"a system message stands after turn {index}: it may only be the first message")
    return Conversation(tuple(read), system)


def _check_list(messages: object) -> None:
    """Refuse what is no list of messages, a single message foremost."""
    if isinstance(messages, Mapping | bytes) or not isinstance(messages, Sequence):
        raise SeekVLError(
            f"messages must be a list of messages, a string or a Conversation, not {_kind(messages)}"
        )


def _system_text(message: Message) -> str:
    """Take the words of a system message, which shows no pictures."""
    if message.pictures:
        raise SeekVLError("the system message holds a picture: show it in a user message")
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def _read_message(message: object, *, place: str) -> Message:
    """Read one message of either form."""
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise SeekVLError(f"{place} is {_kind(message)}: it must be a mapping with 'role' and 'content'")
    unknown = set(message) - {"role", "content", "images"}
    if unknown:
        raise SeekVLError(
            f"{place} has the unknown key {_first(unknown)}: use 'role', 'content' and 'images'"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in PLAIN_ROLES | OFFICIAL_ROLES:
        raise SeekVLError(f"{place} has the unknown role {role!r}: use 'system', 'user' or 'assistant'")
    content, pictures = message.get("content"), _read_images(message.get("images"), place=place)
    if content is None:
        raise SeekVLError(f"{place} has no content (None): give a string or a list of parts")
    if isinstance(content, str):
        if role in OFFICIAL_ROLES:
            known = OFFICIAL_ROLES[role]
            return Message(
                known, _split_placeholders(content, pictures, place=place, role=role), control=True
            )
        if pictures and content.count(SHORT_PLACEHOLDER) == len(pictures):
            placed = _interleave(content.split(SHORT_PLACEHOLDER), pictures)
            front = (Text(""),) if isinstance(placed[0], Picture) else ()  # words in front: no line is ended
            return Message(PLAIN_ROLES[role], (*front, *placed))
        return Message(PLAIN_ROLES[role], (*pictures, Text(content)))
    if isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        if pictures:
            raise SeekVLError(
                f"{place} has both content parts and 'images': put the pictures among the parts"
            )
        parts = [_read_part(part, place=f"{place}, part {i}") for i, part in enumerate(content, start=1)]
        known = PLAIN_ROLES[role] if role in PLAIN_ROLES else OFFICIAL_ROLES[role]
        return Message(known, _join_texts(parts))
    raise SeekVLError(f"{place} has content of {_kind(content)}: give a string or a list of parts")


def _read_images(images: object, *, place: str) -> tuple[Picture, ...]:
    """Read the `images` list of a message."""
    if images is None:
        return ()
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise SeekVLError(f"{place} has 'images' of {_kind(images)}: it must be a list")
    return tuple(_picture(image, place=f"{place}, image {i}") for i, image in enumerate(images, start=1))


def _split_placeholders(
    text: str, pictures: tuple[Picture, ...], *, place: str, role: str
) -> tuple[Part, ...]:
    """Put pictures where the text of an official message has placeholders, or in front if it has none.

    `<image>` is DeepSeek-VL2's tag: it counts where the longer one is absent and pictures or that role call
    for it. Under that role pictures in front end their line, as in the prompts the model has learnt.
    """
    tag = PLACEHOLDER
    if PLACEHOLDER not in text and (pictures or role.startswith("<|")):
        tag = SHORT_PLACEHOLDER
    stretches = text.split(tag)
    found = len(stretches) - 1
    if found == 0:
        if role.startswith("<|") and pictures:
            return _interleave(["", *["\n"] * (len(pictures) - 1), f"\n{text}"], pictures)
        return (*pictures, Text(text))
    if found != len(pictures):
        raise SeekVLError(
            f"{place} has {found} {tag} in its text but {len(pictures)} pictures: "
            "give one picture for each placeholder"
        )
    return _interleave(stretches, pictures)


def _interleave(stretches: Sequence[str], pictures: Sequence[Picture]) -> tuple[Part, ...]:
    """Put the pictures between stretches of text, one more than there are pictures."""
    parts: list[Part] = [Text(stretches[0])]
    for picture, stretch in zip(pictures, stretches[1:], strict=True):
        parts += [picture, Text(stretch)]
    return tuple(part for part in parts if isinstance(part, Picture) or part.text)


def _read_part(part: object, *, place: str) -> Part:
    """Read one content part."""
    if isinstance(part, Text | Picture):
        return part
    if not isinstance(part, Mapping):
        raise SeekVLError(f"{place} is {_kind(part)}: it must be a mapping with a 'type'")
    kind = part.get("type")
    if kind == "text":
        _refuse_unknown(part, {"type", "text"}, place=place)
        text = part.get("text")
        if not isinstance(text, str):
            raise SeekVLError(f"{place} is text without a string under 'text'")
        return Text(text)
    if not isinstance(kind, str) or kind not in PICTURE_KEYS:
        raise SeekVLError(f"{place} has the unknown type {kind!r}: use 'text', 'image' or 'image_url'")
    keys = PICTURE_KEYS[kind]
    _refuse_unknown(part, {"type", "detail", *keys} if kind == "image" else {"type", *keys}, place=place)
    given = [key for key in keys if key in part]
    if len(given) != 1:
        raise SeekVLError(
            f"{place} of type {kind!r} needs exactly one of {', '.join(keys)}, and has {len(given)}"
        )
    source, detail = part[given[0]], part.get("detail", "auto")
    if kind == "image_url" and isinstance(source, Mapping):
        _refuse_unknown(source, {"url", "detail"}, place=place)
        detail = source.get("detail", "auto")
        source = source.get("url")
    picture = _picture(source, place=place)
    return picture if detail == "auto" else replace(picture, detail=_detail(detail, place=place))


def _detail(value: object, *, place: str) -> Detail:
    """Read how closely a picture is looked at."""
    for known in DETAILS:
        if value == known:
            return known
    raise SeekVLError(f"{place} has the detail {value!r}: use {', '.join(map(repr, DETAILS))}")


def _picture(source: object, *, place: str) -> Picture:
    """Wrap what should be a picture, refusing what cannot be one."""
    if isinstance(source, Picture):
        return source
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise SeekVLError(f"{place}: {not_a_picture(source)}")
    return Picture(source)


def not_a_picture(source: object) -> str:
    """Say why a value of this type cannot be a picture, and what helps where it is an array."""
    hint = "; use PIL.Image.fromarray" if hasattr(source, "shape") else ""
    return f"a picture is a path, a URL, bytes or a PIL image, not {_kind(source)}{hint}"


def _join_texts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join neighbouring texts by one space, the rule of the published chat template for transformers."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Text) and isinstance(last, Text):
            joined[-1] = Text(f"{last.text} {part.text}")
        else:
            joined.append(part)
    return tuple(joined)


def _refuse_unknown(part: Mapping[str, object], known: set[str], *, place: str) -> None:
    """Refuse a mapping with keys nobody would read."""
    unknown = set(part) - known
    if unknown:
        raise SeekVLError(
            f"{place} has the unknown key {_first(unknown)}: known here are {', '.join(sorted(known))}"
        )


def _first(keys: set[str]) -> str:
    """Name one key of a set, always the same."""
    return repr(min(keys, key=str))


def _kind(value: object) -> str:
    """Name the type of a value in an error message."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
