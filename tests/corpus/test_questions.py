import random
from collections import Counter

import pytest
from PIL import Image

from seekvl.corpus.asked import grid_box
from seekvl.corpus.charts import draw_chart
from seekvl.corpus.questions import QUESTIONS, caption, questions
from seekvl.corpus.scene import Drawn, Scene
from seekvl.corpus.shapes import draw_shapes
from seekvl.corpus.signs import draw_sign
from seekvl.corpus.strips import draw_strip
from seekvl.processing.grounding import parse_boxes


def thing(name: str, box: tuple[float, float, float, float], size: str = "small") -> Drawn:
    colour, shape = name.split()
    return Drawn(kind="shape", name=name, colour=colour, shape=shape, size=size, box=box)


@pytest.fixture
def scene() -> Scene:
    # from left to right: red circle, large blue square, green circle; at the bottom a blue star
    objects = (
        thing("blue square", (80, 20, 140, 80), "large"),
        thing("red circle", (10, 30, 40, 60)),
        thing("green circle", (160, 30, 190, 60)),
        thing("blue star", (95, 160, 125, 190)),
    )
    return Scene(image=Image.new("RGB", (200, 200)), style="shapes", background="white", objects=objects)


def answers(scene: Scene, kind: str) -> dict[str, str]:
    return {one.about: one.answer for one in questions(scene, random.Random(0), kind=kind)}


def test_colour_is_asked_only_of_the_one_thing_of_a_shape(scene):
    assert answers(scene, "colour") == {"look blue square": "blue", "look blue star": "blue"}


def test_shape_is_asked_only_of_the_one_thing_of_a_colour(scene):
    assert answers(scene, "shape") == {"look red circle": "circle", "look green circle": "circle"}


def test_counts(scene):
    counted = [answers_of(scene, seed) for seed in range(40)]
    for each in counted:
        assert each["count all"] == "4"
        assert each["count circle"] == "2"
        assert each["count blue"] == "2"
    truth = {"count red": "1", "count star": "1", "count square": "1", "count green": "1"}
    seen = {about: answer for each in counted for about, answer in each.items()}
    assert truth.items() <= seen.items()
    assert {"0"} == {seen[about] for about in seen if about in ("count ring", "count heart", "count pink")}


def answers_of(scene: Scene, seed: int) -> dict[str, str]:
    return {one.about: one.answer for one in questions(scene, random.Random(seed), kind="count")}


def test_boxes_are_of_the_picture_from_0_to_999(scene):
    located = answers(scene, "locate")
    assert located["locate red circle"] == "<|ref|>red circle<|/ref|><|det|>[[50, 150, 200, 300]]<|/det|>"
    assert grid_box((0, 0, 200, 100), 200, 100) == (0, 0, 999, 999)


def test_what_is_not_there_has_no_box(scene):
    (one,) = questions(scene, random.Random(1), kind="absent")
    assert one.answer.startswith("There is no ")
    assert one.answer[12:-1] not in {each.name for each in scene.objects}


def test_relations_hold_by_the_centres(scene):
    centres = {
        one.name: ((one.box[0] + one.box[2]) / 2, (one.box[1] + one.box[3]) / 2) for one in scene.objects
    }
    said = Counter()
    for seed in range(60):
        for one in questions(scene, random.Random(seed), kind="relation"):
            if not one.about.startswith("relation"):
                continue
            a, b = sorted(centres, key=one.question.find)[-2:]
            (ax, ay), (bx, by) = centres[a], centres[b]
            holds = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
            (side,) = [side for side in holds if side in one.question]
            assert one.answer == ("Yes" if holds[side] else "No"), one
            said[one.answer] += 1
    assert 0.8 < said["Yes"] / said["No"] < 1.25


def test_what_is_on_a_side_is_asked_only_where_one_thing_is(scene):
    found = answers(scene, "relation")
    assert "what above blue star" not in found  # three things are
    assert found["what left of blue square"] == "red circle"
    assert found["what right of blue square"] == "green circle"


def test_outermost(scene):
    assert answers(scene, "position") == {
        "left of": "red circle",
        "right of": "green circle",
        "below": "blue star",
    }


def test_sizes_are_compared_only_where_they_differ_clearly(scene):
    asked = questions(scene, random.Random(0), kind="size")
    assert {one.about for one in asked} == {
        f"size blue square {b}" for b in ("red circle", "green circle", "blue star")
    }
    for one in asked:
        smaller = "smaller" in one.question
        assert (one.answer == "blue square") != smaller


def test_exist_is_true_and_balanced():
    said = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        scene = draw_shapes(rng)
        words = {one.name for one in scene.shapes} | {one.shape for one in scene.shapes}
        for one in questions(scene, rng, kind="exist"):
            assert one.answer == ("Yes" if one.about.removeprefix("exist ") in words else "No")
            said[one.answer] += 1
    assert 0.8 < said["Yes"] / said["No"] < 1.25


def test_charts():
    for seed in range(30):
        scene = draw_chart(random.Random(seed))
        height = {bar.colour: bar.box[3] - bar.box[1] for bar in scene.objects}
        found = answers(scene, "chart")
        assert found["tallest"] == max(height, key=height.get)
        assert found["shortest"] == min(height, key=height.get)
        assert found["bars"] == str(len(height))
        for bar in scene.objects:
            if bar.shape:
                assert found[f"bar {bar.shape}"] == bar.colour


def test_taller_is_true():
    said = Counter()
    for seed in range(200):
        scene = draw_chart(random.Random(seed))
        height = {bar.colour: bar.box[3] - bar.box[1] for bar in scene.objects}
        (one,) = [one for one in questions(scene, random.Random(seed), kind="chart") if one.about == "taller"]
        a, b = sorted((c for c in height if f"the {c}" in one.question), key=one.question.find)
        assert one.answer == ("Yes" if height[a] > height[b] else "No")
        said[one.answer] += 1
    assert min(said.values()) > 60


def test_signs_are_read_spelled_and_found():
    scene = draw_sign(random.Random(3), word="STOP")
    assert answers(scene, "read") == {"read": "STOP"}
    assert answers(scene, "letters") == {
        "spell": "S T O P",
        "first letter": "S",
        "last letter": "P",
        "letters": "4",
    }
    assert parse_boxes(answers(scene, "locate")["locate text"])[0].label == "STOP"


def test_captions(scene):
    assert caption(scene) == "Four objects on a white background."
    few = Scene(image=scene.image, style="shapes", background="grey", objects=scene.objects[:2])
    assert caption(few) == "A small red circle and a large blue square on a grey background."
    orange = thing("orange star", (0, 0, 50, 50), "medium")
    one = Scene(image=scene.image, style="shapes", background="dark blue", objects=(orange,))
    assert caption(one) == "An orange star on a dark blue background."
    assert caption(draw_chart(random.Random(0), count=2)).startswith("A bar chart with two bars: ")


@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_kind_fills_its_wordings_and_tells_its_kind(kind):
    found = 0
    for seed in range(30):
        rng = random.Random(seed)
        for draw in (draw_shapes, draw_sign, draw_chart, draw_strip):
            for one in questions(draw(rng), rng, kind=kind):
                found += 1
                assert one.kind == kind
                assert one.question
                assert one.answer
                assert not set("{}") & set(one.question + one.answer)
    assert found > 5
