"""What `POST /v1/responses` asks for, turned into a request for chat completions."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from seekvl.serve.chat_request import (
    ChatMessage,
    ChatRequest,
    JsonSchema,
    Loose,
    ResponseFormat,
    Sampled,
)
from seekvl.serve.errors import ApiError, bad_request

LOGPROBS = "message.output_text.logprobs"
"""What `include` holds where likelihoods of tokens are asked for."""
NAMES = {
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}
"""Fields of chat completions that have other names here."""


class InputItem(ChatMessage):
    """A turn; items of tools and of kept conversations are refused."""

    type: Literal["message"] = "message"


class TextFormat(Loose):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Loose):
    """How the answer is written."""

    format: TextFormat | None = None


class ResponsesRequest(Sampled):
    """The body of `POST /v1/responses`."""

    input: StrictStr | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    text: TextOptions | None = None
    include: list[StrictStr] | None = None
    previous_response_id: StrictStr | None = None
    conversation: Any = None
    background: StrictBool | None = None

    def as_chat(self) -> ChatRequest:
        """Return the same request in the words of chat completions. Raises ApiError for what is refused."""
        self._check_state()
        given = [ChatMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        system = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        logprobs = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        shared = {name: getattr(self, name) for name in Sampled.model_fields}
        return ChatRequest(
            **{**shared, "top_logprobs": self.top_logprobs if logprobs else None},
            messages=[*system, *given],
            max_tokens=self.max_output_tokens,
            logprobs=logprobs,
            response_format=self._format(),
        )

    def _check_state(self) -> None:
        """Refuse what would need answers to be kept."""
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise bad_request(
                    f"{name}: this server keeps no answers; send the whole conversation as input",
                    param=name,
                    code="unsupported_parameter",
                )

    def _format(self) -> ResponseFormat | None:
        """Return the form of the answer as chat completions name it."""
        wanted = None if self.text is None else self.text.format
        if wanted is None:
            return None
        schema = None if wanted.schema_ is None else JsonSchema(name=wanted.name, schema=wanted.schema_)
        return ResponseFormat(type=wanted.type, json_schema=schema)


def renamed(error: ApiError, *, shift: int) -> ApiError:
    """Give the field at fault its name here; messages are numbered from `shift` on.

    >>> renamed(bad_request("", param="messages[2].content[0].text"), shift=1).param
    'input[1].content[0].text'
    """
    if error.param is not None:
        numbered = re.sub(r"^messages\[(\d+)\]", lambda found: f"input[{int(found[1]) - shift}]", error.param)
        error.param = NAMES.get(numbered, re.sub("^messages$", "input", numbered))
    return error
