"""The object users hold: a model with its processor, to be asked, streamed, scored and chatted with."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from seekvl.engine.budget import choose_limits
from seekvl.engine.engine import Engine
from seekvl.engine.gpu.layers import accelerate_on_gpu
from seekvl.engine.kernels.accelerate import PACKED, accelerate
from seekvl.engine.kernels.towers import TOWERS
from seekvl.engine.request import (
    Completion,
    FinishReason,
    Form,
    Piece,
    Request,
    SamplingParams,
    Timings,
    Usage,
)
from seekvl.engine.score import Score, prompt_logits, score_continuations
from seekvl.models.vl2 import AnyConfig, AnyVL, VL2Config
from seekvl.processing.choices import Preprocessing
from seekvl.processing.conversation import Conversation, Message, Source, Text, parse_messages
from seekvl.processing.encode import Processor
from seekvl.processing.grounding import Box, parse_boxes
from seekvl.processing.picture import open_picture
from seekvl.processing.tile_image import TileImageConfig, visual_tokens
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError

Messages: TypeAlias = Sequence[Mapping[str, object]] | Conversation | str
"""Every form of a conversation; see `processing.conversation.parse_messages`."""
Stop: TypeAlias = str | tuple[str, ...] | None
Cancel: TypeAlias = Callable[[], bool] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said."""

    text: str
    """Without template specials and leading whitespace, cut before a stop string; grounding marks stay."""
    token_ids: list[int]
    """As generated, without the end token."""
    boxes: list[Box]
    """Boxes the text names, in 0..999 of the original picture.

    A text does not say which picture it means. The reference draws on the last one of the conversation, and
    so it is here: `Box.image` is its index, 0 where there was none. A box that a last assistant message has
    opened is one of them; those it holds whole are not.
    """
    finish_reason: FinishReason
    """"stop", "length" or "cancelled"."""
    usage: Usage
    timings: Timings


