"""How the server is: alive, ready, Cog's health check, figures for Prometheus."""

import platform
from datetime import datetime

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import seekvl
from seekvl.serve.desk import desk_of
from seekvl.serve.metrics import CONTENT_TYPE
from seekvl.serve.service import RETRY_SECONDS, Phase

router = APIRouter(tags=["Health"])

COG_STATUS: dict[Phase, str] = {
    "starting": "STARTING",
    "ready": "READY",
    "restarting": "UNHEALTHY",
    "failed": "SETUP_FAILED",
    "draining": "DEFUNCT",
    "stopped": "DEFUNCT",
}
SETUP_STATUS: dict[Phase, str] = {"starting": "starting", "failed": "failed"}


@router.get("/health")
async def health() -> dict[str, str]:
    """Say that the server is alive; it is as soon as its port is open."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Say whether a request would be taken: 200, or 503 while loading, draining or failed."""
    service = desk_of(request).service
    if service.ready:
        return JSONResponse({"status": "ready"})
    retry = {"Retry-After": str(RETRY_SECONDS)}
    status = "restarting" if service.phase == "ready" else service.phase  # it died, and nobody has looked yet
    return JSONResponse({"status": status}, status_code=503, headers=retry)


@router.get("/health-check")
async def health_check(request: Request) -> dict[str, object]:
    """Say how the model is, in Cog's words; always 200."""
    service = desk_of(request).service
    setup, status = service.setup, COG_STATUS[service.phase]
    if service.ready:
        now = service.vlm.engine.metrics()
        status = "BUSY" if now.running >= service.vlm.engine.limits.rows else status
    return {
        "status": status,
        "setup": {
            "started_at": _iso(setup.started_at),
            "completed_at": None if setup.completed_at is None else _iso(setup.completed_at),
            "status": SETUP_STATUS.get(service.phase, "succeeded"),
            "logs": "\n".join(setup.logs),
        },
        "version": {
            "seekvl": seekvl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return the figures of this server for Prometheus."""
    return Response(desk_of(request).metrics.text(), media_type=CONTENT_TYPE)


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
