"""The page: what browsers are given, and the page itself in a real Chromium."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from seekvl.serve.page import FOLDER, POLICY, page_files, read_page
from tests.serve.conftest import Running, Start

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EXAMPLES = Path(__file__).parents[2] / "examples"
CHROMIUM = Path("/usr/bin/chromium")
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
WAIT = 20_000
"""Milliseconds after which a thing that does not come is missed."""


def soon(found: Callable[[], object]) -> None:
    """Wait until something holds: a browser draws when it comes to it."""
    until = time.monotonic() + WAIT / 1000
    while not found() and time.monotonic() < until:
        time.sleep(0.05)
    assert found()


# What goes over the wire


def test_browsers_get_the_page_and_others_the_routes(server: Running) -> None:
    page = server.ask("GET", "/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html")
    assert page.content == page_files()["index.html"].content
    listed = server.ask("GET", "/", headers={"Accept": "*/*"})
    assert "POST /v1/chat/completions" in listed.json()["routes"]
    assert "accept" in listed.headers["vary"].lower()


def test_every_file_of_the_page_has_a_strict_policy(server: Running) -> None:
    for path, file in page_files().items():
        found = server.ask("GET", f"/page/{path}")
        assert found.content == file.content
        assert found.headers["content-security-policy"] == POLICY
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["content-type"].split(";")[0] == file.kind
        assert file.kind != "application/octet-stream"
    assert "unsafe" not in POLICY
    assert "default-src 'self'" in POLICY
    assert "frame-ancestors 'none'" in POLICY


def test_the_page_holds_no_inline_script_or_style_and_names_no_other_host() -> None:
    index = page_files()["index.html"].content.decode()
    assert re.search(r"<script(?![^>]*\bsrc=)", index) is None
    assert "<style" not in index
    assert re.search(r"\bon\w+=", index) is None
    for source in re.findall(r'(?:src|href)="([^"]*)"', index):
        assert source.startswith("/page/")
        assert source.removeprefix("/page/") in page_files()


def test_a_copy_that_is_still_good_is_not_sent_again(server: Running) -> None:
    first = server.ask("GET", "/page/page.js")
    again = server.ask("GET", "/page/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["../page.py", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", "", "x"])
def test_nothing_beside_the_page_is_served(server: Running, path: str) -> None:
    found = server.ask("GET", f"/page/{path}")
    assert found.status_code == 404
    assert b"import" not in found.content


def test_the_examples_are_those_of_the_repository() -> None:
    for name in ("chart.png", "shapes.png", "sign.png"):
        assert page_files()[f"examples/{name}"].content == (EXAMPLES / name).read_bytes()


def test_files_that_are_not_there_are_not_served(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.css").write_text("x")
    assert {path: file.kind for path, file in read_page(tmp_path).items()} == {"a/b.css": "text/css"}
    assert read_page(tmp_path / "none") == {}
    assert FOLDER.is_dir()


def test_the_page_opens_without_a_key_and_asks_for_it(start: Start) -> None:
    guarded = start(api_keys=("secret",))
    assert guarded.ask("GET", "/", headers=HTML).status_code == 200
    assert guarded.ask("GET", "/page/page.js").status_code == 200
    assert guarded.ask("GET", "/", headers={"Accept": "application/json, text/html;q=0.5"}).status_code == 401
    for route in ("/v1/page/picture", "/v1/page/pdf"):
        assert guarded.ask("POST", route, json={}).status_code == 401


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x.png", "http://169.254.169.254/", "file:///etc/hostname", "data:image/png,x"]
)
def test_pictures_are_fetched_for_the_page_under_the_same_rules(server: Running, url: str) -> None:
    found = server.ask("POST", "/v1/page/picture", json={"url": url})
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "invalid_image"


def test_a_picture_comes_as_it_is(start: Start) -> None:
    local = start(file_root=EXAMPLES)
    address = (EXAMPLES / "sign.png").as_uri()
    found = local.ask("POST", "/v1/page/picture", json={"url": address})
    assert found.content == (EXAMPLES / "sign.png").read_bytes()
    assert found.headers["content-type"] == "image/png"


def test_what_the_model_saw_is_told_with_its_tiles(server: Running) -> None:
    asked = {"model": "seekvl/seekvl-nano", "messages": shown("sign.png"), "temperature": 0}
    (seen,) = server.ask("POST", "/v1/chat/completions", json=asked).json()["pictures"]
    assert seen["tile"] == 256
    assert seen["tile_tokens"] == seen["tokens"] == 100
    assert server.ask("GET", "/v1/models").json()["data"][0]["context_length"] > 1000


def shown(name: str) -> list[dict[str, object]]:
    data = io.BytesIO()
    with Image.open(EXAMPLES / name) as picture:
        picture.save(data, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Where is the sign?"}]
    return [{"role": "user", "content": parts}]


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """One Chromium for all tests."""
    sync = pytest.importorskip("playwright.sync_api", reason="the page is driven through playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"the page is driven in {CHROMIUM}, which is not here: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=[
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera
            ],
        )
        yield started
        started.close()


class Opened:
    """A page in a browser profile of its own, with all it said and asked for."""

    def __init__(self, browser: "Browser", url: str, **options: Any) -> None:
        options = {"viewport": {"width": 1200, "height": 860}, "locale": "en-US", **options}
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda line: self.said.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def ready(self) -> "Opened":
        """Wait until a question could be asked."""
        self.page.locator(".examples button:enabled").first.wait_for()
        return self

    def ask(self, question: str, *pictures: str, mode: str | None = None) -> None:
        """Ask, and wait for the end of the answer."""
        self.write(question, *pictures, mode=mode)
        self.page.keyboard.press("Enter")
        self.answered()

    def write(self, question: str, *pictures: str, mode: str | None = None) -> None:
        page = self.page
        if pictures:
            page.get_by_test_id("files").set_input_files([EXAMPLES / name for name in pictures])
            page.locator(".foot .strip li").nth(len(pictures) - 1).wait_for()
        if mode is not None:
            page.locator(".foot").get_by_role("radio", name=mode).click()
        page.locator("#question").fill(question)
        page.locator("#question").focus()

    def answered(self, *, count: int = 1) -> None:
        """Wait until all replies that are shown have ended."""
        self.page.locator("[data-state=done]").nth(count - 1).wait_for()

    def word(self) -> str:
        """The last answer that is shown."""
        return self.page.get_by_test_id("words").last.inner_text().strip()


@pytest.fixture
def opened(browser: "Browser", server: Running) -> Iterator[Opened]:
    """The page, ready; at the end nothing must have gone wrong, and nobody else been asked."""
    page = Opened(browser, server.url).ready()
    yield page
    page.context.close()
    assert page.said == []
    assert all(url.startswith((server.url, "blob:", "data:")) for url in page.asked)


def test_an_example_is_answered(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Which bar is tallest?").click()
    opened.answered()
    soon(lambda: opened.word() == "orange")
    facts = opened.page.locator(".facts").inner_text()
    assert re.search(r"\d+ tokens · first after [\d.]+ s · \d+ tokens/s", facts)


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


def stream_instead(page: "Page", text: str, **more: object) -> None:
    """Answer in the place of the server."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": "stop"}
    body = f"data: {json.dumps({'choices': [choice], **more})}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )


