"""Asking on the page: pictures in, answers out, versions, errors, what is kept, and the request as code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.serve.browsing import EXAMPLES, Opened, cancelled, endless, soon, stream_instead
from tests.serve.conftest import Running, Start, Visit


def test_an_example_is_answered(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Which bar is tallest?").click()
    opened.answered()
    soon(lambda: opened.word() == "orange")
    facts = opened.page.locator(".facts").inner_text()
    assert re.search(r"\d+ tokens · first after [\d.]+ s · \d+ tokens/s", facts)


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
    opened.page.locator(".foot").get_by_role("radio", name="Compare").click()
    assert page.get_by_text("Comparing takes two pictures").count() == 0
    strip.first.drag_to(strip.last)
    soon(lambda: strip.first.get_attribute("aria-label") == "Picture 1: sign.png")
    strip.first.get_by_role("button", name="Move to the right").click()
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


def test_without_a_camera_a_file_is_taken(visit: Visit, server: Running) -> None:
    """A page on plain http has no camera; the program of the phone takes the picture then."""
    opened = visit(server.url)
    opened.page.add_init_script("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
    opened.page.reload()
    opened.ready().page.get_by_role("button", name="Take a picture").click()
    opened.page.get_by_text("No camera can be used here.").wait_for()
    taken = opened.page.locator("input[capture=environment]")
    taken.set_input_files(EXAMPLES / "sign.png")
    opened.page.locator(".foot .strip li").wait_for()


def test_a_picture_comes_from_an_address(visit: Visit, start: Start) -> None:
    opened = visit(start(file_root=EXAMPLES).url).ready()
    page = opened.page
    page.get_by_role("button", name="Picture from a web address").click()
    page.get_by_label("Address of a picture").fill("http://127.0.0.1:9/x.png")
    page.get_by_role("button", name="Add", exact=True).click()
    soon(lambda: "not one that may be fetched" in page.locator(".wrong").inner_text())
    opened.forgive(400)
    page.get_by_label("Address of a picture").fill((EXAMPLES / "sign.png").as_uri())
    page.get_by_label("Address of a picture").press("Enter")
    page.locator(".foot .strip li").wait_for()
    opened.ask("What does the sign say?")
    soon(lambda: opened.word() == "WALL")


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


def test_a_pdf_is_answered_page_by_page(opened: Opened, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    pages = [Image.open(EXAMPLES / name).convert("RGB") for name in ("sign.png", "shapes.png")]
    pages[0].save(tmp_path / "two.pdf", save_all=True, append_images=pages[1:])
    opened.page.evaluate("""() => {
        window.told = new Set();
        const look = () => document.querySelectorAll(".progress").forEach(node => told.add(node.textContent));
        const all = {childList: true, subtree: true, characterData: true};
        new MutationObserver(look).observe(document.body, all);
    }""")
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
    assert "Page 2 of 2 of two.pdf…" in opened.page.evaluate("[...told]")


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
    page.get_by_role("button", name="New chat").first.click()
    opened.ask("Which bar is tallest?", "chart.png")
    soon(lambda: page.locator(".sidebar .chat").count() == 2)
    page.locator(".sidebar li").filter(has_text="Which bar").hover()
    page.locator(".sidebar li").filter(has_text="Which bar").get_by_role(
        "button", name="Delete this chat"
    ).click()
    soon(lambda: page.locator(".sidebar .chat").count() == 1)
    soon(lambda: "What does the sign say?" in page.locator(".sidebar .chat").inner_text())
    page.get_by_role("button", name="Delete all").click()
    page.locator(".sidebar .chat").wait_for(state="detached")
    page.get_by_test_id("import").set_input_files(tmp_path / "chats.json")
    page.locator(".sidebar .chat").wait_for()
    soon(lambda: opened.word() == "WALL")
    older = json.loads((tmp_path / "chats.json").read_text())
    for turn in older["chats"][0]["turns"].values():
        turn["replies"] = [{"state": "done", "text": "an older page"} for _ in turn.get("replies", [])]
    (tmp_path / "older.json").write_text(json.dumps(older))
    page.get_by_test_id("import").set_input_files(tmp_path / "older.json")
    soon(lambda: opened.word() == "an older page")
    page.get_by_test_id("import").set_input_files(EXAMPLES / "sign.png")
    page.get_by_text("This file holds no chats of this page.").wait_for()


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
    opened.page.get_by_role("radio", name="Python · replicate").click()
    script = opened.page.locator(".block pre").inner_text()
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.stdout == "WALL\n", ran.stderr
    opened.page.get_by_role("radio", name="Python · seekvl").click()
    script = opened.page.locator(".block pre").inner_text()
    assert 'seekvl.load("seekvl-nano")' in script
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.stdout.startswith("WALL [] "), ran.stderr


def test_what_replicate_cannot_be_asked_is_said(opened: Opened) -> None:
    opened.ask("What does the sign say?", "sign.png")
    opened.ask("What colour is it?", count=2)
    opened.page.locator(".facts").last.click()
    opened.page.get_by_role("tab", name="Code").click()
    opened.page.get_by_role("radio", name="Python · replicate").click()
    opened.page.get_by_text("Replicate's predictions take one question").wait_for()
    assert opened.page.locator(".block").count() == 0


def test_an_error_stands_in_its_place_and_can_be_tried_again(visit: Visit, server: Running) -> None:
    opened = visit(server.url).ready()
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
    opened.page.route("**/v1/chat/completions", lambda route: route.abort())
    opened.write("And now?")
    opened.page.keyboard.press("Enter")
    soon(lambda: "The server did not answer. Is it running?" in trouble.inner_text())
    broken = [line for line in opened.said if "net::ERR_FAILED" in line]
    assert len(broken) == 1
    opened.said.remove(broken[0])
    opened.forgive(429)


def test_a_stream_that_breaks_off_is_no_answer(opened: Opened) -> None:
    choice = {"index": 0, "delta": {"content": "half an ans"}, "logprobs": None, "finish_reason": None}
    opened.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {json.dumps({'choices': [choice]})}\n\n"
        ),
    )
    opened.write("hi")
    opened.page.keyboard.press("Enter")
    soon(lambda: "the stream ended before the answer did" in opened.page.locator(".trouble").inner_text())
    assert opened.word() == "half an ans"  # what came is kept


def test_a_key_is_asked_for_and_kept_for_the_tab(visit: Visit, start: Start) -> None:
    guarded = start(api_keys=("secret",))
    opened = visit(guarded.url)
    opened.page.get_by_label("API key").last.fill("secret")
    opened.page.get_by_role("button", name="Save").click()
    opened.ready()
    opened.page.reload()
    opened.ready()
    opened.page.get_by_role("button", name="Which bar is tallest?").click()
    opened.answered()
    soon(lambda: opened.word() == "orange")
    opened.forgive(401)


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


def test_comparing_asks_for_two_pictures(opened: Opened) -> None:
    opened.write("What is different?", "sign.png", mode="Compare")
    opened.page.get_by_text("Comparing takes two pictures, not 1.").wait_for()
    assert opened.page.get_by_role("button", name="Send").is_disabled()


def test_an_answer_is_copied_as_it_is_read(opened: Opened) -> None:
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.ask("the sign", "sign.png", mode="Locate")
    opened.page.locator(".reply").get_by_role("button", name="Copy").click()
    opened.page.locator(".reply").get_by_role("button", name="Copied").wait_for()
    assert opened.page.evaluate("navigator.clipboard.readText()") == "sign"


def test_a_context_that_is_nearly_full_is_told_before_the_next_question(
    opened: Opened, server: Running
) -> None:
    most = server.ask("GET", "/v1/models").json()["data"][0]["context_length"]
    usage = {"prompt_tokens": most - 110, "completion_tokens": 10, "total_tokens": most - 100}
    stream_instead(
        opened.page, "first", usage={"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    )
    opened.ask("hi")
    note = opened.page.get_by_text("tokens of the context are used")
    assert note.count() == 0
    opened.page.unroute_all()
    stream_instead(opened.page, "second", usage=usage)
    opened.ask("hi again", count=2)
    soon(lambda: f"{most - 100} of {most} tokens of the context are used" in note.inner_text())


def test_a_prompt_that_is_too_long_says_what_to_do(opened: Opened) -> None:
    opened.write("word " * 3000)
    opened.page.keyboard.press("Enter")
    trouble = opened.page.locator(".trouble")
    soon(lambda: "ask for fewer tiles in the parameters" in trouble.inner_text())
    opened.forgive(400)


def test_notices_of_the_server_are_told_once(opened: Opened) -> None:
    """What was scaled down for the first question is so for the second, too; nobody reads it twice."""
    opened.ask("What does the sign say?", "sign.png")
    opened.ask("How many objects are there?", "shapes.png", count=2)
    replies = opened.page.locator(".reply")
    assert "Picture 1 of 290×200 px was scaled down to 256×176 px." in replies.first.inner_text()
    assert "Picture 1" not in replies.last.inner_text()
    assert "Picture 2 of 307×259 px was scaled down to 256×215 px." in replies.last.inner_text()


def test_an_answer_that_should_have_boxes_and_has_none_says_so(opened: Opened) -> None:
    opened.ask("Describe the picture.", "shapes.png", mode="Grounded")
    soon(lambda: "This answer has no boxes. The bundled models" in opened.page.locator(".reply").inner_text())
    opened.ask("Describe the picture.", mode="Describe", count=2)
    assert "no boxes" not in opened.page.locator(".reply").last.inner_text()
