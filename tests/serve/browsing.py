"""What tests of the page share: a page that must stay without fault, and answers on demand."""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

    from tests.serve.conftest import Running

EXAMPLES = Path(__file__).parents[2] / "examples"
CHROMIUM = Path("/usr/bin/chromium")
WAIT = 30_000
"""Milliseconds after which a thing that does not come is missed."""
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


def soon(found: Callable[[], object]) -> None:
    """Wait until something holds: a browser draws when it comes to it."""
    until = time.monotonic() + WAIT / 1000
    while not found() and time.monotonic() < until:
        time.sleep(0.05)
    assert found()


class Opened:
    """A page in a browser profile of its own, with all it said and asked for."""

    def __init__(self, browser: "Browser", url: str, **options: Any) -> None:
        options = {"viewport": {"width": 1200, "height": 860}, "locale": "en-US", **options}
        self.url = url
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.said: list[str] = []
        """Errors of the console, among them every violation of the policy, and of scripts."""
        self.asked: list[str] = []
        """Addresses that anything in the page asked for."""
        self.page.on("console", lambda line: self.said.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def close(self) -> None:
        """Leave, and see that nothing went wrong and nobody else was asked."""
        self.context.close()
        assert self.said == []
        strangers = [url for url in self.asked if not url.startswith((self.url, "blob:", "data:"))]
        assert strangers == []

    def forgive(self, status: int) -> None:
        """Take a failed request for what it is: one that this test wanted."""
        self.said = [line for line in self.said if f"a status of {status}" not in line]

    def ready(self) -> "Opened":
        """Wait until a question could be asked."""
        self.page.locator(".examples button:enabled").first.wait_for()
        return self

    def ask(self, question: str, *pictures: str, mode: str | None = None, count: int = 1) -> None:
        """Ask, and wait for the end of the answer; `count` replies will then be shown."""
        self.write(question, *pictures, mode=mode)
        self.page.keyboard.press("Enter")
        self.answered(count=count)

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

    def sent(self, *, last: int = -1) -> dict[str, Any]:
        """The request of an answer as the page shows it."""
        self.page.locator(".facts").nth(last).click()
        self.page.get_by_role("tab", name="Request").click()
        found: dict[str, Any] = json.loads(self.page.locator(".block pre").inner_text())
        self.page.locator(".facts").nth(last).click()
        return found

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag in the large picture; places are shares of what it lies in."""
        pane = self.page.locator(".pane").first.bounding_box()
        assert pane is not None
        places = [(pane["x"] + x * pane["width"], pane["y"] + y * pane["height"]) for x, y in (start, end)]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        self.page.mouse.move(*places[1], steps=4)
        self.page.mouse.up()


def stream_instead(page: "Page", *texts: str, **more: object) -> None:
    """Answer in the place of the server, one text after the other; `more` goes beside the end of each."""
    left = list(texts)

    def answer(route: "Route") -> None:
        text = left.pop(0) if len(left) > 1 else left[0]
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": "stop"}
        body = f"data: {json.dumps({'choices': [choice], **more})}\n\ndata: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)


def sure(
    token: str, *, others: Sequence[tuple[str, float]] = (), probability: float = 1.0
) -> dict[str, object]:
    """A token of `logprobs`, with what might have stood in its place."""
    told = [(token, probability), *others]
    tops = [{"token": each, "logprob": math.log(value), "bytes": list(each.encode())} for each, value in told]
    return {**tops[0], "top_logprobs": tops}


def endless(page: "Page") -> None:
    """Let answers go on until they are stopped."""

    def change(route: "Route") -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route("**/v1/chat/completions", change)


def cancelled(server: "Running") -> float:
    found = re.search(r"^seekvl_canceled_total (\S+)", server.ask("GET", "/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])
