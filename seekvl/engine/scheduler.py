"""Who computes what next: whole numbers only, no tensor and no network.

    waiting --plan: place--> prompt --plan: encode, fill--> answering --plan: decode--> ended
                                                                                      its slot stays a prefix

Each plan is one step of the engine: one piece of one prompt, or one picture, and one token for every answer
under way. So a long prompt holds running answers up for one piece at a time. The rules:

- Who waits is let in by turns: a client's requests are numbered, from the turn that is being served on, and
  the smallest number goes first, by arrival among equals. A client with a hundred requests takes one of every
  turn, as does one with a single request. Nobody overtakes who is next, so nobody waits for ever.
- Prompts take turns piece by piece.
- A request is let in when a slot is free and slots times capacity stay within the limit, for as many tokens
  as its answer may have. When nothing runs it is let in anyway: what one alone asks for was always tried.
- Who is next and begins like a prompt that is being computed waits for that part and takes it over.
- A finished slot stays as a prefix until its place is needed; what was used last stays longest.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from seekvl.engine.cache import BLOCK, grown
from seekvl.engine.prompt import Prompt, common_beginning, common_cut, common_tokens
from seekvl.runtime import SeekVLError

WORTH_WAITING = 64
"""Tokens of a beginning that are worth waiting for; fewer are computed again in the time of a step."""


class QueueFull(SeekVLError):  # noqa: N818 - what a server tells its client, not a fault
    """Too many requests wait; come back later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the scheduler keeps to. Raises SeekVLError for numbers that leave no room."""

    rows: int
    """Most answers that grow at once, and most slots of the cache."""
    tokens: int
    """Most tokens of the cache, slots times capacity; one answer alone may exceed it."""
    longest: int
    """The model's longest sequence, tokens."""
    chunk: int
    """Most tokens of a piece of a prompt."""
    queue: int | None = None
    """Most requests that wait; None: any number."""
    exact: bool = True
    """Whether every answer has, bit for bit, what it would have alone: a prefix is only taken over up to a
    cut, or of a seamless prompt as far as the prompt itself goes, and rows share a step only where they do
    not touch each other.
    """
    guess: int = 0
    """Most tokens that are guessed ahead in a step of an answer."""
    feature_bytes: int | None = None
    """Most bytes of pictures' features that are kept; None: a fiftieth of the memory that is free."""

    def __post_init__(self) -> None:
        least = {"rows": 1, "tokens": 1, "longest": 1, "chunk": 1, "queue": 1, "guess": 0, "feature_bytes": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise SeekVLError(f"{name} must be at least {bound}, not {value}")


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """A request, as the scheduler sees it."""

    prompt: Prompt
    room: int
    """Most tokens of its answer."""
    client: str = ""
    """Whose it is."""
    deadline: float | None = None
    """When it must have ended, seconds of the engine's clock."""
    turn: int = 0
    """Its number among the requests of its client."""
    slot: int | None = None
    """Its place in the cache; None while it waits and after it ended."""
    filled: int = 0
    """Tokens of the prompt that are in the cache."""
    cached: int = 0
    """Those of them that were taken over."""
    encoded: int = 0
    """Pictures, counted from the first, whose features are at hand or no longer needed."""
    served: int = 0
    """When its prompt last got a piece."""
    ended: bool = False

    @property
    def longest(self) -> int:
        """Tokens it may come to hold."""
        return len(self.prompt) + self.room

    @property
    def answering(self) -> bool:
        """Whether its prompt is computed."""
        return self.filled == len(self.prompt)


@dataclass(slots=True)
class Slot:
    """What a slot of the cache holds."""

    ids: list[int] = field(default_factory=list)
    prompt: Prompt | None = None
    """The prompt it began with; None in an empty slot."""
    filled: int = 0
    """Tokens of the prompt that are in it."""
    job: Job | None = None
    """Who works in it; None: it is a prefix, or empty."""
    used: int = 0
    """When it was last worked in."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A job gets a slot, with the first `shared` tokens of slot `source` in it."""

    job: Job
    slot: int
    source: int
    shared: int


@dataclass(frozen=True, slots=True)
class Encode:
    """A picture of a prompt goes through the towers."""

    job: Job
    picture: int


@dataclass(frozen=True, slots=True)
class Fill:
    """Tokens start..end of a prompt go into the cache."""

    job: Job
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step of the engine, to be done in this order."""

    rows: int
    """Slots that the cache must have."""
    capacity: int
    """Tokens that each must have room for."""
    placement: Placement | None
    """At most one, so that its source is still there when the cache has its new shape."""
    work: Encode | Fill | None
    decode: tuple[Job, ...]
    """Whose answers get a token."""


class Scheduler:
    """Decides; `plan` says what to do, the methods below it take down what was done."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.capacity = 0
        """Tokens each slot has room for."""
        self.queries = 0
        """Prompts that were let in."""
        self.hits = 0
        """Those that found a beginning of theirs in the cache."""
        self._slots = [Slot()]
        self._queue: list[tuple[int, int, Job]] = []
        self._waiting = 0
        self._arrivals = 0
        self._turn = 0
        self._last: dict[str, int] = {}
        self._timed: set[Job] = set()
        self._tick = 0

    @property
    def rows(self) -> int:
        """Slots the cache has."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._waiting

    @property
    def running(self) -> list[Job]:
        """Jobs that have a slot, by slot."""
        return [slot.job for slot in self._slots if slot.job is not None]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._waiting == 0 and not self.running

    def add(self, job: Job) -> None:
        """Let a request wait. Raises QueueFull beyond the limit, SeekVLError for one that can never run."""
        limits = self.limits
        if job.longest > limits.longest or not len(job.prompt) or job.room < 1:
            raise SeekVLError(
                f"a prompt of {len(job.prompt):,} tokens with room for {job.room:,} more does not fit into "
                f"1 to {limits.longest:,} tokens"
            )
        if limits.queue is not None and self._waiting >= limits.queue:
            raise QueueFull(
                f"{self._waiting:,} requests wait, the limit is {limits.queue:,}; try again later"
            )
        job.turn = max(self._turn, self._last.get(job.client, 0)) + 1
        self._last[job.client] = job.turn
        self._arrivals += 1
        self._waiting += 1
        heapq.heappush(self._queue, (job.turn, self._arrivals, job))
        if job.deadline is not None:
            self._timed.add(job)

    def plan(self) -> Plan | None:
        """Decide on the next step; None: there is nothing to do."""
        self._tick += 1
        placement = self._place_next()
        if not self.running:
            return None
        work = self._prompt_work()
        decode = tuple(job for job in self.running if job.answering)
        needed = [min(self.held(job) + 1 + self.limits.guess, job.longest) for job in decode]
        if isinstance(work, Fill):
            needed.append(work.end)
        self._grow(max(needed, default=0))
        return Plan(self.rows, self.capacity, placement, work, decode)

    def encoded(self, work: Encode) -> None:
        """Take down that a picture's features are at hand."""
        work.job.encoded = work.picture + 1

    def filled(self, work: Fill) -> None:
        """Take down that a piece is in the cache."""
        work.job.filled = work.end
        slot = self._slot_of(work.job)
        slot.filled, slot.used = work.end, self._tick
        slot.ids = list(work.job.prompt.ids[: work.end])

    def fed(self, job: Job, tokens: Iterable[int]) -> None:
        """Take down that tokens of an answer are in the cache."""
        slot = self._slot_of(job)
        slot.ids.extend(tokens)
        slot.used = self._tick

    def end(self, job: Job, *, keep: bool = True) -> None:
        """Take a job out, wherever it is; its slot stays as a prefix, or is empty with `keep` off."""
        if job.ended:
            return
        job.ended = True
        self._timed.discard(job)
        if job.slot is None:
            self._waiting -= 1
            if 2 * self._waiting < len(self._queue):
                self._tidy()
            return
        index, job.slot = job.slot, None
        self._slots[index].job = None
        if not keep or not self._slots[index].ids:
            self._slots[index] = Slot()

    def _tidy(self) -> None:
        """Drop those who left the queue, and the turns of clients who have nothing in it."""
        self._queue = [entry for entry in self._queue if not entry[2].ended]
        heapq.heapify(self._queue)
        self._last = {}
        for turn, _, job in self._queue:
            self._last[job.client] = max(turn, self._last.get(job.client, 0))

    def overdue(self, now: float) -> list[Job]:
        """Return the jobs whose deadline has passed."""
        return [job for job in self._timed if job.deadline is not None and job.deadline <= now]

    def forget(self) -> None:
        """Give up all prefixes, those that running answers would leave too: the weights have changed."""
        for index, slot in enumerate(self._slots):
            if slot.job is None:
                self._slots[index] = Slot()
            else:
                slot.prompt = None

    def reset(self) -> None:
        """Begin with an empty cache again; nothing may run."""
        assert not self.running
        self._slots, self.capacity = [Slot()], 0

    def held(self, job: Job) -> int:
        """Tokens of a running job that are in the cache."""
        return len(self._slot_of(job).ids)

    def _slot_of(self, job: Job) -> Slot:
        assert job.slot is not None
        return self._slots[job.slot]

    def _place_next(self) -> Placement | None:
        """Let in who is next, if there is room and nothing to wait for."""
        while self._queue and self._queue[0][2].ended:
            heapq.heappop(self._queue)
        if not self._queue:
            return None
        job = self._queue[0][2]
        allowed, capacity = self._room_for(job)
        if not allowed or self._follows(job):
            return None
        heapq.heappop(self._queue)
        self._waiting -= 1
        self._turn = max(self._turn, job.turn)
        self._last = {client: turn for client, turn in self._last.items() if turn > self._turn}
        source, shared = self._best(job.prompt, among=allowed)
        index = self._target(source, shared, allowed=allowed)
        self._take(job, index, shared=shared)
        self._fit(allowed, capacity)
        return Placement(job, index, source, shared)

    def _room_for(self, job: Job) -> tuple[int, int]:
        """Return how many slots there may be when this job runs, 0 when it cannot now, and their capacity."""
        running, limits = self.running, self.limits
        longest = max(chain((job.longest,), (other.longest for other in running)))
        capacity = min(-(-longest // BLOCK) * BLOCK, limits.longest)
        allowed = min(limits.rows, limits.tokens // capacity)
        if not running:
            return max(allowed, 1), capacity
        top = max(index for index, slot in enumerate(self._slots) if slot.job is not None)
        return (allowed if top < allowed and len(running) < allowed else 0), capacity

    def _follows(self, job: Job) -> bool:
        """Whether a prompt that is being computed will soon hold more of this one than the cache does."""
        coming = [
            _reusable(other.prompt, job.prompt, most=len(other.prompt))
            for other in self.running
            if not other.answering and self._slot_of(other).prompt is not None
        ]
        least = WORTH_WAITING if job.prompt.seamless else 1
        return max(coming, default=0) >= self._best(job.prompt, among=self.rows)[1] + least

    def _best(self, prompt: Prompt, *, among: int) -> tuple[int, int]:
        """Return which of the first slots shares most of a prompt, and how many tokens that is."""
        best = (0, 0)
        for index, slot in enumerate(self._slots[:among]):
            shared = self._shared(slot, prompt)
            if shared > best[1]:
                best = (index, shared)
        return best

    def _shared(self, slot: Slot, prompt: Prompt) -> int:
        """Return how many tokens of a prompt a slot can give."""
        if slot.prompt is None:
            return 0
        if not self.limits.exact:
            pictures = [shown for shown in slot.prompt.pictures if shown.end <= slot.filled]
            return common_tokens(slot.ids, pictures, prompt)
        return _reusable(slot.prompt, prompt, most=slot.filled)

    def _target(self, source: int, shared: int, *, allowed: int) -> int:
        """Choose the slot of a new job: its source where most of that is shared, one that is empty or not yet
        made, or the prefix that was not used for longest.
        """
        from_slot = self._slots[source]
        if shared and from_slot.job is None and 2 * shared >= len(from_slot.ids):
            return source
        free = [index for index, slot in enumerate(self._slots[:allowed]) if slot.job is None]
        empty = [index for index in free if self._slots[index].prompt is None]
        if empty:
            return empty[0]
        if self.rows < allowed:
            return self.rows
        return min(free, key=lambda index: self._slots[index].used)

    def _take(self, job: Job, index: int, *, shared: int) -> None:
        """Let a job begin in a slot."""
        if index == self.rows:
            self._slots.append(Slot())
        self.queries += 1
        self.hits += shared > 0
        job.slot, job.filled, job.cached, job.served = index, shared, shared, self._tick
        job.encoded = sum(shown.end <= shared for shown in job.prompt.pictures)
        self._slots[index] = Slot(list(job.prompt.ids[:shared]), job.prompt, shared, job, self._tick)

    def _fit(self, allowed: int, capacity: int) -> None:
        """Drop slots beyond what is allowed, and room that nobody needs where it is too much."""
        del self._slots[allowed:]
        if self.capacity > capacity and self.rows * self.capacity > self.limits.tokens:
            self.capacity = capacity
            for slot in self._slots:
                del slot.ids[capacity:]
                slot.filled = min(slot.filled, capacity)

    def _prompt_work(self) -> Encode | Fill | None:
        """Choose the next piece of the prompt that has waited longest for one."""
        prompts = [job for job in self.running if not job.answering]
        if not prompts:
            return None
        job = min(prompts, key=lambda one: one.served)
        job.served = self._tick
        end = next((cut for cut in job.prompt.cuts if cut > job.filled), len(job.prompt))
        pictures = job.prompt.pictures
        if job.encoded < len(pictures) and pictures[job.encoded].start < end:
            return Encode(job, job.encoded)
        return Fill(job, job.filled, end)

    def _grow(self, tokens: int) -> None:
        """Make room for the longest slot of a step, and for a while to come within what was promised."""
        longest = max(job.longest for job in self.running)
        if tokens > self.capacity:
            most = min(-(-longest // BLOCK) * BLOCK, self.limits.longest)
            self.capacity = min(grown(tokens, capacity=self.capacity, limit=self.limits.longest), most)


def _reusable(held: Prompt, wanted: Prompt, *, most: int) -> int:
    """Return how many tokens of a prompt are, bit for bit, those of another of which so many are computed."""
    most = min(most, len(wanted) - 1)
    if held.seamless != wanted.seamless:
        return 0
    if wanted.seamless:
        return min(common_beginning(held, wanted), most)
    return _last_cut(held, most=min(common_cut(held, wanted), most))


def _last_cut(prompt: Prompt, *, most: int) -> int:
    """Return the last cut of a prompt within so many tokens; 0 where none is."""
    return max((cut for cut in prompt.cuts if cut <= most), default=0)
