"""The body of a request for a prediction, and how one is begun."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr

from seekvl.serve.desk import Desk, base_of, client_of, owner_of
from seekvl.serve.errors import ApiError, Fault, invalid
from seekvl.serve.prediction_inputs import known_inputs, read_inputs
from seekvl.serve.prediction_run import Run, check_room, new_id
from seekvl.serve.prediction_schemas import models, version_id
from seekvl.serve.records import Prediction, iso, now
from seekvl.serve.request_log import fresh_seed
from seekvl.serve.webhooks import EVENTS, Event, Webhook

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
"""Ids that callers may choose: they stand in addresses and name files of the log."""
DURATION = re.compile(r"(?=.)(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s?)?", re.IGNORECASE)
LEAST_DURATION = 5
"""Seconds, as Replicate has it."""


class PredictionRequest(BaseModel):
    """What both dialects send; what it does not know it ignores."""

    model_config = ConfigDict(extra="ignore")

    id: StrictStr | None = None
    version: StrictStr | None = None
    input: dict[str, Any] | None = None
    webhook: StrictStr | None = None
    webhook_completed: StrictStr | None = None
    webhook_events_filter: list[Event] | None = None
    created_at: datetime | None = None
    stream: StrictBool | None = None


async def begin(
    request: Request,
    body: PredictionRequest,
    *,
    model: str,
    desk: Desk,
    waits: bool,
    name: str | None = None,
) -> Run:
    """Check a request and begin with its prediction. Raises ApiError.

    waits: whether the reply is held, so that what goes wrong can still be an error of the request. name: id
    of the prediction; None makes one.
    """
    inputs = models(desk)[model]
    given = body.input or {}
    faults = _webhook_faults(body, desk)
    most = cancel_after(request.headers.get("cancel-after"))
    try:
        asked = read_inputs(given, inputs)
    except ApiError as error:
        raise invalid(*faults, *error.faults) from error
    if faults:
        raise invalid(*faults)
    check_room(desk)
    if desk.log is not None and asked.seed is None:
        asked = replace(asked, seed=fresh_seed())
    prediction = Prediction(
        id=name or new_id(),
        model=model,
        version=version_id(model, inputs),
        input=known_inputs(given, inputs),
        owner=owner_of(request),
        created_at=_created(body),
    )
    if prediction.key in desk.live:
        raise ApiError(status=409, message=f"the prediction {prediction.id} is under way")
    run = Run(
        prediction=prediction,
        asked=asked,
        base=base_of(request),
        client=client_of(request),
        webhook=_webhook(body, desk, owner=prediction.owner),
        replied=not waits,
    )
    desk.runs[model] += 1
    run.start(desk)
    if most is not None and most < desk.settings.answer_seconds:  # by then it has ended anyway
        asyncio.get_running_loop().call_later(most, run.cancel)
    try:
        await desk.store.save(prediction)
    except BaseException:
        run.cancel()
        raise
    return run


def cancel_after(given: str | None) -> int | None:
    """Return the seconds after which a caller wants a prediction to be cancelled: the header `Cancel-After`.

    Raises ApiError (422) for what is no duration.

    >>> cancel_after("1m30s"), cancel_after("90"), cancel_after("2h"), cancel_after(None)
    (90, 90, 7200, None)
    """
    if given is None:
        return None
    found = DURATION.fullmatch(given.strip())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if total < LEAST_DURATION:
        message = f"{given[:40]!r} is no duration of at least {LEAST_DURATION} s, such as 90s or 1m30s"
        raise invalid(Fault("Cancel-After", message))
    return total


def check_id(name: str) -> str:
    """Return an id that a caller chose. Raises ApiError where it is none."""
    if not ID.fullmatch(name):
        raise invalid(Fault("id", "an id is 1 to 128 letters, digits, - and _"))
    return name


def _created(body: PredictionRequest) -> str:
    """Return when the caller says that it asked, if that is a time; else now."""
    try:
        return now() if body.created_at is None else iso(body.created_at.timestamp())
    except (ValueError, OverflowError, OSError):
        return now()


def _webhook_faults(body: PredictionRequest, desk: Desk) -> Sequence[Fault]:
    """Return what is wrong with the addresses that are to be called."""
    faults = []
    for field, url in (("webhook", body.webhook), ("webhook_completed", body.webhook_completed)):
        if not url:
            continue
        if not desk.settings.fetch:
            faults.append(Fault(field, "this server calls no webhooks"))
        elif not _is_address(url):
            faults.append(Fault(field, "an http: or https: address is wanted"))
    return faults


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _webhook(body: PredictionRequest, desk: Desk, *, owner: str) -> Webhook | None:
    """Return what is called; `webhook_completed` is the older form, for the end alone."""
    if body.webhook:
        events = EVENTS if body.webhook_events_filter is None else body.webhook_events_filter
        return Webhook(webhooks=desk.webhooks, url=body.webhook, owner=owner, events=frozenset(events))
    if body.webhook_completed:
        ended: Event = "completed"
        url = body.webhook_completed
        return Webhook(webhooks=desk.webhooks, url=url, owner=owner, events=frozenset((ended,)))
    return None
