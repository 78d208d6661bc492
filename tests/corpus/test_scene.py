import random

import numpy as np
import pytest
from PIL import Image

from seekvl.corpus.scene import (
    ASPECTS,
    CLEAR,
    COLOURS,
    GROUNDS,
    LONGEST,
    SHORTEST,
    Canvas,
    canvas_size,
    distance,
    shade,
)


def test_canvas_sizes_stay_in_their_bounds():
    rng = random.Random(0)
    for _ in range(500):
        width, height = canvas_size(rng)
        assert min(width, height) >= SHORTEST
        assert max(width, height) <= LONGEST
        assert ASPECTS[0] - 0.01 <= width / height <= ASPECTS[1] + 0.01


def test_shades_stay_nearest_to_their_own_colour():
    rng = random.Random(0)
    for _ in range(100):
        for name in COLOURS:
            drawn = shade(rng, name)
            assert min(COLOURS, key=lambda other: distance(COLOURS[other], drawn)) == name


@pytest.mark.parametrize("seed", range(20))
def test_colours_offered_stand_out_from_every_pixel_of_the_background(seed):
    rng = random.Random(seed)
    canvas = Canvas(rng, 90, 120)
    palette = canvas.clear_colours(rng)
    assert canvas.background in GROUNDS
    assert len(palette) >= 4
    pixels = np.asarray(canvas.image).reshape(-1, 3).astype(float)
    for rgb in palette.values():
        assert np.linalg.norm(pixels - rgb, axis=1).min() >= 0.5 * CLEAR


def test_a_later_thing_takes_the_pixels_of_an_earlier_one():
    canvas = Canvas(random.Random(0), 40, 40)
    first = canvas.paste(Image.new("L", (10, 10), 255), 5, 5, rgb=(1, 2, 3))
    assert canvas.covered(Image.new("L", (10, 5), 255), 5, 5) == {first: 50}
    second = canvas.paste(Image.new("L", (10, 5), 255), 5, 5, rgb=(9, 8, 7))
    assert canvas.visible(first) == 50
    assert canvas.areas[first] == 100
    assert canvas.box(first) == (5.0, 10.0, 15.0, 15.0)
    assert canvas.box(first, second) == (5.0, 5.0, 15.0, 15.0)
    assert canvas.image.getpixel((6, 6)) == (9, 8, 7)
