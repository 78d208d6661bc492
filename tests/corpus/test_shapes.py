import random

import numpy as np
import pytest

from seekvl.corpus import shapes
from seekvl.corpus.scene import COLOURS, distance
from seekvl.corpus.shapes import LEAST_VISIBLE, MOST, SHAPES, SIZES, draw_shapes, shape_mask


@pytest.mark.parametrize("seed", range(25))
def test_every_box_holds_pixels_of_its_colour_on_all_four_edges(seed):
    scene = draw_shapes(random.Random(seed))
    pixels = np.asarray(scene.image).astype(float)
    for thing in scene.objects:
        x1, y1, x2, y2 = map(int, thing.box)
        near = np.linalg.norm(pixels[y1:y2, x1:x2] - COLOURS[thing.colour], axis=2) < 75
        assert near.any(axis=1).mean() > 0.9, thing
        assert near.any(axis=0).mean() > 0.9, thing


def test_names_sizes_and_counts_are_as_promised():
    seen = set()
    for seed in range(120):
        scene = draw_shapes(random.Random(seed))
        seen.add(len(scene.objects))
        longer = max(scene.image.size)
        for thing in scene.objects:
            assert thing.name == f"{thing.colour} {thing.shape}"
            x1, y1, x2, y2 = thing.box
            assert max(x2 - x1, y2 - y1) <= 1.45 * SIZES[thing.size][1] * longer
    assert seen == set(range(1, MOST + 1))


@pytest.mark.parametrize("by", ["shape", "colour"])
def test_alike_shapes_share_what_was_asked(by):
    for seed in range(20):
        scene = draw_shapes(random.Random(seed), count=4, alike=3, by=by)
        values = [getattr(thing, by) for thing in scene.objects]
        assert len(set(values[: min(3, len(values) - 1)])) == 1


def test_overlapping_shapes_leave_enough_to_see(monkeypatch):
    kept = []
    original = shapes.Canvas
    monkeypatch.setattr(shapes, "Canvas", lambda *args: kept.append(original(*args)) or kept[-1])
    hidden = 0
    for seed in range(150):
        draw_shapes(random.Random(seed))
        canvas = kept[-1]
        shares = [canvas.visible(owner) / canvas.areas[owner] for owner in range(1, len(canvas.areas))]
        assert min(shares) >= LEAST_VISIBLE
        hidden += min(shares) < 1
    assert hidden > 3


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_tight_and_as_large_as_asked(shape):
    mask = shape_mask(shape, 60.0)
    assert max(mask.size) in (60, 61)
    solid = np.asarray(mask) > 60
    assert solid[:2].any()
    assert solid[-2:].any()
    assert solid[:, :2].any()
    assert solid[:, -2:].any()


def test_shapes_differ_from_each_other_in_any_allowed_turn():
    fills = {name: np.asarray(shape_mask(name, 80.0)).mean() / 255 for name in ("circle", "square", "ring")}
    assert fills["square"] > 0.98 > fills["circle"] > 0.76 > fills["ring"]
    assert distance(COLOURS["orange"], COLOURS["yellow"]) > 80
