"""Boxes on the page: read, drawn, lit, marked, taken away; and what the model saw, of either family."""

import base64
import io
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageChops

from seekvl.processing.boxes import Box
from seekvl.processing.draw import mark_object
from seekvl.processing.grounding import in_context, parse_boxes
from seekvl.serve.grounding import grounding
from tests.processing.test_grounding import CASES, rows
from tests.serve.browsing import EXAMPLES, Opened, endless, soon, stream_instead, sure
from tests.serve.conftest import Running, Visit

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route


def test_boxes_and_phrases_light_each_other(opened: Opened) -> None:
    page = opened.page
    opened.ask("the sign", "sign.png", mode="Locate")
    phrase, box = page.locator(".phrase"), page.locator(".drawn [data-box]")
    soon(lambda: phrase.inner_text() == "sign")
    soon(lambda: "<|" not in opened.word())
    soon(lambda: "lit" not in (box.get_attribute("class") or ""))
    phrase.hover()
    soon(lambda: "lit" in (box.get_attribute("class") or ""))
    box.hover()
    soon(lambda: "lit" in (phrase.get_attribute("class") or ""))
    page.mouse.move(2, 2)
    soon(lambda: "lit" not in (box.get_attribute("class") or ""))
    soon(lambda: re.fullmatch(r"sign \d+\s%", page.locator(".drawn .plate text").text_content() or ""))
    assert re.fullmatch(
        r"sign [\d ]{7,15} · \d+\s% likely that its edges .*", box.locator("title").text_content() or ""
    )
    # where it is drawn is where the server says it is
    reply = page.locator(".facts")
    reply.click()
    page.get_by_role("tab", name="Reply").click()
    raw = page.locator(".block pre").inner_text()
    (found,) = re.findall(r'"box_px": \[([^\]]*)\]', raw)
    x1, y1, x2, y2 = map(float, found.split(","))
    outline = page.locator(".drawn .outline")
    drawn = [float(outline.get_attribute(name) or 0) for name in ("x", "y", "width", "height")]
    assert drawn == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.01)


def test_what_the_model_saw_and_how_sure_it_was(opened: Opened) -> None:
    opened.ask("What does the sign say?", "sign.png")
    page = opened.page
    page.get_by_role("button", name="What the model saw").click()
    assert (
        "290×200 px, seen at 256×176 px in one view of 256 px; 100 tokens"
        in page.locator("figcaption").inner_text()
    )
    soon(lambda: page.locator(".tiles text").text_content() == "1 · 100 tokens")
    page.get_by_role("button", name="Confidence").click()
    tokens = page.get_by_test_id("sure").locator(".token")
    soon(lambda: "".join(tokens.all_inner_texts()).strip() == "WALL")
    soon(lambda: re.match(r"\d+\s%", tokens.first.get_attribute("title") or ""))
    soon(lambda: re.search(r"Least sure: “\w+”, \d+\s%\.", page.locator(".reply").inner_text()))


def test_tiles_lie_where_the_model_cut_them(opened: Opened) -> None:
    seen = {"size": [290, 200], "scaled": [290, 200], "columns": 3, "rows": 2, "tile": 100}
    stream_instead(opened.page, "six tiles", pictures=[{**seen, "tokens": 180, "tile_tokens": 25}])
    opened.ask("How many tiles?", "sign.png")
    opened.page.get_by_role("button", name="What the model saw").click()
    places = opened.page.locator(".tiles rect").evaluate_all(
        "nodes => nodes.map(node => ['x', 'y', 'width'].map(name => Number(node.getAttribute(name))))"
    )
    assert places == [[x, y, 100] for y in (0, 100) for x in (-5, 95, 195)]  # 5 px of padding on each side
    soon(
        lambda: "3×2 tiles of 100 px; 180 tokens, 25 a tile" in opened.page.locator("figcaption").inner_text()
    )


