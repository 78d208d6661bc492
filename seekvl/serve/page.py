"""`GET /`: the page for browsers, a list of routes for everyone else; and what the page alone asks for.

The page is built from `page/` at the root of the repository (`make page`); what is built lies in the folder
beside this file, is read once, and asks nobody but this server for anything.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StrictStr

from seekvl.serve.cog import DISCOVERY
from seekvl.serve.desk import desk_of, owner_of
from seekvl.serve.errors import ApiError
from seekvl.serve.pictures import picture_format

router = APIRouter()

FOLDER = Path(__file__).parent / "page"
"""The built page: index.html, scripts and styles, example pictures."""
KINDS = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
"""Media types by suffix; those of the system differ, and a script of the wrong type is not run."""
POLICY = "; ".join(
    (
        "default-src 'self'",  # no inline script or style, nothing of third parties
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",  # ask each time whether it is still the same
    "Vary": "Accept",
}


@dataclass(frozen=True, slots=True)
class Static:
    """A file of the page."""

    content: bytes
    kind: str
    """Its media type."""
    tag: str
    """Changes with its content."""


def read_page(folder: Path = FOLDER) -> dict[str, Static]:
    """Return the files of the page by their paths below the folder; what is not among them is not served."""
    return {
        path.relative_to(folder).as_posix(): Static(
            content=(content := path.read_bytes()),
            kind=KINDS.get(path.suffix, "application/octet-stream"),
            tag=f'"{hashlib.sha256(content).hexdigest()[:16]}"',
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@cache
def page_files() -> Mapping[str, Static]:
    """Return the files of the built page, read once."""
    return read_page()


@router.get("/", include_in_schema=False)
async def front(request: Request) -> Response:
    """Give a browser the page, and every other caller Cog's discovery and the routes there are."""
    if wants_page(request.headers.get("accept", "")):
        return _answer(request, page_files()["index.html"])
    found = {**DISCOVERY, "routes": routes(request.app)}
    return JSONResponse(found, headers={"Vary": "Accept"})


@router.get("/page/{path:path}", include_in_schema=False)
async def static(request: Request, path: str) -> Response:
    """Return a file of the page."""
    file = page_files().get(path)
    if file is None:
        raise ApiError(status=404, message="the page has no such file")
    return _answer(request, file)


class Address(BaseModel):
    """Where a picture is."""

    url: Annotated[StrictStr, Field(min_length=1, max_length=8192)]


@router.post("/v1/page/picture", tags=["Page"])
async def picture(request: Request, asked: Address) -> Response:
    """Fetch a picture for the page, which asks no third party itself, under the rules of the server."""
    data = await desk_of(request).pictures.original(asked.url, param="url", owner=owner_of(request))
    kind = f"image/{(picture_format(data) or 'png').lower()}"
    return Response(data, media_type=kind, headers={"Cache-Control": "no-store"})


def wants_page(accept: str) -> bool:
    """Tell by the header `Accept` whether a page is preferred to data.

    >>> wants_page("text/html,application/xml;q=0.9,*/*;q=0.8"), wants_page("*/*"), wants_page("")
    (True, False, False)
    >>> wants_page("application/json, text/html;q=0.5")
    False
    """
    weights = dict(_weighed(part) for part in accept.split(","))
    html = weights.get("text/html", 0.0)
    return html > 0 and html >= weights.get("application/json", 0.0)


def _weighed(part: str) -> tuple[str, float]:
    """Read one entry of `Accept`: its media type, and how much it is wanted, 0 to 1."""
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return kind, float(value)
            except ValueError:
                return kind, 0.0
    return kind, 1.0


def routes(app: FastAPI) -> list[str]:
    """List what can be asked, as `GET /health`."""
    return [
        f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods
    ]


def _answer(request: Request, file: Static) -> Response:
    """Send a file, or word that the browser's copy is still good."""
    headers = {**HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
