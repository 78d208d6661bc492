"""What the server asks of a model, be it in this process (`seekvl.vlm`) or on replicas (`serve.replicas`)."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from seekvl.engine.engine import Metrics
from seekvl.engine.request import Piece, Request, SamplingParams
from seekvl.engine.scheduler import Limits
from seekvl.models.vl2 import AnyConfig
from seekvl.processing.conversation import Conversation
from seekvl.processing.encode import Processor


class Held(Protocol):
    """An answer that comes; see `engine.handle.Handle`."""

    @property
    def waiting(self) -> bool:
        """Whether nobody has begun with it."""

    def poll(self) -> Piece | None:
        """Return the next piece if it is there. Raises what made the answer fail."""

    def cancel(self) -> None:
        """End it; its last piece says so."""


Notify: TypeAlias = Callable[[Sequence[Held]], None]
"""Who is told of answers that something has come of; see `engine.handle.Notify`."""


class Answerer(Protocol):
    """What answers; see `engine.engine.Engine`."""

    @property
    def limits(self) -> Limits:
        """How much it takes at once."""

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""

    def submit(self, request: Request, *, client: str, deadline: float | None, notify: Notify | None) -> Held:
        """Take a request in."""

    def metrics(self) -> Metrics:
        """Return how it is doing."""

    def start(self) -> None:
        """Begin to answer."""

    def drain(self, seconds: float) -> bool:
        """Take no more requests, wait so long for those under way; return whether all ended."""

    def close(self) -> None:
        """End the answers that are left."""


class Model(Protocol):
    """A model that answers; see `vlm.VLM`."""

    @property
    def processor(self) -> Processor:
        """Turns conversations into model input."""

    @property
    def config(self) -> AnyConfig:
        """The dimensions of the networks."""

    @property
    def engine(self) -> Answerer:
        """What answers now."""

    @property
    def device(self) -> object:
        """Where it is computed, for the log."""

    @property
    def dtype(self) -> object:
        """In which numbers, for the log."""

    def prepare(
        self, messages: Conversation, params: SamplingParams, *, max_tiles: int | None = None
    ) -> Request:
        """Turn a conversation into what `engine.submit` takes."""

    def renew_engine(self, *, queue: int | None = None) -> None:
        """Answer with a new engine, which lets at most `queue` requests wait."""
