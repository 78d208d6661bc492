"""A model in a process of its own: what Ray Serve runs, once for each replica."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence

from seekvl.engine.engine import Metrics
from seekvl.engine.request import Piece, Request
from seekvl.engine.scheduler import Limits
from seekvl.serve.service import load_model
from seekvl.serve.settings import Settings

log = logging.getLogger(__name__)

Arrived = Piece | Exception
"""What a replica sends of an answer, an error at last where it failed."""
LET_IN_SECONDS = 0.1
"""Between two looks at whether the engine has begun with a request."""


class Replica:
    """A model in a process of its own, run by Ray Serve."""

    def __init__(self, settings: Settings) -> None:
        from ray import serve

        self.name: str = serve.get_replica_context().replica_id.unique_id
        self.vlm = load_model(settings)
        self.vlm.engine.start()  # with no bound on who waits: Ray Serve sends no more than it may

    async def answer(
        self, request: Request, *, client: str, deadline: float | None
    ) -> AsyncGenerator[Sequence[Arrived], None]:
        """Yield what has come of an answer, first of all nothing, when the engine begins with it.

        Closing it ends the answer.
        """
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            handle = self.vlm.engine.submit(
                request,
                client=client,
                deadline=deadline,
                notify=lambda _: _wake(loop, arrived),
            )
        except Exception as error:
            yield [portable(error)]
            return
        over, told = False, False
        try:
            while not over:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if told else LET_IN_SECONDS):
                        await arrived.wait()
                arrived.clear()
                pieces: list[Arrived] = []
                try:
                    while (piece := handle.poll()) is not None:
                        pieces.append(piece)
                        over = piece.completion is not None
                except Exception as error:
                    pieces.append(portable(error))
                    over = True
                if pieces or not (told or handle.waiting):
                    told = True
                    yield pieces
        finally:
            if not over:
                handle.cancel()

    async def figures(self) -> tuple[str, Metrics, Limits]:
        """Return the name of this replica, how its engine is doing, and its limits."""
        return self.name, self.vlm.engine.metrics(), self.vlm.engine.limits

    def check_health(self) -> None:
        """Ray Serve asks now and then, and replaces a replica that raises."""
        if not self.vlm.engine.alive:
            raise RuntimeError("the engine of this replica has died")


def portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process: ours as they are, others in words."""
    if type(error).__module__.startswith("seekvl."):
        return error
    log.error("an answer failed on a replica", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")


def _wake(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
    """Tell a loop that something has come; the engine's thread calls it, perhaps after the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(arrived.set)