def test_a_region_is_asked_about_as_the_paper_does(opened: Opened) -> None:
    page = opened.page
    opened.write("", "shapes.png")
    page.locator(".thumb").click()
    page.get_by_role("button", name="Mark a region").click()
    opened.drag((0.4, 0.2), (0.6, 0.5))
    region = page.locator(".region")
    x, y, width, height = (float(region.get_attribute(name) or 0) for name in ("x", "y", "width", "height"))
    page.get_by_role("button", name="Find the like in").click()
    soon(lambda: page.locator("#question").input_value() == in_context().removeprefix("<|grounding|>"))
    assert page.locator(".foot").get_by_role("radio", name="Grounded answer").is_checked()
    names = [item.get_attribute("aria-label") for item in page.locator(".foot .strip li").all()]
    assert names == ["Picture 1: shapes-marked.png", "Picture 2: shapes.png"]
    # the rectangle is the one that `mark_object` draws, but for the edges' rounding
    with Image.open(EXAMPLES / "shapes.png") as plain, Image.open(io.BytesIO(shown_in(page))) as marked:
        corners = (x, y, x + width, y + height)
        wanted = mark_object(
            plain.convert("RGB"), Box.from_pixels("", corners, width=plain.width, height=plain.height)
        )
        changed = [
            ImageChops.difference(each.convert("RGB"), plain.convert("RGB")).getbbox()
            for each in (marked, wanted)
        ]
    assert changed[0] == pytest.approx(changed[1], abs=1)
    page.locator("#question").press("Enter")
    opened.answered()
    assert opened.sent()["messages"][0]["content"][-1] == {"type": "text", "text": in_context()}


def shown_in(page: "Page") -> bytes:
    """The bytes of the first picture of the draft."""
    read = """async node => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [node.naturalWidth, node.naturalHeight];
        canvas.getContext("2d").drawImage(node, 0, 0);
        return canvas.toDataURL("image/png");
    }"""
    url = page.locator(".foot .strip img").first.evaluate(read)
    return base64.b64decode(url.partition(",")[2])


def test_a_region_is_marked_by_keys_and_asked_about(opened: Opened) -> None:
    page = opened.page
    opened.write("", "shapes.png", "sign.png")
    page.locator(".thumb").first.click()
    page.keyboard.press("r")
    page.get_by_role("status").get_by_text("use the arrow keys").wait_for()

    def place() -> list[float]:
        names = ("x", "y", "width", "height")
        return [float(page.locator(".region").get_attribute(name) or 0) for name in names]

    page.keyboard.press("ArrowLeft")  # the first one puts it into the middle
    soon(lambda: place() == pytest.approx([0.375 * 307, 0.375 * 259, 0.25 * 307, 0.25 * 259]))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    soon(lambda: place() == pytest.approx([0.355 * 307, 0.395 * 259, 0.27 * 307, 0.25 * 259]))
    for _ in range(40):
        page.keyboard.press("ArrowUp")
    soon(lambda: place()[1] == 0)  # it stays in the picture
    assert page.locator(".zoom").inner_text() == "100%"
    # in another picture of the draft, too
    page.get_by_label("Find the like in").last.select_option(label="sign.png")
    page.get_by_role("button", name="Find the like in").click()
    items = page.locator(".foot .strip li")
    soon(lambda: items.nth(1).get_attribute("aria-label") == "Picture 2: sign.png")
    items.first.get_by_role("button", name="Open large").click()
    page.keyboard.press("r")
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Ask what it is").click()
    soon(lambda: page.locator("#question").input_value() == "What is the object within the red rectangle?")
    soon(lambda: page.evaluate("document.activeElement.id") == "question")


def test_boxes_are_downloaded_in_four_forms(opened: Opened, tmp_path: Path) -> None:
    opened.ask("the sign", "sign.png", mode="Locate")
    found = {}
    for name in ("PNG", "SVG", "JSON", "COCO"):
        with opened.page.expect_download() as saving:
            opened.page.get_by_role("button", name=f"Download {name}").click()
        saving.value.save_as(tmp_path / name)
        found[name] = (tmp_path / name).read_bytes()
    with Image.open(io.BytesIO(found["PNG"])) as drawn, Image.open(EXAMPLES / "sign.png") as plain:
        assert drawn.size == plain.size
        assert drawn.convert("RGB").tobytes() != plain.convert("RGB").tobytes()
    assert found["SVG"].startswith(b"<svg")
    assert b">sign</text>" in found["SVG"]
    (box,) = json.loads(found["JSON"])["boxes"]
    (noted,) = json.loads(found["COCO"])["annotations"]
    assert 0 < box["confidence"] <= 1
    x, y, width, height = noted["bbox"]
    assert box["box_px"] == pytest.approx([x, y, x + width, y + height], abs=0.02)


# What is read in an answer

