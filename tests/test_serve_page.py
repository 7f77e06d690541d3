"""The page at `/` in headless Chromium, before a stand-in for the service's API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from page_stand_in import ACTIVE, HOSTILE, PATH, REQUEST_ID, SHADOW, problem
from page_visits import (
    NARROW,
    QUESTION,
    WIDE,
    Site,
    Visit,
    contrast_failures,
    needs_chromium,
    open_site,
)

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as opened:
        yield opened


@pytest.fixture
def open_page(site: Site) -> Iterator[Callable[..., Visit]]:
    with site.visits() as open_one:
        yield open_one


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the screenshots are kept."""
    folder = tmp_path_factory.getbasetemp() / "page"
    folder.mkdir(exist_ok=True)
    print(f"screenshots: {folder}")
    return folder


def test_an_answer_comes_with_its_passages_and_probabilities(open_page):
    visit = open_page()
    page = visit.page
    assert page.get_by_text("The service finds candidate passages").is_visible()
    visit.ask()
    visit.answered()
    assert visit.stand_in.asked == [{"question": QUESTION, "stream": True}]
    assert page.locator(".answer").inner_text() == "Rotterdam."
    assert page.locator(".passage h3").all_inner_texts() == [
        "Rhine",
        "Netherlands",
        "Marks & <b>tags</b>",
    ]
    assert page.locator(".rank").all_inner_texts() == ["1", "2", "3"]
    probs = [text.strip() for text in page.locator(".prob dd").all_inner_texts()]
    assert probs == ["62 %", "27 %", "< 0.1 %"]
    bar = page.locator(".prob .meter").first
    assert bar.evaluate("bar => bar.style.getPropertyValue('--part')") == "0.6241"
    assert page.get_by_text("14.22").is_visible()
    facts = page.locator(".answer-facts").inner_text()
    assert ACTIVE in facts
    assert REQUEST_ID in facts
    assert "−0.84" in facts
    assert page.locator(".cut").count() == 0
    assert not page.get_by_text("The service finds candidate passages").is_visible()


def test_the_path_is_drawn_turn_by_turn(open_page):
    visit = open_page()
    page = visit.page
    visit.ask()
    visit.answered()
    visit.expect(page.locator(".path")).to_be_hidden()
    visit.stand_in.path = PATH
    visit.ask()
    visit.answered()
    visit.expect(page.locator(".path")).to_be_visible()
    assert page.locator(".turn-head").all_inner_texts() == [
        "Question Which port lies at the mouth of the Rhine?",
        "Pick Rhine",
        f"Search mouth of {HOSTILE} (query writer title, on Rhine)",
        "Stop",
    ]
    assert page.locator(".found .note").all_inner_texts() == [
        "found by the query",
        "named in the question",
        "hop from Rhine: names its title",
        "found by the query",
    ]
    assert page.locator(".was-picked .found-title").all_inner_texts() == ["Rhine"]
    assert page.get_by_text("2 more found no room.").is_visible()
    assert page.get_by_text("found on the path").count() == 1
    assert page.title() != "taken"
    assert contrast_failures(page) == []


def test_the_answer_is_written_as_it_comes(open_page):
    visit = open_page()
    visit.stand_in.hangs = True
    visit.ask()
    visit.expect(visit.page.locator(".answer.writing")).to_have_text("R")
    assert visit.page.locator(".passage").count() == 3
    assert visit.page.get_by_role("button", name="Stop").is_visible()


def test_the_answer_is_marked_where_it_stands(open_page):
    visit = open_page()
    visit.ask()
    visit.answered()
    # Whatever the case, but not within a longer word; a long text is cut to where it stands.
    assert visit.page.locator("mark").all_inner_texts() == ["Rotterdam", "ROTTERDAM"]
    text = visit.page.locator(".passage-text").first
    assert text.inner_text().startswith("… ")
    assert "largest port" in text.inner_text()
    toggle = visit.page.get_by_role("button", name="Show all of Rhine")
    toggle.click()
    assert text.inner_text().startswith("The Rhine rises")
    assert text.locator("mark").count() == 1
    visit.page.get_by_role("button", name="Show less of Rhine").click()
    assert text.inner_text().startswith("… ")


