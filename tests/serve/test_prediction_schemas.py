"""The published documents of the two models: names, order, defaults and ranges are a contract."""

import pytest

from seekvl.serve.prediction_inputs import FULL, SIMPLE
from seekvl.serve.prediction_schemas import document, version_id

NONE = object()
"""No such key."""
PUBLISHED = {
    "full": [
        ("text", "string", "Describe this image.", NONE, NONE),
        ("image1", "uri", NONE, NONE, NONE),
        ("image2", "uri", NONE, NONE, NONE),
        ("image3", "uri", NONE, NONE, NONE),
        ("max_new_tokens", "integer", 2048, 0, 4096),
        ("temperature", "number", 0.1, NONE, NONE),
        ("top_p", "number", 0.9, NONE, NONE),
        ("repetition_penalty", "number", 1.1, 0, 2),
    ],
    "simple": [
        ("image", "uri", NONE, NONE, NONE),
        ("prompt", "string", NONE, NONE, NONE),
        ("temperature", "number", 0.1, 0, 1),
        ("top_p", "number", 0.9, 0, 1),
        ("repetition_penalty", "number", 1.1, 0, 2),
        ("max_length_tokens", "integer", 2048, 0, 4096),
    ],
}
SETS = {"full": FULL, "simple": SIMPLE}


@pytest.mark.parametrize("name", SETS)
def test_the_inputs_are_the_published_ones_in_order_with_ours_behind(name: str) -> None:
    schema = document(SETS[name])["components"]["schemas"]["Input"]
    properties = schema["properties"]
    found = [
        (
            name,
            "uri" if each.get("format") == "uri" else each["type"],
            each.get("default", NONE),
            each.get("minimum", NONE),
            each.get("maximum", NONE),
        )
        for name, each in properties.items()
    ]
    published = PUBLISHED[name]
    assert found[: len(published)] == published
    assert [each[0] for each in found[len(published) :]] == ["seed", "stop", "max_tiles"]
    assert [each["x-order"] for each in properties.values()] == list(range(len(properties)))
    assert schema["required"] == {"full": ["image1"], "simple": ["image", "prompt"]}[name]
    assert all(each["description"] and each["title"] for each in properties.values())


def test_outputs_are_no_iterators() -> None:
    output = document(FULL)["components"]["schemas"]["Output"]
    assert output["type"] == "object"
    assert output["required"] == ["text_out"]
    assert output["properties"]["img_out"]["format"] == "uri"
    assert document(SIMPLE)["components"]["schemas"]["Output"] == {"title": "Output", "type": "string"}


@pytest.mark.parametrize("name", SETS)
def test_the_document_offers_streams(name: str) -> None:
    found = document(SETS[name])
    assert found["openapi"] == "3.0.2"
    assert found["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    assert found["paths"]["/predictions/{prediction_id}"]["put"]["x-cog-streaming"] is True
    assert set(found["paths"]) >= {"/", "/health-check", "/predictions/{prediction_id}/cancel"}


def test_every_reference_leads_somewhere() -> None:
    found = document(FULL)
    known = {f"#/components/schemas/{name}" for name in found["components"]["schemas"]}

    def references(value: object) -> set[str]:
        if isinstance(value, dict):
            here = {value["$ref"]} if "$ref" in value else set()
            return here.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    assert references(found) <= known
    assert "#/components/schemas/Input" in references(found)


def test_a_version_is_known_by_name_and_inputs() -> None:
    ids = {version_id("o/a", FULL), version_id("o/a-simple", SIMPLE), version_id("o/b", FULL)}
    assert len(ids) == 3
    assert version_id("o/a", FULL) in ids
    assert all(len(each) == 64 for each in ids)
