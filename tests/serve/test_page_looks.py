"""How the page looks and is used: light and dark, languages, a phone, keys, screen readers, motion."""

from pathlib import Path
from typing import Any

import pytest

from tests.serve.browsing import EXAMPLES, PHONE, Opened, endless, soon
from tests.serve.conftest import Running, Visit


def test_dark_and_light(visit: Visit, server: Running) -> None:
    opened = visit(server.url, color_scheme="dark").ready()
    ground = "getComputedStyle(document.body).backgroundColor"
    soon(lambda: opened.page.evaluate(ground) == "rgb(20, 21, 23)")
    opened.page.get_by_role("button", name="Light or dark").click()
    soon(lambda: opened.page.evaluate(ground) == "rgb(247, 247, 245)")
    opened.page.reload()
    opened.ready()
    soon(lambda: opened.page.evaluate(ground) == "rgb(247, 247, 245)")


def test_chinese_by_browser_and_switched(visit: Visit, server: Running) -> None:
    opened = visit(server.url, locale="zh-CN").ready()
    soon(lambda: opened.page.get_by_role("heading", level=1).inner_text() == "向图片提问")
    soon(lambda: opened.page.evaluate("document.documentElement.lang") == "zh-CN")
    opened.page.get_by_role("button", name="English").click()
    soon(lambda: opened.page.get_by_role("heading", level=1).inner_text() == "Ask about pictures")
    opened.page.reload()
    soon(lambda: opened.ready().page.get_by_role("heading", level=1).inner_text() == "Ask about pictures")


def test_the_width_of_a_phone(visit: Visit, server: Running) -> None:
    opened = visit(server.url, **PHONE).ready()
    page = opened.page

    def fits() -> None:
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360
        for node in page.locator(".conversation, .foot, .head, dialog, .sidebar").all():
            assert node.evaluate("node => node.scrollWidth <= node.clientWidth"), node.get_attribute("class")
        languages = page.get_by_role("button", name="中文").bounding_box()
        assert languages is not None
        assert languages["height"] < 40  # on one line

    soon(lambda: page.locator(".sidebar").count() == 0)
    fits()
    page.get_by_role("button", name="Locate the sign").tap()
    opened.answered()
    fits()
    page.locator(".facts").tap()
    page.get_by_role("tab", name="Code").tap()
    fits()
    page.locator(".frame").get_by_role("button", name="Open large").tap()
    page.get_by_test_id("viewer").wait_for()
    assert page.locator("dialog").evaluate("node => node.scrollWidth <= node.clientWidth")
    page.get_by_role("button", name="Close").last.tap()
    page.get_by_role("button", name="Parameters").tap()
    page.get_by_role("dialog", name="Parameters").wait_for()
    assert page.locator("dialog").evaluate("node => node.scrollWidth <= node.clientWidth")
    page.get_by_role("button", name="Close").last.tap()
    opened.write("What is here?", "shapes.png", "sign.png")
    fits()
    page.get_by_role("button", name="Show or hide the history").tap()
    page.locator(".sidebar .chat").wait_for()
    fits()


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


def test_everything_is_done_with_keys_alone(opened: Opened) -> None:
    """No pointer: an example, its box, the large picture and back, the code of the request."""
    page = opened.page

    def reach(selector: str) -> None:
        """Go on with Tab until something that matches has the focus."""
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    reach(".skip")
    reach(".examples li:nth-child(3) button")
    page.keyboard.press("Enter")
    opened.answered()
    reach(".frame .corner button")
    page.keyboard.press("Enter")
    page.get_by_test_id("viewer").wait_for()
    page.keyboard.press("Escape")
    page.get_by_test_id("viewer").wait_for(state="detached")
    soon(lambda: page.evaluate("document.activeElement.matches('.frame .corner button')"))
    reach(".phrase")
    soon(lambda: "lit" in (page.locator("[data-box]").get_attribute("class") or ""))
    reach(".facts")
    page.keyboard.press("Enter")
    reach("[role=tab][aria-selected=true]")
    page.keyboard.press("ArrowRight")
    reach("[role=radio]")
    assert page.evaluate("document.activeElement.textContent") == "curl"
    page.keyboard.press("ArrowRight")
    soon(lambda: "from openai import OpenAI" in page.locator(".block pre").inner_text())
    reach("#question")
    page.keyboard.press("Tab")  # one stop for each button, and one for all modes
    for _ in range(3):
        page.keyboard.press("Tab")
    soon(lambda: page.evaluate("document.activeElement.textContent") == "Ask")
    page.keyboard.press("ArrowLeft")
    soon(lambda: page.evaluate("document.activeElement.textContent") == "Compare")
    assert page.locator(".foot").get_by_role("radio", name="Compare").is_checked()


