"""A conversation as the numbers a network is fed, and the bill of its tokens.

Letters: t tokens, n pictures, k tiles of all pictures, S side of a picture or tile in px, s side of the
low-resolution picture in px.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from seekvl.processing import pad_image, tile_image
from seekvl.processing.choices import Preprocessing
from seekvl.processing.conversation import Conversation, Picture, Source, parse_messages
from seekvl.processing.pad_image import PadImageConfig, check_mode, prepare_picture, upright
from seekvl.processing.picture import DEFAULT_LIMITS, PictureLimits, open_picture
from seekvl.processing.recent import Recent
from seekvl.processing.template import Piece, Template, prompt_text, render
from seekvl.processing.tile_image import (
    WHOLE,
    Grid,
    TileImageConfig,
    check_max_tiles,
    check_tile_mode,
    plan_grid,
    prepare_tiles,
)
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import PromptTooLongError, SeekVLError, is_whole


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
    """f32[n, 3, S, S] in order of appearance; of DeepSeek-VL2 f32[k, 3, S, S], the tiles of one picture after
    those of the other; None without pictures."""
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
    grids: tuple[Grid, ...] | None = None
    """Columns and rows of local tiles of each picture; None in DeepSeek-VL, which has no tiles."""
    digests: tuple[bytes, ...] | None = None
    """The fingerprint of each picture, where the processor remembers pictures; else None."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One picture, prepared."""

    pixels: Tensor
    """f32[1, 3, S, S]; tiled, f32[k, 3, S, S]."""
    low_pixels: Tensor | None
    """f32[1, 3, s, s] where preprocessing makes it."""
    normalized: bool
    """Whether the pixels are already (x - mean) / std."""
    size: tuple[int, int]
    """Width and height of the original in px, as oriented."""
    grid: Grid
    """Columns and rows of its local tiles."""
    digest: bytes | None = None
    """Its fingerprint, where it is remembered."""

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels."""
        return self.pixels.nbytes + (0 if self.low_pixels is None else self.low_pixels.nbytes)


_Shown: TypeAlias = tuple[int, str, int, int | None]
"""Identity of a picture, its detail, how many there are, most tiles: what its pixels depend on."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A prompt as ids."""

    ids: list[int]
    slots: list[bool]
    weights: list[float]


