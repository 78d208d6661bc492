import random
from itertools import combinations, pairwise

import numpy as np
import pytest

from seekvl.corpus.scene import COLOURS, GROUNDS, jittered, luma
from seekvl.corpus.strips import ASPECTS, LAYOUTS, LONGEST, SHORTEST, draw_strip, ink_for, kept_in_tiles
from seekvl.corpus.words import WORDS_HELD_OUT
from seekvl.processing.tile_image import choose_grid
from seekvl.runtime import SeekVLError

GRIDS = tuple((m, n) for m in range(1, 7) for n in range(1, 7) if m * n <= 6)
FLAT = "EFHIKLTXZ"
"""Letters as high as a capital, no curve beyond it."""

every_strip = pytest.mark.parametrize(
    ("layout", "tall", "seed"),
    [(layout, tall, seed) for layout in LAYOUTS for tall in (False, True) for seed in range(4)],
)


def inside(box, other) -> bool:
    return other[0] <= box[0] < box[2] <= other[2] and other[1] <= box[1] < box[3] <= other[3]


def apart(a, b) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def middle(box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@every_strip
def test_things_lie_in_the_picture_and_on_nothing_else(layout, tall, seed):
    scene = draw_strip(random.Random(seed), layout=layout, tall=tall)
    assert (scene.style, scene.layout) == ("strip", layout)
    width, height = scene.image.size
    assert (height > width) == tall
    assert SHORTEST <= max(width, height) <= LONGEST
    assert ASPECTS[0] - 0.02 <= max(width, height) / min(width, height) <= ASPECTS[1] + 0.1
    assert all(inside(thing.box, (0, 0, width, height)) for thing in scene.objects)
    for kind in ("text", "shape", "sign"):
        assert all(apart(a.box, b.box) for a, b in combinations(scene.of(kind), 2))
    assert all(apart(a.box, b.box) for a in scene.of("text") for b in scene.of("shape"))


@every_strip
def test_entries_stand_in_order_and_hold_what_their_layout_has(layout, tall, seed):
    scene = draw_strip(random.Random(seed), layout=layout, tall=tall)
    assert 3 <= len(scene.entries) <= 10
    places = [middle(entry.text.box)[tall] for entry in scene.entries]
    assert places == sorted(places)
    texts = [text.name for text in scene.of("text")]
    assert len(set(texts)) == len(texts) == len(scene.entries) * (2 if layout == "table" else 1)
    letters = "".join(letter.name for letter in scene.of("letter"))
    assert letters == "".join(text for text in texts if not text.isdigit())
    spelled = iter(scene.of("letter"))
    for text in scene.of("text"):
        boxes = [next(spelled).box for _ in text.name if not text.name.isdigit()]
        assert all(inside(box, text.box) for box in boxes)
        assert all(middle(a) < middle(b) for a, b in pairwise(boxes))
    for entry in scene.entries:
        assert (entry.number is not None) == (layout == "table")
        if layout != "ruler":
            assert (entry.mark is not None) == (layout in ("menu", "banner"))
        for part in (entry.text, entry.number, entry.mark):
            assert part is None or part in scene.objects


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_what_belongs_together_stands_together(tall, seed):
    across = 1 - tall
    banner = draw_strip(random.Random(seed), layout="banner", tall=tall)
    assert all(inside(entry.text.box, entry.mark.box) for entry in banner.entries)
    menu = draw_strip(random.Random(seed), layout="menu", tall=tall)
    for entry in menu.entries:
        assert entry.mark.box[2] < entry.text.box[0]
        assert abs(middle(entry.mark.box)[1] - middle(entry.text.box)[1]) <= 4
    table = draw_strip(random.Random(seed), layout="table", tall=tall)
    for entry in table.entries:
        assert entry.text.box[2 + across] <= entry.number.box[across]
        assert abs(middle(entry.text.box)[tall] - middle(entry.number.box)[tall]) <= 4
    ruler = draw_strip(random.Random(seed), layout="ruler", tall=tall)
    numbers = [int(entry.text.name) for entry in ruler.entries]
    assert len({b - a for a, b in pairwise(numbers)}) == 1
    pointed = [entry for entry in ruler.entries if entry.mark]
    assert 1 <= len(pointed) <= 3
    for entry in pointed:
        assert entry.mark.box[2 + across] <= entry.text.box[across]
        assert abs(middle(entry.mark.box)[tall] - middle(entry.text.box)[tall]) <= 4


def test_capitals_can_be_read_in_tiles_and_not_in_a_small_square():
    for seed in range(120):
        scene = draw_strip(random.Random(seed))
        width, height = scene.image.size
        columns, rows = choose_grid(width, height, grids=GRIDS, tile=160)
        tiled = min(1.0, columns * 160 / width, rows * 160 / height)
        assert tiled == pytest.approx(kept_in_tiles(max(width, height), min(width, height)), rel=0.01)
        for letter in scene.of("letter"):
            if letter.shape in FLAT:
                capital = letter.box[3] - letter.box[1]
                assert 8 <= capital <= 20
                assert capital * tiled >= 7.99
                assert capital * 256 / max(width, height) <= 7.01


@pytest.mark.parametrize("seed", range(12))
def test_marks_and_letters_have_their_colour_where_their_box_is(seed):
    scene = draw_strip(random.Random(seed), layout=("menu", "banner", "ruler")[seed % 3])
    pixels = np.asarray(scene.image).astype(float)
    for thing in scene.objects:
        if thing.kind == "text":
            continue
        x1, y1, x2, y2 = (round(value) for value in thing.box)
        near = np.linalg.norm(pixels[y1:y2, x1:x2] - COLOURS[thing.colour], axis=2) < 100
        least = 0.15 if thing.kind == "letter" else 0.75  # a thin stroke is half background everywhere
        assert near.any(axis=1).mean() > least, thing
        assert near.any(axis=0).mean() > least, thing


@pytest.mark.parametrize("ground", GROUNDS)
def test_ink_stands_out_from_every_background(ground):
    for seed in range(20):
        rng = random.Random(seed)
        tones = [jittered(rng, GROUNDS[ground], amount=26) for _ in range(3)]
        name, ink = ink_for(rng, tones)
        assert name in COLOURS
        assert all(abs(luma(ink) - luma(tone)) >= 90 for tone in tones)


def test_held_out_words_are_only_on_held_out_strips():
    for seed in range(40):
        unseen = draw_strip(random.Random(seed), held_out=True)
        seen = draw_strip(random.Random(seed))
        for scene, held_out in ((unseen, True), (seen, False)):
            words = [text.name for text in scene.of("text") if not text.name.isdigit()]
            assert all(len(word) >= 3 for word in words)
            assert all((word in WORDS_HELD_OUT) == held_out for word in words)


def test_every_layout_comes_tall_and_long_and_from_its_random_stream_alone():
    scenes = [draw_strip(random.Random(seed)) for seed in range(60)]
    assert {(one.layout, one.image.height > one.image.width) for one in scenes} == {
        (layout, tall) for layout in LAYOUTS for tall in (False, True)
    }
    again = draw_strip(random.Random(7))
    assert again.objects == scenes[7].objects
    assert again.image.tobytes() == scenes[7].image.tobytes()


def test_an_unknown_layout_is_refused():
    with pytest.raises(SeekVLError, match="'poem' is not known; use one of list, menu, table, banner, ruler"):
        draw_strip(random.Random(0), layout="poem")
