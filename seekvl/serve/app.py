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
from seekvl.serve import chat, cog, files, health, hosted, models, page, pdf, responses
from seekvl.serve.answerer import Model
from seekvl.serve.desk import Desk
from seekvl.serve.errors import (
    DECLARED,
    HUNG_UP,
    TITLES,
    ApiError,
    Dialect,
    Fault,
    body,
    dialect_of,
    headers_of,
)
from seekvl.serve.files import stored_in
from seekvl.serve.guard import Guard
from seekvl.serve.metrics import ServerMetrics
from seekvl.serve.pictures import PictureDesk
from seekvl.serve.prediction_run import finish_all
from seekvl.serve.replicas import load_replicas
from seekvl.serve.request_log import RequestLog
from seekvl.serve.service import Service, load_model
from seekvl.serve.settings import Settings
from seekvl.serve.store import Store
from seekvl.serve.webhooks import Webhooks, new_secret


def create_app(settings: Settings, *, load: Callable[[Settings], Model] | None = None) -> FastAPI:
    """Return the application. Its model is loaded when the server starts, by `load`, or as the settings say.

    Raises SeekVLError for a store or a log that cannot be used.
    """
    service = Service(settings, load=load or (load_model if settings.replicas == 1 else load_replicas))
    metrics = ServerMetrics(service)
    store = Store(settings)
    pictures = PictureDesk(settings, stored=stored_in(store))
    pictures.seconds = metrics.picture.observe
    app = FastAPI(
        title="seekvl",
        version=seekvl.__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,  # both of them load scripts of others
        lifespan=lifespan,
        responses=DECLARED,
    )
    app.state.desk = Desk(
        settings=settings,
        service=service,
        pictures=pictures,
        metrics=metrics,
        store=store,
        webhooks=Webhooks(settings),
        log=None if settings.log_prompts is None else RequestLog(settings.log_prompts, settings),
    )
    # a request is compared with one room after the other: first what is asked most; versions before models of
    # any name
    for room in (chat, responses, hosted, cog, files, health, page, pdf, models):
        app.include_router(room.router)
    for kind, handler in (
        (ApiError, on_api_error),
        (RequestValidationError, on_invalid),
        (HTTPException, on_http_error),
    ):
        app.add_exception_handler(kind, handler)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    if settings.cors_origins:  # in front of the guard, so that pages can read what it refuses
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "prefer"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model beside the open port, look after it, and let its answers end."""
    desk: Desk = app.state.desk
    if desk.settings.webhook_secret is None:
        desk.webhooks.secret = await desk.store.fact("webhook_secret", make=new_secret)
    desk.service.start()
    watching = asyncio.create_task(desk.service.watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await desk.service.drain()
        await finish_all(desk)
        await desk.webhooks.close()
        await desk.store.close()


async def on_api_error(request: Request, error: Exception) -> Response:
    """Say an error in the dialect of its route."""
    assert isinstance(error, ApiError)
    return _refusal(request, error, dialect_of(request.url.path))


def _refusal(request: Request, error: ApiError, dialect: Dialect) -> Response:
    """Count an error and write it."""
    if error.status != HUNG_UP:
        request.app.state.desk.metrics.rejected.labels(error.code or str(error.status)).inc()
    return JSONResponse(body(error, dialect), status_code=error.status, headers=headers_of(error))


async def on_invalid(request: Request, error: Exception) -> Response:
    """Say which field of a body is not as it must be: 400 where OpenAI's clients ask, and for a body that is
    no JSON; else 422 with all of them.
    """
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = max(found, key=lambda fault: len(fault["loc"]))  # of a union, the branch that was meant
    broken = first["type"] == "json_invalid"
    param = None if broken else _place(first["loc"])
    reason = f"no JSON, {first['ctx']['error']} at letter {first['loc'][1]}" if broken else first["msg"]
    message = f"{param or 'the body'}: {reason}"
    if broken or dialect_of(request.url.path) in ("openai", "any"):
        return await on_api_error(request, ApiError(status=400, message=message, param=param))
    faults = tuple(
        Fault(".".join(map(str, each["loc"][1:])), each["msg"], missing=each["type"] == "missing")
        for each in found
    )
    return await on_api_error(request, ApiError(status=422, message=message, param=param, faults=faults))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Say what the framework refused: an unknown path, a wrong method, a body it cannot read.

    Who asks for a path that is not there may be anybody, so the answer has the fields of all dialects.
    """
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # the guard's, while the framework read the body
        return await on_api_error(request, error.__cause__)
    kept = dict(error.headers or {})
    if error.status_code in (404, 405):
        message = f"{TITLES[error.status_code]}: {request.method} {request.url.path}"
        refused = ApiError(status=error.status_code, message=message, headers=kept)
        return _refusal(request, refused, "any")
    return await on_api_error(request, ApiError(status=error.status_code, message=error.detail, headers=kept))


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
