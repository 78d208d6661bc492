"""Running a prediction: from checked inputs to a finished record, with readers, webhooks, and a way to stop.

starting --> processing --> succeeded | failed | canceled

A run is a task of its own, so that it goes on where nobody waits for it. What cannot be served is an error of
the request as long as the request has not been replied to (`refused`); afterwards the prediction has failed.
A finished prediction is in the store before anybody hears that it is.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL import Image

from seekvl.engine.request import Completion
from seekvl.engine.request import Request as Prepared
from seekvl.processing.tile_image import TileImageConfig
from seekvl.serve.desk import Desk
from seekvl.serve.errors import ApiError, Fault, invalid
from seekvl.serve.grounding import grounding
from seekvl.serve.notices import limits_met, notices
from seekvl.serve.prediction_inputs import Asked, ask
from seekvl.serve.prediction_output import Drawn, draw, figures
from seekvl.serve.records import Prediction, Status, now
from seekvl.serve.request_log import Logged
from seekvl.serve.service import Answering, failure, not_ready
from seekvl.serve.webhooks import Webhook

log = logging.getLogger(__name__)

Kind = Literal["output", "logs"]

FULL_PAUSE = 0.25
"""Seconds between two tries to hand a run to a full engine, where its request was replied to already."""
PARTING = 5.0
"""Seconds that runs have to end by themselves when the engine has stopped."""
REFUSALS = (400, 409, 413, 422, 429, 503)
"""What a request is refused with; any other failure is data."""


@dataclass(kw_only=True, slots=True)
class Run:
    """One prediction under way."""

    prediction: Prediction
    asked: Asked
    base: str
    """Address of this server, as the caller wrote it."""
    client: str
    webhook: Webhook | None = None
    steps: list[tuple[Kind, str]] = field(default_factory=list)
    """Pieces of the answer and lines of the log, as they came."""
    replied: bool = False
    """Whether the caller knows of the prediction already."""
    refused: ApiError | None = None
    """Why the request is refused, where nothing was answered yet."""
    over: bool = False
    _text: str = ""
    """The answer as far as it has come."""
    _task: "asyncio.Task[None] | None" = None
    _ending: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self) -> AsyncIterator[tuple[Kind, str]]:
        """Yield all steps from the first on, until it is over."""
        seen = 0
        while True:
            while seen < len(self.steps):
                yield self.steps[seen]
                seen += 1
            if self.over:
                return
            await self._changed.wait()

    async def begun(self) -> None:
        """Wait until the model has begun with it, or it is over. Raises ApiError if it was refused."""
        while not self.over and self.prediction.status == "starting":
            await self._changed.wait()
        if self.refused is not None:
            raise self.refused

    async def wait(self, *, seconds: float | None = None) -> bool:
        """Wait until it is over, at most so long; return whether it is. Raises ApiError if it was refused."""
        assert self._task is not None
        await asyncio.wait([self._task], timeout=seconds)
        if self.refused is not None:
            raise self.refused
        return self.over

    async def ended(self) -> None:
        """Wait until it is over, refused or not."""
        assert self._task is not None
        await asyncio.wait([self._task])

    def cancel(self) -> None:
        """Stop it, unless it ends anyhow."""
        if self._task is not None and not self._ending:
            self._task.cancel()

    def start(self, desk: Desk) -> None:
        """Begin to work."""
        desk.live[self.prediction.key] = self
        self._task = asyncio.create_task(self._perform(desk))

    def told(self) -> dict[str, object]:
        """Return what a webhook is told."""
        return self.prediction.told(self.base)

    async def _perform(self, desk: Desk) -> None:
        """Do all of it; however it ends, it is noted, told and no longer live."""
        began = time.monotonic()
        status: Status
        try:
            status, error = await self._answer(desk), None
        except asyncio.CancelledError:
            status, error = "canceled", None
        except Exception as caught:
            found = in_words(failure(caught), self.asked)
            if self._refusable and found.status in REFUSALS:
                self.refused = found
            status, error = "failed", found.message
        self._ending = True
        self.prediction.metrics["predict_time"] = time.monotonic() - began
        await self._end(status, error, desk=desk)

    @property
    def _refusable(self) -> bool:
        """Whether nobody has heard of it yet: neither the caller nor, of its beginning, a webhook."""
        unheard = self.webhook is None or self.prediction.status == "starting"
        return unheard and not self.replied and not self._text

    async def _end(self, status: Status, error: str | None, *, desk: Desk) -> None:
        """Put it away, then say that it is over: nobody may hear of an end that a crash would undo."""
        ended = replace(self.prediction, status=status, error=error, completed_at=now())
        try:
            if self.refused is None:
                await desk.store.save(ended)
            else:
                await desk.store.forget(ended.id, owner=ended.owner)
        except Exception:
            log.exception("prediction %s could not be kept", ended.id)
            ended.status, ended.error = "failed", "the answer could not be kept; see the server's log"
        self.prediction = ended
        if desk.live.get(ended.key) is self:
            del desk.live[ended.key]
        self.over = True
        self._tell()
        if self.webhook is not None and self.refused is None:
            self.webhook.completed(self.told)

    async def _answer(self, desk: Desk) -> Status:
        """Open the pictures, ask the engine, and gather the answer."""
        desk.pictures.check_count(len(self.asked.pictures), param=self.asked.question_input)
        pictures = [
            await desk.pictures.open(url, param=name, owner=self.prediction.owner)
            for name, url in self.asked.pictures
        ]
        conversation = ask(self.asked, pictures)
        params, tiles = self.asked.sampling(room=desk.context), self._tiles(desk)
        prepared = await desk.service.prepare(conversation, params, max_tiles=tiles)
        lines = notices(prepared.inputs, desk.service.vlm.processor)
        if self.asked.budget == 0:
            self._begin(lines)
            self.prediction.output = self._output("")
            return "succeeded"
        if desk.log is not None:
            params = self.asked.sampling(room=desk.room(prepared))
            logged = Logged(conversation=conversation, params=(params,), max_tiles=tiles)
            await desk.log.request(self.prediction.id, logged)
        answering = await self._submit(prepared, desk=desk)
        self._begin(lines)
        async for pieces in answering.pieces():
            if text := "".join(piece.text for piece in pieces):
                self._output_piece(text)
            completion = pieces[-1].completion
            if completion is not None:
                return await self._complete(completion, answering, prepared, pictures[-1], desk=desk)
        raise ApiError(status=500, message="the answer has no end")

    def _begin(self, lines: Sequence[str]) -> None:
        """Say that the model works on it, and what it should be known of the pictures."""
        self.prediction.started_at, self.prediction.status = now(), "processing"
        self._tell()
        self._say("start")
        for line in lines:
            self._log(line)

    def _tiles(self, desk: Desk) -> int | None:
        """Return the most tiles of a picture; a model that never cuts pictures has no use for a bound."""
        if self.asked.max_tiles is None or isinstance(desk.service.vlm.processor.image, TileImageConfig):
            return self.asked.max_tiles
        self._log("max_tiles does nothing here: this model sees every picture whole")
        return None

    async def _submit(self, prepared: Prepared, *, desk: Desk) -> Answering:
        """Hand a prompt to the engine; a caller who was told that it begins waits for a place."""
        until = time.monotonic() + desk.settings.wait_seconds
        params = self.asked.sampling(room=desk.room(prepared))
        while True:
            try:
                return desk.service.submit(replace(prepared, params=params), client=self.client)
            except ApiError as error:
                if error.status != 429 or not self.replied or time.monotonic() > until:
                    raise
            await asyncio.sleep(FULL_PAUSE)

    async def _complete(
        self,
        completion: Completion,
        answering: Answering,
        prepared: Prepared,
        picture: Image.Image,
        *,
        desk: Desk,
    ) -> Status:
        """Note what an answer took, and draw its boxes."""
        prediction, sizes = self.prediction, prepared.inputs.picture_sizes
        first = answering.first_seconds or 0.0
        if desk.log is not None:
            await desk.log.answer(prediction.id, completion)
        desk.metrics.answered(completion, first_seconds=first)
        boxes = grounding(completion.text, sizes=sizes, stripped=False)
        prediction.metrics.update(figures(completion, boxes, first_seconds=first))
        for line in limits_met(completion, asked=self.asked.budget):
            self._log(line)
        drawn = None
        if self.asked.drawn and boxes:
            name = f"{prediction.id}.png"
            drawn = await draw(
                picture, completion.text, name=name, settings=desk.settings, painter=desk.painter
            )
            if drawn.notice:
                self._log(drawn.notice)
        prediction.output = self._output(completion.text, drawn=drawn)
        if completion.finish_reason == "cancelled" and not desk.service.ready:
            return "canceled"  # the server stops
        return "succeeded"

    def _output(self, text: str, *, drawn: Drawn | None = None) -> object:
        """Return the output in the form of the model."""
        if not self.asked.drawn:
            return text
        return {"img_out": None if drawn is None else drawn.address, "text_out": text}

    def _output_piece(self, text: str) -> None:
        """Take a piece of the answer in; the output so far is what a canceled prediction has."""
        self.steps.append(("output", text))
        self._text += text
        self.prediction.output = self._output(self._text)
        self._tell()
        self._say("output")

    def _log(self, line: str) -> None:
        """Write a line into the log of the prediction."""
        self.steps.append(("logs", f"{line}\n"))
        self.prediction.logs += f"{line}\n"
        self._tell()
        self._say("logs")

    def _say(self, event: Literal["start", "output", "logs"]) -> None:
        if self.webhook is not None:
            self.webhook.tell(event, self.told)

    def _tell(self) -> None:
        """Wake those who follow."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def finish_all(desk: Desk) -> None:
    """Let all runs end, when the engine has stopped: most have their answer and only put it away."""
    runs = list(desk.live.values())
    if runs:
        await asyncio.wait([asyncio.ensure_future(run.ended()) for run in runs], timeout=PARTING)
    for run in runs:
        run.cancel()
        await run.ended()


def check_room(desk: Desk) -> None:
    """Refuse a prediction that would find no place. Raises ApiError: 503 when not ready, 429 when full."""
    if not desk.service.ready:
        raise not_ready(desk.service.phase)
    engine = desk.service.vlm.engine
    most = engine.limits.rows + desk.settings.queue
    if len(desk.live) >= most or engine.metrics().waiting >= desk.settings.queue:
        message = f"{len(desk.live)} predictions are under way or wait, as many as are taken"
        raise ApiError(status=429, message=message, retry_after=1)


def in_words(error: ApiError, asked: Asked) -> ApiError:
    """Say an error of the caller's as one of the input at fault."""
    if error.status != 400:
        return error
    place = error.param if error.param and error.param.startswith("input") else asked.question_input
    return invalid(Fault(place, error.message))


def new_id() -> str:
    """Make an id that cannot be guessed."""
    return secrets.token_hex(13)
