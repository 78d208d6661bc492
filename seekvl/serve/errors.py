"""What goes wrong, once, and how each dialect says it (status, headers, body)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Dialect = Literal["openai", "replicate", "cog", "any"]

TITLES = {
    400: "Bad request",
    401: "Unauthenticated",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "Request timeout",
    409: "Conflict",
    413: "Request too large",
    415: "Unsupported media type",
    422: "Input validation failed",
    429: "Too many requests",
    500: "Internal server error",
    503: "Service unavailable",
}
OBJECT = {"application/json": {"schema": {"type": "object"}}}
DECLARED: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request has to be changed; the body says what.", "content": OBJECT},
    "5XX": {"description": "The server could not answer; the body says why.", "content": OBJECT},
}
"""What the OpenAPI document says of errors, for every route."""
HUNG_UP = 499
"""What the log and the figures say of a request whose caller did not wait; nobody reads it."""
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    401: "invalid_api_key",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One input that is not as it must be."""

    field: str
    """Its place in the body, such as `input.max_new_tokens`."""
    message: str
    missing: bool = False


@dataclass(kw_only=True, slots=True)
class ApiError(Exception):
    """Why a request is refused or failed. Routes raise it; `body` says it in the dialect of the route."""

    status: int
    message: str
    """One sentence with the numbers, and what to do."""
    code: str | None = None
    """A word that programs read, such as `context_length_exceeded`."""
    param: str | None = None
    """The field at fault, such as `messages[0].content[1].image_url`."""
    faults: tuple[Fault, ...] = ()
    """All that is at fault in the body of a prediction."""
    retry_after: int | None = None
    """Whole seconds after which it is worth trying again."""
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Say that the caller has to change the request."""
    return ApiError(status=400, message=message, param=param, code=code)


def invalid(*faults: Fault) -> ApiError:
    """Say what is wrong with the inputs of a prediction, all at once."""
    message = "; ".join(f"{fault.field}: {fault.message}" for fault in faults)
    return ApiError(status=422, message=message, faults=faults)


def headers_of(error: ApiError) -> dict[str, str]:
    """Return the headers an error is sent with."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 500:
        headers["x-should-retry"] = "false"  # the same request would fail again
    return headers


def dialect_of(path: str) -> Dialect:
    """Tell who asks by the path of the request.

    >>> dialect_of("/v1/chat/completions"), dialect_of("/v1/models/o/n/predictions"), dialect_of("/x")
    ('openai', 'replicate', 'any')
    """
    parts = path.strip("/").split("/")
    if parts[0] == "predictions":
        return "cog"
    if parts[0] != "v1" or len(parts) < 2:
        return "any"
    if parts[1] in ("chat", "responses", "completions"):
        return "openai"
    if parts[1] in ("predictions", "files", "webhooks") or {"predictions", "versions"} & set(parts):
        return "replicate"
    return "any"


def body(error: ApiError, dialect: Dialect) -> dict[str, object]:
    """Return the body of an error; where nobody can tell who asks, it has the fields of both."""
    if dialect == "cog":
        return _cog_body(error)
    replicate = {
        "type": f"about:blank#{error.status}",
        "title": TITLES.get(error.status, "Error"),
        "detail": _detail(error),
        "status": error.status,
    }
    if dialect == "replicate":
        return replicate
    return _openai_body(error) if dialect == "openai" else {**replicate, **_openai_body(error)}


def _openai_body(error: ApiError) -> dict[str, object]:
    kind = KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code or CODES.get(error.status),
        }
    }


def _cog_body(error: ApiError) -> dict[str, object]:
    """Return Cog's form: all faults at once, or one sentence."""
    if error.faults:
        return {
            "detail": [
                {
                    "loc": ["body", *fault.field.split(".")],
                    "msg": fault.message,
                    "type": "value_error.missing" if fault.missing else "value_error",
                }
                for fault in error.faults
            ]
        }
    if error.status == 422:
        place = error.param or "body"
        return {"detail": [{"loc": ["body", place], "msg": error.message, "type": "value_error"}]}
    return {"error": error.message, "detail": error.message, "status": "failed"}


def _detail(error: ApiError) -> str:
    """Return the text the Replicate client shows: a line for each input at fault."""
    if not error.faults:
        return error.message
    return "\n".join(f"- {fault.field}: {fault.message}" for fault in error.faults)


def error_event(error: ApiError) -> Mapping[str, object]:
    """Return what a stream of the OpenAI dialect says when it breaks off."""
    return _openai_body(error)
