"""The model behind the server: loaded while the port is open already, kept answering, let go in good order.

starting --> ready <--> restarting          draining --> stopped
    |          |             |                 ^
    +--> failed <------------+     (a signal) -+
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Literal

import anyio.to_thread
from anyio import CapacityLimiter

from seekvl.engine.handle import DeadlinePassed, EngineStopped
from seekvl.engine.request import Piece, Request, SamplingParams
from seekvl.engine.scheduler import QueueFull
from seekvl.processing.conversation import Conversation, Text
from seekvl.processing.encode import Processor
from seekvl.processing.picture import PictureLimits
from seekvl.runtime import PromptTooLongError, SeekVLError
from seekvl.serve.answerer import Held, Model
from seekvl.serve.errors import ApiError, bad_request
from seekvl.serve.settings import Settings
from seekvl.vlm import VLM, load

log = logging.getLogger(__name__)

Phase = Literal["starting", "ready", "restarting", "failed", "draining", "stopped"]

READERS = 2
"""Threads that turn conversations into model input, beside the engine's."""
FEW_LETTERS = 2000
"""Letters of a conversation that are turned into tokens in the event loop, within half a millisecond."""
PREPARED_BYTES = 128 * 2**20
"""Most bytes of pictures as the network takes them, kept for the next turn of their conversation."""
WATCH_SECONDS = 0.25
"""Between two looks at the engine."""
DRAIN_SECONDS = 0.05
"""Between two looks at answers that are to end."""
MOST_RESTARTS, RESTART_WINDOW = 3, 60.0
"""An engine that dies more often than this within so many seconds is not started again."""
RETRY_SECONDS = 5
"""What a caller is told to wait for a server that is not ready."""


@dataclass(kw_only=True, slots=True)
class Setup:
    """How loading went, for `/health-check`."""

    started_at: datetime
    completed_at: datetime | None = None
    logs: list[str] = field(default_factory=list)


def load_model(settings: Settings) -> VLM:
    """Load what the settings name."""
    return load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        preprocessing=settings.preprocessing,
        max_tiles=settings.max_tiles,
    )


