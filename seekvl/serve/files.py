"""`/v1/files`: uploads that inputs may name, in the forms of the Replicate and of the OpenAI client.

A picture that is given by the address of a file here is read from the store. It is never fetched: the guard
would refuse this very server, and rightly.
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from urllib.parse import quote, urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from seekvl.serve.desk import Desk, base_of, desk_of, owner_of
from seekvl.serve.errors import ApiError
from seekvl.serve.fetch import FetchError
from seekvl.serve.pictures import Stored
from seekvl.serve.records import FileRecord
from seekvl.serve.store import Store

router = APIRouter(tags=["Files"])

HERE = re.compile(r"(?:https?://[^/?#]+)?/v1/files/(file_[0-9a-f]{32})(?:/content)?", re.IGNORECASE)
"""The address of a file, by any name of this server; ids cannot be guessed."""
METADATA_FIELD = re.compile(r"metadata\[(\w{1,64})\]")
LONGEST_NAME = 255
MOST_FIELDS = 30
"""Of a form, what is noted about the file included."""


def stored_in(store: Store) -> Stored:
    """Return what reads the files of a store by their address."""

    async def stored(url: str, owner: str) -> bytes | None:
        """Return the bytes of somebody's file; None for any other address. Raises FetchError for one that is
        gone.
        """
        found = HERE.fullmatch(url)
        if found is None:
            return None
        data = await store.file_data(found[1].lower(), owner=owner)
        if data is None:
            raise FetchError(f"the file {found[1]} is not kept here, or no longer")
        return data

    return stored


@router.post("/v1/files", status_code=201)
async def upload(request: Request) -> Response:
    """Keep a file: form field `content` or `file`, perhaps `metadata` in JSON and `purpose`.

    The second generation of the Replicate client sends `metadata[key]`, and name and type in fields of their
    own.
    """
    desk = desk_of(request)
    check_origin(request, desk)
    try:
        async with request.form(max_files=1, max_fields=MOST_FIELDS) as form:
            given = form.get("content", form.get("file"))
            if not isinstance(given, UploadFile):
                raise ApiError(
                    status=422, message="a multipart form with a file under content or file is wanted"
                )
            data = await given.read()
            metadata = {**_metadata(form.get("metadata")), **_metadata_fields(form.multi_items())}
            name = _text(form.get("filename")) or given.filename or "file"
            kind = _text(form.get("type")) or given.content_type or "application/octet-stream"
            purpose, moment = form.get("purpose"), time.time()
            record = FileRecord(
                id=f"file_{secrets.token_hex(16)}",
                name=_clean(name),
                content_type=_clean(kind),
                size=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                metadata=metadata,
                purpose=_clean(purpose) if isinstance(purpose, str) else None,
                created=moment,
                expires=moment + desk.settings.file_seconds,
                owner=owner_of(request),
            )
    except MultiPartException as error:
        raise ApiError(status=400, message=f"the form cannot be read: {error.message}") from error
    await desk.store.add_file(record, data)
    return JSONResponse(record.told(base_of(request)), status_code=201)


@router.get("/v1/files")
async def files(request: Request) -> dict[str, object]:
    """List the caller's files, newest first."""
    kept = await desk_of(request).store.files(owner=owner_of(request))
    found = [record.told(base_of(request)) for record in kept]
    return {
        "object": "list",
        "data": found,
        "has_more": False,
        "previous": None,
        "next": None,
        "results": found,
    }


@router.get("/v1/files/{file_id}")
async def file(request: Request, file_id: str) -> dict[str, object]:
    """Describe a file."""
    record = await desk_of(request).store.file(file_id, owner=owner_of(request))
    if record is None:
        raise unknown(file_id)
    return record.told(base_of(request))


@router.get("/v1/files/{file_id}/content")
async def content(request: Request, file_id: str) -> Response:
    """Return the bytes of a file, for saving: no browser shows them as a page of this server."""
    store, owner = desk_of(request).store, owner_of(request)
    record, data = await store.file(file_id, owner=owner), await store.file_data(file_id, owner=owner)
    if record is None or data is None:
        raise unknown(file_id)
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.name, safe='')}"}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}", status_code=204)
async def delete(request: Request, file_id: str) -> Response:
    """Forget a file."""
    if not await desk_of(request).store.delete_file(file_id, owner=owner_of(request)):
        raise unknown(file_id)
    return Response(status_code=204)


def unknown(file_id: str) -> ApiError:
    """Say that there is no such file."""
    return ApiError(status=404, message=f"the file {file_id[:80]!r} is not kept here, or no longer")


def check_origin(request: Request, desk: Desk) -> None:
    """Refuse forms of foreign pages: browsers send them without asking first."""
    origin = request.headers.get("origin")
    own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not own and origin not in desk.settings.cors_origins:
        raise ApiError(
            status=403, message="pages of this origin may not upload here", code="forbidden_origin"
        )


def _metadata(given: object) -> dict[str, object]:
    """Read what a caller notes about a file."""
    if given is None or given == "":
        return {}
    try:
        if isinstance(given, UploadFile):
            raise ValueError
        found = json.loads(str(given))
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(status=422, message="metadata is no JSON", param="metadata") from error
    if not isinstance(found, dict):
        raise ApiError(status=422, message="metadata is no JSON object", param="metadata")
    return found


def _metadata_fields(fields: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Read what a caller notes about a file in a field each.

    >>> _metadata_fields([("metadata[of]", "a sign"), ("purpose", "vision")])
    {'of': 'a sign'}
    """
    found = [(METADATA_FIELD.fullmatch(name), value) for name, value in fields]
    return {name[1]: value for name, value in found if name is not None and isinstance(value, str)}


def _text(value: object) -> str | None:
    """Return a form's field where it is a text."""
    return value if isinstance(value, str) else None


def _clean(text: str) -> str:
    """Shorten a name, and replace what cannot be written."""
    return text.encode(errors="replace").decode()[:LONGEST_NAME]
