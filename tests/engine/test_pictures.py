from dataclasses import replace
from pathlib import Path

import torch

import seekvl
from seekvl.engine.forward import embed_piece, embed_prompt
from seekvl.engine.pictures import Features, encode_picture, picture_digests, picture_places
from seekvl.processing.encode import ModelInput

IMAGES = Path(__file__).parents[1] / "golden" / "images"


def shown(vlm: seekvl.VLM, *names: str) -> ModelInput:
    pictures = [str(IMAGES / f"{name}.png") for name in names]
    return vlm.processor([{"role": "user", "content": "Which?", "images": pictures}])


def test_places_hold_all_slots(tiled: seekvl.VLM) -> None:
    inputs = shown(tiled, "text_320x200", "la_90x61")
    places = picture_places(inputs)
    assert [end - start for start, end in places] == list(inputs.bill.image_tokens)
    assert inputs.image_mask.sum() == sum(end - start for start, end in places)
    assert all(inputs.image_mask[start:end].all() for start, end in places)


def test_everything_that_changes_features_is_part_of_a_fingerprint(
    vlm: seekvl.VLM, tiled: seekvl.VLM
) -> None:
    inputs = shown(tiled, "la_90x61")
    assert inputs.grids == ((2, 1),)
    assert inputs.pixels is not None
    others = [
        replace(inputs, grids=((1, 2),)),
        replace(inputs, pixels=inputs.pixels + 1e-6),
        replace(inputs, normalized=not inputs.normalized),
        replace(inputs, low_pixels=torch.zeros(len(inputs.pixels), 3, 4, 4)),
        replace(inputs, low_pixels=torch.ones(len(inputs.pixels), 3, 4, 4)),
    ]
    digests = [picture_digests(one)[0] for one in (inputs, *others)]
    assert len(set(digests)) == len(digests)
    assert picture_digests(replace(inputs)) == digests[:1]
    assert picture_digests(vlm.processor("Hello")) == []


def test_pieces_embed_as_the_whole(tiled: seekvl.VLM) -> None:
    inputs = shown(tiled, "text_320x200", "la_90x61")
    features = [encode_picture(tiled.model, inputs, index=index) for index in range(2)]
    whole, (first, second) = embed_prompt(tiled.model, inputs), picture_places(inputs)
    middle = first[0] + 3
    rows = torch.cat((features[0][3:], features[1][:2]))
    piece = embed_piece(tiled.model, inputs, start=middle, end=second[0] + 2, features=rows)
    assert torch.equal(piece, whole[:, middle : second[0] + 2])


def test_features_stay_within_their_bytes_and_the_least_used_go_first() -> None:
    features = Features(limit=100)
    rows = {name: torch.zeros(10, dtype=torch.float32) for name in (b"a", b"b", b"c")}
    for name in (b"a", b"b"):
        features.put(name, rows[name])
    assert features.get(b"a") is rows[b"a"]
    features.put(b"c", rows[b"c"])
    assert features.get(b"b") is None
    assert features.get(b"a") is not None
    assert features.nbytes == 80
    features.put(b"a", rows[b"b"])
    assert features.nbytes == 80
    features.put(b"large", torch.zeros(26))
    assert features.get(b"large") is None
    assert (features.queries, features.hits) == (4, 2)
    features.clear()
    assert (features.nbytes, features.get(b"a")) == (0, None)
