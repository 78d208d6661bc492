"""Answers of several processes: each replica has a model with its engine, and Ray Serve looks after them.

    clients <--> this process: dialects, pictures, files, predictions, the page; no weights
                      |  a prompt, ready for the network         ^  pieces
                      v                                          |
                 Ray Serve, by the first picture --> replica 1 ... n, on this machine or on others

A conversation keeps to the replica that its first picture leads to (consistent hashing), because what the
replica computed for a picture serves the next questions. A replica that is gone, or has as many requests
waiting as running, is passed over. All that must be found again lies in this process, so that no replica
needs to know of files, predictions or keys.
"""

import asyncio
import contextlib
import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from queue import Empty, SimpleQueue
from typing import Any

from seekvl.engine.engine import Metrics
from seekvl.engine.handle import EngineStopped
from seekvl.engine.pictures import picture_tiles
from seekvl.engine.request import Completion, Piece, Request, SamplingParams, Timings, Usage
from seekvl.engine.row import start_row
from seekvl.engine.scheduler import Limits, QueueFull
from seekvl.models.vl2 import AnyConfig
from seekvl.processing.conversation import Conversation
from seekvl.processing.encode import ModelInput, Processor
from seekvl.runtime import SeekVLError
from seekvl.serve.answerer import Notify
from seekvl.serve.deploy import PARTING_SECONDS, deploy, leave
from seekvl.serve.replica import Arrived, portable
from seekvl.serve.settings import Settings
from seekvl.vlm import prepare
from seekvl.weights.config import read_config
from seekvl.weights.load import find_folder, load_processor

log = logging.getLogger(__name__)

BEGINNING = 64
"""Tokens by which a conversation without pictures is told; fewer are not worth taking over."""
TRIES = 3
"""Replicas that are asked where one is lost before its first piece."""
WATCH_SECONDS = 0.5
"""Between two looks at the replicas."""
SILENCE_SECONDS = 30.0
"""Replicas that say nothing for so long count as lost."""
START_SECONDS = 600.0
"""Longest wait for the first replica to load its model, or for a lost one to come back."""


