"""The predictions API in the shape of the hosted one, as the Replicate client speaks it."""

import re
from collections.abc import AsyncGenerator, Mapping

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from seekvl.serve import events
from seekvl.serve.desk import Desk, base_of, desk_of, owner_of, until_disconnected
from seekvl.serve.errors import ApiError, Fault, invalid
from seekvl.serve.prediction_inputs import InputSet
from seekvl.serve.prediction_request import PredictionRequest, begin
from seekvl.serve.prediction_run import Run
from seekvl.serve.prediction_schemas import models, version, version_id
from seekvl.serve.records import Prediction

router = APIRouter(tags=["Replicate"])

WAIT = re.compile(r"(?:^|[\s,;])wait(?:\s*=\s*(\d{1,9}))?(?:$|[\s,;])")
LEAST_WAIT, MOST_WAIT = 1, 60
"""Seconds that `Prefer: wait` may ask for; without a number it is the most."""


@router.post("/v1/predictions", status_code=201)
async def create(request: Request, body: PredictionRequest) -> Response:
    """Begin a prediction of a version."""
    return await _create(request, body, model=_model_of(body.version, desk_of(request)))


@router.post("/v1/models/{owner}/{name}/predictions", status_code=201)
async def create_of_model(request: Request, owner: str, name: str, body: PredictionRequest) -> Response:
    """Begin a prediction of a model."""
    model, _ = _model(desk_of(request), owner, name)
    return await _create(request, body, model=model)


@router.get("/v1/predictions")
async def predictions(request: Request, cursor: str | None = None) -> dict[str, object]:
    """List the caller's predictions, newest first."""
    desk, base = desk_of(request), base_of(request)
    page, following = await desk.store.predictions(cursor=cursor, owner=owner_of(request))
    known = [_now(each, desk).told(base) for each in page]
    further = None if following is None else f"{base}/v1/predictions?cursor={following}"
    return {"previous": None, "next": further, "results": known}


@router.get("/v1/predictions/{prediction_id}")
async def prediction(request: Request, prediction_id: str) -> dict[str, object]:
    """Tell how a prediction is."""
    return (await _find(request, prediction_id)).told(base_of(request))


@router.post("/v1/predictions/{prediction_id}/cancel")
async def cancel(request: Request, prediction_id: str) -> dict[str, object]:
    """Stop a prediction; one that has ended comes back unchanged."""
    run = desk_of(request).live.get((owner_of(request), prediction_id))
    if run is not None:
        run.cancel()
        await run.ended()
        return run.prediction.told(base_of(request))
    return (await _find(request, prediction_id)).told(base_of(request))


@router.get("/v1/predictions/{prediction_id}/stream")
async def stream(request: Request, prediction_id: str) -> Response:
    """Stream a prediction from its first piece on; leaving early does not stop it."""
    run = desk_of(request).live.get((owner_of(request), prediction_id))
    steps = finished(await _find(request, prediction_id)) if run is None else running(run)
    return events.EventStream(steps)


@router.get("/v1/models/{owner}/{name}/versions")
async def versions(request: Request, owner: str, name: str) -> dict[str, object]:
    """List the only version of a model."""
    desk = desk_of(request)
    model, inputs = _model(desk, owner, name)
    only = version(model, inputs, created=desk.service.setup.started_at)
    return {"previous": None, "next": None, "results": [only]}


@router.get("/v1/models/{owner}/{name}/versions/{version_name}")
async def one_version(request: Request, owner: str, name: str, version_name: str) -> dict[str, object]:
    """Describe a version."""
    desk = desk_of(request)
    model, inputs = _model(desk, owner, name)
    if version_name != version_id(model, inputs):
        raise ApiError(status=404, message=f"{model} has no version {version_name[:80]!r}")
    return version(model, inputs, created=desk.service.setup.started_at)


@router.get("/v1/webhooks/default/secret")
async def webhook_secret(request: Request) -> dict[str, str]:
    """Tell the secret that the caller's webhooks are signed with."""
    return {"key": desk_of(request).webhooks.secret_of(owner_of(request))}


