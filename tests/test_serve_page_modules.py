"""What the scripts of the service's page and of a report compute, by hand, in one browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_stand_in import METRICS, PAGE
from page_visits import Site, contrast_failures, needs_chromium, open_site
from question_files import EVIL, few_questions, many_questions
from test_evaluation_report import run

from rlrag.evaluation.report.page import render_report


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as opened:
        yield opened


@pytest.fixture(scope="module")
def evaluate(site: Site) -> Iterator[Callable[..., Any]]:
    with site.visits() as open_one:
        yield open_one().page.evaluate


@needs_chromium
@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("Paris.", "In paris, PARIS and Parisian", ["paris", "PARIS"]),
        ("the United  States", "The United\nStates", ["The United\nStates"]),
        ("It is Rotterdam, near the sea", "It is Rotterdam", ["It is Rotterdam"]),
        ("The river is long", "the river is the longest", []),
        ("12 (twelve)", "about 12, or 120", ["12"]),
        ("C++ (a+b)*", "since C++ (a+b", ["C++ (a+b"]),
        ("São Tomé", "on são tomé island", ["são tomé"]),
        ("...", "anything", []),
        ("", "anything", []),
    ],
)
def test_what_counts_as_the_answer_in_a_text(evaluate, answer, text, found):
    script = """async ([answer, text]) => {
        const { answerPattern } = await import("/page/passages.js");
        const pattern = answerPattern(answer, text);
        return pattern ? [...text.matchAll(pattern)].map(([match]) => match) : [];
    }"""
    assert evaluate(script, [answer, text]) == found


@needs_chromium
def test_differences_are_counted_by_hand(evaluate):
    script = """async () => {
        const { changesOf, lossesOf, differenceInWords } = await import("/page/compare.js");
        const list = (ids) => [...ids].map((id) => ({ id }));
        const result = (answer, ids) => ({ answer, passages: list(ids) });
        const words = (a, b, first, second) =>
            differenceInWords(result(a, first), result(b, second));
        return [
            changesOf(list("abcd"), list("dbxa")).map(({ text }) => text),
            lossesOf(list("abcd"), list("dbxa")).map((loss) => loss?.kind ?? null),
            words("Paris", " paris. ", "ab", "ab"),
            words("Paris", "Lyon", "ab", "a"),
        ];
    }"""
    assert evaluate(script) == [
        ["↑ up 3", "same place", "new", "↓ down 3"],
        [None, None, "gone", None],
        "Both give the same answer. Same passages in the same order.",
        "The answers differ. Passages: 1 in both (0 moved), 0 new, 1 gone.",
    ]


@needs_chromium
def test_metrics_are_read_and_quantiles_estimated(evaluate):
    script = """async (text) => {
        const { askingRequests, quantile, readMetrics, sumBy } = await import("/page/metrics.js");
        const odd = readMetrics('# HELP a b\\na_total{x="1,\\\\"}",y=""} 2e3 1700\\nb NaN\\n');
        const buckets = [[Infinity, 10], [1, 4], [2, 8]];
        return [
            odd[0],
            Number.isNaN(odd[1].value),
            [...sumBy(askingRequests(readMetrics(text)), "rlrag_requests_total", "status")],
            [0.2, 0.4, 0.6, 0.99].map((q) => quantile(buckets, q)),
            Number.isNaN(quantile([], 0.5)),
        ];
    }"""
    # Rank 2 of 10 lies halfway to 4, at 0.5; rank 6 halfway between 4 and 8, at 1.5.
    assert evaluate(script, METRICS) == [
        {"name": "a_total", "labels": {"x": '1,"}', "y": ""}, "value": 2000},
        True,
        [["200", 2050], ["422", 31], ["503", 12]],
        [0.5, 1, 1.5, 2],
        True,
    ]


@needs_chromium
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_however_they_are_cut(evaluate, size):
    text = (
        ': note\r\n\r\nevent: token\r\ndata: {"text":\r\ndata: "é"}\r\n\r\ndata: 1\n\nevent: x\n\n'
    )
    script = """async ([text, size]) => {
        const { EventReader } = await import("/page/api.js");
        const reader = new EventReader();
        const events = [];
        for (let at = 0; at < text.length; at += size)
            events.push(...reader.push(text.slice(at, at + size)));
        return events;
    }"""
    assert evaluate(script, [text, size]) == [
        {"event": "token", "data": {"text": "é"}},
        {"event": "message", "data": 1},
    ]


def test_the_scripts_write_no_markup_and_load_nothing_from_elsewhere():
    texts = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= set(texts)
    for name, text in texts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|\burl\(", text), name
        assert len(text.splitlines()) < 400, name
    assert not re.search(r"\sstyle=|\son\w+=|<script(?![^>]*src=)|<style", texts["index.html"])


@pytest.fixture(scope="module")
def reports(site: Site) -> Iterator[Callable[..., Any]]:
    """Opens a report in the browser that is open; at the end none has complained."""
    opened, complaints = [], []

    def open_report(path: Path, **options: Any) -> Any:
        page = site.browser.new_page(**options)
        opened.append(page)
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_report
    for page in opened:
        page.close()
    assert [text for text in complaints if not text.startswith("file:")] == []


@needs_chromium
def test_the_questions_of_a_report_are_sorted_and_searched(reports, tmp_path):
    path = tmp_path / "r.html"
    path.write_text(render_report([run(questions=few_questions())]), encoding="utf-8")
    page = reports(path)
    status, asked = page.locator("#question-status"), page.locator(".question .asked")

    def numbers() -> list[str]:
        return [re.sub(r"\D+", "", text) or "3" for text in asked.all_inner_texts()]

    page.locator("#question-list li").first.wait_for()
    assert (
        page.get_by_label("compare", exact=True).evaluate("s => s.selectedOptions[0].text")
        == "trained"
    )
    assert numbers() == ["3", "1", "2", "0", "4"]
    assert status.inner_text().endswith("2 gained, 1 lost, 1 same, 1 unanswered.")
    page.get_by_label("sort by").select_option("greatest loss")
    assert numbers() == ["0", "2", "1", "3", "4"]
    page.get_by_label("sort by").select_option("greatest change")
    assert numbers() == ["0", "3", "1", "2", "4"]
    page.get_by_label("by", exact=True).select_option("EM")
    page.get_by_label("show", exact=True).select_option("gained")
    assert numbers() == []  # the half-right answer gains in F1 alone
    page.get_by_label("show", exact=True).select_option("not answered")
    assert numbers() == ["4"]
    page.get_by_label("show", exact=True).select_option("all")
    page.get_by_label("search").fill("NUMBER half")
    assert numbers() == ["1"]
    page.get_by_label("search").fill("")
    page.get_by_label("type", exact=True).select_option("without a type")
    page.get_by_label("sort by").select_option("order of the file")
    assert numbers() == ["0", "2", "4"]
    page.get_by_label("compare", exact=True).select_option("retriever_order")
    page.get_by_label("with", exact=True).select_option("trained")
    assert status.inner_text().startswith("3 of 5 questions. Of those that match: 1 gained, 0 lost")


@needs_chromium
def test_what_a_run_says_is_never_markup_and_all_can_be_reached_by_keys(reports, tmp_path):
    path = tmp_path / "r.html"
    path.write_text(render_report([run(questions=few_questions())]), encoding="utf-8")
    for scheme in ("light", "dark"):
        page = reports(path, color_scheme=scheme)
        item = page.locator("#question-list li").first
        item.wait_for()
        page.get_by_label("search").focus()
        page.keyboard.type("paris")
        for key, then in (
            ("Tab", ".question > summary:focus"),
            ("Enter", ".question[open] .facts"),
            ("Tab", ".scroll:focus"),
            ("Tab", ".found > summary:focus"),
            ("Enter", ".found[open] li"),
            ("Tab", "li:first-child > details > summary:focus"),
            ("Tab", "li:last-child > details > summary:focus"),
            ("Enter", "li:last-child > details[open] > .passage"),
        ):
            page.keyboard.press(key)
            item.locator(then).first.wait_for()
        shown = item.inner_text()
        assert shown.count(EVIL) >= 6  # question, type, golden, answer, title and text
        assert f"text {EVIL} of the second" in shown
        assert f"Gold passages that were not retrieved: {EVIL}" in shown
        assert page.locator("img").count() == 0
        assert page.title().startswith("Training report")
        assert item.locator(".picks .gold").count() == 0  # a is no gold passage
        assert item.locator(".found .gold").count() == 1
        page.locator("section", has=page.locator("#question-browser")).scroll_into_view_if_needed()
        assert contrast_failures(page) == []


@needs_chromium
def test_many_questions_are_paged_and_a_page_without_scripts_says_so(reports, tmp_path):
    path = tmp_path / "r.html"
    runs = [run("a", questions=many_questions(2000)), run("b", questions=few_questions())]
    path.write_text(render_report(runs), encoding="utf-8")
    page = reports(path)
    where, items = page.locator("#question-page"), page.locator("#question-list > li")
    items.first.wait_for()
    assert (where.inner_text(), items.count()) == ("Page 1 of 100", 20)
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    assert where.inner_text() == "Page 2 of 100"
    page.get_by_label("show", exact=True).select_option("lost")
    assert (where.inner_text(), items.count()) == ("Page 1 of 34", 20)
    page.get_by_label("run", exact=True).select_option("b")
    assert page.locator("#question-status").inner_text().startswith("1 of 5 questions")
    bare = reports(path, java_script_enabled=False)
    assert bare.get_by_text("To look through the single questions, allow").is_visible()
    assert not bare.locator("#question-browser").is_visible()