PIECES = (
    *(
        "<|ref|>",
        "<|/ref|>",
        "<|det|>",
        "<|/det|>",
        "<|grounding|>",
        "the dog",
        "狗",
        "🐕",
        "\n",
        " ",
        "[[",
        "]]",
        "[",
        "]",
    ),
    *(
        "[1, 2, 3, 4]",
        "[[10, 20, 30, 40]]",
        "[0.5, 1.5, 2.5, 998.5]",
        "[1,2,3]",
        ", ",
        "-3",
        "\x1f",
        "\ufeff",
        "[\xa01, 2, 3, 4]",
    ),
    *("<|ref|>cat<|/ref|><|det|>[[1, 2, 3, 4], [9, 8, 7, 6]]<|/det|>", "<|det|>[[5, 6, 7, 8", "<|/de"),
)


def answers() -> list[str]:
    """The table of docs/grounding.md, the golden cases, and made-up ones."""
    dice = random.Random(20)
    mixed = ["".join(dice.choices(PIECES, k=dice.randint(1, 12))) for _ in range(3000)]
    return [row[1].strip("`") for row in rows()] + [str(case["response"]) for case in CASES["cases"]] + mixed


def test_the_page_reads_boxes_as_the_library_does(opened: Opened) -> None:
    texts = answers()
    assert len(texts) > 3060
    read = opened.page.evaluate(
        "texts => import('/page/grounding.js').then(({parse}) => texts.map(text => parse(text, 1)))", texts
    )
    placed = 0
    for text, boxes in zip(texts, read, strict=True):
        assert [(box["label"], tuple(box["corners"])) for box in boxes] == [
            (box.label, box.corners) for box in parse_boxes(text)
        ], text
        wanted = grounding(text, sizes=[(1000, 1000)], stripped=False)
        for box, server in zip(boxes, wanted, strict=True):
            assert box["picture"] == 1
            place = [units(text, int(str(server[name]))) for name in ("start", "end") if name in server]
            assert (box["span"] or []) == place, text
            placed += bool(place)
            first, end = box["numbers"]
            assert cut(text, first, end)[:: len(cut(text, first, end)) - 1] == "[]", text
    assert placed > 1000


def units(text: str, letters: int) -> int:
    """How many UTF-16 units, which a browser counts, so many letters are."""
    return len(text[:letters].encode("utf-16-le")) // 2


def cut(text: str, start: int, end: int) -> str:
    """A part of a text, in UTF-16 units."""
    return text.encode("utf-16-le")[2 * start : 2 * end].decode("utf-16-le")


def unfinished(page: "Page", texts: list[str]) -> None:
    """Stream answers without a last word of the server, which would bring its own list of boxes."""
    left = list(texts)

    def answer(route: "Route") -> None:
        choice = {"index": 0, "delta": {"content": left.pop(0)}, "logprobs": None, "finish_reason": None}
        body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)


def test_a_box_has_its_place_in_the_words_whoever_read_it(opened: Opened) -> None:
    """The list of the server, whose places count characters, changes nothing of what the page made itself."""
    text = (
        "🐕 A <|ref|>dog<|/ref|><|det|>[[1, 2, 30, 40], [50, 60, 70, 80]]<|/det|> and <|ref|>狗<|/ref|> "
        "<|det|>[[100, 200, 300, 400]]<|/det|>, not <|ref|>this<|/ref|>."
    )
    opened.write("What is here?", "shapes.png", mode="Grounded")
    unfinished(opened.page, [text])
    opened.page.keyboard.press("Enter")
    opened.answered()
    own = looked_at(opened)
    assert opened.page.locator(".plate text").all_text_contents().count("狗") == 1
    assert own == (
        "🐕 A dog and 狗, not this.",
        ["dog", "狗"],
        [["dog", "1 2 30 40"], ["dog", "50 60 70 80"], ["狗", "100 200 300 400"]],
    )
    opened.page.unroute_all()
    boxes = grounding(text, sizes=[(307, 259)], stripped=False)
    choice = {
        "index": 0,
        "delta": {"content": text, "grounding": boxes},
        "logprobs": None,
        "finish_reason": "stop",
    }
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    opened.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    opened.page.get_by_role("button", name="Answer again").click()
    opened.page.get_by_role("group", name="Version 2 of 2").wait_for()
    opened.answered()
    assert looked_at(opened) == own


def looked_at(opened: Opened) -> tuple[str, list[str], list[list[str]]]:
    """The words of an answer, its phrases, and label and corners of its boxes."""
    phrases = opened.page.locator(".phrase").all_inner_texts()
    titles = opened.page.locator("[data-box] title").all_text_contents()
    return opened.word(), phrases, [title.split(" ", 1) for title in titles]