def load(
    name: str | Path = "seekvl-nano",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    preprocessing: Preprocessing = "seekvl",
    max_tokens: int | None = None,
    max_tiles: int | None = None,
    smallest: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "VLM":
    """Load a bundled model (seekvl-nano, seekvl-nano-moe), a folder in the official or the transformers
    layout, or a hub id.

    device, dtype: "auto" takes CUDA where there is one, and a dtype that suits device and size.
    revision: commit, tag or branch of a hub id.
    preprocessing: "seekvl" (the official numerics, EXIF orientation applied, alpha on the pad colour),
    "official" (the reference bit for bit) or "transformers".
    max_tokens: most tokens of a prompt; None takes the length the checkpoint was trained with.
    max_tiles: most tiles of a picture, for DeepSeek-VL2; None takes the checkpoint's rule, which tiles up to
    two pictures of a conversation and sees more of them as a single tile each.

    quantize: "int8" or "int4" turns the weights into whole numbers on the way in, for the CPU; a folder made
    by `seekvl convert --quantize` has them already and opens at once. On a GPU torchao (extra `gpu`) turns
    them, into "fp8" as well; see `weights.weight_only` for what stays plain there.
    smallest: numbers of the smallest matrix that `quantize` turns on the CPU; None leaves those plain that
    lie in a core's own cache, 0 turns every one.
    progress: is told how many matrices are quantised, of how many.

    Raises SeekVLError for what cannot be loaded.
    """
    from seekvl.weights.load import load_checkpoint

    checkpoint = load_checkpoint(
        name,
        device=device,
        dtype=dtype,
        preprocessing=preprocessing,
        revision=revision,
        max_tokens=max_tokens,
        max_tiles=max_tiles,
        quantize=quantize,
        smallest=smallest,
        progress=progress,
    )
    return VLM(checkpoint.model, checkpoint.processor)


class VLM:
    """A model that sees and answers; get one from `seekvl.load`, or wrap a model that is being trained."""

    def __init__(self, model: AnyVL, processor: Processor, *, prefill_chunk: int | None = None) -> None:
        _check_slots(model.config, processor)
        if prefill_chunk is not None and prefill_chunk < 1:
            raise SeekVLError(f"prefill_chunk must be at least 1 token, not {prefill_chunk}")
        self.model = model
        self.processor = processor
        self.prefill_chunk = prefill_chunk
        """Most prompt tokens in one forward pass; None leaves it to `engine.budget.choose_limits`."""
        gpu = accelerate_on_gpu(model)
        self.kernels = accelerate(model.language) if gpu is None else gpu
        """Level of what decoding runs on: the CPU kernels (see `engine.kernels.compiled`) or the GPU path
        (see `engine.gpu.switch`); None where torch walks through the layers.
        """
        accelerate(model.vision, kernels=TOWERS)
        accelerate(model.adaptor, kernels=PACKED)
        self.engine = Engine(model, self.tokenizer, limits=choose_limits(model, chunk=prefill_chunk))
        """What answers. It keeps beginnings of prompts and features of pictures for questions to come, and
        serves calls from several threads together.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self.processor.tokenizer

    @property
    def config(self) -> AnyConfig:
        """The dimensions of the networks."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.language.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are, and what is computed in."""
        return self.model.language.embed_tokens.weight.dtype

    def ask(
        self,
        images: Source | Sequence[Source],
        question: str,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Stop = None,
        constrain: Form | None = None,
    ) -> Answer:
        """Answer a question about one picture or several, which stand in front of it; `[]` shows none."""
        return self.chat(
            Conversation((user_message(question, images),)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            constrain=constrain,
        )

    def chat(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Stop = None,
        constrain: Form | None = None,
        cancel: Cancel = None,
    ) -> Answer:
        """Answer a conversation; arguments as in `SamplingParams`. A last assistant message is continued.

        `cancel` is asked before every step and ends the answer, as "cancelled", when it returns True.
        """
        pieces = self.stream(
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            constrain=constrain,
            cancel=cancel,
        )
        return _last_answer(pieces)

    def stream(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Stop = None,
        constrain: Form | None = None,
        cancel: Cancel = None,
    ) -> Generator[Piece, None, None]:
        """Answer piece by piece: the texts, joined, equal `chat(...).text`.

        The last piece holds the completion, which `answer_of` turns into an `Answer`.

        Bad input raises here, not at the first piece. Closing the iterator ends the work.
        """
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            constrain=constrain,
        )
        return self._stream(messages, params, engine=self.engine, cancel=cancel)

    def batch(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Stop = None,
        constrain: Form | None = None,
        cancel: Cancel = None,
    ) -> list[Answer]:
        """Answer conversations together, each as `chat` would alone; all of them are checked before the first
        is computed.

        On a CPU no answer depends on the others by a single bit. On a GPU rows share products whose last bits
        depend on how many they are: in half precision a near-tie may fall the other way.

        Raises SeekVLError naming the conversation that is at fault.
        """
        if isinstance(conversations, str | bytes | Mapping | Conversation):
            raise SeekVLError("batch takes a list of conversations; use chat for a single one")
        if not isinstance(conversations, Sequence):
            raise SeekVLError(f"batch takes a list of conversations, not {type(conversations).__name__}")
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            constrain=constrain,
        )
        requests = []
        for index, messages in enumerate(conversations, start=1):
            try:
                requests.append(self.prepare(messages, params))
            except SeekVLError as error:
                raise SeekVLError(f"conversation {index} of {len(conversations)}: {error}") from error
        pieces = self.engine.answer(requests, cancel=cancel)
        done = {index: piece.completion for index, piece in pieces if piece.completion is not None}
        return [answer_of(done[index]) for index in range(len(requests))]

    def score(self, messages: Messages, continuations: Sequence[str]) -> list[Score]:
        """Score how likely each continuation is after the prompt; it is encoded as it stands, right after
        "Assistant:".

        Answers of DeepSeek-VL start with a space: give " A" to score the answer A as the model was taught to
        write it. Those of DeepSeek-VL2 start without one.
        """
        if isinstance(continuations, str | bytes) or not isinstance(continuations, Sequence):
            raise SeekVLError(f"score takes a list of continuations, not {type(continuations).__name__}")
        for index, text in enumerate(continuations, start=1):
            if not isinstance(text, str):
                raise SeekVLError(
                    f"continuation {index} of {len(continuations)} must be a string, "
                    f"not {type(text).__name__}"
                )
        ids = [self.tokenizer.encode(text) for text in continuations]
        inputs = self.processor(messages)
        return score_continuations(self.model, inputs, continuations=ids, chunk=self.prefill_chunk)

    def logits(self, messages: Messages) -> Tensor:
        """Return the logits f32[t, v] after each token of the prompt, on the CPU."""
        return prompt_logits(self.model, self.processor(messages), chunk=self.prefill_chunk)

    def session(self, *, system: str | None = None) -> "Session":
        """Start a conversation whose past stays in the cache."""
        return Session(self, system=system)

    def renew_engine(self, *, queue: int | None = None) -> None:
        """Answer with a new engine, which lets at most `queue` requests wait and knows nothing of earlier
        ones; those of the former one end.
        """
        self.engine.close()
        limits = choose_limits(self.model, chunk=self.prefill_chunk, queue=queue)
        self.engine = Engine(self.model, self.tokenizer, limits=limits)

    def prepare(self, messages: Messages, params: SamplingParams, *, max_tiles: int | None = None) -> Request:
        """Turn a conversation into what `engine.submit` takes: template, tokens, pixels.

        max_tiles: most tiles of a picture of DeepSeek-VL2 in this conversation; None leaves it to the
        processor. Raises SeekVLError for what `chat` would refuse.
        """
        processor = self.processor if max_tiles is None else self.processor.bounded(max_tiles)
        return prepare(messages, params, processor=processor, config=self.config)

    def _stream(
        self, messages: Messages, params: SamplingParams, *, engine: Engine, cancel: Cancel
    ) -> Generator[Piece, None, None]:
        """Prepare one conversation now, and answer it as the iterator is drawn from."""
        pieces = engine.answer([self.prepare(messages, params)], cancel=cancel)
        return (piece for _, piece in pieces)


