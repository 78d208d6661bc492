"""A conversation as the numbers a network is fed, and the bill of its tokens.

Letters: t tokens, n pictures, S side of a picture in px, s side of the low-resolution picture in px.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seekvl.processing.conversation import Conversation, Picture, Source, parse_messages
from seekvl.processing.pad_image import (
    PadImageConfig,
    PreparedPicture,
    Preprocessing,
    check_mode,
    prepare_picture,
    visual_tokens,
)
from seekvl.processing.picture import DEFAULT_LIMITS, PictureLimits, open_picture
from seekvl.processing.template import Piece, Template, prompt_text, render
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBill:
    """What a prompt costs, in tokens."""

    text_tokens: int
    """Tokens of words, BOS and end tokens."""
    image_tokens: tuple[int, ...]
    """Tokens of each picture."""
    total: int
    """All of them."""
    limit: int
    """How many the processor lets through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """What a network is fed for one conversation."""

    input_ids: Tensor
    """i64[t]; the slots of pictures hold the image token's id."""
    image_mask: Tensor
    """bool[t]: True at the slots of pictures."""
    pixels: Tensor | None
    """f32[n, 3, S, S] in order of appearance; None without pictures."""
    low_pixels: Tensor | None
    """f32[n, 3, s, s] where preprocessing makes them; else None."""
    normalized: bool
    """Whether the pixels are already (x - mean) / std."""
    loss_weights: Tensor | None
    """f32[t]: 1 at the tokens to be learnt, 0 elsewhere; None outside training."""
    picture_sizes: tuple[tuple[int, int], ...]
    """Width and height in px of each original picture, as oriented: what boxes refer to."""
    prompt: str
    """The prompt in letters, each picture as its placeholder."""
    bill: TokenBill
    """What it costs."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A prompt as ids, before its pictures are opened."""

    ids: list[int]
    slots: list[bool]
    weights: list[float]


