"""A server as a process: its port, its signals, and callers who never finish a sentence.

first SIGTERM or SIGINT    ready turns 503, running answers finish within the time of grace, exit 0
second one                 exit at once, 1
the model cannot answer    exit 1
"""

import asyncio
import logging
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from seekvl.runtime import SeekVLError
from seekvl.serve.app import create_app
from seekvl.serve.service import Service
from seekvl.serve.settings import Settings

log = logging.getLogger(__name__)

HEADER_SECONDS = 15.0
"""Longest time for the headers of a request, from its first byte or from the connection on."""
KEEP_ALIVE_SECONDS = 75
"""How long a connection may rest between two requests."""


class Protocol(H11Protocol):
    """uvicorn's, which waits for headers for ever; this one hangs up."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._overdue = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def data_received(self, data: bytes) -> None:
        """Take what came; wait on for headers that have begun."""
        super().data_received(data)
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy and self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        elif not busy and self._overdue is None and not self.transport.is_closing():
            self._overdue = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._overdue is not None:
            self._overdue.cancel()
        super().connection_lost(exc)

    def _hang_up(self) -> None:
        self._overdue = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, which stops listening at the first signal; this one first lets answers end, and says so."""

    def __init__(self, config: uvicorn.Config, *, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to stop."""
        if self._signals and self._draining is None:
            log.info("stopping: answers under way have %g s", self.service.settings.grace_seconds)
            self._draining = asyncio.create_task(self.service.drain())
        if self.service.phase == "failed" or (self._draining is not None and self._draining.done()):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(settings: Settings) -> int:
    """Serve until a signal; return the exit code. Raises SeekVLError for a port that cannot be had."""
    app = create_app(settings)
    config = server_config(app, settings)
    server = Server(config, service=app.state.desk.service)
    if settings.exposed and not settings.api_keys:
        print(
            f"warning: {settings.host} can be reached from other machines and no key is asked for; "
            "set --api-key, or listen on 127.0.0.1",
            file=sys.stderr,
        )
    try:
        door = config.bind_socket()  # before the model is loaded: a thread in its midst cannot be left
    except SystemExit as error:  # uvicorn's way of saying that the port is taken
        raise SeekVLError(
            f"cannot listen on {settings.host}:{settings.port}: another program may; use --port"
        ) from error
    with door:
        server.run(sockets=[door])
    return int(server.force_exit or app.state.desk.service.phase == "failed")


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return how uvicorn is run."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",
        access_log=False,  # the guard writes one line a request
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
