"""Event streams: what goes over the wire, and the comments that keep proxies from closing it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

KEEP_ALIVE_SECONDS = 15.0
COMMENT = b": still at work\n\n"
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect it
}


encode: Callable[[object], str] = json.JSONEncoder(ensure_ascii=False).encode
"""Writes JSON with the letters of all scripts as themselves; one encoder for all, for making one takes longer
than a chunk.
"""

DECLARED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, whole or, with `stream`, as events.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}
"""What the OpenAPI document says of answers that may be streams."""


class EventStream(StreamingResponse):
    """Sends events, with a comment whenever none has come for so long; where the caller leaves, what makes
    them is closed.

    `ended` is called when it is over, also where the caller left before the first event was drawn.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        ended: Callable[[], None] = lambda: None,
        seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        super().__init__(chunks, headers=HEADERS)
        self._chunks = chunks
        self._ended = ended
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all there is, to whoever still listens."""
        try:
            with contextlib.suppress(HungUp):
                async with while_connected(receive):
                    await self.stream_response(send)
        finally:
            self._ended()

    async def stream_response(self, send: Send) -> None:
        """Send the head, the events, and the comments between them."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        comments = Comments(send, seconds=self._seconds)
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    comments.sent = comments.loop.time()
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            await comments.end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Comments:
    """Sends a comment whenever nothing was sent for so many seconds."""

    def __init__(self, send: Send, *, seconds: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.sent = self.loop.time()
        """When something was sent last, by the clock of the loop."""
        self._send, self._seconds = send, seconds
        self._sending = set[asyncio.Future[None]]()
        self._timer = self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """Send a comment, if it is time, and look again later."""
        if self.loop.time() >= self.sent + self._seconds:
            self.sent = self.loop.time()
            comment = {"type": "http.response.body", "body": COMMENT, "more_body": True}
            sending = asyncio.ensure_future(self._send(comment))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        self._timer = self.loop.call_at(self.sent + self._seconds, self._look)

    async def end(self) -> None:
        """Send no more."""
        self._timer.cancel()
        for sending in self._sending:
            sending.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)


class HungUp(Exception):  # noqa: N818 - what a caller did, not a fault
    """The caller does not wait for an answer any more."""


@contextlib.asynccontextmanager
async def while_connected(receive: Receive) -> AsyncGenerator[None, None]:
    """Cancel what is done inside as soon as the caller hangs up; raises HungUp then."""
    working, hung_up = asyncio.current_task(), False
    assert working is not None

    async def listen() -> None:
        """Wait until the caller hangs up."""
        nonlocal hung_up
        while (await receive())["type"] != "http.disconnect":
            pass
        hung_up = True
        working.cancel()

    listening = asyncio.create_task(listen())
    try:
        try:
            yield
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
    except asyncio.CancelledError:
        if not hung_up or working.uncancel():
            raise  # somebody else wants it to end
        raise HungUp from None


def data(value: Mapping[str, object] | str) -> bytes:
    r"""Write an event without a name; a mapping becomes JSON.

    >>> data("[DONE]")
    b'data: [DONE]\n\n'
    """
    text = value if isinstance(value, str) else encode(value)
    return f"data: {text}\n\n".encode()


def event(name: str, value: Mapping[str, object] | str, *, number: int | None = None) -> bytes:
    r"""Write an event with a name and perhaps an id; raw text takes a line of data for each of its lines.

    Separators other than \n that `str.splitlines` knows would cut the rest of a line off in a client that
    uses it; they are sent as \n.

    >>> event("output", "a\nb", number=3)
    b'event: output\nid: 3\ndata: a\ndata: b\n\n'
    """
    lines = [line.rstrip("\r\n") for line in _lines(value)] if isinstance(value, str) else [encode(value)]
    head = f"event: {name}\n" + ("" if number is None else f"id: {number}\n")
    return (head + "".join(f"data: {line}\n" for line in lines) + "\n").encode()


def _lines(text: str) -> list[str]:
    r"""Cut a text at every separator; a text that ends in one has an empty line behind it.

    >>> _lines("\n"), _lines("a")
    (['', ''], ['a'])
    """
    cut = text.splitlines()
    return [*cut, ""] if not text or text.splitlines(keepends=True)[-1] != cut[-1] else cut
