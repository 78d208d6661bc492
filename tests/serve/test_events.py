"""What goes over the wire, and the comments between."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from seekvl.serve.events import COMMENT, EventStream, data, event


async def sent(
    chunks: AsyncGenerator[bytes, None], *, leave_after: float = 60.0
) -> tuple[list[bytes], list[str]]:
    """Let a response send its chunks to a caller who leaves; return what was sent, and what was told."""
    told: list[str] = []
    bodies: list[bytes] = []

    async def receive() -> dict[str, str]:
        await asyncio.sleep(leave_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        bodies.append(message.get("body", b""))

    response = EventStream(chunks, ended=lambda: told.append("ended"), seconds=0.1)
    await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    return bodies, told


def test_a_response_fills_the_time_with_comments() -> None:
    async def slow() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.25)
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"

    bodies, told = asyncio.run(sent(slow()))
    assert bodies == [b"", COMMENT, COMMENT, b"data: 1\n\n", b"data: 2\n\n", b""]
    assert told == ["ended"]
    assert COMMENT.startswith(b":")


def test_a_response_says_that_its_caller_left() -> None:
    ended = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.sleep(60)
            yield b"never"
        finally:
            ended.append(True)

    for seconds in (0.0, 0.2):
        _, told = asyncio.run(sent(endless(), leave_after=seconds))
        assert told == ["ended"]
    assert ended  # of the one that had begun


def test_leaving_early_ends_what_makes_the_events() -> None:
    ended = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    bodies, _ = asyncio.run(sent(endless(), leave_after=0.1))
    assert bodies[1] == b"x"
    assert ended == [True]


def test_what_breaks_the_events_is_raised() -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"x"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(sent(broken()))


@pytest.mark.parametrize("mark", ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_no_separator_cuts_a_line_off(mark: str) -> None:
    assert event("output", f"a{mark}b") == b"event: output\ndata: a\ndata: b\n\n"
    assert event("output", mark) == b"event: output\ndata: \ndata: \n\n"


def test_letters_of_all_scripts_stay_themselves() -> None:
    assert data({"text": "猫\u2028"}) == 'data: {"text": "猫\u2028"}\n\n'.encode()
