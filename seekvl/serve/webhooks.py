"""Telling others of predictions: signed webhooks, through the same guard as pictures.

    start        at once, when the prediction begins
    output, logs at most every half second each, and not while an earlier call is under way
    completed    at once, when it has ended; tried again while the receiver is busy, broken or away

Signed as Replicate does: v1, and in base64 the HMAC-SHA256 of "{id}.{time}.{body}".
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from seekvl.serve.fetch import FetchError, RefusedError, Rules, Web
from seekvl.serve.settings import Settings, signing_key

log = logging.getLogger(__name__)

Event = Literal["start", "output", "logs", "completed"]
EVENTS: tuple[Event, ...] = ("start", "output", "logs", "completed")
Body = Callable[[], Mapping[str, object]]
"""Returns what a call tells; asked for only when there is a call."""

SECONDS = 30.0
"""Longest time for one call."""
BETWEEN = 0.5
"""Seconds between two calls of output, and of logs."""
NEVER = 0
"""Instead of a status: the address may not be called."""
TRIES = 12
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
"""Seconds before the second try of a last call; they double up to the longest."""
SETTLING = 2.0
"""Seconds that an earlier call has to end before the last one is made."""
PARTING = 5.0
"""Seconds that last calls have when the server stops."""


class Webhooks:
    """Calls webhooks, for all predictions of a server."""

    def __init__(self, settings: Settings) -> None:
        self._web = Web(Rules(allowed=settings.fetch_hosts, max_bytes=0, seconds=SECONDS))
        self._calls: set[asyncio.Task[None]] = set()
        self._given = settings.webhook_secret is not None
        self.secret = settings.webhook_secret or new_secret()

    def secret_of(self, owner: str) -> str:
        """Return what the calls of an owner are signed with: what the operator has set, or one that no other
        owner is told.
        """
        if self._given or not owner:
            return self.secret
        own = hmac.new(signing_key(self.secret), owner.encode(), hashlib.sha256).digest()
        return "whsec_" + base64.b64encode(own).decode()

    def spawn(self, call: "asyncio.Task[None]") -> None:
        """Look after a call that nobody waits for."""
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def close(self) -> None:
        """Give last calls a little time, then let go."""
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=PARTING)
            for call in late:
                call.cancel()
            if late:
                log.warning("%d webhooks were not delivered: the server stops", len(late))

    async def call(self, url: str, body: bytes, *, name: str, owner: str = "") -> int | None:
        """Call once; return the status, None where nothing was reached, NEVER where nothing may be."""
        moment = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "webhook-id": name,
            "webhook-timestamp": moment,
            "webhook-signature": "v1," + signature(self.secret_of(owner), name, moment, body),
        }
        try:
            status, _ = await self._web.send(url, body=body, headers=headers)
        except FetchError as error:
            log.warning("webhook %s: %s", name, error)
            return NEVER if isinstance(error, RefusedError) else None
        return status

    async def insist(self, url: str, body: bytes, *, name: str, owner: str = "") -> None:
        """Call until the receiver has taken it, or has refused it, or all tries are used."""
        for pause in (*pauses(), None):
            status = await self.call(url, body, name=name, owner=owner)
            if status is not None and status != 429 and status < 500:
                return
            if pause is not None:
                await asyncio.sleep(pause)
        log.warning("webhook %s was not delivered in %d tries", name, TRIES)


@dataclass(kw_only=True, slots=True)
class Webhook:
    """The calls for one prediction."""

    webhooks: Webhooks
    url: str
    owner: str = ""
    """Whose the prediction is."""
    events: frozenset[Event] = frozenset(EVENTS)
    _called: dict[Event, float] = field(default_factory=dict)
    _under_way: "asyncio.Task[None] | None" = None

    def tell(self, event: Event, body: Body) -> None:
        """Tell of a step, unless nobody wants to know, or it was told of a moment ago."""
        if event not in self.events or (self._under_way is not None and not self._under_way.done()):
            return
        moment = time.monotonic()
        if event in ("output", "logs") and moment - self._called.get(event, float("-inf")) < BETWEEN:
            return
        self._called[event] = moment
        self._under_way = asyncio.create_task(self._once(encoded(body)))
        self.webhooks.spawn(self._under_way)

    def completed(self, body: Body) -> None:
        """Tell of the end."""
        if "completed" in self.events:
            self.webhooks.spawn(asyncio.create_task(self._last(encoded(body))))

    async def _once(self, body: bytes) -> None:
        await self.webhooks.call(self.url, body, name=_name(), owner=self.owner)

    async def _last(self, body: bytes) -> None:
        """Call when the call before has ended, so that the end is what is heard last."""
        if self._under_way is not None:
            await asyncio.wait([self._under_way], timeout=SETTLING)
            self._under_way.cancel()
        await self.webhooks.insist(self.url, body, name=_name(), owner=self.owner)


def pauses() -> list[float]:
    """Return the seconds between the tries of a last call."""
    return [min(FIRST_PAUSE * 2**number, LONGEST_PAUSE) for number in range(TRIES - 1)]


def encoded(body: Body) -> bytes:
    """Write what a call tells."""
    return json.dumps(body(), ensure_ascii=False).encode()


def signature(secret: str, name: str, moment: str, body: bytes) -> str:
    """Return the signature of a call, in base64."""
    signed = f"{name}.{moment}.".encode() + body
    return base64.b64encode(hmac.new(signing_key(secret), signed, hashlib.sha256).digest()).decode()


def new_secret() -> str:
    """Make a secret; the letters of its base64 hold no _, at which clients cut it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def _name() -> str:
    return f"msg_{secrets.token_hex(12)}"
