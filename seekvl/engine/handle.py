"""An answer as its asker holds it: pieces that come, a way to stop them, and what may come instead."""

from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from seekvl.engine.request import Completion, Piece
from seekvl.engine.scheduler import Job
from seekvl.runtime import SeekVLError

if TYPE_CHECKING:
    from seekvl.engine.engine import Engine


class Notify(Protocol):
    """Whom the engine tells that something has come."""

    def __call__(self, handles: Sequence["Handle"], /) -> None:
        """Take the handles that it has come for."""


class EngineStopped(RuntimeError):  # noqa: N818 - a state, which a server answers with "not ready"
    """The engine takes no requests, or could not finish one: it was closed, or a step broke it."""


class DeadlinePassed(SeekVLError):  # noqa: N818 - as above
    """A request was not let in before its deadline."""


class Handle:
    """An answer that comes piece by piece; get one from `Engine.submit`.

    Drawing from it gives pieces until the last, which holds the completion. It raises what made the answer
    fail: SeekVLError for what the user can mend, DeadlinePassed and EngineStopped among others. A handle is
    for one thread; `cancel` may be called from any.
    """

    def __init__(self, engine: "Engine", job: Job, *, notify: Notify | None = None) -> None:
        self.notify = notify
        """Whom the engine tells when something has come, if anybody."""
        self._engine, self._job = engine, job
        self._arrived: SimpleQueue[Piece | BaseException] = SimpleQueue()
        self._next: Piece | BaseException | None = None
        self._over = False

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while not self._over:
            piece = self.poll()
            if piece is not None:
                return piece
            try:
                self._engine.advance(self)
            except BaseException:
                self.cancel()
                raise
        raise StopIteration

    def poll(self, *, seconds: float | None = 0.0) -> Piece | None:
        """Return the next piece if it comes within so many seconds, None: whenever it comes; nobody makes a
        step for it.
        """
        if self._over or not self.wait(seconds=seconds):
            return None
        found, self._next = self._next, None
        if isinstance(found, Piece):
            self._over = found.completion is not None
            return found
        self._over = True
        assert found is not None
        raise found

    def wait(self, *, seconds: float | None = None) -> bool:
        """Return whether a piece is there, within so many seconds; None waits as long as it takes."""
        if self._next is None:
            if seconds == 0.0 and self._arrived.empty():
                return False
            try:
                self._next = self._arrived.get(block=seconds != 0.0, timeout=seconds)
            except Empty:
                return False
        return True

    @property
    def waiting(self) -> bool:
        """Whether it has no place in the cache yet; False once it has ended."""
        return self._job.slot is None and not self._job.ended

    def result(self) -> Completion:
        """Draw all pieces that are left; return the completion."""
        completion = None
        for piece in self:
            completion = piece.completion
        if completion is None:
            raise SeekVLError("this answer was drawn to its end before; its last piece has the completion")
        return completion

    def cancel(self) -> None:
        """End the answer as "cancelled" before the next step; what it held is free then. Never blocks."""
        self._engine._cancel(self._job)

    def put(self, item: Piece | BaseException) -> None:
        """Add what comes next, an error at last; the engine calls it."""
        self._arrived.put(item)
