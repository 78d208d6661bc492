import random
from collections import Counter

import pytest
from PIL import Image

from seekvl.corpus.phrases import ORDINALS
from seekvl.corpus.questions import caption, questions
from seekvl.corpus.scene import Drawn, Entry, Scene
from seekvl.corpus.signs import draw_sign
from seekvl.corpus.strips import LAYOUTS, draw_strip
from seekvl.processing.grounding import parse_boxes

KINDS = ("small_print", "small_locate", "small_count", "small_colour", "small_letters", "small_text")


def text(word: str, y: int, x: int = 40) -> Drawn:
    box = (float(x), float(y), float(x + 40), float(y + 10))
    return Drawn(kind="text", name=word, colour="black", shape=word, size="medium", box=box)


def star(colour: str, y: int) -> Drawn:
    box = (10.0, float(y), 20.0, float(y + 10))
    return Drawn(kind="shape", name=f"{colour} star", colour=colour, shape="star", size="small", box=box)


def strip(layout: str, *entries: Entry, size: tuple[int, int] = (100, 400)) -> Scene:
    parts = [part for one in entries for part in (one.mark, one.text, one.number) if part]
    return Scene(
        image=Image.new("RGB", size), style="strip", background="white", objects=tuple(parts), layout=layout,
        entries=entries,
    )  # fmt: skip


@pytest.fixture
def menu() -> Scene:
    return strip(
        "menu",
        Entry(text=text("TEA", 20), mark=star("red", 20)),
        Entry(text=text("SOUP", 120), mark=star("blue", 120)),
        Entry(text=text("CAKE", 220), mark=star("red", 220)),
    )


@pytest.fixture
def table() -> Scene:
    return strip(
        "table",
        Entry(text=text("TEA", 20), number=text("31", 20, x=150)),
        Entry(text=text("SOUP", 120), number=text("75", 120, x=150)),
        size=(200, 400),
    )


def said(scene: Scene, kind: str) -> dict[str, str]:
    """Every question that 300 draws ask, with its answer; the same question never has two."""
    found: dict[str, str] = {}
    for seed in range(300):
        for one in questions(scene, random.Random(seed), kind=kind):
            assert found.setdefault(one.question, one.answer) == one.answer
    return found


def test_words_are_read_by_place_neighbour_and_unique_bullet(menu):
    found = said(menu, "small_print")
    for nth, word in (("first", "TEA"), ("second", "SOUP"), ("third", "CAKE"), ("last", "CAKE")):
        assert found[f"What is the {nth} word?"] == word
        assert found[f"What does the {nth} line say?"] == word
    assert found["Which word comes after TEA?"] == found["Which word comes before CAKE?"] == "SOUP"
    assert found["Which word is below SOUP?"] == "CAKE"
    assert found["Which word is above SOUP?"] == "TEA"
    assert found["Which word is beside the blue star?"] == "SOUP"
    assert not [question for question in found if "red star" in question]  # there are two
    assert not [question for question in found if "after CAKE" in question or "before TEA" in question]


def test_in_a_row_a_bullet_belongs_to_the_word_after_it():
    row = draw_strip(random.Random(4), layout="menu", tall=False)
    asked = {**said(row, "small_print"), **said(row, "small_colour")}
    assert not [question for question in asked if "beside" in question or "line" in question]
    first = row.entries[0]
    assert asked[f"What colour is the {first.mark.shape} before {first.text.name}?"] == first.mark.colour
    assert asked[f"Which word stands after the {first.mark.name}?"] == first.text.name


def test_a_table_is_read_both_ways(table):
    found = said(table, "small_print")
    assert found["Which number is beside SOUP?"] == "75"
    assert found["Which word has the number 31?"] == "TEA"
    columns = Scene(
        image=Image.new("RGB", (400, 100)), style="strip", background="white", objects=table.objects,
        layout="table", entries=table.entries,
    )  # fmt: skip
    found = said(columns, "small_print")
    assert found["Which number is under SOUP?"] == "75"
    assert found["Which word is above 31?"] == "TEA"
    assert not [question for question in found if "beside" in question]


