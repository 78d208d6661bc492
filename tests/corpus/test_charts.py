import random
from itertools import pairwise

import numpy as np
import pytest

from seekvl.corpus.charts import LEVELS, draw_chart
from seekvl.corpus.scene import COLOURS


@pytest.mark.parametrize("seed", range(25))
def test_bars_differ_in_colour_and_clearly_in_height(seed):
    scene = draw_chart(random.Random(seed))
    assert 2 <= len(scene.objects) <= 5
    assert len({bar.colour for bar in scene.objects}) == len(scene.objects)
    heights = sorted(bar.box[3] - bar.box[1] for bar in scene.objects)
    least = (scene.image.height * 0.7) / LEVELS / 1.5
    assert all(b - a >= least for a, b in pairwise(heights))


@pytest.mark.parametrize("seed", range(10))
def test_each_bar_is_filled_with_its_colour(seed):
    scene = draw_chart(random.Random(seed))
    pixels = np.asarray(scene.image).astype(float)
    for bar in scene.objects:
        x1, y1, x2, y2 = map(int, bar.box)
        assert (np.linalg.norm(pixels[y1:y2, x1:x2] - COLOURS[bar.colour], axis=2) < 75).mean() > 0.95


def test_bars_are_as_many_as_asked_and_labelled_differently():
    for count in range(2, 6):
        scene = draw_chart(random.Random(count), count=count)
        labels = [bar.shape for bar in scene.objects if bar.shape]
        assert len(scene.objects) == count
        assert len(set(labels)) == len(labels)
