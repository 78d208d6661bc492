"""Words to token ids and back, from a `tokenizer.json` of the byte-level kind.

Text is data: template specials written by a user come out as the plain letters they are. The grounding marks
of DeepSeek-VL2 are words of the vocabulary, so they are recognised wherever the vocabulary has them.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from seekvl.runtime import SeekVLError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
IMAGE = "<image_placeholder>"
GROUNDING_MARKS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")

VL2_PAD = "<｜▁pad▁｜>"
VL2_IMAGE = "<image>"
VL2_ROLES = ("<|User|>", "<|Assistant|>")
VL2_ADDED = (VL2_PAD, VL2_IMAGE, *GROUNDING_MARKS, *VL2_ROLES)
"""What the processor of DeepSeek-VL2 appends to a vocabulary that lacks it, in this order."""

Segment: TypeAlias = str | int


def _byte_letters() -> dict[str, int]:
    """List the letters that stand for bytes in a byte-level vocabulary: printable ones for themselves."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, each with the place of its first letter."""

    ids: list[int]
    starts: list[int]
    """Index of the letter of the text at which each token starts."""


class Tokenizer:
    """The tokenizer of a checkpoint; make one with `Tokenizer.from_file`."""

    def __init__(self, backend: Backend, *, bos: str, eos: str, image: str, pad: str | None) -> None:
        backend.encode_special_tokens = True  # specials are matched by `split` only, where they are wanted
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._specials = {token.content: i for i, token in added.items() if token.special}
        names = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._letters = _byte_letters()
        self._bytes: dict[int, bytes] = {}
        self._silent = frozenset(self._specials.values())
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._need(bos, what="begin of sentence")
        self.eos_id = self._need(eos, what="end of sentence")
        self.image_id = self._need(image, what="image placeholder")
        self.pad_id = self.eos_id if pad is None else self._need(pad, what="padding")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = (
            True  # the backend forgets it when it travels to a worker process
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        bos: str = BOS,
        eos: str = EOS,
        image: str = IMAGE,
        pad: str | None = None,
        added: Sequence[str] = (),
    ) -> "Tokenizer":
        """Read a `tokenizer.json`; ids of the named specials are looked up, never assumed. No pad: EOS pads.

        `added`: specials that are appended in this order where the file lacks them, their ids after the
        highest of the file.

        Raises SeekVLError when the file is missing, is no tokenizer, is not byte-level, or lacks a named
        special.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SeekVLError(f"tokenizer {path}: cannot be read ({error})") from error
        try:
            return cls(_load(text, added=added), bos=bos, eos=eos, image=image, pad=pad)
        except SeekVLError as error:
            raise SeekVLError(f"tokenizer {path}: {error}") from error

    def _need(self, token: str, *, what: str) -> int:
        """Look up a special that must be there."""
        found = self._specials.get(token)
        if found is None:
            raise SeekVLError(
                f"the vocabulary has no special token {token!r} for {what}; name the one it has"
            )
        return found

    def token_id(self, text: str) -> int | None:
        """Look up the id of the token written exactly so (ordinary ones in byte letters), or None."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Encode text without BOS; specials written in it are letters, unless `specials` says tokens."""
        if not specials:
            return self.encode_with_starts(text).ids
        ids: list[int] = []
        for segment in self.split(text):
            ids += [segment] if isinstance(segment, int) else self.encode_with_starts(segment).ids
        return ids

    def encode_with_starts(self, text: str) -> Encoded:
        """Encode text without specials, and tell where each token starts."""
        try:
            encoding: Encoding = self._backend.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            if not isinstance(text, str):
                raise SeekVLError(f"text must be a string, not {type(text).__name__}") from error
            alone = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), "")
            raise SeekVLError(
                f"text cannot be encoded as UTF-8, it holds the lone surrogate {alone!r}; take it out"
            ) from error
        return Encoded(encoding.ids, [start for start, _ in encoding.offsets])

    def split(self, text: str) -> list[Segment]:
        """Cut text at the specials written in it: strings between them, ids for them."""
        segments: list[Segment] = []
        end = 0
        for found in self._pattern.finditer(text):
            if found.start() > end:
                segments.append(text[end : found.start()])
            segments.append(self._specials[found[0]])
            end = found.end()
        if end < len(text):
            segments.append(text[end:])
        return segments

    def token_bytes(self, token: int, *, skip_specials: bool = True) -> bytes:
        """Give the bytes a token stands for: none for a special, and none for a row beyond the vocabulary.

        Published models have more output rows than their vocabulary has tokens; the reference prints nothing
        for them.
        """
        if skip_specials and token in self._silent:
            return b""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._read_bytes(token)
        return known

    def _read_bytes(self, token: int) -> bytes:
        if token < 0:
            raise SeekVLError(f"token id {token} is negative; ids start at 0")
        letters = self._backend.id_to_token(token) or ""
        if all(letter in self._letters for letter in letters):
            return bytes(self._letters[letter] for letter in letters)
        return letters.encode()

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """Turn ids into text; bytes that are no UTF-8 become U+FFFD. Grounding marks are always kept."""
        return b"".join(self.token_bytes(token, skip_specials=skip_specials) for token in ids).decode(
            errors="replace"
        )

    def stream(self, *, skip_specials: bool = True) -> "TextStream":
        """Start decoding token by token."""
        return TextStream(self, skip_specials=skip_specials)


class TextStream:
    """Decodes token by token, never splitting a letter: the pieces, joined, equal the decoding of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_specials: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_specials = skip_specials
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take a token and give the letters that are complete now."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, skip_specials=self._skip_specials))

    def flush(self) -> str:
        """Give what is left when no token follows: U+FFFD for a letter that was never completed."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _load(text: str, *, added: Sequence[str]) -> Backend:
    """Build the backend, with grounding marks as ordinary added tokens, which are always recognised."""
    try:
        content = json.loads(text)
        decoder, stored = content["decoder"], content["added_tokens"]
        for token in stored:
            special = token["special"] or token["content"] in added
            token["special"] = special and token["content"] not in GROUNDING_MARKS
        missing = [name for name in added if name not in {token["content"] for token in stored}]
        backend: Backend = Backend.from_buffer(json.dumps(content).encode())
    except (ValueError, KeyError, TypeError) as error:
        raise SeekVLError(
            f"not a tokenizer.json that can be read ({type(error).__name__}: {error})"
        ) from error
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    if [part.get("type") for part in parts] != ["ByteLevel"]:
        raise SeekVLError("its decoder is not ByteLevel, the only kind these checkpoints use")
    for name in missing:  # one by one: the order decides the ids
        special = name not in GROUNDING_MARKS
        append = backend.add_special_tokens if special else backend.add_tokens
        append([AddedToken(name, normalized=False, special=special)])
    return backend