def test_panels_and_pointers():
    board = Drawn(
        kind="sign", name="red panel", colour="red", shape="", size="medium", box=(5.0, 5.0, 95.0, 45.0)
    )
    banner = strip("banner", Entry(text=text("TEA", 20), mark=board), Entry(text=text("SOUP", 120)))
    found = said(banner, "small_print")
    assert found["What is written on the red panel?"] == found["Read the first panel."] == "TEA"
    assert set(said(banner, "small_colour").values()) == {"red"}
    assert said(banner, "small_count")["Count the panels."] == "2"
    assert said(banner, "locate")["Where is the red panel?"].startswith("<|ref|>red panel<|/ref|>")
    ruler = strip("ruler", Entry(text=text("10", 20)), Entry(text=text("20", 120), mark=star("blue", 120)))
    found = said(ruler, "small_print")
    assert found["Which number does the blue star point at?"] == found["What is the last number?"] == "20"
    assert not [question for question in found if "after" in question]
    assert said(ruler, "small_colour")["What colour is the triangle at 20?"] == "blue"
    assert said(ruler, "small_text") == {}
    assert said(ruler, "small_letters") == {}


def test_words_and_numbers_are_located(table):
    found = said(table, "small_locate")
    assert found["Where is the word SOUP?"] == "<|ref|>SOUP<|/ref|><|det|>[[200, 300, 400, 325]]<|/det|>"
    assert found["Where is the number 31?"] == "<|ref|>31<|/ref|><|det|>[[749, 50, 949, 75]]<|/det|>"


def test_entries_are_counted_by_what_they_are(menu, table):
    assert said(menu, "small_count")["How many lines are there?"] == "3"
    assert said(table, "small_count")["How many words are there?"] == "2"
    long = draw_strip(random.Random(2), layout="list", tall=False)
    assert not [question for question in said(long, "small_count") if "lines" in question]


def test_letters_and_the_whole_text(menu, table):
    found = said(menu, "small_letters")
    assert found["Spell the second word."] == "S O U P"
    assert found["What is the first letter of the last word?"] == "C"
    assert found["What is the last letter of the first word?"] == "A"
    assert said(menu, "small_text")["Read everything."] == "TEA, SOUP, CAKE"
    assert said(table, "small_text")["Read everything."] == "TEA 31, SOUP 75"


def test_colours_are_asked_by_the_word(menu):
    found = said(menu, "small_colour")
    assert found["What colour is the star beside TEA?"] == "red"
    assert found["What colour is the star beside SOUP?"] == "blue"


def test_captions(menu, table):
    assert caption(menu) == "A menu of three words on a white background: red, blue and red."
    assert caption(table) == "A table of two words on a white background."
    ruler = strip("ruler", Entry(text=text("10", 20)), Entry(text=text("20", 120), mark=star("orange", 120)))
    assert caption(ruler) == "A ruler with two numbers and an orange star."
    banner = draw_strip(random.Random(0), layout="banner")
    colours = [panel.colour for panel in banner.of("sign")]
    assert caption(banner).startswith("A banner of ")
    assert caption(banner).endswith(f"panels: {', '.join(colours[:-1])} and {colours[-1]}.")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_strips_answer_every_kind_truly_and_fill_every_wording(layout):
    counts = Counter()
    for seed in range(6):
        rng = random.Random(seed)
        scene = draw_strip(rng, layout=layout)
        boxes = {thing.name: thing.box for thing in scene.objects if thing.kind == "text"}
        for kind in KINDS:
            for one in questions(scene, rng, kind=kind):
                counts[kind] += 1
                assert one.kind == kind
                assert not set("{}") & set(one.question + one.answer)
                if kind == "small_locate":
                    (box,) = parse_boxes(one.answer)
                    assert box.pixels(*scene.image.size) == pytest.approx(boxes[box.label], abs=1)
                if kind == "small_print":
                    assert one.answer in boxes
                    nth = [place for place in ORDINALS if f" {place} " in one.question]
                    if nth:
                        assert one.answer == scene.entries[ORDINALS.index(nth[0])].text.name
    lacks = {"list": {"small_colour"}, "table": {"small_colour"}, "ruler": {"small_letters", "small_text"}}
    assert set(KINDS) - set(counts) == lacks.get(layout, set())


@pytest.mark.parametrize("kind", ["colour", "shape", "count", "read", "letters", "relation", "chart"])
def test_questions_about_other_pictures_find_nothing_doubtful_on_a_list(kind):
    scene = draw_strip(random.Random(1), layout="list")
    assert questions(scene, random.Random(0), kind=kind) == []


def test_strips_alone_have_small_print():
    scene = draw_sign(random.Random(0))
    assert not [one for kind in KINDS for one in questions(scene, random.Random(0), kind=kind)]