class Processor:
    """Turns conversations into model input, for one checkpoint.

    Raises SeekVLError for an unknown preprocessing mode and for a limit that leaves no room.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: PadImageConfig,
        template: Template,
        *,
        preprocessing: Preprocessing = "seekvl",
        max_tokens: int = 4096,
        limits: PictureLimits = DEFAULT_LIMITS,
    ) -> None:
        if max_tokens < 1:
            raise SeekVLError(f"max_tokens must be at least 1, not {max_tokens}")
        self.tokenizer = tokenizer
        self.image = image
        self.template = template
        self.preprocessing = check_mode(preprocessing)
        self.max_tokens = max_tokens
        self.limits = limits

    @property
    def picture_tokens(self) -> int:
        """The tokens a picture takes."""
        return visual_tokens(self.image)

    def __call__(self, messages: Sequence[Mapping[str, object]] | Conversation | str) -> ModelInput:
        """Encode a conversation in any accepted form, ready to be answered."""
        return self.encode(parse_messages(messages))

    def encode(self, conversation: Conversation, *, train: bool = False) -> ModelInput:
        r"""Encode a conversation: BOS and the prompt up to where the answer begins or goes on.

        `train`: it must end with an assistant message, which is closed; `loss_weights` is 1.0 at the tokens
        of every answer and of the end token after it, 0.0 elsewhere (2403.05525, sec. 3.3).

            tokens   BOS User : hi \n\n Assistant : _yes EOS
            weights   0   0  0  0    0       0     0    1   1

        Raises SeekVLError for more than `max_tokens` tokens, with the bill, and for pictures that cannot be
        opened.
        """
        if train and conversation.messages[-1].role != "assistant":
            raise SeekVLError(
                "a training conversation must end with an assistant message; "
                f"the last of {len(conversation.messages)} is from the user"
            )
        pieces = render(conversation, template=self.template, complete=train)
        return self._model_input(pieces, conversation.pictures, train=train)

    def encode_prompt(
        self, prompt: str, *, pictures: Sequence[Source] = (), train: bool = False
    ) -> ModelInput:
        """Encode a finished prompt as it stands, with no template and no system prompt.

        Specials written in it act as such; each picture's place is its placeholder. `train`: everything but
        pictures and BOS is to be learnt, and an end token closes it.

        Raises SeekVLError when placeholders and pictures differ in number.
        """
        stretches = prompt.split(self.template.picture)
        if len(stretches) - 1 != len(pictures):
            raise SeekVLError(
                f"the prompt has {len(stretches) - 1} {self.template.picture} but {len(pictures)} pictures: "
                "give one picture for each placeholder"
            )
        pieces = [Piece(stretches[0], control=True, answer=train)]
        for stretch in stretches[1:]:
            pieces += [Piece(self.template.picture, picture=True), Piece(stretch, control=True, answer=train)]
        if train:
            pieces.append(Piece(self.template.separators[1], control=True, answer=True))
        return self._model_input(pieces, [Picture(source) for source in pictures], train=train)

    def tokens(self, messages: Sequence[Mapping[str, object]] | Conversation | str) -> TokenBill:
        """Count what a conversation costs, without opening its pictures and without a limit."""
        conversation = parse_messages(messages)
        return self._bill(
            self._tokens(render(conversation, template=self.template)), len(conversation.pictures)
        )

    def _model_input(
        self, pieces: Sequence[Piece], pictures: Sequence[Picture], *, train: bool
    ) -> ModelInput:
        """Encode pieces, check the bill before anything is opened, then prepare the pictures."""
        tokens = self._tokens(pieces)
        bill = self._bill(tokens, len(pictures))
        if bill.total > bill.limit:
            raise SeekVLError(_over_limit(bill))
        prepared = [self._prepare(picture, number=i) for i, picture in enumerate(pictures, start=1)]
        lows = [picture.low_pixels for picture in prepared if picture.low_pixels is not None]
        return ModelInput(
            input_ids=torch.tensor(tokens.ids, dtype=torch.int64),
            image_mask=torch.tensor(tokens.slots, dtype=torch.bool),
            pixels=_stack([picture.pixels for picture in prepared]),
            low_pixels=_stack(lows),
            normalized=prepared[0].normalized if prepared else False,
            loss_weights=torch.tensor(tokens.weights, dtype=torch.float32) if train else None,
            picture_sizes=tuple(picture.size for picture in prepared),
            prompt=prompt_text(pieces),
            bill=bill,
        )

    def _prepare(self, picture: Picture, *, number: int) -> PreparedPicture:
        """Open and prepare one picture; errors name its number."""
        try:
            image = open_picture(picture.source, limits=self.limits)
        except SeekVLError as error:
            raise SeekVLError(f"picture {number}: {error}") from error
        return prepare_picture(image, self.image, mode=self.preprocessing)

    def _bill(self, tokens: _Tokens, pictures: int) -> TokenBill:
        """Add up the tokens."""
        each = (self.picture_tokens,) * pictures
        total = len(tokens.ids)
        return TokenBill(text_tokens=total - sum(each), image_tokens=each, total=total, limit=self.max_tokens)

    def _tokens(self, pieces: Sequence[Piece]) -> _Tokens:
        """Encode pieces, each stretch of words between control tokens as one string, as the reference does.

        Cutting a stretch anywhere else would change its tokens: " There" is a word, " " and "There" are two.
        """
        result = _Tokens([self.tokenizer.bos_id], [False], [0.0])
        stretch: list[tuple[str, bool]] = []
        for piece in pieces:
            if piece.picture:
                self._add_words(result, stretch)
                self._add(result, self.tokenizer.image_id, count=self.picture_tokens, slot=True)
                continue
            for segment in self.tokenizer.split(piece.text) if piece.control else [piece.text]:
                if isinstance(segment, str):
                    stretch.append((segment, piece.answer))
                    continue
                if segment == self.tokenizer.image_id:
                    raise SeekVLError(
                        "the text holds an image placeholder that no picture belongs to; give it a picture"
                    )
                self._add_words(result, stretch)
                self._add(result, segment, weight=float(piece.answer))
        self._add_words(result, stretch)
        return result

    def _add_words(self, result: _Tokens, stretch: list[tuple[str, bool]]) -> None:
        """Encode the collected stretch and empty it; a token is weighted as the letter it starts with."""
        text = "".join(part for part, _ in stretch)
        if not text:
            return
        if any(answer for _, answer in stretch):
            letters = [float(answer) for part, answer in stretch for _ in part]
            letters.append(letters[-1])  # tokenizers that trim offsets start a last space behind the text
            encoded = self.tokenizer.encode_with_starts(text)
            ids, weights = encoded.ids, [letters[start] for start in encoded.starts]
        else:
            ids = self.tokenizer.encode(text)
            weights = [0.0] * len(ids)
        result.ids.extend(ids)
        result.slots.extend([False] * len(ids))
        result.weights.extend(weights)
        stretch.clear()

    def _add(
        self, result: _Tokens, token: int, *, count: int = 1, slot: bool = False, weight: float = 0.0
    ) -> None:
        """Append one token `count` times."""
        result.ids.extend([token] * count)
        result.slots.extend([slot] * count)
        result.weights.extend([weight] * count)


def _stack(pictures: Sequence[Tensor]) -> Tensor | None:
    """Stack f32[3, S, S] to f32[n, 3, S, S]; a single one is not copied."""
    if not pictures:
        return None
    return torch.stack(list(pictures)) if len(pictures) > 1 else pictures[0].unsqueeze(0)


def _over_limit(bill: TokenBill) -> str:
    """Say what a prompt costs that costs too much."""
    pictures = ""
    if bill.image_tokens:
        number, each = len(bill.image_tokens), bill.image_tokens[0]
        pictures = f" + {sum(bill.image_tokens):,} picture tokens ({number} x {each:,})"
    return (
        f"the prompt takes {bill.total:,} tokens ({bill.text_tokens:,} text tokens{pictures}), more than "
        f"the limit of {bill.limit:,}; shorten the text, show fewer pictures, or raise max_tokens"
    )
