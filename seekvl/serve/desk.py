"""What the routes of all dialects share: settings, the model, pictures, figures, and who asks."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from fastapi import Request

from seekvl.engine.request import Request as Prepared
from seekvl.processing.tile_image import TileImageConfig
from seekvl.serve.errors import HUNG_UP, ApiError, bad_request
from seekvl.serve.events import HungUp, while_connected
from seekvl.serve.metrics import ServerMetrics
from seekvl.serve.pictures import PictureDesk
from seekvl.serve.request_log import RequestLog
from seekvl.serve.service import Service
from seekvl.serve.settings import Settings
from seekvl.serve.store import Store
from seekvl.serve.webhooks import Webhooks

if TYPE_CHECKING:
    from seekvl.serve.prediction_run import Run

SIMPLE = "-simple"
"""Behind the name of the model that takes one picture and a prompt in the predictions API."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """One for a server."""

    settings: Settings
    service: Service
    pictures: PictureDesk
    metrics: ServerMetrics
    store: Store
    webhooks: Webhooks
    log: RequestLog | None = None
    """Where whole requests are kept, if anywhere."""
    live: "dict[tuple[str, str], Run]" = field(default_factory=dict)
    """Predictions under way, by owner and id."""
    painter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    """Threads that draw boxes."""
    runs: Counter[str] = field(default_factory=Counter)
    """Predictions begun since the server was started, by model."""

    @property
    def names(self) -> tuple[str, str]:
        """The names the model answers to; in the predictions API they take different inputs."""
        name = self.settings.model_name
        return name, name + SIMPLE

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        vlm = self.service.vlm
        return min(vlm.processor.max_tokens, vlm.config.language.max_positions)

    @property
    def most_tiles(self) -> int | None:
        """Most tiles that a picture is cut into; None where the model sees every picture whole."""
        image = self.service.vlm.processor.image
        if not isinstance(image, TileImageConfig):
            return None
        return max(columns * rows for columns, rows in image.grids)

    def room(self, prepared: Prepared) -> int:
        """Return the tokens that a prompt leaves for its answer. Raises ApiError where it leaves none."""
        total = prepared.inputs.bill.total
        if total >= self.context:
            raise bad_request(
                f"the prompt takes {total:,} tokens of a context of {self.context:,}: no room for an answer",
                param="messages",
                code="context_length_exceeded",
            )
        return self.context - total


def desk_of(request: Request) -> Desk:
    """Return what the server of a request shares."""
    desk = request.app.state.desk
    assert isinstance(desk, Desk)
    return desk


def base_of(request: Request) -> str:
    """Return the address of this server as the caller wrote it."""
    return str(request.base_url).rstrip("/")


def owner_of(request: Request) -> str:
    """Return whose predictions and files a caller may see, see `guard.owner_name`."""
    return str(request.state.owner)


def client_of(request: Request) -> str:
    """Return whose request this is, for turns that are fair: a key, or an address."""
    key = request.headers.get("authorization")
    return key or (request.client.host if request.client else "")


@contextlib.asynccontextmanager
async def until_disconnected(request: Request) -> AsyncIterator[None]:
    """Cancel what is done inside as soon as the caller hangs up; raises ApiError (499) then."""
    try:
        async with while_connected(request.receive):
            yield
    except HungUp:
        raise ApiError(status=HUNG_UP, message="the caller hung up") from None
