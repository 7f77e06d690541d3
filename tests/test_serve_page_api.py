"""The page before the service's own API, whose pipeline is a stand-in without models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from page_visits import Site, Visit, needs_chromium, open_site
from serve_stand_ins import Served

from rlrag.serving.records import Routing

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site(Served(Routing("v1", shadow="v2")).app) as opened:
        yield opened


@pytest.fixture
def open_page(site: Site) -> Iterator[Callable[..., Visit]]:
    with site.visits() as open_one:
        yield open_one


def test_a_question_is_answered_and_seen_in_the_traffic(open_page):
    visit = open_page()
    page = visit.page
    visit.ask("What is it worth?")
    visit.answered()
    # 17 characters turn eight passages by one: numbers 1 and 2 are picked.
    assert page.locator(".answer").inner_text() == "v1 says 1. 4."
    assert page.locator(".passage h3").all_inner_texts() == ["Title 1", "Title 2"]
    assert [text.strip() for text in page.locator(".prob dd").all_inner_texts()] == ["50 %"] * 2
    page.get_by_role("button", name="Right answer").click()
    page.get_by_text("This service records no feedback.").wait_for()
    page.get_by_role("tab", name="Traffic").click()
    page.locator("#recent").get_by_text("/v1/answer").first.wait_for()
    assert page.locator("#stages tbody th").all_inner_texts() == [
        *("retrieve", "select", "generate", "total"),
    ]
    assert page.locator("#caches li").count() == 2


def test_two_versions_are_compared(open_page):
    visit = open_page()
    visit.page.get_by_role("switch", name="Compare two versions").check()
    visit.ask("Which of both?")
    visit.page.get_by_text("The answers differ. Same passages in the same order.").wait_for()
    answers = visit.page.locator(".answer").all_inner_texts()
    assert [answer.split()[0] for answer in answers] == ["v1", "v2"]


def test_a_refusal_is_shown(open_page):
    visit = open_page()
    visit.page.get_by_text("Options").click()
    visit.page.get_by_role("spinbutton", name="Passages").fill("99")
    visit.ask("Too many?")
    notice = visit.page.get_by_role("alert").filter(has_text="num_selected is 99 of 5 candidates")
    notice.wait_for()
    assert "Status 422" in notice.inner_text()
