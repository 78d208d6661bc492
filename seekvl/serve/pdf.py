"""`POST /v1/page/pdf`: the pages of a PDF as pictures, one event each, drawn in a process that is bounded."""

import asyncio
import base64
import contextlib
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, StrictStr

from seekvl.runtime import SeekVLError, require
from seekvl.serve import events
from seekvl.serve.desk import desk_of
from seekvl.serve.errors import ApiError, bad_request, error_event
from seekvl.serve.fetch import FetchError
from seekvl.serve.pictures import read_data_url

router = APIRouter()

WORKER = Path(__file__).with_name("pdf_worker.py")
MAGIC = b"%PDF-"
MOST_PAGES = 50
"""Pages that are drawn of one PDF; it is said how many there are."""
SIDE = 1536
"""Px of the longer side of a page: what the largest published checkpoints look at."""
SECONDS = 60
"""Time for all pages."""
MOST_PDFS = 2
"""PDFs that are drawn at once; more are told to come back."""
RETRY_SECONDS = 5

_drawn = 0
_closing: set[asyncio.Future[None]] = set()


class Pdf(BaseModel):
    """A PDF."""

    pdf: Annotated[StrictStr, Field(min_length=1)]
    """A data: URL."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page."""

    number: int
    """From 1."""
    pages: int
    """Of the whole PDF."""
    png: bytes


@router.post("/v1/page/pdf", tags=["Page"])
async def pdf(request: Request, asked: Pdf) -> Response:
    """Draw the pages of a PDF: an event stream of `{"page", "pages", "picture"}`, `picture` a data: URL."""
    data = _bytes(asked.pdf, most=desk_of(request).settings.max_picture_bytes)
    pages = draw(data)
    try:
        first = await anext(pages)
    except StopAsyncIteration:
        raise bad_request("the PDF has no pages", param="pdf", code="invalid_pdf") from None
    return events.EventStream(_stream(first, pages), ended=partial(_let_go, pages))


async def draw(data: bytes) -> AsyncGenerator[Page, None]:
    """Yield the pages of a PDF; leaving early ends the work. Raises ApiError."""
    global _drawn
    if _drawn >= MOST_PDFS:
        raise ApiError(status=429, message="other PDFs are being drawn", retry_after=RETRY_SECONDS)
    _drawn += 1
    try:
        until = time.monotonic() + SECONDS  # asyncio.timeout would bind to the task of the first page
        async with _worker(data) as process:
            while (page := await asyncio.wait_for(_next(process), until - time.monotonic())) is not None:
                yield page
    except TimeoutError as error:
        raise bad_request(
            f"the PDF was not drawn within {SECONDS} s; send fewer pages", param="pdf", code="invalid_pdf"
        ) from error
    finally:
        _drawn -= 1


@contextlib.asynccontextmanager
async def _worker(data: bytes) -> AsyncIterator[Process]:
    """Run the worker on a PDF, and end it whatever happens."""
    arguments = (str(WORKER), str(MOST_PAGES), str(SIDE), str(SECONDS))
    # isolated (-I): no environment, no site of the user, not this folder on the path
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", *arguments, stdin=PIPE, stdout=PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    feeding = asyncio.create_task(_feed(process, data))
    try:
        yield process
    finally:
        feeding.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.gather(feeding, return_exceptions=True)
        await process.wait()


async def _feed(process: Process, data: bytes) -> None:
    """Hand the worker its PDF."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is told by its output
        process.stdin.write(data)
        await process.stdin.drain()
        process.stdin.close()


async def _next(process: Process) -> Page | None:
    """Read a page from the worker; None after the last. Raises ApiError for what PDFium could not read."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        if await process.wait() == 0:
            return None
        raise bad_request("the PDF cannot be read, or takes too much", param="pdf", code="invalid_pdf")
    head = json.loads(line)
    if "error" in head:
        locked = "password" in head["error"].lower()
        why = "it asks for a password; save it without one" if locked else "it is damaged"
        raise bad_request(f"the PDF cannot be read: {why}", param="pdf", code="invalid_pdf")
    return Page(head["page"], head["pages"], await process.stdout.readexactly(head["bytes"]))


async def _stream(first: Page, rest: AsyncGenerator[Page, None]) -> AsyncGenerator[bytes, None]:
    """Write the pages as events."""
    yield _event(first)
    try:
        async with contextlib.aclosing(rest):
            async for page in rest:
                yield _event(page)
    except ApiError as error:
        yield events.data(error_event(error))


def _let_go(pages: AsyncGenerator[Page, None]) -> None:
    """End the work on a PDF, also where the caller left before the first page was sent."""
    closing = asyncio.ensure_future(pages.aclose())
    _closing.add(closing)
    closing.add_done_callback(_closing.discard)


def _event(page: Page) -> bytes:
    picture = "data:image/png;base64," + base64.b64encode(page.png).decode()
    return events.data({"page": page.number, "pages": page.pages, "picture": picture})


def _bytes(url: str, *, most: int) -> bytes:
    """Return the bytes of a PDF, checked from outside. Raises ApiError."""
    try:
        require("pypdfium2", extra="server")
    except SeekVLError as error:
        raise ApiError(status=501, message=str(error), param="pdf") from error
    try:
        data = read_data_url(url, most=most)
    except FetchError as error:
        raise bad_request(f"the PDF: {error}", param="pdf", code="invalid_pdf") from error
    if len(data) > most:
        raise bad_request(f"the PDF has {len(data):,} bytes, at most {most:,} are taken", param="pdf")
    if MAGIC not in data[:1024]:
        raise bad_request("this is no PDF", param="pdf", code="invalid_pdf")
    return data
