"""A stand-in for the service in; visits to its page in headless Chromium, watched, out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from page_stand_in import StandIn, make_app, served

CHROMIUM = shutil.which("chromium")
QUESTION = "Which port lies at the mouth of the Rhine?"
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 360, "height": 760}
_TIMEOUT_MS = 20_000

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed; on Debian: apt install chromium"
)


@dataclass
class Visit:
    """One browser page, and what it did that nobody sees."""

    page: Any
    stand_in: StandIn
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def ask(self, question: str = QUESTION) -> None:
        self.page.get_by_label("Ask a question").fill(question)
        self.page.keyboard.press("Enter")

    def answered(self, count: int = 1) -> None:
        """Wait for whole answers."""
        self.expect(self.page.locator(".answer[aria-busy=false]")).to_have_count(count)

    def expect(self, locator: Any) -> Any:
        """Assertions that wait; `wait_for_function` evaluates text, which the page forbids."""
        from playwright.sync_api import expect

        expect.set_options(timeout=_TIMEOUT_MS)
        return expect(locator)

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id")


@dataclass
class Site:
    """A browser and the address that it visits."""

    browser: Any
    address: str
    stand_in: StandIn

    @contextmanager
    def visits(self) -> Iterator[Callable[..., Visit]]:
        """Opens pages; at the end none has left the loopback interface or logged an error."""
        self.stand_in.__dict__.update(StandIn().__dict__)
        visits: list[Visit] = []

        def open_one(path: str = "/", viewport: dict[str, int] = WIDE, **options: Any) -> Visit:
            page = self.browser.new_page(viewport=viewport, **options)
            page.set_default_timeout(_TIMEOUT_MS)
            visit = Visit(page, self.stand_in)
            visits.append(visit)
            page.on("request", lambda request: visit.hosts.add(re.split("[/:]+", request.url)[1]))
            page.on("pageerror", lambda error: visit.complaints.append(str(error)))
            page.on("console", lambda message: listen(visit, message))
            page.goto(self.address + path)
            return visit

        try:
            yield open_one
        finally:
            for visit in visits:
                visit.page.close()
        for visit in visits:
            assert visit.hosts == {"127.0.0.1"}
            assert visit.complaints == []


@contextmanager
def open_site(app: FastAPI | None = None) -> Iterator[Site]:
    """A browser before an application; before the stand-in when none is given."""
    from playwright.sync_api import sync_playwright

    stand_in = StandIn()
    with served(app or make_app(stand_in)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Site(browser, address, stand_in)
        browser.close()


def listen(visit: Visit, message: Any) -> None:
    """Keep what the console says, save that the service refused, which the browser always logs."""
    refused = "Failed to load resource: the server responded with a status"
    if message.type in ("error", "warning") and not message.text.startswith(refused):
        visit.complaints.append(message.text)


CONTRAST = """() => {
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => {
        const [r, g, b] = rgba(colour).map((byte) => byte / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        const colour = getComputedStyle(element).backgroundColor;
        return rgba(colour)[3] === 255 ? colour : ground(element.parentElement);
    };
    const failures = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const { data, parentElement: element } = walker.currentNode;
        const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const counts = data.trim() && element.checkVisibility() && !element.matches(":disabled");
        if (counts && ratio < 4.5) failures.push(`${ratio.toFixed(2)} ${data}`);
    }
    return failures;
}"""


def contrast_failures(page: Any) -> list[str]:
    """Visible texts whose contrast to the ground behind them is below what WCAG AA asks for."""
    return page.evaluate(CONTRAST)
