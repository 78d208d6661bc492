"""The engine: requests come and go at any time, and every step serves all that are under way.

A step does what the scheduler planned (`engine.scheduler`) through the runner (`engine.runner`), and turns
logits into pieces of answers. Who wants an answer drives: drawing from a handle makes steps until it has its
piece, and the answers of other threads grow in the same steps. `start` gives that work to a thread, as a
server needs it.

Letters: n rows of a step, v vocabulary.
"""

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from seekvl.engine.budget import choose_limits
from seekvl.engine.handle import DeadlinePassed, EngineStopped, Handle, Notify
from seekvl.engine.pictures import picture_digests, picture_places
from seekvl.engine.prompt import Prompt, Shown, make_prompt
from seekvl.engine.request import Piece, Request
from seekvl.engine.row import Row, start_row
from seekvl.engine.runner import Runner
from seekvl.engine.sampler import Peak, choose, likelihood, peaks
from seekvl.engine.scheduler import Encode, Fill, Job, Limits, Placement, Plan, QueueFull, Scheduler
from seekvl.models.vl2 import AnyVL
from seekvl.processing.encode import ModelInput
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError

log = logging.getLogger(__name__)

POLL = 0.02
"""Seconds between two looks at a caller's `cancel` while a thread does the steps."""

AHEAD = 2
"""Times the rows of an engine: how many requests of a batch are taken in before others have ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """How an engine is doing; counts are since it was made."""

    waiting: int
    """Requests without a slot."""
    running: int
    """Requests with one."""
    ended: dict[str, int]
    """Requests that ended, by finish reason, "failed" and "overdue"."""
    prompt_tokens: int
    """Tokens of prompts that were let in."""
    cached_tokens: int
    """Those of them that were taken over instead of computed."""
    image_tokens: int
    """Those of them that stand for pictures."""
    generated_tokens: int
    guessed_tokens: int
    """Tokens that were fed on a guess."""
    right_tokens: int
    """Those of them that were chosen."""
    prefix_queries: int
    """Prompts that were let in."""
    prefix_hits: int
    """Those that found their beginning in the cache."""
    picture_queries: int
    """Pictures whose features were needed."""
    picture_hits: int
    """Those that were at hand."""
    cache_bytes: int
    """Bytes of the buffers of keys and values."""
    feature_bytes: int
    """Bytes of the features of pictures."""


class Engine:
    """Answers requests of any number of threads. All public methods may be called from any of them.

    The weights may change between requests: what was kept of the former ones is forgotten then.
    """

    def __init__(self, model: AnyVL, tokenizer: Tokenizer, *, limits: Limits | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.limits = choose_limits(model) if limits is None else limits
        self._scheduler = Scheduler(self.limits)
        self._runner = Runner(
            model,
            exact=self.limits.exact,
            tokens=self.limits.tokens,
            feature_bytes=self.limits.feature_bytes,
        )
        self._tasks: dict[Job, tuple[Row, Handle]] = {}
        self._driving = threading.Lock()
        """Held by who makes a step."""
        self._state = threading.Condition()
        """Held for moments, around the scheduler and the fields here; told when work comes or ends."""
        self._counts: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._told: dict[Handle, None] = {}
        """Those that something has come for and whose asker was not told yet, in order."""
        self._cancelled = False
        self._submitted = False
        self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(
        self,
        request: Request,
        *,
        client: str = "",
        deadline: float | None = None,
        notify: Notify | None = None,
    ) -> Handle:
        """Take a request in; return the handle of its answer.

        client: whose it is; clients take turns, see `engine.scheduler`. deadline: seconds from now, within
        which it must be let in, or it fails with DeadlinePassed; an answer that has begun ends as "cancelled"
        then. notify: called with the handles that something has come for, so that an event loop need not wait
        in a thread; by whoever makes the steps, once for all handles that bear it, after a step's prompt and
        after its answers. It must return at once and not raise.

        Raises SeekVLError for a prompt that leaves no room for an answer, QueueFull beyond the limit,
        EngineStopped when the engine is closed.
        """
        if deadline is not None and not deadline > 0:
            raise SeekVLError(f"deadline must be above 0 seconds, not {deadline}")
        return self._enqueue(self._start(request), client=client, deadline=deadline, notify=notify)

    def answer(
        self, requests: Sequence[Request], *, cancel: Callable[[], bool] | None = None
    ) -> Generator[tuple[int, Piece], None, None]:
        """Answer requests together; yield (index, its next piece) until each had its last piece.

        cancel: asked before every step; True ends all of them as "cancelled". Closing the iterator does so,
        too. They are taken in when the first piece is drawn.

        Raises SeekVLError at once for a prompt that leaves no room for an answer.
        """
        if cancel is not None and not callable(cancel):
            raise SeekVLError(f"cancel is called before every step; {type(cancel).__name__} cannot be")
        return self._answer([self._start(request) for request in requests], cancel)

    def step(self) -> bool:
        """Make one step for all that are under way; False when there was nothing to do."""
        with self._telling(), self._driving:
            with self._state:
                self._sweep()
                self._forget_stale()
                plan = self._scheduler.plan()
                if plan is not None and plan.placement is not None:
                    self._let_in(plan.placement)
            if plan is not None:
                self._do(plan)
        self._sweep_if_free()
        return plan is not None

    def advance(self, handle: Handle, *, seconds: float | None = None) -> None:
        """Bring an answer closer to its next piece: make a step, or wait so long while a thread does."""
        if self._thread is not None:
            handle.wait(seconds=seconds)
        elif not self.step() and not handle.wait(seconds=0.0):
            raise EngineStopped("the answer was lost: the engine has nothing to do and gave no piece")

    def start(self) -> None:
        """Let a thread make the steps from now on, until `close`."""
        with self._state:
            self._check_open()
            if self._thread is not None:
                raise SeekVLError("the engine's thread runs already")
            self._thread = threading.Thread(target=self._serve, name="seekvl-engine", daemon=True)
            self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait so long for those that are under way; return whether all ended."""
        with self._state:
            self._closed = True
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._thread is None:
                if not self.step():
                    break
                continue
            with self._state:
                if self._scheduler.idle:
                    break
                self._state.wait(min(POLL, max(0.0, until - time.monotonic())))
        with self._state:
            return self._scheduler.idle

    def close(self) -> None:
        """Take no more requests, cancel those that are left, and let the thread end. May be called twice."""
        with self._state:
            self._closed = True
            for row, _ in self._tasks.values():
                row.cancelled = self._cancelled = True
            self._state.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._telling(), self._driving, self._state:
            self._thread = None
            self._sweep()

    def forget(self) -> None:
        """Give up what was kept of earlier requests: prefixes and features of pictures."""
        with self._driving, self._state:
            self._forget()

    @property
    def alive(self) -> bool:
        """Whether requests are taken, and a thread that was started still runs."""
        with self._state:
            return not self._closed and self._failure is None

    def metrics(self) -> Metrics:
        """Return how the engine is doing."""
        with self._state:
            scheduler, features, counts = self._scheduler, self._runner.features, self._counts
            return Metrics(
                waiting=scheduler.waiting,
                running=len(scheduler.running),
                ended=dict(self._ended),
                prompt_tokens=counts["prompt"],
                cached_tokens=counts["cached"],
                image_tokens=counts["image"],
                generated_tokens=counts["generated"],
                guessed_tokens=counts["guessed"],
                right_tokens=counts["right"],
                prefix_queries=scheduler.queries,
                prefix_hits=scheduler.hits,
                picture_queries=features.queries,
                picture_hits=features.hits,
                cache_bytes=self._runner.cache.nbytes,
                feature_bytes=features.nbytes,
            )

    def _start(self, request: Request) -> Row:
        """Make the row of a request, if it has room for an answer."""
        return start_row(self.model.config, self.tokenizer, request, guess=self.limits.guess)

    def _enqueue(
        self,
        row: Row,
        *,
        client: str = "",
        deadline: float | None = None,
        notify: Notify | None = None,
    ) -> Handle:
        """Let a row wait for its slot."""
        job = Job(
            prompt=read_prompt(row.request.inputs, chunk=self.limits.chunk, seamless=self._runner.seamless()),
            room=row.room,
            client=client,
            deadline=None if deadline is None else time.monotonic() + deadline,
        )
        handle = Handle(self, job, notify=notify)
        with self._state:
            self._check_open()
            self._scheduler.add(job)
            self._tasks[job] = (row, handle)
            self._submitted = True
            self._state.notify_all()
        return handle

    def _answer(
        self, rows: Sequence[Row], cancel: Callable[[], bool] | None
    ) -> Generator[tuple[int, Piece], None, None]:
        """Do the work of `answer`."""
        coming, left = deque(enumerate(rows)), dict[int, Handle]()
        try:
            while coming or left:
                while coming and len(left) < AHEAD * self.limits.rows:
                    try:
                        left[coming[0][0]] = self._enqueue(coming[0][1])
                    except QueueFull:
                        if not left:
                            raise
                        break  # others fill the queue: the next one when one of these has ended
                    coming.popleft()
                if cancel is not None and cancel():
                    cancel = None
                    for handle in left.values():
                        handle.cancel()
                    yield from ((index, row.end("cancelled")) for index, row in coming)
                    coming.clear()
                first = next(iter(left.values()))
                if not first.wait(seconds=0.0):
                    self.advance(first, seconds=None if cancel is None else POLL)
                for index, handle in list(left.items()):
                    while (piece := handle.poll()) is not None:
                        if piece.completion is not None:
                            del left[index]
                        yield index, piece
        finally:
            for handle in left.values():
                handle.cancel()

    def _check_open(self) -> None:
        """Refuse work that nobody would do."""
        if self._failure is not None:
            raise EngineStopped(f"the engine broke: {self._failure}") from self._failure
        if self._closed:
            raise EngineStopped("the engine is closed and takes no more requests")

    def _serve(self) -> None:
        """Make steps until the engine is closed: the work of the thread."""
        try:
            while True:
                worked = self.step()
                with self._state:
                    if self._closed and self._scheduler.idle:
                        return
                    if not worked:
                        self._state.wait_for(lambda: self._closed or not self._scheduler.idle)
        except BaseException as error:
            log.exception("the engine's thread died")
            with self._telling():
                with self._driving:
                    self._collapse(error)
                with self._state:
                    self._failure = error
                    for job in list(self._tasks):  # not the error itself, which may be one that ends programs
                        self._fail(job, EngineStopped(f"the engine broke: {error!r}"))

    def _do(self, plan: Plan) -> None:
        """Do what was planned. What fails takes only those with it whose work it was."""
        try:
            self._runner.prepare(plan)
        except BaseException as error:
            self._collapse(error)
            if isinstance(error, Exception):
                return
            raise
        if plan.work is not None:
            job = plan.work.job
            try:
                self._encode(plan.work) if isinstance(plan.work, Encode) else self._fill(plan.work)
            except Exception as error:
                self._fail(job, error)
            self._tell()  # a first token need not wait for the others' next ones
        if plan.decode:
            try:
                self._decode(plan.decode)
            except Exception as error:
                for job in plan.decode:
                    self._fail(job, error)

    def _encode(self, work: Encode) -> None:
        """Get the features of a picture."""
        row, _ = self._tasks[work.job]
        began = time.perf_counter()
        digest = work.job.prompt.pictures[work.picture].digest
        row.features[work.picture] = self._runner.encode(
            row.request.inputs, index=work.picture, digest=digest
        )
        row.clock.vision += time.perf_counter() - began
        with self._state:
            self._scheduler.encoded(work)

    def _fill(self, work: Fill) -> None:
        """Compute a piece of a prompt, and the first token after the last piece."""
        job = work.job
        assert job.slot is not None
        row, _ = self._tasks[job]
        began = time.perf_counter()
        logits = self._runner.fill(
            row.request.inputs,
            slot=job.slot,
            start=work.start,
            end=work.end,
            pictures=job.prompt.pictures,
            features=row.features,
        )
        row.clock.prefill += time.perf_counter() - began
        row.features = {
            index: rows for index, rows in row.features.items() if job.prompt.pictures[index].end > work.end
        }
        with self._state:
            self._scheduler.filled(work)
        if logits is not None:
            self._extend(job, [logits], peaks(logits[None]), fed=[])

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Feed each answer its last token, and those that are guessed to follow."""
        began = time.perf_counter()
        fed = self._next_tokens(jobs)
        slots = [job.slot for job in jobs if job.slot is not None]
        logits = self._runner.decode(
            [slot for slot, tokens in zip(slots, fed, strict=True) for _ in tokens],
            [token for tokens in fed for token in tokens],
            held={slot: self._scheduler.held(job) for slot, job in zip(slots, jobs, strict=True)},
        )  # n v
        parts, found = logits.unbind(), peaks(logits)
        seconds = time.perf_counter() - began
        for job in jobs:
            self._tasks[job][0].clock.decode += seconds
        start = 0
        for job, tokens in zip(jobs, fed, strict=True):
            rows = slice(start, start := start + len(tokens))
            try:
                self._extend(job, parts[rows], found[rows], fed=tokens)
            except Exception as error:
                self._fail(job, error)

    def _next_tokens(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Return what each answer is fed: the token chosen last, and a guess where a step has room for it."""
        spare, fed = self._runner.spare(len(jobs)), []
        for job in jobs:
            row, _ = self._tasks[job]
            guess = row.guesser.guess(min(spare, row.room - 1))
            spare -= len(guess)
            fed.append([row.last, *guess])
        return fed

    def _extend(
        self, job: Job, logits: Sequence[Tensor], found: Sequence[Peak], *, fed: Sequence[int]
    ) -> None:
        """Choose tokens from the logits f32[v] after each one that was fed, as far as these were right.

        found: the peaks of the logits.
        """
        row, _ = self._tasks[job]
        pieces: list[Piece] = []
        while not row.done:
            began = time.perf_counter()
            scores, most = logits[len(pieces)], row.request.params.logprobs
            token = choose(scores, row.sampler, peak=found[len(pieces)])
            told = None if most is None else likelihood(scores, token, most=most)
            row.clock.decode += time.perf_counter() - began
            pieces.append(row.take(token, likelihood=told))
            if fed[len(pieces) : len(pieces) + 1] != [token]:
                break
        guessed, right = max(0, len(fed) - 1), len(pieces) - 1
        row.guesser.judge(guessed=guessed, right=right)
        with self._state:
            self._counts["generated"] += sum(piece.token_id is not None for piece in pieces)
            self._counts["guessed"] += guessed
            self._counts["right"] += right
            self._scheduler.fed(job, fed[: len(pieces)])
            for piece in pieces:
                self._deliver(job, piece)

    def _deliver(self, job: Job, piece: Piece) -> None:
        """Hand a piece to who waits for it; the last one ends the job."""
        _, handle = self._tasks[job]
        if piece.completion is not None:
            self._scheduler.end(job)
            self._ended[piece.completion.finish_reason] += 1
            del self._tasks[job]
            self._state.notify_all()
        self._put(handle, piece)

    def _fail(self, job: Job, error: BaseException, *, kind: str = "failed") -> None:
        """End a job with an error. Its slot is emptied: what it computed may be worth nothing."""
        with self._state:
            if job not in self._tasks:
                return
            _, handle = self._tasks.pop(job)
            if job.slot is not None:
                self._runner.cache.wipe(job.slot)
            self._scheduler.end(job, keep=False)
            self._ended[kind] += 1
            self._state.notify_all()
            self._put(handle, error)

    def _collapse(self, error: BaseException) -> None:
        """Fail all that have a slot and begin with an empty cache: a step broke off with half of it done."""
        with self._state:
            self._runner.reset()
            for job in self._scheduler.running:
                _, handle = self._tasks.pop(job)
                self._scheduler.end(job, keep=False)
                self._ended["failed"] += 1
                self._put(handle, EngineStopped(f"a step broke off: {error!r}"))
            self._scheduler.reset()
            self._state.notify_all()

    def _put(self, handle: Handle, item: Piece | BaseException) -> None:
        """Add what comes next for a handle; its asker is told by `_tell`."""
        handle.put(item)
        if handle.notify is not None:
            self._told[handle] = None

    def _tell(self) -> None:
        """Tell askers what has come: each once, for a wake-up costs more than a token's other work here."""
        if not self._told:
            return
        with self._state:
            told, self._told = self._told, {}
        groups: dict[Notify, list[Handle]] = {}
        for handle in told:
            if handle.notify is not None:
                groups.setdefault(handle.notify, []).append(handle)
        for notify, handles in groups.items():
            notify(handles)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell askers in the end, however it comes, when the state is free again."""
        try:
            yield
        finally:
            self._tell()

    def _let_in(self, placement: Placement) -> None:
        """Take down what a request brings and finds."""
        row, _ = self._tasks[placement.job]
        row.cached = placement.shared
        bill = row.request.inputs.bill
        self._counts.update(prompt=bill.total, image=sum(bill.image_tokens), cached=placement.shared)

    def _cancel(self, job: Job) -> None:
        """Mark a job to end; end it at once where nobody is at work on it."""
        with self._telling(), self._state:
            if job not in self._tasks:
                return
            row, _ = self._tasks[job]
            if job.slot is None:
                self._deliver(job, row.end("cancelled"))
                return
            row.cancelled = self._cancelled = True
        self._sweep_if_free()

    def _sweep_if_free(self) -> None:
        """End what was cancelled, unless a step is under way: who makes it will look when it is done."""
        while self._cancelled and self._driving.acquire(blocking=False):
            try:
                with self._telling(), self._state:
                    self._sweep()
            finally:
                self._driving.release()

    def _sweep(self) -> None:
        """End what was cancelled or is overdue. Between steps only."""
        if self._cancelled:
            self._cancelled = False
            for job, (row, _) in list(self._tasks.items()):
                if row.cancelled:
                    self._deliver(job, row.end("cancelled"))
        for job in self._scheduler.overdue(time.monotonic()):
            row, _ = self._tasks[job]
            if job.slot is None:
                error = DeadlinePassed("the request waited for its deadline; try again later")
                self._fail(job, error, kind="overdue")
            else:
                self._deliver(job, row.end("cancelled"))

    def _forget_stale(self) -> None:
        """Forget what the former weights made, when a request came in and they are others now."""
        if self._submitted:
            self._submitted = False
            if self._runner.refresh():
                self._forget()

    def _forget(self) -> None:
        """Forget prefixes and features; between steps only."""
        self._runner.features.clear()
        self._scheduler.forget()
        if not self._scheduler.running:
            self._scheduler.reset()
            self._runner.reset()


def read_prompt(inputs: ModelInput, *, chunk: int, seamless: bool) -> Prompt:
    """Return a prompt as the scheduler knows it."""
    places = zip(picture_places(inputs), picture_digests(inputs), strict=True)
    shown = [Shown(start, end, digest) for (start, end), digest in places]
    return make_prompt(inputs.input_ids.tolist(), shown, chunk=chunk, seamless=seamless)