def load_replicas(settings: Settings) -> "Front":
    """Return a model that answers on replicas. Raises SeekVLError for a checkpoint that cannot be opened."""
    folder = find_folder(settings.model)
    config = read_config(folder)
    processor = load_processor(
        folder, config, preprocessing=settings.preprocessing, max_tiles=settings.max_tiles
    )
    engine = Replicas(settings, config=config.model, processor=processor)
    return Front(processor=processor, config=config.model, engine=engine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """A model as the server sees it, without its weights; see `vlm.VLM`."""

    processor: Processor
    config: AnyConfig
    engine: "Replicas"

    @property
    def device(self) -> str:
        """Where answers are computed."""
        return f"{self.engine.settings.replicas} replicas ({self.engine.settings.device})"

    @property
    def dtype(self) -> str:
        """In which numbers, as it was asked for."""
        return self.engine.settings.dtype

    def prepare(
        self, messages: Conversation, params: SamplingParams, *, max_tiles: int | None = None
    ) -> Request:
        """Turn a conversation into what `engine.submit` takes; see `VLM.prepare`."""
        processor = self.processor if max_tiles is None else self.processor.bounded(max_tiles)
        return prepare(messages, params, processor=processor, config=self.config)

    def renew_engine(self, *, queue: int | None = None) -> None:
        """Do nothing: Ray Serve replaces lost replicas by itself, `engine.start` waits for them."""


class Remote:
    """An answer that a replica computes; see `engine.handle.Handle`."""

    def __init__(self, request: Request, *, notify: Notify | None) -> None:
        self.waiting = True
        """Whether no replica has begun with it."""
        self.over = False
        self.work: Future[None] | None = None
        """Draws the answer from the replica."""
        self._request, self._notify = request, notify
        self._arrived: SimpleQueue[Arrived] = SimpleQueue()
        self._given: list[Piece] = []
        self._changing = threading.Lock()

    @property
    def begun(self) -> bool:
        """Whether pieces have come."""
        return bool(self._given)

    def poll(self) -> Piece | None:
        """Return the next piece if it is there. Raises what made the answer fail."""
        try:
            found = self._arrived.get_nowait()
        except Empty:
            return None
        if isinstance(found, Piece):
            return found
        raise found

    def cancel(self) -> None:
        """End it; its last piece says so. Never blocks."""
        self.put([Piece(text="", token_id=None, completion=self._cancelled())])
        if self.work is not None:
            self.work.cancel()

    def put(self, arrived: Sequence[Arrived]) -> None:
        """Add what has come; what comes after the end is dropped."""
        with self._changing:
            if self.over:
                return
            self.waiting = False
            for item in arrived:
                self._arrived.put(item)
                if isinstance(item, Piece):
                    self._given.append(item)
                self.over = not isinstance(item, Piece) or item.completion is not None
        if arrived and self._notify is not None:
            self._notify([self])

    def _cancelled(self) -> Completion:
        """Return an answer that ends here, as far as it has come.

        What it cost is known where it is computed alone: times, and tokens that were taken over, are 0.
        """
        given, bill = list(self._given), self._request.inputs.bill
        ids = tuple(piece.token_id for piece in given if piece.token_id is not None)
        return Completion(
            token_ids=ids,
            text="".join(piece.text for piece in given),
            pictures=len(bill.image_tokens),
            begun=self._request.begun,
            finish_reason="cancelled",
            usage=Usage(
                prompt_tokens=bill.total,
                image_tokens=sum(bill.image_tokens),
                completion_tokens=len(ids),
                cached_tokens=0,
            ),
            timings=Timings(preprocess=self._request.preprocess_seconds, vision=0.0, prefill=0.0, decode=0.0),
        )


class Replicas:
    """What answers: all replicas together; see `engine.engine.Engine`.

    A thread with an event loop of its own talks to Ray, so that handlers never wait for it. It lives as long
    as the server does: the processes of Ray end with the thread that started them.
    """

    def __init__(self, settings: Settings, *, config: AnyConfig, processor: Processor) -> None:
        self.settings, self.config, self.processor = settings, config, processor
        self._loop = asyncio.new_event_loop()
        self._handle: Any = None
        """Ray Serve's, which leads to a replica."""
        self._answers: set[Remote] = set()
        self._figures: Mapping[str, Metrics] = {}
        self._limits = Limits(rows=1, tokens=1, longest=1, chunk=1, queue=settings.queue)
        """Those of one replica."""
        self._heard = time.monotonic()
        self._closed = False
        self._changing = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the replicas, or wait until one that was lost is back. Raises SeekVLError."""
        if self._thread is None:
            started: Future[None] = Future()
            self._thread = threading.Thread(
                target=self._live, args=(started,), name="seekvl-replicas", daemon=True
            )
            self._thread.start()
            started.result()
        elif not self.alive:
            self._figures = {}  # of replicas that say nothing any more
        until = time.monotonic() + START_SECONDS
        while not self._figures and not self._closed:
            if time.monotonic() > until:
                raise SeekVLError(f"no replica answered within {START_SECONDS:g} s; see the logs of Ray")
            time.sleep(WATCH_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether requests are taken, and a replica is there to answer them."""
        return not self._closed and bool(self._figures) and time.monotonic() - self._heard < SILENCE_SECONDS

    @property
    def limits(self) -> Limits:
        """How much all replicas that run take at once."""
        return replace(self._limits, rows=self._limits.rows * max(1, len(self._figures)))

    def submit(
        self,
        request: Request,
        *,
        client: str,
        deadline: float | None = None,
        notify: Notify | None = None,
    ) -> Remote:
        """Take a request in; see `Engine.submit`, which raises the same."""
        start_row(self.config, self.processor.tokenizer, request, guess=0)  # says what is wrong with it
        limits, remote = self.limits, Remote(request, notify=notify)
        with self._changing:
            if self._closed or self._handle is None:
                raise EngineStopped("the replicas take no more requests")
            if len(self._answers) >= limits.rows + self.settings.queue:
                raise QueueFull(f"{self.settings.queue} requests wait already; try again later")
            self._answers.add(remote)
        remote.work = self._run(self._follow(remote, request, client=client, deadline=deadline))
        remote.work.add_done_callback(lambda _: self._answers.discard(remote))
        return remote

    def by_replica(self) -> Mapping[str, Metrics]:
        """Return how each replica was doing a moment ago."""
        return self._figures

    def metrics(self) -> Metrics:
        """Return how all of them are doing together; what runs and waits, as it is now."""
        found = list(self._figures.values())
        ended: Counter[str] = Counter()
        for one in found:
            ended.update(one.ended)
        sums = {
            field.name: sum(getattr(one, field.name) for one in found)
            for field in fields(Metrics)
            if field.name != "ended"
        }
        waiting = sum(remote.waiting for remote in list(self._answers))
        return Metrics(
            **{**sums, "waiting": waiting, "running": len(self._answers) - waiting}, ended=dict(ended)
        )

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait so long for those under way; return whether all ended."""
        with self._changing:
            self._closed = True
        until = time.monotonic() + seconds
        while self._answers and time.monotonic() < until:
            time.sleep(min(0.05, seconds))
        return not self._answers

    def close(self) -> None:
        """End the answers that are left, and the replicas."""
        self.drain(0.0)
        for remote in list(self._answers):
            remote.cancel()
        self.drain(PARTING_SECONDS)
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._thread = None

    def _live(self, started: "Future[None]") -> None:
        """Start the replicas, do what is asked of the loop until it is stopped, and take them down."""
        try:
            self._handle = deploy(self.settings)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        self._run(self._watch())
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        leave(self._handle.app_name)

    async def _follow(self, remote: Remote, request: Request, *, client: str, deadline: float | None) -> None:
        """Draw an answer to its end; asks another replica where one is lost before it said anything."""
        from ray.exceptions import RayActorError

        try:
            key = await asyncio.to_thread(conversation_key, request.inputs)
            for left in reversed(range(TRIES)):
                try:
                    async with contextlib.aclosing(self._ask(key, request, client, deadline)) as answer:
                        async for arrived in answer:
                            remote.put(arrived)
                    break
                except RayActorError:
                    if remote.begun or not left:
                        raise
                    log.warning("a replica was lost before it answered; another one is asked")
            remote.put([EngineStopped("the replica gave no end of the answer")])
        except RayActorError:
            remote.put([EngineStopped("the replica that computed it was lost")])
        except Exception as error:
            log.exception("a replica could not be asked")
            remote.put([portable(error)])

    async def _ask(
        self, key: str, request: Request, client: str, deadline: float | None
    ) -> AsyncGenerator[Sequence[Arrived], None]:
        """Yield what one replica sends; leaving early ends the answer there."""
        ask = self._handle.options(method_name="answer", stream=True, session_id=key)
        answer = ask.remote(request, client=client, deadline=deadline)
        try:
            async for arrived in answer:
                yield arrived
        finally:
            answer.cancel()

    async def _watch(self) -> None:
        """Ask every replica how it is, for as long as the server runs."""
        from ray.serve.exceptions import DeploymentUnavailableError

        while not self._closed:
            try:
                asked = self._handle.broadcast("figures")
                found = await asked.results_async(timeout_s=SILENCE_SECONDS, return_exceptions=True)
            except DeploymentUnavailableError:
                found = []
            except Exception as error:
                log.warning("the replicas could not be asked how they are: %r", error)
                found = None
            if found is not None:
                told = [one for one in found if not isinstance(one, BaseException)]
                self._limits = told[0][2] if told else self._limits
                self._figures = {name: figures for name, figures, _ in told}
                self._heard = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)

    def _run(self, work: Coroutine[Any, Any, None]) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def conversation_key(inputs: ModelInput) -> str:
    """Return what leads a conversation to its replica: its first picture, or else its first words."""
    if inputs.pixels is None:
        return hashlib.blake2b(repr(inputs.input_ids[:BEGINNING].tolist()).encode()).hexdigest()
    first = inputs.pixels[picture_tiles(inputs)[0]]
    return hashlib.blake2b(first.numpy().tobytes()).hexdigest()