def test_the_close_button_gives_the_focus_back(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Parameters").press("Enter")
    opened.page.get_by_role("dialog").get_by_role("button", name="Close").press("Enter")
    opened.page.get_by_role("dialog").wait_for(state="detached")
    soon(lambda: opened.page.evaluate("document.activeElement.title") == "Parameters")


def test_an_answer_is_announced_when_it_has_ended(opened: Opened) -> None:
    endless(opened.page)
    opened.write("the sign", "sign.png", mode="Locate")
    opened.page.keyboard.press("Enter")
    opened.page.locator("[data-state=streaming] .phrase").first.wait_for()
    told = opened.page.get_by_test_id("announced")
    assert told.get_attribute("role") == "status"
    assert told.inner_text() == ""
    opened.page.get_by_role("button", name="Stop").click()
    soon(lambda: told.inner_text().startswith("sign"))


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE, {"locale": "zh-CN"}], ids=str)
def test_axe_finds_no_fault(visit: Visit, server: Running, options: dict[str, Any]) -> None:
    """The rules of WCAG and of good practice, in every state of the page, colours among them."""
    rules = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js").read_text()
    opened = visit(server.url, reduced_motion="reduce", **options).ready()
    page = opened.page
    page.evaluate(rules)

    def check(state: str) -> None:
        page.mouse.move(2, 2)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert found["passes"], state
        faults = [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found["violations"]]
        assert faults == [], state

    check("empty")
    page.get_by_test_id("files").set_input_files([EXAMPLES / "sign.png", EXAMPLES / "shapes.png"])
    page.locator(".foot .strip li").nth(1).wait_for()
    page.locator(".foot .check input").check()
    page.locator("#question").fill("Where is the sign?")
    check("draft")
    page.locator("#question").press("Enter")
    opened.answered(count=2)
    check("answered")
    page.locator(".facts").first.click()
    check("tokens")
    page.locator("[role=tab]").nth(1).click()
    check("code")
    page.locator(".reply .bar [aria-pressed]").first.click()
    check("confidence")
    page.locator(".frame .corner button").first.click()
    page.get_by_test_id("viewer").wait_for()
    check("large")
    page.keyboard.press("r")
    page.keyboard.press("ArrowLeft")
    check("region")
    page.keyboard.press("Escape")
    page.locator(".head button").nth(-2).click()
    page.get_by_role("dialog").wait_for()
    check("parameters")
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    page.locator("#question").blur()
    page.keyboard.press("?")
    page.get_by_role("dialog").wait_for()
    check("keys")
    page.keyboard.press("Escape")
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=503, json={"error": {"message": "x"}})
    )
    page.locator("#question").fill("?")
    page.locator("#question").press("Enter")
    page.locator(".trouble").wait_for()
    check("trouble")
    opened.forgive(503)


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_nothing_moves_for_those_who_want_none_of_it(visit: Visit, server: Running, motion: str) -> None:
    opened = visit(server.url, reduced_motion=motion).ready()
    opened.page.route("**/v1/chat/completions", lambda route: None)  # it waits
    opened.write("hi")
    opened.page.keyboard.press("Enter")
    opened.page.locator(".dots").wait_for()
    moving = opened.page.evaluate(
        """[...document.querySelectorAll("*")].filter(node => {
            const style = getComputedStyle(node);
            return style.animationName !== "none" || parseFloat(style.transitionDuration) > 0;
        }).length"""
    )
    assert (moving == 0) == (motion == "reduce")
    opened.page.get_by_role("button", name="Stop").click()
