"""What the scripts of the page compute, by hand-computed cases in the browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_stand_in import METRICS, PAGE
from page_visits import Site, needs_chromium, open_site


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
