"""The door of the server: whose name is asked, who may enter, what may be brought in, and one log line each.

Plain ASGI, so that it sees every byte before anything reads it and streams pass through untouched.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seekvl.engine.request import Completion
from seekvl.serve.errors import ApiError, body, dialect_of, headers_of
from seekvl.serve.metrics import ServerMetrics
from seekvl.serve.page import wants_page
from seekvl.serve.settings import LOOPBACK_NAMES, Settings

log = logging.getLogger("seekvl.access")

OPEN = frozenset(("/health", "/ready", "/health-check"))
"""Routes that need no key."""
PAGE = ("/page/", "/favicon.ico")
"""The static files of the page need none either; they say nothing."""
VERSIONS = frozenset(("1.0", "1.1", "2"))
"""Of HTTP; the parser of requests takes any two digits."""
BODY_SECONDS = 60.0
"""Longest time for the body of a request to arrive."""
UPLOADS = "/v1/files"
LINGER_SECONDS = 5.0
"""How long the rest of a refused body is thrown away: who is still sending it would not see the answer."""
DIGITS = 15
"""Most digits of a Content-Length that are read as a number."""


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What became of a request."""

    status: int = 0
    """0 before the answer has begun."""
    whole: bool = False
    """Whether the body of the request was read to its end."""


class Guard:
    """Stands in front of all routes."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: ServerMetrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._owners = {key.encode(): owner_name(key) for key in settings.api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, began, seen = f"req_{uuid.uuid4().hex}", time.monotonic(), _Seen()
        scope.setdefault("state", {}).update(request_id=request_id, completions=[], owner="")
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def numbered(message: Message) -> None:
            """Send on, with the id of the request on every reply."""
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(scope=message)
                if seen.status >= 400:
                    await self._read_rest(receive, seen)
                    if not seen.whole:
                        headers["connection"] = "close"  # or the rest would be taken for the next request
                headers["x-request-id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check(scope)
            await self.app(inner, self._bounded(receive, seen), numbered)
        except ApiError as error:
            self.metrics.rejected.labels(error.code or str(error.status)).inc()
            await refuse(error, scope=scope, send=numbered)
        except Exception:
            log.exception("%s failed", request_id)
            if seen.status:
                raise  # the answer has begun: uvicorn breaks it off
            message = f"something broke here; the server's log has it under {request_id}"
            await refuse(ApiError(status=500, message=message), scope=scope, send=numbered)
        finally:
            self._note(inner, seen, request_id=request_id, seconds=time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for what may not enter, by its headers alone."""
        if scope["http_version"] not in VERSIONS:
            raise ApiError(status=400, message="the HTTP version of the request is none")
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        if self._owners and not self._open(scope, headers):
            scope["state"]["owner"] = self._owner(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise ApiError(status=400, message="Content-Length is no number")
        if len(length) > DIGITS or int(length) > self.settings.max_body:
            raise _too_large(self.settings.max_body)
        brings = int(length) > 0 or "transfer-encoding" in headers
        given = headers.get("content-type", "").partition(";")[0].strip().lower()
        writes = scope["method"] in ("POST", "PUT", "PATCH") and not scope["path"].startswith(UPLOADS)
        if writes and given != "application/json" and (brings or given):
            message = f"the body is {given or 'of no type'}; send application/json"
            raise ApiError(status=415, message=message)

    def _check_host(self, host: str) -> None:
        """Refuse a name that is none of this server's: a page may have had its own name lead here."""
        allowed = self.settings.allowed_hosts
        if "*" in allowed or (self.settings.exposed and not allowed):
            return
        name = (
            host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        )
        if name.lower().rstrip(".") not in (*LOOPBACK_NAMES, self.settings.host, *allowed):
            raise ApiError(
                status=403, message="the Host of the request is no name of this server", code="forbidden_host"
            )

    def _open(self, scope: Scope, headers: Headers) -> bool:
        """Tell whether a route needs no key."""
        path = scope["path"]
        if path in OPEN or (path == "/metrics" and self.settings.open_metrics):
            return True
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return True  # a browser asks before it sends the key
        page = path == "/" and wants_page(headers.get("accept", ""))
        return scope["method"] in ("GET", "HEAD") and (page or path.startswith(PAGE))

    def _owner(self, given: str) -> str:
        """Tell whose key is given, comparing with every one, in the same time whatever it is."""
        kind, _, key = given.partition(" ")
        right = [hmac.compare_digest(key.strip().encode(), known) for known in self._owners]
        if kind.lower() not in ("bearer", "token") or not any(right):
            raise ApiError(status=401, message="a key is needed: Authorization: Bearer KEY")
        return list(self._owners.values())[right.index(True)]

    def _bounded(self, receive: Receive, seen: _Seen) -> Receive:
        """Count the body as it comes, and wait for it only so long."""
        read, until = 0, time.monotonic() + BODY_SECONDS

        async def bounded() -> Message:
            """Receive the next part."""
            nonlocal read
            if seen.whole:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(
                    status=408, message=f"the body did not arrive within {BODY_SECONDS:g} s"
                ) from error
            read += len(message.get("body", b""))
            if read > self.settings.max_body:
                raise _too_large(self.settings.max_body)
            seen.whole = not message.get("more_body", False)
            return message

        return bounded

    async def _read_rest(self, receive: Receive, seen: _Seen) -> None:
        """Throw away what is left of a refused body, for a while; not of one that was waited for in vain."""
        if seen.status == 408:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not seen.whole:
                    seen.whole = not (await receive()).get("more_body", False)

    def _note(self, scope: Scope, seen: _Seen, *, request_id: str, seconds: float) -> None:
        """Write the one log line of a request; no word of what was asked."""
        route = scope.get("route")
        path = getattr(route, "path", None) or "none"
        self.metrics.requests.labels(path, str(seen.status)).inc()
        self.metrics.request.observe(seconds)
        costs = "".join(map(_costs, scope["state"]["completions"]))
        log.info("%s %s %s %d %.3f s%s", request_id, scope["method"], path, seen.status, seconds, costs)


def owner_name(key: str) -> str:
    """Return what the holder of a key is called in the store, which shall not hold the key itself.

    Who asks a server that wants no key is called "".
    """
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"seekvl owner").hexdigest()


async def refuse(error: ApiError, *, scope: Scope, send: Send) -> None:
    """Send an error in the dialect of the route."""
    text = json.dumps(body(error, dialect_of(scope["path"])), ensure_ascii=False).encode()
    headers: Iterable[tuple[str, str]] = {
        "content-type": "application/json",
        "content-length": str(len(text)),
        **headers_of(error),
    }.items()
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else text})


def _costs(completion: Completion) -> str:
    """Write what an answer took: tokens of prompt and answer, seconds of its parts."""
    usage, timings = completion.usage, completion.timings
    return (
        f", {usage.prompt_tokens} + {usage.completion_tokens} tokens in {timings.preprocess:.3f} + "
        f"{timings.vision:.3f} + {timings.prefill:.3f} + {timings.decode:.3f} s"
    )


def _too_large(most: int) -> ApiError:
    return ApiError(status=413, message=f"the request is larger than {most:,} bytes")