async def _create(request: Request, body: PredictionRequest, *, model: str) -> Response:
    """Begin, and hold the reply for as long as is asked for. Raises ApiError."""
    desk, base = desk_of(request), base_of(request)
    seconds = wait_seconds(request.headers.get("prefer", ""))
    run = await begin(request, body, model=model, desk=desk, waits=seconds is not None)
    if seconds is None:  # as it was begun, however far it has come since
        return JSONResponse(run.prediction.told_starting(base), status_code=201)
    async with until_disconnected(request):
        try:
            over = await run.wait(seconds=seconds)
        except BaseException:
            run.cancel()  # nobody waits for it any more
            raise
    run.replied = True
    told = run.prediction.told(base) if over else run.prediction.told_starting(base)
    return JSONResponse(told, status_code=201)


def wait_seconds(prefer: str) -> int | None:
    """Return how long a reply is held; None: not at all.

    >>> wait_seconds("wait"), wait_seconds("wait=5"), wait_seconds("respond-async")
    (60, 5, None)
    """
    found = WAIT.search(prefer.lower())
    if found is None:
        return None
    return min(max(int(found[1] or MOST_WAIT), LEAST_WAIT), MOST_WAIT)


async def running(run: Run) -> AsyncGenerator[bytes, None]:
    """Yield the events of a run; each has a number, without which the client drops it."""
    number = 0
    async for kind, text in run.follow():
        yield events.event(kind, text, number=number)
        number += 1
    for each in _ending(run.prediction, number=number):
        yield each


async def finished(found: Prediction) -> AsyncGenerator[bytes, None]:
    """Yield what a stream of a prediction that has ended would have said, in one piece."""
    number, text = 0, _text(found.output)
    for kind, said in (("logs", found.logs), ("output", text)):
        if said:
            yield events.event(kind, said, number=number)
            number += 1
    for each in _ending(found, number=number):
        yield each


def _ending(found: Prediction, *, number: int) -> list[bytes]:
    """Return the last events; the client raises at `error` and reads no further."""
    if found.status == "failed":
        error = events.event("error", {"detail": found.error}, number=number)
        return [error, events.event("done", {"reason": "error"}, number=number + 1)]
    reason = {"reason": "canceled"} if found.status == "canceled" else {}
    return [events.event("done", reason, number=number)]


def _text(output: object) -> str:
    """Return the words of an output."""
    return str(output["text_out"] if isinstance(output, Mapping) else output or "")


def _now(found: Prediction, desk: Desk) -> Prediction:
    """Return a prediction as it is now: the store knows how one began and how it ended."""
    run = desk.live.get(found.key)
    return found if run is None else run.prediction


async def _find(request: Request, name: str) -> Prediction:
    """Return a prediction of the caller's. Raises ApiError (404)."""
    desk, owner = desk_of(request), owner_of(request)
    if (run := desk.live.get((owner, name))) is not None:
        return run.prediction
    found = await desk.store.prediction(name, owner=owner)
    if found is None:
        raise ApiError(status=404, message=f"the prediction {name[:80]!r} is not kept here, or no longer")
    return found


def _model(desk: Desk, owner: str, name: str) -> tuple[str, InputSet]:
    """Return a model by name, with its inputs. Raises ApiError (404)."""
    known, wanted = models(desk), f"{owner}/{name}"
    if wanted not in known:
        message = f"the model {wanted[:80]!r} is not served here; known are {', '.join(known)}"
        raise ApiError(status=404, message=message, code="model_not_found")
    return wanted, known[wanted]


def _model_of(wanted: str | None, desk: Desk) -> str:
    """Return the model of a version, given as its hash, as owner/name:hash or as owner/name.

    Raises ApiError (422).
    """
    if not wanted:
        raise invalid(Fault("version", "a version is required", missing=True))
    for name, inputs in models(desk).items():
        known = version_id(name, inputs)
        if wanted in (known, name, f"{name}:{known}"):
            return name
    raise invalid(Fault("version", f"{wanted[:80]!r} is no version that is served here"))
