"""The OpenAPI document is true: requests made from it find no answer that it does not know."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.serve.conftest import MODEL, Running

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 25
"""Requests made for each route, of the right form and of a wrong one each."""


def operations(server: Running) -> list[Any]:
    """Return the routes of the document, as the tool reads it."""
    document = schemathesis.openapi.from_url(f"{server.v1}/openapi.json")
    return [found.ok() for found in document.get_all_operations()]


def test_every_route_is_in_the_document(server: Running) -> None:
    labels = {operation.label for operation in operations(server)}
    assert {"POST /v1/chat/completions", "POST /v1/responses", "GET /v1/models", "GET /metrics"} <= labels


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_route_answers_as_the_document_says(server: Running, mode: str) -> None:
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    for operation in operations(server):
        if mode == "negative" and not operation.body:
            continue  # nothing is sent that could be wrong
        made = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @given(case=made)
        @settings(
            max_examples=EXAMPLES if operation.method.upper() == "POST" else 3,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str):
                body["model"] = MODEL  # any other ends as a 404
            # a document cannot say which data: URLs are pictures, nor that a system message stands in front
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