def test_each_box_has_its_own_confidence(opened: Opened) -> None:
    """Two boxes of one list: neighbours of a digit are as good where they change little."""
    half = {"probability": 0.5}
    near = [sure("1", others=[("2", 0.5)], **half), sure("2", **half), sure("3", **half), sure("4", **half)]
    far = [[sure("5", others=[("9", 0.5)], **half), sure("0"), sure("0")] for _ in range(4)]
    tokens = [sure(text) for text in ("<|ref|>", "ring", "<|/ref|>", "<|det|>", "[[")]
    for index, digits in enumerate([*([each] for each in near), *far]):
        tokens += [*([] if index == 0 else [sure("], [" if index == 4 else ", ")]), *digits]
    tokens += [sure("]]"), sure("<|/det|>")]
    text = "".join(str(token["token"]) for token in tokens)
    assert [box.corners for box in parse_boxes(text)] == [(1, 2, 3, 4), (500, 500, 500, 500)]
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": tokens}, "finish_reason": None}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    opened.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    opened.ask("the ring", "shapes.png", mode="Locate")
    titles = opened.page.locator("[data-box] title").all_text_contents()
    assert [re.findall(r"\d+(?=\s%)", title)[0] for title in titles] == ["100", "50"]


# DeepSeek-VL2


def test_the_second_family_answers_with_tiles_boxes_and_confidence(visit: Visit, tiled: Running) -> None:
    """What the bundled model says may be wrong; what is shown of it must be what it said."""
    opened = visit(tiled.url).ready()
    page = opened.page
    opened.ask("the sign", "sign.png", mode="Locate")
    page.locator(".facts").click()
    page.get_by_role("tab", name="Reply").click()
    events = [
        json.loads(line)
        for line in page.locator(".block pre").inner_text().splitlines()
        if line.startswith("{")
    ]
    last = next(event for event in events if event["choices"] and event["choices"][0]["finish_reason"])
    wanted = last["choices"][0]["delta"].get("grounding", [])
    titles = page.locator("[data-box] title").all_text_contents()
    assert len(titles) == len(wanted)
    for title, box in zip(titles, wanted, strict=True):
        assert title.startswith(f"{box['label']} {' '.join(map(str, box['box']))} · ")
    (seen,) = last["pictures"]
    assert seen["columns"] * seen["rows"] > 1
    page.get_by_role("button", name="What the model saw").click()
    assert page.locator(".tiles rect").count() == seen["columns"] * seen["rows"]
    line = page.locator("figcaption").inner_text()
    assert f"as {seen['columns']}×{seen['rows']} tiles of {seen['tile']} px; " in line
    assert f"; {seen['tokens']} tokens, {seen['tile_tokens']} a tile" in line
    assert page.locator(".padding").count() == 1
    page.get_by_role("tab", name="Tokens").click()
    rows = {
        row.locator("th").inner_text(): row.locator("td").inner_text()
        for row in page.locator(".bill tr").all()
    }
    usage = next(event["usage"] for event in events if event.get("usage"))
    assert (
        rows["of these, pictures"]
        == str(seen["tokens"])
        == str(usage["prompt_tokens_details"]["image_tokens"])
    )
    assert rows["Together"].startswith(f"{usage['total_tokens']} of a context of ")
    page.get_by_role("button", name="Confidence").click()
    soon(lambda: page.get_by_test_id("sure").locator(".token").count() > 0)


def test_fewer_tiles_are_asked_for_where_there_are_tiles(
    visit: Visit, tiled: Running, server: Running
) -> None:
    opened = visit(tiled.url).ready()
    opened.page.get_by_role("button", name="Parameters").click()
    tiles = opened.page.get_by_label("Most tiles of a picture")
    most = tiled.ask("GET", "/v1/models").json()["data"][0]["max_tiles"]
    assert tiles.get_attribute("max") == str(most)
    tiles.fill("1")
    opened.page.keyboard.press("Escape")
    opened.ask("the sign", "sign.png", mode="Locate")
    assert opened.sent()["max_tiles"] == 1
    opened.page.get_by_role("button", name="What the model saw").click()
    assert "in one view of" in opened.page.locator("figcaption").inner_text()
    assert "Picture 1 was cut into 1×1 tiles" in opened.page.locator(".reply").inner_text()
    # the first family has none, and is not asked for any
    plain = visit(server.url).ready()
    assert server.ask("GET", "/v1/models").json()["data"][0]["max_tiles"] is None
    plain.page.evaluate("localStorage.setItem('seekvl-params', JSON.stringify({tiles: 1}))")
    plain.page.reload()
    plain.ready().page.get_by_role("button", name="Parameters").click()
    assert plain.page.get_by_label("Most tiles of a picture").count() == 0
    plain.page.keyboard.press("Escape")
    plain.ask("What does the sign say?", "sign.png")
    assert "max_tiles" not in plain.sent()