def test_boxes_appear_while_the_answer_streams_and_stop_stops_the_server(
    opened: Opened, server: Running
) -> None:
    endless(opened.page)
    opened.write("the sign", "sign.png", mode="Locate")
    opened.page.keyboard.press("Enter")
    opened.page.locator("[data-state=streaming] [data-box]").first.wait_for()
    before = cancelled(server)
    opened.page.get_by_role("button", name="Stop").click()
    opened.page.locator("[data-state=stopped]").wait_for()
    soon(lambda: "Stopped." in opened.page.locator(".reply").inner_text())
    soon(lambda: opened.word() != "")
    for _ in range(50):
        if cancelled(server) > before:
            break
        opened.page.wait_for_timeout(100)
    assert cancelled(server) > before
    opened.page.unroute_all()
    opened.page.get_by_role("button", name="Answer again").click()
    opened.answered()
    soon(lambda: opened.word() == "sign")


def endless(page: "Page") -> None:
    """Let answers go on until they are stopped."""

    def change(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route("**/v1/chat/completions", change)


def cancelled(server: Running) -> float:
    found = re.search(r"^seekvl_canceled_total (\S+)", server.ask("GET", "/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_versions_branches_and_pictures_of_earlier_turns(opened: Opened) -> None:
    page = opened.page
    opened.ask("What does the sign say?", "sign.png")
    page.get_by_role("button", name="Answer again").click()
    page.get_by_role("group", name="Version 2 of 2").wait_for()
    opened.answered()
    opened.ask("What colour is the sign?")  # the picture is that of the turn before
    opened.page.get_by_test_id("user").nth(1).wait_for()
    opened.answered(count=2)
    soon(lambda: opened.word() == "yellow")
    first = page.get_by_test_id("user").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    editor = page.locator(".editing textarea")
    editor.fill("What colour is the background?")
    editor.press("Enter")
    page.get_by_test_id("user").get_by_role("group", name="Version 2 of 2").wait_for()
    opened.answered()
    soon(lambda: page.get_by_test_id("user").count() == 1)
    soon(lambda: "green" in opened.word())
    page.get_by_test_id("user").get_by_role("button", name="Earlier version").click()
    soon(lambda: page.get_by_test_id("user").count() == 2)
    soon(lambda: opened.word() == "yellow")


def test_several_pictures_are_ordered_and_reordered(opened: Opened) -> None:
    page = opened.page
    opened.write("What does the sign in the second picture say?", "sign.png", "shapes.png")
    strip = page.locator(".foot .strip li")
    assert [item.get_attribute("aria-label") for item in strip.all()] == [
        "Picture 1: sign.png",
        "Picture 2: shapes.png",
    ]
    strip.first.focus()
    page.keyboard.press("Alt+ArrowRight")
    soon(lambda: strip.first.get_attribute("aria-label") == "Picture 1: shapes.png")
    page.locator("#question").focus()
    page.keyboard.press("Enter")
    opened.answered()
    soon(lambda: opened.word() == "WALL")
    page.locator(".shot").first.click()
    page.get_by_label("Compare with").select_option(label="sign.png")
    soon(lambda: page.locator(".pane").count() == 2)
    page.keyboard.press("+")
    soon(lambda: page.locator(".zoom").inner_text() == "130%")
    page.keyboard.press("Escape")
    page.get_by_test_id("viewer").wait_for(state="detached")


def test_dropped_and_pasted_files_are_taken(opened: Opened) -> None:
    page = opened.page
    bring = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, {type: "image/png"}));
        const given = kind === "paste" ? {clipboardData: data} : {dataTransfer: data};
        const Event = kind === "paste" ? ClipboardEvent : DragEvent;
        document.body.dispatchEvent(new Event(kind, {...given, bubbles: true, cancelable: true}));
    }"""
    content = list((EXAMPLES / "sign.png").read_bytes())
    for number, kind in enumerate(("drop", "paste")):
        page.evaluate(bring, [kind, content])
        page.locator(".foot .strip li").nth(number).wait_for()
    page.evaluate(bring, ["drop", [1, 2, 3]])
    soon(lambda: "drop.png is no picture" in page.get_by_role("alert").inner_text())


def test_a_picture_comes_from_the_camera(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name="Take a picture").click()
    page.get_by_role("button", name="Take it").click()
    page.locator(".foot .strip li").wait_for()
    soon(lambda: "camera" in (page.locator(".foot .strip li").get_attribute("aria-label") or ""))


def test_a_picture_comes_from_an_address(browser: "Browser", start: Start) -> None:
    opened = Opened(browser, start(file_root=EXAMPLES).url).ready()
    page = opened.page
    page.get_by_role("button", name="Picture from a web address").click()
    page.get_by_label("Address of a picture").fill("http://127.0.0.1:9/x.png")
    page.get_by_role("button", name="Add", exact=True).click()
    soon(lambda: "not one that may be fetched" in page.locator(".wrong").inner_text())
    page.get_by_label("Address of a picture").fill((EXAMPLES / "sign.png").as_uri())
    page.get_by_label("Address of a picture").press("Enter")
    page.locator(".foot .strip li").wait_for()
    opened.ask("What does the sign say?")
    soon(lambda: opened.word() == "WALL")
    opened.context.close()


def test_a_long_scan_is_cut_into_pages(opened: Opened, tmp_path: Path) -> None:
    Image.new("RGB", (300, 1000), "white").save(tmp_path / "scan.png")
    opened.page.get_by_test_id("files").set_input_files(tmp_path / "scan.png")
    opened.page.get_by_role("button", name="Cut into pages").click()
    opened.page.locator(".foot .strip li").nth(2).wait_for()
    sizes = opened.page.locator(".foot .strip img").evaluate_all(
        "nodes => nodes.map(node => [node.naturalWidth, node.naturalHeight])"
    )
    assert [width for width, _ in sizes] == [300] * len(sizes)
    assert 1000 < sum(height for _, height in sizes) < 1300  # all of it, and a little twice
    soon(lambda: opened.page.get_by_label("Answer each picture on its own").is_checked())


def test_a_region_is_asked_about_as_the_paper_does(opened: Opened) -> None:
    page = opened.page
    opened.write("", "shapes.png")
    page.locator(".thumb").click()
    page.get_by_role("button", name="Mark a region").click()
    pane = page.locator(".pane").bounding_box()
    assert pane is not None
    middle = pane["x"] + pane["width"] / 2
    page.mouse.move(middle - 60, pane["y"] + 100)
    page.mouse.down()
    page.mouse.move(middle + 60, pane["y"] + 300, steps=3)
    page.mouse.up()
    page.get_by_role("button", name="Find the like in").click()
    from playwright.sync_api import expect

    wanted = re.compile("^In the first image, an object within the red")  # the copy is drawn meanwhile
    expect(page.locator("#question")).to_have_value(wanted)
    soon(lambda: page.locator(".foot").get_by_role("radio", name="Grounded answer").is_checked())
    names = [item.get_attribute("aria-label") for item in page.locator(".foot .strip li").all()]
    assert names == ["Picture 1: shapes-marked.png", "Picture 2: shapes.png"]


def test_a_pdf_is_answered_page_by_page(opened: Opened, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    pages = [Image.open(EXAMPLES / name).convert("RGB") for name in ("sign.png", "shapes.png")]
    pages[0].save(tmp_path / "two.pdf", save_all=True, append_images=pages[1:])
    opened.page.get_by_test_id("files").set_input_files(tmp_path / "two.pdf")
    opened.page.locator(".foot .strip li").nth(1).wait_for()
    opened.page.locator(".foot .progress").wait_for(state="detached")
    soon(lambda: opened.page.get_by_label("Answer each picture on its own").is_checked())
    opened.page.locator("#question").fill("What does the sign say?")
    opened.page.locator("#question").press("Enter")
    opened.answered(count=2)
    soon(lambda: opened.page.locator(".page").all_inner_texts() == ["Page 1 of 2", "Page 2 of 2"])
    soon(lambda: opened.page.get_by_test_id("words").first.inner_text().strip() == "WALL")
    soon(lambda: "2 of 2 answered" in opened.page.locator(".pages").inner_text())


def test_the_history_is_kept_exported_deleted_and_brought_back(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    opened.ask("What does the sign say?", "sign.png")
    page.reload()
    opened.ready()
    page.locator(".sidebar .chat").click()
    soon(lambda: opened.word() == "WALL")
    soon(lambda: page.locator(".shot img").count() == 1)
    with page.expect_download() as exporting:
        page.get_by_role("button", name="Export").click()
    exporting.value.save_as(tmp_path / "chats.json")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    page.locator(".sidebar .chat").wait_for(state="detached")
    page.get_by_test_id("import").set_input_files(tmp_path / "chats.json")
    page.locator(".sidebar .chat").wait_for()
    soon(lambda: opened.word() == "WALL")
    page.get_by_test_id("import").set_input_files(EXAMPLES / "sign.png")
    page.get_by_text("This file holds no chats of this page.").wait_for()


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


def test_the_code_of_a_request_gives_the_same_answer(opened: Opened, server: Running, tmp_path: Path) -> None:
    opened.ask("What does the sign say?", "sign.png")
    opened.page.locator(".facts").click()
    opened.page.get_by_role("tab", name="Code").click()
    shutil.copy(EXAMPLES / "sign.png", tmp_path)
    opened.page.get_by_role("radio", name="Python · openai").click()
    script = opened.page.locator(".block pre").inner_text()
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.stdout == "WALL\n", ran.stderr
    if shutil.which("curl"):
        opened.page.get_by_role("radio", name="curl").click()
        script = opened.page.locator(".block pre").inner_text()
        ran = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert "data: [DONE]" in ran.stdout, ran.stderr
    opened.page.get_by_role("radio", name="Python · seekvl").click()
    script = opened.page.locator(".block pre").inner_text()
    compile(script, "seekvl", "exec")
    assert 'seekvl.load("seekvl-nano")' in script


def test_an_error_stands_in_its_place_and_can_be_tried_again(browser: "Browser", server: Running) -> None:
    opened = Opened(browser, server.url).ready()
    error = {"error": {"message": "too many wait", "type": "rate_limit_error", "param": None, "code": None}}
    opened.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, json=error, headers={"Retry-After": "5"}),
    )
    opened.write("What does the sign say?", "sign.png")
    opened.page.keyboard.press("Enter")
    trouble = opened.page.locator(".trouble")
    soon(lambda: "too many wait" in trouble.inner_text())
    soon(lambda: "Wait a little and try again. The server says: after 5 s." in trouble.inner_text())
    opened.page.unroute_all()
    trouble.get_by_role("button", name="Try again").click()
    opened.answered()
    soon(lambda: opened.word() == "WALL")
    opened.context.close()


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: "Browser", start: Start) -> None:
    guarded = start(api_keys=("secret",))
    opened = Opened(browser, guarded.url)
    opened.page.get_by_label("API key").last.fill("secret")
    opened.page.get_by_role("button", name="Save").click()
    opened.ready()
    opened.page.reload()
    opened.ready()
    opened.page.get_by_role("button", name="Which bar is tallest?").click()
    opened.answered()
    soon(lambda: opened.word() == "orange")
    opened.context.close()


def test_markdown_brings_no_html_and_no_remote_picture(opened: Opened, server: Running) -> None:
    evil = (
        "**bold** <img src=x onerror=alert(1)> <script>alert(1)</script> ![p](https://example.org/p.png) "
        "[a](javascript:alert(1)) [b](https://example.org/)"
    )
    stream_instead(opened.page, evil)
    opened.ask("hi")
    words = opened.page.get_by_test_id("words")
    soon(lambda: words.locator("strong").inner_text() == "bold")
    soon(lambda: words.locator("img, script").count() == 0)
    links = words.locator("a")
    soon(lambda: [link.get_attribute("href") for link in links.all()] == ["", "https://example.org/"])
    soon(lambda: "noopener" in (links.last.get_attribute("rel") or ""))
    opened.page.unroute_all()


def test_dark_and_light(browser: "Browser", server: Running) -> None:
    opened = Opened(browser, server.url, color_scheme="dark").ready()
    ground = "getComputedStyle(document.body).backgroundColor"
    soon(lambda: opened.page.evaluate(ground) == "rgb(20, 21, 23)")
    opened.page.get_by_role("button", name="Light or dark").click()
    soon(lambda: opened.page.evaluate(ground) == "rgb(247, 247, 245)")
    opened.page.reload()
    opened.ready()
    soon(lambda: opened.page.evaluate(ground) == "rgb(247, 247, 245)")
    opened.context.close()


def test_chinese_by_browser_and_switched(browser: "Browser", server: Running) -> None:
    opened = Opened(browser, server.url, locale="zh-CN").ready()
    soon(lambda: opened.page.get_by_role("heading", level=1).inner_text() == "向图片提问")
    soon(lambda: opened.page.evaluate("document.documentElement.lang") == "zh-CN")
    opened.page.get_by_role("button", name="English").click()
    soon(lambda: opened.page.get_by_role("heading", level=1).inner_text() == "Ask about pictures")
    opened.page.reload()
    soon(lambda: opened.ready().page.get_by_role("heading", level=1).inner_text() == "Ask about pictures")
    opened.context.close()


def test_the_width_of_a_phone(browser: "Browser", server: Running) -> None:
    phone = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}
    opened = Opened(browser, server.url, **phone).ready()
    soon(lambda: opened.page.locator(".sidebar").count() == 0)
    opened.page.get_by_role("button", name="Locate the sign").tap()
    opened.answered()
    for selector in ("html", ".conversation", ".foot"):
        wide = opened.page.locator(selector).evaluate("node => [node.scrollWidth, node.clientWidth]")
        assert wide[0] <= wide[1], selector
    opened.page.get_by_role("button", name="Show or hide the history").tap()
    opened.page.locator(".sidebar .chat").wait_for()
    opened.context.close()


def test_keys(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Alt+4")
    soon(lambda: page.locator(".foot").get_by_role("radio", name="Locate").is_checked())
    page.keyboard.press("/")
    soon(lambda: page.evaluate("document.activeElement.id") == "question")
    page.keyboard.type("a?")  # while typing it is a letter
    soon(lambda: page.locator("#question").input_value() == "a?")
    page.locator("#question").blur()
    page.keyboard.press("?")
    soon(lambda: page.get_by_role("dialog", name="Keyboard shortcuts").is_visible())
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")


def test_every_control_has_a_name(opened: Opened) -> None:
    opened.ask("the sign", "sign.png", mode="Locate")
    controls = opened.page.locator("button, input:not([hidden]), select, textarea")
    named = "n.innerText || n.ariaLabel || n.title || n.labels?.length"
    nameless = controls.evaluate_all(f"nodes => nodes.filter(n => !({named})).map(n => n.outerHTML)")
    assert nameless == []


def test_parameters_change_the_request_and_are_reset(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name="Parameters").click()
    page.get_by_label("Most new tokens").fill("1")
    page.get_by_label("Temperature").last.fill("0")
    page.keyboard.press("Escape")
    opened.ask("Describe the picture.", "chart.png")
    soon(lambda: "Cut at the limit of tokens." in page.locator(".reply").inner_text())
    page.locator(".facts").click()
    page.get_by_role("tab", name="Request").click()
    soon(lambda: '"temperature": 0,' in page.locator(".block pre").inner_text())
    page.get_by_role("button", name="Parameters").click()
    page.get_by_role("button", name="Reset").click()
    soon(lambda: page.get_by_label("Most new tokens").input_value() == "")
    soon(lambda: page.get_by_label("Temperature").last.input_value() == "0.1")