def test_markup_in_a_passage_stays_text(open_page):
    visit = open_page()
    visit.ask()
    visit.answered()
    assert HOSTILE in visit.page.locator(".passage-text").last.inner_text()
    assert visit.page.locator("#results img, #results script, #results b").count() == 0
    assert visit.page.title() == "Ask · rlrag"


def test_timings_are_a_bar_and_a_table(open_page):
    visit = open_page()
    visit.ask()
    visit.answered()
    bar = visit.page.get_by_role("img", name="Retrieve 8.4 ms, Select 3.1 ms, Generate 231 ms")
    assert bar.is_visible()
    assert bar.get_attribute("aria-label").endswith("Other 1.5 ms")
    table = visit.page.get_by_role("table", name="Time by stage")
    assert not table.is_visible()
    visit.page.get_by_text("Answered in 244 ms", exact=True).click()
    assert table.get_by_role("row", name="Generate 231 ms 95 %").is_visible()


def test_options_are_sent_and_checked(open_page):
    visit = open_page()
    page = visit.page
    page.get_by_text("Options").click()
    page.get_by_role("spinbutton", name="Passages").fill("2")
    page.get_by_role("spinbutton", name="Candidates").fill("20")
    page.get_by_label("Version", exact=True).select_option(SHADOW)
    page.get_by_label("Also list the candidates").check()
    visit.ask()
    visit.answered()
    (asked,) = visit.stand_in.asked
    assert asked == {
        "question": QUESTION,
        "stream": True,
        "num_selected": 2,
        "num_candidates": 20,
        "version": SHADOW,
        "explain": True,
    }
    page.get_by_text("Candidates not picked: 2").click()
    assert page.get_by_role("row", name="4 Basel 8.250").is_visible()
    page.get_by_role("spinbutton", name="Passages").fill("0")
    visit.ask()
    assert page.get_by_role("alert").inner_text() == "Passages must be a whole number from 1 on."
    assert visit.focused() == "num-selected"
    visit.ask("   ")
    assert page.get_by_role("alert").inner_text() == "Type a question first."
    assert len(visit.stand_in.asked) == 1


