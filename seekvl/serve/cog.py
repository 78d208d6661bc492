"""The predictions API in Cog's style: one model, at the root of the server."""

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from seekvl.serve import events
from seekvl.serve.desk import Desk, base_of, desk_of, owner_of, until_disconnected
from seekvl.serve.errors import ApiError, Fault, invalid
from seekvl.serve.prediction_request import PredictionRequest, begin, check_id
from seekvl.serve.prediction_run import Run
from seekvl.serve.prediction_schemas import document, models
from seekvl.serve.service import not_ready

router = APIRouter(tags=["Cog"])

DISCOVERY = {
    "docs_url": "/",
    "openapi_url": "/openapi.json",
    "healthcheck_url": "/health-check",
    "predictions_url": "/predictions",
    "predictions_idempotent_url": "/predictions/{prediction_id}",
    "predictions_cancel_url": "/predictions/{prediction_id}/cancel",
}
"""What is where. There is no route that shuts the server down."""


def served(desk: Desk) -> str:
    """Return the name of the model that the Cog routes serve."""
    full, simple = desk.names
    return full if desk.settings.cog_inputs == "full" else simple


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, object]:
    """Describe the model."""
    desk = desk_of(request)
    if not desk.service.ready:
        raise not_ready(desk.service.phase)
    return document(models(desk)[served(desk)])


@router.post("/predictions")
async def predict(request: Request, body: PredictionRequest | None = None) -> Response:
    """Run the model: wait for the answer, stream it, or (`Prefer: respond-async`) only begin."""
    asked = body or PredictionRequest()
    return await _predict(request, asked, name=None if asked.id is None else check_id(asked.id))


@router.put("/predictions/{prediction_id}")
async def predict_as(request: Request, prediction_id: str, body: PredictionRequest | None = None) -> Response:
    """Run the model under an id of the caller's; while it runs, asking again starts nothing new."""
    asked = body or PredictionRequest()
    if asked.id is not None and asked.id != prediction_id:
        raise invalid(Fault("id", f"the body says {asked.id[:80]!r}, the path {prediction_id[:80]!r}"))
    running = desk_of(request).live.get((owner_of(request), prediction_id))
    if running is not None:
        running.replied = True
        return JSONResponse(running.prediction.told(base_of(request)), status_code=202)
    return await _predict(request, asked, name=check_id(prediction_id))


@router.post("/predictions/{prediction_id}/cancel")
async def cancel(request: Request, prediction_id: str) -> Response:
    """Stop a prediction that runs."""
    run = desk_of(request).live.get((owner_of(request), prediction_id))
    if run is None:
        return JSONResponse({}, status_code=404)
    run.cancel()
    await run.ended()
    return JSONResponse({})


async def _predict(request: Request, body: PredictionRequest, *, name: str | None) -> Response:
    """Begin, and answer in the form that is asked for. Raises ApiError."""
    desk, base = desk_of(request), base_of(request)
    streamed = "text/event-stream" in request.headers.get("accept", "")
    waits = streamed or request.headers.get("prefer", "").strip() != "respond-async"
    try:
        run = await begin(request, body, model=served(desk), desk=desk, waits=waits, name=name)
        if not waits:
            return JSONResponse(run.prediction.told_starting(base), status_code=202)
        async with until_disconnected(request):
            try:
                await (run.begun() if streamed else run.wait())
            except BaseException:
                run.cancel()  # nobody waits for it any more
                raise
    except ApiError as error:
        raise _busy(error) from error
    if streamed:
        run.replied = True
        return events.EventStream(stream(run, base=base), ended=run.cancel)
    return JSONResponse(run.prediction.told(base))


async def stream(run: Run, *, base: str) -> AsyncGenerator[bytes, None]:
    """Yield Cog's events of a run."""
    yield events.event("start", {"id": run.prediction.id, "status": "processing"})
    index = 0
    async for kind, text in run.follow():
        if kind == "output":
            yield events.event("output", {"chunk": text, "index": index})
            index += 1
        else:
            yield events.event("log", {"source": "stdout", "data": text})
    for name, value in run.prediction.metrics.items():
        yield events.event("metric", {"name": name, "value": value, "mode": "replace"})
    yield events.event("completed", run.prediction.told(base))


def _busy(error: ApiError) -> ApiError:
    """Say as Cog does that there is no place."""
    if error.status != 429:
        return error
    return ApiError(
        status=409, message=f"At capacity - {error.message}", retry_after=error.retry_after, code=error.code
    )