class Processor:
    """Turns conversations into model input, for one checkpoint.

    A prompt longer than `max_tokens` is refused with its bill, never cut. Pictures of DeepSeek-VL2 take more
    tokens the more tiles they have; `max_tiles` bounds columns x rows of each, and takes the place of the
    rule that three pictures or more are not tiled. A picture's `detail` does for it alone.

    Raises SeekVLError for an unknown preprocessing mode, for limits that leave no room, and for a vocabulary
    without the speakers of the template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: PadImageConfig | TileImageConfig,
        template: Template,
        *,
        preprocessing: Preprocessing = "seekvl",
        max_tokens: int = 4096,
        max_tiles: int | None = None,
        limits: PictureLimits = DEFAULT_LIMITS,
    ) -> None:
        if not is_whole(max_tokens) or max_tokens < 1:
            raise SeekVLError(f"max_tokens must be a whole number of at least 1, not {max_tokens!r}")
        self.tokenizer = tokenizer
        self.image = image
        self.template = template
        self.preprocessing = check_mode(preprocessing)
        _check_family(image, preprocessing, max_tiles)
        _check_speakers(tokenizer, template)
        self.max_tokens = max_tokens
        self.max_tiles = max_tiles
        self.limits = limits
        self._recent: Recent[_Shown, tuple[Image.Image, _Seen]] | None = None

    def remember(self, limit: int) -> None:
        """Keep what is made of decoded pictures, up to so many bytes, for when the same one is shown again.

        For a server, where nobody changes a picture that was shown; a library cannot promise that.
        """
        self._recent = Recent(limit)

    def remembers(self, conversation: Conversation) -> bool:
        """Whether all pictures of a conversation are remembered, so that only its words are to be encoded."""
        pictures, recent = conversation.pictures, self._recent
        return all(
            recent is not None and recent.get(self._shown(picture, len(pictures))) is not None
            for picture in pictures
        )

    @property
    def picture_tokens(self) -> int:
        """The tokens a picture takes; where pictures are tiled, the least: those of a single tile."""
        if isinstance(self.image, PadImageConfig):
            return pad_image.visual_tokens(self.image)
        return tile_image.visual_tokens(WHOLE, self.image)

    def bounded(self, max_tiles: int) -> "Processor":
        """Return this processor with another bound on the tiles of a picture."""
        bounded = Processor(
            self.tokenizer,
            self.image,
            self.template,
            preprocessing=self.preprocessing,
            max_tokens=self.max_tokens,
            max_tiles=max_tiles,
            limits=self.limits,
        )
        bounded._recent = self._recent
        return bounded

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
        """Count what a conversation costs, without a limit; pictures are opened only where size decides."""
        conversation = parse_messages(messages)
        slots = self._count(conversation.pictures)
        return self._bill(self._tokens(render(conversation, template=self.template), slots=slots), slots)

    def _model_input(
        self, pieces: Sequence[Piece], pictures: Sequence[Picture], *, train: bool
    ) -> ModelInput:
        """Encode pieces, check the least bill before anything is opened, prepare pictures, check the bill."""
        slots = [self.picture_tokens] * len(pictures)
        tokens = self._tokens(pieces, slots=slots)
        bill = self._bill(tokens, slots)
        if bill.total > bill.limit:
            raise PromptTooLongError(_over_limit(bill, least=isinstance(self.image, TileImageConfig)))
        seen = [
            self._see(picture, number=number, pictures=len(pictures))
            for number, picture in enumerate(pictures, start=1)
        ]
        grids = None
        if isinstance(self.image, TileImageConfig):
            grids = tuple(picture.grid for picture in seen)
            slots = [tile_image.visual_tokens(grid, self.image) for grid in grids]
            tokens = self._tokens(pieces, slots=slots)
            bill = self._bill(tokens, slots)
            if bill.total > bill.limit:
                room = bill.limit - bill.text_tokens
                fitting = _fitting([picture.size for picture in seen], pictures, config=self.image, room=room)
                raise PromptTooLongError(_over_limit(bill, grids=grids, fitting=fitting))
        return ModelInput(
            input_ids=torch.tensor(tokens.ids, dtype=torch.int64),
            image_mask=torch.tensor(tokens.slots, dtype=torch.bool),
            pixels=_join([picture.pixels for picture in seen]),
            low_pixels=_join([picture.low_pixels for picture in seen if picture.low_pixels is not None]),
            normalized=seen[0].normalized if seen else False,
            loss_weights=torch.tensor(tokens.weights, dtype=torch.float32) if train else None,
            picture_sizes=tuple(picture.size for picture in seen),
            prompt=prompt_text(pieces),
            bill=bill,
            grids=grids,
            digests=None if self._recent is None else tuple(map(self._fingerprint, seen)),
        )

    def _see(self, picture: Picture, *, number: int, pictures: int) -> _Seen:
        """Prepare one of so many pictures, or remember what was made of it."""
        image, recent = picture.source, self._recent
        if recent is None or not isinstance(image, Image.Image):
            return self._prepare(picture, number=number, pictures=pictures)
        key = self._shown(picture, pictures)
        if (found := recent.get(key)) is not None:
            return found[1]
        seen = self._prepare(picture, number=number, pictures=pictures)
        seen = replace(seen, digest=self._fingerprint(seen))
        size = seen.nbytes + image.width * image.height * len(image.getbands())
        recent.put(key, (image, seen), size=size)  # held, so that nothing else has its identity
        return seen

    def _shown(self, picture: Picture, pictures: int) -> _Shown:
        """Return what the pixels of one of so many pictures depend on."""
        return id(picture.source), picture.detail, pictures, self.max_tiles

    def _fingerprint(self, seen: _Seen) -> bytes:
        """Return what tells a picture from others, unless it is known."""
        grid = seen.grid if isinstance(self.image, TileImageConfig) else None
        return seen.digest or fingerprint(
            seen.pixels, low_pixels=seen.low_pixels, grid=grid, normalized=seen.normalized
        )

    def _prepare(self, picture: Picture, *, number: int, pictures: int) -> _Seen:
        """Open and prepare one of so many pictures; errors name its number."""
        with _naming(number):
            image = open_picture(picture.source, limits=self.limits, mode=self.preprocessing)
            if isinstance(self.image, TileImageConfig):
                image, grid = self._plan(image, picture, pictures=pictures, config=self.image)
                tiles = prepare_tiles(image, self.image, grid=grid, mode=self.preprocessing)
                return _Seen(tiles.pixels, None, True, tiles.size, grid)
            padded = prepare_picture(image, self.image, mode=self.preprocessing)
        low = None if padded.low_pixels is None else padded.low_pixels[None]
        return _Seen(padded.pixels[None], low, padded.normalized, padded.size, WHOLE)

    def _count(self, pictures: Sequence[Picture]) -> list[int]:
        """Count the slots each picture takes."""
        if isinstance(self.image, PadImageConfig):
            return [self.picture_tokens] * len(pictures)
        slots = []
        for number, picture in enumerate(pictures, start=1):
            with _naming(number):
                image = open_picture(picture.source, limits=self.limits, mode=self.preprocessing)
                _, grid = self._plan(image, picture, pictures=len(pictures), config=self.image)
            slots.append(tile_image.visual_tokens(grid, self.image))
        return slots

    def _plan(
        self, image: Image.Image, picture: Picture, *, pictures: int, config: TileImageConfig
    ) -> tuple[Image.Image, Grid]:
        """Turn one of so many pictures upright where the mode does, and pick its grid."""
        if self.preprocessing != "official":
            image = upright(image)
        return image, plan_grid(
            image.size, config, detail=picture.detail, pictures=pictures, max_tiles=self.max_tiles
        )

    def _bill(self, tokens: _Tokens, slots: Sequence[int]) -> TokenBill:
        """Add up the tokens."""
        total, each = len(tokens.ids), tuple(slots)
        return TokenBill(text_tokens=total - sum(each), image_tokens=each, total=total, limit=self.max_tokens)

    def _tokens(self, pieces: Sequence[Piece], *, slots: Sequence[int]) -> _Tokens:
        """Encode pieces, each stretch of words between control tokens as one string, as the reference does.

        Cutting a stretch anywhere else would change its tokens: " There" is a word, " " and "There" are two.
        `slots`: how many each picture takes, in order.
        """
        result = _Tokens([self.tokenizer.bos_id], [False], [0.0])
        stretch: list[tuple[str, bool]] = []
        counts = iter(slots)
        for piece in pieces:
            if piece.picture or piece.printed_only:
                self._add_words(result, stretch)
                if piece.picture:
                    self._add(result, self.tokenizer.image_id, count=next(counts), slot=True)
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


def fingerprint(pixels: Tensor, *, low_pixels: Tensor | None, grid: Grid | None, normalized: bool) -> bytes:
    """Return 16 bytes that tell a picture from others: by the pixels of all its tiles, f32[k, 3, S, S] and
    f32[k, 3, s, s], its grid where it is tiled, and how they are scaled.
    """
    state = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16)
    if low_pixels is not None:
        state.update(low_pixels.numpy().tobytes())
    if grid is not None:
        state.update(repr(grid).encode())
    state.update(bytes([normalized]))
    return state.digest()


def _join(pictures: Sequence[Tensor]) -> Tensor | None:
    """Join the pixels of pictures along their first axis; those of a single one are not copied."""
    if not pictures:
        return None
    return torch.cat(list(pictures)) if len(pictures) > 1 else pictures[0]


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Say in front of an error which picture is at fault."""
    try:
        yield
    except SeekVLError as error:
        raise SeekVLError(f"picture {number}: {error}") from error


