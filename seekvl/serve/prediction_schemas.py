"""OpenAPI documents of the two models, in the form that Cog publishes, and their versions."""

import hashlib
import json
from datetime import datetime
from typing import Any

import seekvl
from seekvl.serve.desk import Desk
from seekvl.serve.prediction_inputs import FULL, SIMPLE, Input, InputSet
from seekvl.serve.records import iso

COG_VERSION = "0.23.1"
"""Whose HTTP interface the Cog routes speak."""
TYPES: dict[str, dict[str, object]] = {
    "string": {"type": "string"},
    "file": {"type": "string", "format": "uri"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "strings": {"type": "array", "items": {"type": "string"}},
}
STATUS = ["starting", "processing", "succeeded", "canceled", "failed"]
EVENTS = ["start", "output", "logs", "completed"]


def models(desk: Desk) -> dict[str, InputSet]:
    """Return the models by name, with their inputs."""
    full, simple = desk.names
    return {full: FULL, simple: SIMPLE}


def version_id(name: str, inputs: InputSet) -> str:
    """Return the id of a model's version: another one when its name, inputs or output change."""
    fixed = json.dumps([name, _input(inputs), _output(inputs)], sort_keys=True)
    return hashlib.sha256(fixed.encode()).hexdigest()


def version(name: str, inputs: InputSet, *, created: datetime) -> dict[str, object]:
    """Return what the Replicate client is told of a version."""
    return {
        "id": version_id(name, inputs),
        "created_at": iso(created.timestamp()),
        "cog_version": COG_VERSION,
        "openapi_schema": document(inputs),
    }


def document(inputs: InputSet) -> dict[str, Any]:
    """Return the OpenAPI document of a model."""
    prediction = {"$ref": "#/components/schemas/PredictionResponse"}
    return {
        "openapi": "3.0.2",
        "info": {"title": "seekvl", "version": seekvl.__version__},
        "paths": {
            "/": _path("get", "Root", _ok("What is where", {"type": "object"})),
            "/health-check": _path("get", "Healthcheck", _ok("How the model is", {"type": "object"})),
            "/predictions": _predict("post", "Predict", prediction),
            "/predictions/{prediction_id}": _predict("put", "Predict Idempotent", prediction, by_id=True),
            "/predictions/{prediction_id}/cancel": _path(
                "post",
                "Cancel",
                {**_ok("It stops", {"type": "object"}), "404": _answer("It does not run", {})},
            ),
        },
        "components": {"schemas": _schemas(inputs)},
    }


def _schemas(inputs: InputSet) -> dict[str, object]:
    """Return the schemas of what is sent and answered."""
    text = {"type": "string"}
    moment = {"type": "string", "format": "date-time"}
    given = {"$ref": "#/components/schemas/Input"}
    events = {"type": "array", "items": {"$ref": "#/components/schemas/WebhookEvent"}}
    return {
        "Input": _input(inputs),
        "Output": _output(inputs),
        "Status": {"title": "Status", "type": "string", "enum": STATUS},
        "WebhookEvent": {"title": "WebhookEvent", "type": "string", "enum": EVENTS},
        "PredictionRequest": {
            "title": "PredictionRequest",
            "type": "object",
            "properties": {
                "id": text,
                "input": given,
                "created_at": moment,
                "webhook": {"type": "string", "format": "uri"},
                "webhook_events_filter": events,
            },
        },
        "PredictionResponse": {
            "title": "PredictionResponse",
            "type": "object",
            "properties": {
                "id": text,
                "input": given,
                "output": {"$ref": "#/components/schemas/Output", "nullable": True},
                "status": {"$ref": "#/components/schemas/Status"},
                "error": {"type": "string", "nullable": True},
                "logs": text,
                "metrics": {"type": "object"},
                "version": text,
                "created_at": moment,
                "started_at": {**moment, "nullable": True},
                "completed_at": {**moment, "nullable": True},
            },
        },
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {
                "detail": {"type": "array", "items": {"$ref": "#/components/schemas/ValidationError"}}
            },
        },
        "ValidationError": {
            "title": "ValidationError",
            "type": "object",
            "required": ["loc", "msg", "type"],
            "properties": {
                "loc": {"type": "array", "items": {"anyOf": [text, {"type": "integer"}]}},
                "msg": text,
                "type": text,
            },
        },
    }


def _input(inputs: InputSet) -> dict[str, object]:
    """Return the schema of the inputs; `x-order` is the order in which forms show them."""
    schema: dict[str, object] = {
        "title": "Input",
        "type": "object",
        "properties": {each.name: _property(each, order) for order, each in enumerate(inputs.inputs)},
    }
    required = [each.name for each in inputs.inputs if each.required]
    return {**schema, "required": required}


def _property(each: Input, order: int) -> dict[str, object]:
    title = each.name.replace("_", " ").title()
    found = {"title": title, **TYPES[each.kind], "description": each.text, "x-order": order}
    if each.default is not None:
        found["default"] = each.default
    if each.published and each.least is not None:
        found["minimum"] = each.least
    if each.published and each.most is not None:
        found["maximum"] = each.most
    return found


def _output(inputs: InputSet) -> dict[str, object]:
    """Return the schema of the output; an iterator type would make the Replicate client give a generator."""
    if not inputs.drawn:
        return {"title": "Output", "type": "string"}
    return {
        "title": "Output",
        "type": "object",
        "required": ["text_out"],
        "properties": {
            "img_out": {"title": "Img Out", "type": "string", "format": "uri", "nullable": True},
            "text_out": {"title": "Text Out", "type": "string"},
        },
    }


def _predict(method: str, summary: str, prediction: dict[str, str], *, by_id: bool = False) -> dict[str, Any]:
    """Describe a route that runs the model; it offers event streams."""
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}
    invalid = _answer("Wrong inputs", {"$ref": "#/components/schemas/HTTPValidationError"})
    answers = {**_ok("A prediction", prediction), "202": _answer("It runs", prediction), "422": invalid}
    path = _path(method, summary, answers)
    path[method] |= {"requestBody": {"content": body}, "x-cog-streaming": True}
    if by_id:
        path["parameters"] = [
            {"name": "prediction_id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return path


def _path(method: str, summary: str, answers: dict[str, object]) -> dict[str, Any]:
    return {
        method: {"summary": summary, "operationId": summary.lower().replace(" ", "_"), "responses": answers}
    }


def _ok(text: str, schema: object) -> dict[str, object]:
    return {"200": _answer(text, schema)}


def _answer(text: str, schema: object) -> dict[str, object]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}
