"""The door of the server: whose name is asked, who may enter, what may be brought in, and one log line each.

Plain ASGI, so that it sees every byte before anything reads it and streams pass through untouched.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seekvl.serve.errors import ApiError, body, dialect_of, headers_of
from seekvl.serve.metrics import ServerMetrics
from seekvl.serve.page import wants_page
from seekvl.serve.settings import LOOPBACK_NAMES, Settings

log = logging.getLogger("seekvl.access")

OPEN = frozenset(("/health", "/ready", "/health-check"))
"""Routes that need no key."""
PAGE = ("/page/", "/favicon.ico")
"""The static files of the page need none either; they say nothing."""
BODY_SECONDS = 60.0
"""Longest time for the body of a request to arrive."""
UPLOADS = "/v1/files"


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What became of a request."""

    status: int = 0
    """0 before the answer has begun."""


class Guard:
    """Stands in front of all routes."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: ServerMetrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, began, seen = f"req_{uuid.uuid4().hex}", time.monotonic(), _Seen()
        scope.setdefault("state", {})["request_id"] = request_id

        async def numbered(message: Message) -> None:
            """Send on, with the id of the request on every reply."""
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._bounded(scope, receive), numbered)
        except ApiError as error:
            self.metrics.rejected.labels(error.code or str(error.status)).inc()
            if seen.status == 0:
                await refuse(error, scope=scope, send=numbered)
        finally:
            self._note(scope, seen, request_id=request_id, seconds=time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for what may not enter, by its headers alone."""
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        if self._keys and not self._open(scope, headers):
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise ApiError(status=400, message="Content-Length is no number")
        if int(length) > self.settings.max_body:
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

    def _check_key(self, given: str) -> None:
        """Compare with every key, in the same time whatever is given."""
        kind, _, key = given.partition(" ")
        right = [hmac.compare_digest(key.strip().encode(), known) for known in self._keys]
        if kind.lower() not in ("bearer", "token") or not any(right):
            raise ApiError(status=401, message="a key is needed: Authorization: Bearer KEY")

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Count the body as it comes, and wait for it only so long."""
        read, until, whole = 0, time.monotonic() + BODY_SECONDS, False

        async def bounded() -> Message:
            nonlocal read, whole
            if whole:
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
            whole = not message.get("more_body", False)
            return message

        return bounded

    def _note(self, scope: Scope, seen: _Seen, *, request_id: str, seconds: float) -> None:
        """Write the one log line of a request; no word of what was asked."""
        route = scope.get("route")
        path = getattr(route, "path", None) or "none"
        self.metrics.requests.labels(path, str(seen.status)).inc()
        self.metrics.request.observe(seconds)
        log.info("%s %s %s %d %.3f s", request_id, scope["method"], path, seen.status, seconds)


async def refuse(error: ApiError, *, scope: Scope, send: Send) -> None:
    """Send an error in the dialect of the route."""
    text = json.dumps(body(error, dialect_of(scope["path"])), ensure_ascii=False).encode()
    headers: Iterable[tuple[str, str]] = {
        "content-type": "application/json",
        "content-length": str(len(text)),
        "connection": "close",  # what is left of its body is not read
        **headers_of(error),
    }.items()
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else text})


def _too_large(most: int) -> ApiError:
    return ApiError(status=413, message=f"the request is larger than {most:,} bytes")