def _fitting(
    sizes: Sequence[tuple[int, int]], pictures: Sequence[Picture], *, config: TileImageConfig, room: int
) -> int | None:
    """Find the largest `max_tiles` with which pictures of these sizes take at most `room` slots, if any."""
    for bound in range(max(columns * rows for columns, rows in config.grids), 0, -1):
        grids = [
            plan_grid(size, config, detail=picture.detail, pictures=len(sizes), max_tiles=bound)
            for size, picture in zip(sizes, pictures, strict=True)
        ]
        if sum(tile_image.visual_tokens(grid, config) for grid in grids) <= room:
            return bound
    return None


def _check_family(
    image: PadImageConfig | TileImageConfig, preprocessing: Preprocessing, max_tiles: int | None
) -> None:
    """Refuse what the other family of checkpoints has."""
    if isinstance(image, TileImageConfig):
        check_max_tiles(max_tiles)
        check_tile_mode(preprocessing)
    elif max_tiles is not None:
        raise SeekVLError(
            f"max_tiles={max_tiles} bounds the tiles of DeepSeek-VL2, and this checkpoint makes none: "
            "leave it out"
        )


def _check_speakers(tokenizer: Tokenizer, template: Template) -> None:
    """Refuse a vocabulary in which the speakers of a template with role tokens would be mere letters."""
    for name in (template.user, template.assistant) if template.role_tokens else ():
        if tokenizer.split(name) != [tokenizer.token_id(name)]:
            raise SeekVLError(
                f"the vocabulary has no special token {name!r}, which the template puts in front of a turn"
            )


def _over_limit(
    bill: TokenBill, *, grids: Sequence[Grid] | None = None, fitting: int | None = None, least: bool = False
) -> str:
    """Say what a prompt costs that costs too much, and what would help.

    grids: of its pictures, where they are tiled. fitting: the `max_tiles` with which it would be let through.
    least: whether the bill counts the least its pictures can take.
    """
    at_least = "at least " if least and bill.image_tokens else ""
    pictures, remedy = "", "show fewer pictures, or raise max_tokens"
    if grids:
        each = zip(grids, bill.image_tokens, strict=True)
        listed = ", ".join(f"{columns}x{rows} tiles: {slots:,}" for (columns, rows), slots in each)
        pictures = f" + {sum(bill.image_tokens):,} picture tokens ({listed})"
        remedy = "show fewer pictures, give them detail 'low', or raise max_tokens"
        if fitting is not None:
            remedy = f"set max_tiles={fitting} (then it fits), {remedy}"
    elif bill.image_tokens:
        number, slots = len(bill.image_tokens), bill.image_tokens[0]
        pictures = f" + {sum(bill.image_tokens):,} picture tokens ({number} x {slots:,})"
    return (
        f"the prompt takes {at_least}{bill.total:,} tokens ({bill.text_tokens:,} text tokens{pictures}), "
        f"more than the limit of {bill.limit:,}; shorten the text, {remedy}"
    )