def test_boxes_of_the_second_family_appear_while_it_writes(visit: Visit, tiled: Running) -> None:
    opened = visit(tiled.url).ready()
    endless(opened.page)
    opened.write("the sign", "sign.png", mode="Locate")
    opened.page.keyboard.press("Enter")
    opened.page.locator("[data-state=streaming] [data-box]").first.wait_for()
    opened.page.get_by_role("button", name="Stop").click()
    opened.page.locator("[data-state=stopped]").wait_for()
    assert opened.page.locator("[data-box]").count() > 0


def test_grounded_and_in_context_questions_go_all_the_way_to_the_second_family(
    visit: Visit, tiled: Running
) -> None:
    opened = visit(tiled.url).ready()
    page = opened.page
    opened.ask("Where is the red ring?", "shapes.png", mode="Grounded")
    assert opened.sent()["messages"][0]["content"][-1]["text"] == "<|grounding|>Where is the red ring?"
    page.get_by_test_id("user").get_by_role("button", name="Open large").click()
    page.get_by_role("button", name="Mark a region").click()
    opened.drag((0.3, 0.3), (0.5, 0.6))
    page.get_by_role("button", name="Find the like in").click()
    soon(lambda: page.locator(".foot .strip li").count() == 2)
    page.locator("#question").press("Enter")
    opened.answered(count=2)
    sent = opened.sent()["messages"][-1]["content"]
    assert [part["type"] for part in sent] == ["image_url", "image_url", "text"]
    assert sent[-1]["text"] == in_context()
    # boxes of the answer lie in the last picture; without any, that is said
    last = page.locator(".reply").last
    boxes = last.locator("[data-box]").count()
    assert boxes > 0 or "This answer has no boxes." in last.inner_text()
    assert last.locator(".drawn").count() == (1 if boxes else 0)


# A large picture


def test_a_picture_is_zoomed_and_moved(opened: Opened) -> None:
    page = opened.page
    opened.ask("the sign", "sign.png", mode="Locate")
    page.locator(".frame").hover()
    page.locator(".frame").get_by_role("button", name="Open large").click()
    zoom = page.locator(".zoom")
    picture = page.get_by_test_id("viewer").locator("svg.figure")

    def view() -> list[float]:
        return [float(number) for number in (picture.get_attribute("viewBox") or "").split()]

    soon(lambda: view() == [0, 0, 290, 200])
    page.get_by_role("button", name="Zoom in").click()
    soon(lambda: zoom.inner_text() == "130%")
    page.locator(".pane").hover()
    page.mouse.wheel(0, -100)
    soon(lambda: zoom.inner_text() == "146%")
    before = view()
    opened.drag((0.5, 0.5), (0.6, 0.5))  # to the right: what lay left of it comes into sight
    soon(lambda: view()[0] < before[0])
    before = view()
    page.keyboard.press("ArrowDown")
    soon(lambda: view()[1] > before[1])
    thick = (
        page.get_by_test_id("viewer")
        .locator(".outline")
        .evaluate("node => getComputedStyle(node).vectorEffect")
    )
    assert thick == "non-scaling-stroke"  # the line stays as thin as it was
    page.keyboard.press("0")
    soon(lambda: view() == [0, 0, 290, 200])
    page.locator(".pane").dblclick()
    soon(lambda: zoom.inner_text() == "250%")
    page.get_by_role("button", name="Fit").click()
    soon(lambda: zoom.inner_text() == "100%")
    page.keyboard.press("t")
    page.get_by_test_id("viewer").locator(".tiles").wait_for()


def test_an_answer_with_hundreds_of_boxes_is_drawn(opened: Opened) -> None:
    """The longest answer of a published model is 4,096 tokens: more than two hundred boxes do not fit."""
    listed = "".join(
        f"* <|ref|>thing {n}<|/ref|><|det|>[[{n}, {n}, {n + 300}, {n + 200}]]<|/det|>, with words about it\n"
        for n in range(250)
    )
    unfinished(opened.page, [listed])
    opened.ask("What is here?", "shapes.png", mode="Grounded")
    assert opened.page.locator("[data-box]").count() == opened.page.locator(".phrase").count() == 250
    opened.page.locator(".phrase").nth(200).focus()
    soon(lambda: "lit" in (opened.page.locator("[data-box='200']").get_attribute("class") or ""))