class Session:
    """A conversation that grows turn by turn; get one from `VLM.session`.

    Words and pictures of earlier turns stay in a cache of its own, the answers as they were computed token by
    token: only what is new is computed. A turn that is
    cancelled, closed early or answered with no letter at all is not part of the conversation afterwards.
    """

    def __init__(self, vlm: VLM, *, system: str | None = None) -> None:
        self.vlm = vlm
        self.system = system
        self.messages: tuple[Message, ...] = ()
        """The turns so far: user and assistant in turn."""
        limits = choose_limits(vlm.model, rows=1, chunk=vlm.prefill_chunk, exact=False)
        self._engine = Engine(vlm.model, vlm.tokenizer, limits=limits)
        self._pieces: Generator[Piece, None, None] | None = None
        self._asked = 0

    def ask(
        self,
        question: str,
        *,
        images: Source | Sequence[Source] = (),
        params: SamplingParams | None = None,
        cancel: Cancel = None,
    ) -> Answer:
        """Answer the next question, with pictures in front of it."""
        return _last_answer(self.stream(question, images=images, params=params, cancel=cancel))

    def stream(
        self,
        question: str,
        *,
        images: Source | Sequence[Source] = (),
        params: SamplingParams | None = None,
        cancel: Cancel = None,
    ) -> Generator[Piece, None, None]:
        """Answer the next question piece by piece, as `VLM.stream` does.

        An answer that is not at its end when the next question is asked has lost its place in the cache, and
        raises SeekVLError when it is drawn from again.
        """
        limits = self.vlm.processor.limits
        mode = self.vlm.processor.preprocessing
        opened = [open_picture(source, limits=limits, mode=mode) for source in _sources(images)]
        turn = user_message(question, opened)
        conversation = Conversation((*self.messages, turn), self.system)
        pieces = self.vlm._stream(
            conversation, params or SamplingParams(), engine=self._engine, cancel=cancel
        )
        self._overtake(pieces)
        return self._keep(turn, pieces, number=self._asked)

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.messages = ()
        self._overtake(None)
        self._engine.forget()

    def _overtake(self, pieces: Generator[Piece, None, None] | None) -> None:
        """End the answer before, if it is not at its end, in favour of the next one."""
        if self._pieces is not None:
            self._pieces.close()
        self._pieces = pieces
        self._asked += 1

    def _keep(self, turn: Message, pieces: Iterator[Piece], *, number: int) -> Generator[Piece, None, None]:
        """Pass pieces on, and take the turn into the conversation when its answer is whole."""
        done = None
        while done is None:
            if number != self._asked:
                raise SeekVLError(
                    "this session was asked again or reset before the answer was at its end; draw all pieces "
                    "of an answer before the next question, or start a session for each"
                )
            piece = next(pieces)
            done = piece.completion
            if done is not None and done.finish_reason != "cancelled" and done.text.strip():
                self.messages += (turn, Message("assistant", (Text(done.text),)))
            yield piece