class Service:
    """One model and its engine, for handlers of one event loop."""

    def __init__(self, settings: Settings, *, load: Callable[[Settings], Model] = load_model) -> None:
        self.settings = settings
        self.phase: Phase = "starting"
        self.setup = Setup(started_at=datetime.now(UTC))
        self.restarts = 0
        """Times the engine's thread died and was started again."""
        self._load = load
        self._vlm: Model | None = None
        self._readers = CapacityLimiter(READERS)
        self._wakes: Wakes | None = None
        self._deaths: list[float] = []

    def start(self) -> None:
        """Begin to load, in a thread of its own."""
        threading.Thread(target=self._set_up, name="seekvl-load", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken: not by an engine that has died and was not looked after yet."""
        return self.phase == "ready" and self.vlm.engine.alive

    @property
    def vlm(self) -> Model:
        """The model. Raises ApiError (503) while there is none."""
        if self._vlm is None:
            raise not_ready(self.phase)
        return self._vlm

    async def prepare(
        self, conversation: Conversation, params: SamplingParams, *, max_tiles: int | None = None
    ) -> Request:
        """Turn a conversation into a request: in a thread, unless that would take longer to wake.

        Raises ApiError for a prompt that is too long, and for what else the model cannot be asked.
        """
        if not self.ready:
            raise not_ready(self.phase)
        work = partial(self.vlm.prepare, conversation, params, max_tiles=max_tiles)
        try:
            if max_tiles is None and at_once(conversation, self.vlm.processor):
                return work()
            return await anyio.to_thread.run_sync(work, limiter=self._readers)
        except PromptTooLongError as error:
            raise bad_request(str(error), param="messages", code="context_length_exceeded") from error
        except SeekVLError as error:
            raise bad_request(str(error), param="messages") from error

    def submit(
        self, request: Request, *, client: str, loop: asyncio.AbstractEventLoop | None = None
    ) -> "Answering":
        """Hand a request to the engine; the answer is drawn in `loop`, by default the one that runs here.

        Raises ApiError: 400 for what the engine cannot do, 429 for a full queue, 503 when not ready.
        """
        if not self.ready:
            raise not_ready(self.phase)
        wakes, drawn_in = self._wakes, loop or asyncio.get_running_loop()
        if wakes is None or wakes.loop is not drawn_in:
            wakes = self._wakes = Wakes(drawn_in)
        try:
            handle = self.vlm.engine.submit(
                request, client=client, deadline=self.settings.answer_seconds, notify=wakes.notify
            )
        except QueueFull as error:
            raise ApiError(status=429, message=str(error), retry_after=RETRY_SECONDS) from error
        except EngineStopped as error:
            raise not_ready(self.phase) from error
        except PromptTooLongError as error:
            raise bad_request(str(error), param="messages", code="context_length_exceeded") from error
        except SeekVLError as error:
            raise bad_request(str(error)) from error
        return Answering(handle, wakes=wakes, wait_seconds=self.settings.wait_seconds)

    async def watch(self) -> None:
        """Look after the engine for as long as the server runs; returns when the service has failed."""
        while self.phase != "failed":
            await asyncio.sleep(WATCH_SECONDS)
            if self.phase == "ready" and not self.vlm.engine.alive:
                self.phase = "restarting"
                await anyio.to_thread.run_sync(self._restart)

    async def drain(self) -> None:
        """Take nothing new; let running answers end within the time of grace, then cancel them."""
        if self.phase in ("draining", "stopped", "failed"):
            return
        self.phase = "draining"
        if self._vlm is not None:
            engine, until = self._vlm.engine, time.monotonic() + self.settings.grace_seconds
            while not engine.drain(0.0) and time.monotonic() < until:
                await asyncio.sleep(
                    DRAIN_SECONDS
                )  # not in a thread: a second signal ends the program at once
            await anyio.to_thread.run_sync(engine.close)
        self.phase = "stopped"

    def _set_up(self) -> None:
        """Load the model and start its engine: the work of the thread."""
        self._note(f"loading {self.settings.model}")
        began = time.monotonic()
        try:
            vlm = self._load(self.settings)
            vlm.processor.limits = PictureLimits(
                max_pixels=self.settings.max_pixels, max_bytes=self.settings.max_picture_bytes
            )
            vlm.processor.remember(PREPARED_BYTES)
            vlm.renew_engine(queue=self.settings.queue)
            vlm.engine.start()
        except Exception as error:
            log.error("the model could not be loaded: %s", error, exc_info=not isinstance(error, SeekVLError))
            self._note(f"failed: {error}")
            self.phase = "failed"
        else:
            self._vlm = vlm
            self._note(f"ready after {time.monotonic() - began:.1f} s on {vlm.device}, {vlm.dtype}")
            if self.phase == "starting":  # not told to stop meanwhile
                self.phase = "ready"
        self.setup.completed_at = datetime.now(UTC)

    def _restart(self) -> None:
        """Start a new engine in the place of one that died, unless that happens again and again."""
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if death > now - RESTART_WINDOW] + [now]
        if len(self._deaths) > MOST_RESTARTS:
            self._give_up(f"the engine died {len(self._deaths)} times within {RESTART_WINDOW:.0f} s")
            return
        try:
            self.vlm.renew_engine(queue=self.settings.queue)
            self.vlm.engine.start()
        except Exception as error:
            log.exception("the engine could not be started again")
            self._give_up(str(error))
            return
        self.restarts += 1
        self._note(f"the engine died and was started again, restart {self.restarts}")
        if self.phase == "restarting":  # not told to stop meanwhile
            self.phase = "ready"

    def _give_up(self, why: str) -> None:
        log.error("the engine cannot answer: %s", why)
        self._note(f"failed: {why}")
        self.phase = "failed"

    def _note(self, line: str) -> None:
        log.info(line)
        self.setup.logs.append(line)


def at_once(conversation: Conversation, processor: Processor) -> bool:
    """Whether a conversation is few words about pictures that are remembered."""
    letters = sum(
        len(part.text)
        for message in conversation.messages
        for part in message.parts
        if isinstance(part, Text)
    )
    return letters + len(conversation.system or "") <= FEW_LETTERS and processor.remembers(conversation)


def not_ready(phase: Phase) -> ApiError:
    """Say that nobody answers now, and whether to come back."""
    why = {
        "starting": "the model is still loading",
        "ready": "the engine is being started again",  # nobody has looked yet
        "restarting": "the engine is being started again",
        "failed": "the model cannot answer; the server's log says why",
    }.get(phase, "the server is shutting down")
    return ApiError(status=503, message=why, retry_after=RETRY_SECONDS)


class Wakes:
    """Wakes the handlers of an event loop: by one call into it for all that a step of the engine brought.

    Such a call ends in a system call, in which the engine's thread would lose Python's lock to the loop; one
    for every token took as long as the rest of what a small model's step does in Python.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.arrived: dict[Held, asyncio.Event] = {}
        """Of handlers who draw an answer now; for the loop alone."""

    def notify(self, handles: Sequence[Held]) -> None:
        """Take what the engine says, in its thread and perhaps after the loop has ended."""
        try:
            self.loop.call_soon_threadsafe(self._wake, handles)
        except RuntimeError:
            log.debug("a piece came after the event loop had ended")

    def _wake(self, handles: Sequence[Held]) -> None:
        for handle in handles:
            if (arrived := self.arrived.get(handle)) is not None:
                arrived.set()


class Answering:
    """An answer as a handler draws it; leaving its `pieces` early cancels it."""

    def __init__(self, handle: Held, *, wakes: Wakes, wait_seconds: float) -> None:
        self._handle, self._wakes, self._wait = handle, wakes, wait_seconds
        self._begun = time.monotonic()
        self.first_seconds: float | None = None
        """From taking the request in to its first piece."""
        self._failed: ApiError | None = None

    def cancel(self) -> None:
        """End the answer before the engine's next step; its last piece says so."""
        self._handle.cancel()

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Yield the pieces as they come, all that are there at once, until the one with the completion.

        Raises ApiError: 503 when the engine stopped or did not get to it in time, 400 for what the caller can
        mend, 500 for the rest.
        """
        over = False
        arrived = self._wakes.arrived[self._handle] = asyncio.Event()
        try:
            while not over:
                arrived.clear()
                pieces = self._come()  # also before the first wait: what came until now woke nobody
                if pieces:
                    over = pieces[-1].completion is not None
                    yield pieces
                elif self.first_seconds is None:
                    await self._let_in(arrived)
                else:
                    await arrived.wait()
        finally:
            del self._wakes.arrived[self._handle]
            if not over:
                self._handle.cancel()

    async def _let_in(self, arrived: asyncio.Event) -> None:
        """Wait for the first piece, and give up on an answer that nobody begins in time."""
        try:
            async with asyncio.timeout(self._wait):  # wait_for loses a cancel that comes with the piece
                await arrived.wait()
        except TimeoutError as error:
            if self._handle.waiting:
                message = f"no place became free within {self._wait:g} s; try again later"
                raise ApiError(status=503, message=message, retry_after=RETRY_SECONDS) from error
            await arrived.wait()

    def _come(self) -> list[Piece]:
        """Return the pieces that are there. What made it fail is raised when those before it were drawn."""
        pieces: list[Piece] = []
        try:
            while (piece := self._handle.poll()) is not None:
                pieces.append(piece)
        except Exception as error:
            self._failed = failure(error)
            self._failed.__cause__ = error
        if self._failed is not None and not pieces:
            raise self._failed
        if pieces and self.first_seconds is None:
            self.first_seconds = time.monotonic() - self._begun
        return pieces


def failure(error: Exception) -> ApiError:
    """Say what made an answer fail."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DeadlinePassed):
        return ApiError(
            status=503, message="the request waited too long for its turn", retry_after=RETRY_SECONDS
        )
    if isinstance(error, EngineStopped):
        return ApiError(status=503, message=f"the answer was lost: {error}", retry_after=RETRY_SECONDS)
    if isinstance(error, SeekVLError):
        return bad_request(str(error))
    log.error("an answer failed", exc_info=error)
    return ApiError(status=500, message="the answer failed; the server's log says why")
