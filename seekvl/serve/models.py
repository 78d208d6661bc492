"""The models that are served, in one object that both the OpenAI and the Replicate client can read."""

from urllib.parse import unquote

from fastapi import APIRouter, Request

from seekvl.serve.desk import Desk, desk_of
from seekvl.serve.errors import ApiError
from seekvl.serve.prediction_schemas import models as inputs_by_model
from seekvl.serve.prediction_schemas import version

router = APIRouter(tags=["Models"])


def describe(name: str, desk: Desk) -> dict[str, object]:
    """Return what both clients are told of a model."""
    owner, _, short = name.partition("/")
    created = desk.service.setup.started_at
    return {
        "id": name,
        "object": "model",
        "created": int(created.timestamp()),
        "owned_by": owner,
        "context_length": desk.context if desk.service.ready else None,
        "max_tiles": desk.most_tiles if desk.service.ready else None,
        "url": f"/v1/models/{name}",
        "owner": owner,
        "name": short,
        "description": "Answers questions about pictures.",
        "visibility": "public",
        "github_url": None,
        "paper_url": "https://arxiv.org/abs/2412.10302",
        "license_url": None,
        "run_count": desk.runs[name],
        "cover_image_url": None,
        "default_example": None,
        "latest_version": version(name, inputs_by_model(desk)[name], created=created),
    }


@router.get("/v1/models")
async def models(request: Request) -> dict[str, object]:
    """List the models."""
    desk = desk_of(request)
    found = [describe(name, desk) for name in desk.names]
    return {"object": "list", "data": found, "previous": None, "next": None, "results": found}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, object]:
    """Describe a model."""
    desk, wanted = desk_of(request), unquote(name)
    if wanted not in desk.names:
        raise ApiError(
            status=404,
            message=f"the model {wanted!r} is not served here; known are {', '.join(desk.names)}",
            code="model_not_found",
            param="model",
        )
    return describe(wanted, desk)