def test_everything_works_without_a_mouse(open_page):
    visit = open_page("/#traffic")
    page = visit.page
    page.keyboard.press("/")
    assert visit.focused() == "question"
    page.keyboard.type("Where to?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("By / ship")
    page.keyboard.press("Enter")
    visit.answered()
    assert visit.stand_in.asked[0]["question"] == "Where to?\nBy / ship"
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText.split('\\n')[0]"))
        if page.evaluate("document.activeElement === document.body"):
            break
        ring = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(ring) == "solid", reached
    assert reached[:2] == ["Ask", "Options"]
    assert "Show all" in reached
    assert any(name.startswith("Answered in") for name in reached)
    page.get_by_role("tab", name="Ask").focus()
    page.keyboard.press("ArrowRight")
    assert visit.focused() == "tab-traffic"
    assert page.get_by_role("tabpanel", name="Traffic").is_visible()
    for key, focused in {"ArrowRight": "tab-ask", "End": "tab-traffic", "Home": "tab-ask"}.items():
        page.keyboard.press(key)
        assert visit.focused() == focused
    assert page.get_by_role("tab", name="Traffic").get_attribute("tabindex") == "-1"


def test_escape_stops_and_frees_the_service(open_page):
    visit = open_page()
    visit.stand_in.hangs = True
    visit.ask()
    visit.page.locator(".answer.writing").wait_for()
    visit.page.keyboard.press("Escape")
    visit.page.get_by_text("Stopped before the answer was complete.").wait_for()
    assert visit.page.get_by_role("button", name="Ask", exact=True).is_visible()
    for _ in range(100):
        if visit.stand_in.left:
            break
        visit.page.wait_for_timeout(50)
    assert visit.stand_in.left == 1
    visit.stand_in.hangs = False
    visit.ask()
    visit.answered()
    assert not visit.page.get_by_text("Stopped before").is_visible()


def test_what_the_service_refuses_is_shown(open_page, shots):
    visit = open_page()
    visit.stand_in.problem = problem(
        503, "The service is full", "64 requests wait; try again in a moment", request_id="r-7"
    )
    visit.ask()
    notice = visit.page.get_by_role("alert").filter(has_text="The service is full")
    notice.wait_for()
    assert "64 requests wait; try again in a moment" in notice.inner_text()
    assert "Status 503 · request r-7 · the service asks to wait 2 s" in notice.inner_text()
    visit.page.screenshot(path=shots / "error.png")
    visit.stand_in.problem = None
    notice.get_by_role("button", name="Try again").click()
    visit.answered()
    assert not notice.is_visible()
    field_errors = [{"field": "num_selected", "message": "is beyond the bundle's 5"}]
    visit.stand_in.problem = problem(422, "Not possible", "see errors", errors=field_errors)
    visit.ask()
    visit.page.get_by_text("num_selected: is beyond the bundle's 5").wait_for()


def test_a_broken_stream_and_a_dead_service_are_told_apart(open_page):
    visit = open_page()
    visit.stand_in.breaks_off = True
    visit.ask()
    visit.page.get_by_text("The answer broke off").wait_for()
    assert visit.page.locator(".answer.unfinished").inner_text() == "R"
    visit.page.route("**/v1/answer", lambda route: route.abort())
    visit.ask()
    visit.page.get_by_text("The service cannot be reached").wait_for()
    visit.complaints.clear()


def test_the_key_is_asked_for_and_leaves_with_the_tab(open_page):
    visit = open_page()
    page = visit.page
    visit.stand_in.problem = problem(401, "An API key is needed", "Send Authorization: Bearer KEY.")
    visit.ask()
    page.get_by_role("button", name="Enter an API key").click()
    assert visit.focused() == "api-key"
    page.keyboard.type("secret-1")
    page.keyboard.press("Escape")
    assert not page.get_by_label("API key").is_visible()
    visit.stand_in.problem = None
    visit.ask()
    visit.answered()
    assert visit.stand_in.keys == [None, "Bearer secret-1"]
    assert page.evaluate("Object.values(localStorage).join()") == ""
    assert page.evaluate("Object.values(sessionStorage).join()") == "secret-1"
    page.reload()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("API key").fill("")
    assert page.evaluate("sessionStorage.length") == 0


def test_feedback_is_sent_or_hidden_where_it_is_off(open_page):
    visit = open_page()
    page = visit.page
    visit.ask()
    page.get_by_role("button", name="Wrong answer").click()
    page.get_by_text("Recorded, thank you.").wait_for()
    assert visit.stand_in.thumbs == [{"request_id": REQUEST_ID, "thumbs": "down"}]
    assert page.get_by_role("button", name="Wrong answer").get_attribute("aria-pressed") == "true"
    visit.stand_in.feedback = False
    page.get_by_role("button", name="Right answer").click()
    page.get_by_text("This service records no feedback.").wait_for()
    assert page.get_by_role("button", name="Right answer").count() == 0
    visit.ask()
    page.get_by_text("records no feedback").wait_for(state="detached")
    visit.answered()
    assert page.get_by_role("button", name="Right answer").count() == 0


def test_two_versions_side_by_side(open_page):
    visit = open_page()
    page = visit.page
    page.get_by_role("switch", name="Compare two versions").check()
    assert page.get_by_label("First version").input_value() == ACTIVE
    page.get_by_label("Second version").select_option(SHADOW)
    visit.ask()
    page.get_by_text("The answers differ. Passages: 2 in both (2 moved), 1 new, 1 gone.").wait_for()
    assert {asked["version"] for asked in visit.stand_in.asked} == {ACTIVE, SHADOW}
    first, second = page.locator(".answer-view").all()
    assert first.locator(".version-name").inner_text() == ACTIVE
    assert first.locator(".change:visible").all_inner_texts() == ["gone"]
    assert second.locator(".change").all_inner_texts() == ["↑ up 1", "↓ down 1", "new"]
    assert second.locator(".answer").inner_text() == "Near Rotterdam"
    assert [view.locator(".cut").all_inner_texts() for view in (first, second)] == [
        [],
        ["The prompt leaves out 1,234 tokens of the passages and shows 2 of 3 passages."],
    ]
    # One scale: the slower version fills its bar.
    widths = [
        sum(stage.bounding_box()["width"] for stage in view.locator(".stage").all())
        for view in (first, second)
    ]
    assert widths[1] / widths[0] == pytest.approx(143 / 244, abs=0.05)
    page.get_by_label("First version").select_option(SHADOW)
    visit.ask()
    assert page.get_by_role("alert").inner_text() == "Choose two different versions."


def test_one_version_cannot_be_compared(open_page):
    visit = open_page()
    visit.stand_in.versions = (ACTIVE,)
    visit.page.get_by_role("switch", name="Compare two versions").check()
    visit.page.get_by_text("Only one version is in use.").wait_for()
    visit.ask()
    assert visit.page.get_by_text("There are no two versions to compare.").is_visible()
    assert visit.stand_in.asked == []


def test_traffic_is_read_while_it_is_looked_at(open_page):
    visit = open_page()
    page = visit.page
    assert visit.stand_in.polls == 0
    page.get_by_role("tab", name="Traffic").click()
    page.get_by_role("table", name="Recent requests, newest first").wait_for()
    assert page.locator("#recent tbody tr").count() == 24
    assert page.locator(".figures").inner_text().split("\n") == [
        *("Requests", "2,093", "Refused or failed", "2.1 %", "In flight", "3", "Waiting", "0"),
        *("Tokens, prompt", "742,113", "Tokens, answer", "20,344"),
    ]
    assert page.locator("#stages tbody tr").last.inner_text().split() == [
        *("total", "250", "ms", "985", "ms"),
    ]
    assert page.get_by_text("30 % of 2,050").is_visible()
    assert page.get_by_role("img", name="Latency of the last 22 answers").is_visible()
    for _ in range(100):
        if visit.stand_in.polls > 1:
            break
        page.wait_for_timeout(100)
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(500)
    polls = visit.stand_in.polls
    assert polls > 1
    page.wait_for_timeout(2500)
    assert visit.stand_in.polls == polls
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("tab", name="Ask").click()
    page.wait_for_timeout(500)
    polls = visit.stand_in.polls
    page.wait_for_timeout(2500)
    assert visit.stand_in.polls == polls


def test_traffic_says_what_is_wrong(open_page):
    visit = open_page("/#traffic")
    visit.stand_in.problem = problem(500, "Something failed", "The log says more.")
    visit.page.get_by_role("alert").filter(has_text="Something failed").wait_for()
    visit.stand_in.problem = None
    visit.page.get_by_role("alert").filter(has_text="Something failed").wait_for(state="detached")


def test_colours_follow_the_system_until_they_are_switched(open_page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = open_page(color_scheme="light").page, open_page(color_scheme="dark").page
    colours = [light.evaluate(ground), dark.evaluate(ground)]
    assert colours[0] != colours[1]
    light.get_by_role("button", name="Dark colours").click()
    assert light.evaluate(ground) == colours[1]
    light.reload()
    assert light.evaluate(ground) == colours[1]
    light.get_by_role("button", name="Light colours").click()
    assert light.evaluate(ground) == colours[0]
    assert light.evaluate("document.documentElement.lang") == "en"


def test_motion_is_reduced_where_it_is_not_wanted(open_page):
    visit = open_page(reduced_motion="reduce")
    visit.stand_in.hangs = True
    visit.ask()
    visit.page.locator(".answer.writing").wait_for()
    style = "getComputedStyle(document.querySelector('.answer.writing'), '::after').animationName"
    assert visit.page.evaluate(style) == "none"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_looks_right_in_every_light_and_width(open_page, shots, scheme, viewport):
    def check(visit: Visit, name: str) -> None:
        assert contrast_failures(visit.page) == []
        overflow = "document.documentElement.scrollWidth - innerWidth"
        assert visit.page.evaluate(overflow) <= 0, name
        path = shots / f"{name}-{scheme}-{viewport['width']}.png"
        visit.page.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 5000

    visit = open_page(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
    visit.page.get_by_text("Options").click()
    check(visit, "empty")
    visit.page.get_by_text("Options").click()
    visit.ask()
    visit.answered()
    check(visit, "ask")
    visit.page.get_by_role("switch").check()
    visit.ask()
    visit.page.get_by_text("The answers differ.").wait_for()
    check(visit, "compare")
    visit.page.get_by_role("tab", name="Traffic").click()
    visit.page.locator("#recent table").wait_for()
    check(visit, "traffic")
    visit.page.get_by_role("button", name="Settings").click()
    check(visit, "settings")
