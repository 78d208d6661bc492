"""The application: every route of every dialect behind one door."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import seekvl
from seekvl.serve import chat, health, models, page, pdf
from seekvl.serve.desk import Desk
from seekvl.serve.errors import TITLES, ApiError, body, dialect_of, headers_of
from seekvl.serve.guard import Guard
from seekvl.serve.metrics import ServerMetrics
from seekvl.serve.pictures import PictureDesk
from seekvl.serve.service import Service, load_model
from seekvl.serve.settings import Settings
from seekvl.vlm import VLM


def create_app(settings: Settings, *, load: Callable[[Settings], VLM] = load_model) -> FastAPI:
    """Return the application. Its model is loaded when the server starts, by `load`."""
    service = Service(settings, load=load)
    metrics = ServerMetrics(service)
    pictures = PictureDesk(settings)
    pictures.seconds = metrics.picture.observe
    app = FastAPI(
        title="seekvl",
        version=seekvl.__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,  # both of them load scripts of others
        lifespan=lifespan,
    )
    app.state.desk = Desk(settings=settings, service=service, pictures=pictures, metrics=metrics)
    for room in (health, models, chat, page, pdf):
        app.include_router(room.router)
    for kind, handler in (
        (ApiError, on_api_error),
        (RequestValidationError, on_invalid),
        (HTTPException, on_http_error),
        (Exception, on_fault),
    ):
        app.add_exception_handler(kind, handler)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "prefer"],
        )
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    return app


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model beside the open port, look after it, and let its answers end."""
    desk: Desk = app.state.desk
    desk.service.start()
    watching = asyncio.create_task(desk.service.watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await desk.service.drain()


async def on_api_error(request: Request, error: Exception) -> Response:
    """Say an error in the dialect of its route."""
    assert isinstance(error, ApiError)
    request.app.state.desk.metrics.rejected.labels(error.code or str(error.status)).inc()
    return JSONResponse(
        body(error, dialect_of(request.url.path)), status_code=error.status, headers=headers_of(error)
    )


async def on_invalid(request: Request, error: Exception) -> Response:
    """Say which field of a body is not as it must be: 400 where OpenAI's clients ask, else 422."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = _place(first["loc"])
    message = f"{param or 'the body'}: {first['msg']}"
    status = 400 if dialect_of(request.url.path) in ("openai", "any") else 422
    return await on_api_error(request, ApiError(status=status, message=message, param=param))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Say what the framework refused: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{TITLES.get(error.status_code, error.detail)}: {request.method} {request.url.path}"
    kept = dict(error.headers or {})
    return await on_api_error(request, ApiError(status=error.status_code, message=message, headers=kept))


async def on_fault(request: Request, error: Exception) -> Response:
    """Say that a fault is ours; the log has the rest."""
    request_id = request.scope.get("state", {}).get("request_id", "")
    message = f"something broke here; the server's log has it under {request_id}"
    return await on_api_error(request, ApiError(status=500, message=message))


def _place(loc: Sequence[Any]) -> str | None:
    """Write where a fault lies as clients name it.

    >>> _place(("body", "messages", 0, "content", "str"))
    'messages[0].content'
    """
    text = ""
    for part in loc[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part in ("str", "ImageUrl") or part.startswith(("list[", "constrained")):
            continue  # the branch of a union
        else:
            text += f".{part}" if text else str(part)
    return text or None