def _check_slots(config: AnyConfig, processor: Processor) -> None:
    """Refuse a processor that counts other picture slots than the model makes rows."""
    image = processor.image
    if isinstance(config, VL2Config) and isinstance(image, TileImageConfig):
        for grid in image.grids:
            what = f"a picture of {grid[0]} x {grid[1]} tiles"
            _require_equal(visual_tokens(grid, image), config.slots(grid), what=what)
    elif isinstance(config, VL2Config) or isinstance(image, TileImageConfig):
        raise SeekVLError(
            f"the processor prepares pictures by {type(image).__name__}, the model is built from "
            f"{type(config).__name__}; they belong to different checkpoints"
        )
    else:
        _require_equal(processor.picture_tokens, config.visual_tokens, what="a picture")


def _require_equal(counted: int, made: int, *, what: str) -> None:
    """Refuse two counts of a picture's slots that differ."""
    if counted != made:
        raise SeekVLError(
            f"the processor makes {counted} slots {what}, the model {made}; they belong to different "
            "checkpoints"
        )


def prepare(
    messages: Messages, params: SamplingParams, *, processor: Processor, config: AnyConfig
) -> Request:
    """Do the work of `VLM.prepare`, for which the network's weights are not needed."""
    began = time.perf_counter()
    conversation = parse_messages(messages)
    inputs = processor.encode(conversation)
    return Request(
        inputs=inputs,
        params=params,
        strip=conversation.messages[-1].role == "user",
        begun=_begun(conversation),
        penalise_prompt=isinstance(config, VL2Config),
        preprocess_seconds=time.perf_counter() - began,
    )


def user_message(question: str, images: Source | Sequence[Source] = ()) -> Message:
    """Make the message of a user who shows pictures and asks; pictures stand in front of the words."""
    if not isinstance(question, str):
        raise SeekVLError(f"the question must be a string, not {type(question).__name__}")
    pictures = parse_messages([{"role": "user", "content": question, "images": _sources(images)}])
    return pictures.messages[0]


def answer_of(completion: Completion) -> Answer:
    """Turn what the engine made into an answer with boxes, which lie in the last picture."""
    boxes = parse_boxes(completion.begun + completion.text, image=max(completion.pictures - 1, 0))
    return Answer(
        text=completion.text,
        token_ids=list(completion.token_ids),
        boxes=boxes[len(parse_boxes(completion.begun)) :],
        finish_reason=completion.finish_reason,
        usage=completion.usage,
        timings=completion.timings,
    )


def _begun(conversation: Conversation) -> str:
    """Return what a conversation holds of its next answer: a last assistant message, stripped as rendered."""
    last = conversation.messages[-1]
    if last.role == "user":
        return ""
    return "".join(part.text for part in last.parts if isinstance(part, Text)).strip()


def _sources(images: Source | Sequence[Source]) -> list[Source]:
    """Make a list of one picture or several."""
    if isinstance(images, str | Path | bytes | Image.Image):
        return [images]
    if not isinstance(images, list | tuple):
        raise SeekVLError(
            f"pictures are one path, URL, bytes or PIL image, or a list; not {type(images).__name__}"
        )
    return list(images)


def _last_answer(pieces: Iterator[Piece]) -> Answer:
    """Draw all pieces and return the answer the last one holds."""
    completion = None
    for piece in pieces:
        completion = piece.completion
    assert completion is not None
    return answer_of(completion)
