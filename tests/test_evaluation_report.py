"""The report: charts with known coordinates, numbers of runs, and a page that is whole and safe."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rlrag.config import (
    DROConfig,
    FewShotExample,
    GeneratorConfig,
    OpenRAGConfig,
    PromptConfig,
    RetrievalConfig,
    RunConfig,
)
from rlrag.evaluation.report import figures as report_figures
from rlrag.evaluation.report.charts import (
    BOTTOM,
    LEFT,
    MARKED_POINTS,
    RIGHT,
    TOP,
    Scale,
    Series,
    extent,
    line_chart,
    nice_ticks,
    path_of,
    running_mean,
    stacked_bars,
    thinned,
    tick_label,
)
from rlrag.evaluation.report.page import render_report
from rlrag.evaluation.report.run_record import RunRecord, differing_fields, to_json
from rlrag.runs.alarms import Alarm

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def metrics(num_steps: int = 4) -> list[dict]:
    records: list[dict] = [
        {"step": 0, "epoch": 0.0, "validation/em": 0.125, "validation/f1": 0.25},
    ]
    for step in range(1, num_steps + 1):
        records.append(
            {
                "step": step,
                "epoch": step / 2,
                "reward": -8.0 + step,
                "reward/answer_logp": -8.0 + step,
                "ess": 2.0 + step,
                "weight_entropy": 1.0,
                "log_weight_variance": 3.0 + step,
                "grad_norm": float(step),
                "zero_signal_share": 0.0,
                "generator_tokens_spent": 100.0,
                "generator_tokens_saved": 300.0,
                "rollouts_per_s": 5.0,
                "collect_s": 10.0,
                "learn_s": 5.0,
                "validate_s": 0.0,
                "alarms": ["zero_signal"],
            }
        )
    records[-1] |= {"validation/em": 0.375, "validation/f1": 0.5}
    return records


def evaluation(em: float = 0.3125) -> dict:
    system = {
        "em": em,
        "f1": 0.4375,
        "accuracy": 0.5,
        "recall@1": None,
        "ndcg@1": 0.6875,
        "em_ci95": [0.2, 0.4],
        "f1_ci95": [0.3, 0.5],
    }
    pair = {
        "em_diff": 0.0625,
        "f1_diff": 0.05,
        "ci95": [0.01, 0.11],
        "f1_ci95": [-0.01, 0.1],
        "p_value": 0.0156,
        "f1_p_value": 0.04,
    }
    return {
        "num_questions": 1240,
        "systems": {"retriever_order": system, "trained": system},
        "paired": {"trained_vs_retriever_order": pair},
        "hashes": {"questions": "abc"},
        "bundle_step": 4,
    }


def run(name: str = "one", num_samples: int = 8, finished: bool = True, **changes) -> RunRecord:
    return RunRecord(
        name=name,
        config=RunConfig(recipe="tiny", algorithm=DROConfig(num_samples=num_samples)),
        **{
            "metrics": metrics(),
            "alarms": (),
            "evaluation": evaluation() if finished else None,
            **changes,
        },
    )


def paths(figure: str, kind: str = "line") -> list[str]:
    """Data of the drawn lines, without those of the legend."""
    return re.findall(rf'<path class="{kind} c\w+"[^>]* d="(M[\d. MLh-]+)"/>', figure)


def test_the_least_and_greatest_values_lie_on_the_edges():
    points = [(0.0, -10.0), (5.0, 0.0), (20.0, 10.0)]
    figure = line_chart("t", [Series("a", points)], "step")
    quarter = LEFT + (RIGHT - LEFT) / 4
    middle = (TOP + BOTTOM) / 2
    assert paths(figure) == [
        f"M{LEFT:.1f} {BOTTOM:.1f}L{quarter:.1f} {middle:.1f}L{RIGHT:.1f} {TOP:.1f}"
    ]
    assert figure.count("<circle") == 3
    assert "<title>a: -10 at 0</title>" in figure


def test_series_share_one_scale_and_only_several_have_a_legend():
    one = Series("one", [(0.0, 0.0), (1.0, 1.0)])
    two = Series("two", [(0.0, 3.0), (2.0, 2.0)], colour=1)
    figure = line_chart("t", [one, two], "step")
    assert paths(figure) == [
        f"M{LEFT:.1f} {BOTTOM:.1f}L{(LEFT + RIGHT) / 2:.1f} {BOTTOM - (BOTTOM - TOP) / 3:.1f}",
        f"M{LEFT:.1f} {TOP:.1f}L{RIGHT:.1f} {TOP + (BOTTOM - TOP) / 3:.1f}",
    ]
    assert 'class="legend"' in figure
    assert 'class="legend"' not in line_chart("t", [one], "step")


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, math.nan), (3.0, 1.0), (4.0, math.inf), (5.0, 0.0)]
    same = Scale(0.0, 1.0, 0.0, 1.0)
    assert path_of(points, same, same) == "M0.0 0.0L1.0 1.0M3.0 1.0h0M5.0 0.0h0"
    figure = line_chart("t", [Series("a", points)], "step")
    assert "nan" not in figure
    assert "inf" not in figure
    assert figure.count("<circle") == 4


def test_a_single_point_and_equal_values_are_drawn():
    figure = line_chart("t", [Series("a", [(3.0, 7.0)])], "step")
    assert len(paths(figure)) == 1
    assert ">7.0</text>" in figure
    flat = line_chart("t", [Series("a", [(1.0, 0.0), (2.0, 0.0)])], "step")
    assert paths(flat) == [f"M{LEFT:.1f} {BOTTOM:.1f}L{RIGHT:.1f} {BOTTOM:.1f}"]


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)]])
def test_nothing_to_draw_is_said(points):
    figure = line_chart("Reward", [Series("a", points)], "step")
    assert "no run recorded this" in figure
    assert "<svg" not in figure
    assert "no run recorded this" in stacked_bars("Time", {"a": {"learn": 0.0}}, "s")
    assert "no run recorded this" in stacked_bars("Time", {}, "s")


def test_long_series_are_faint_below_their_running_mean():
    points = [(float(i), float(i % 2)) for i in range(MARKED_POINTS + 1)]
    figure = line_chart("t", [Series("a", points)], "step")
    assert len(paths(figure, "raw")) == len(paths(figure)) == 1
    assert "<circle" not in figure
    assert "running mean of 5 steps" in figure


def test_a_running_mean_ends_at_gaps():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, 6.0), (3.0, math.nan), (4.0, 5.0)]
    found = [point for point in running_mean(points, 3) if math.isfinite(point[1])]
    assert found == [(0.0, 1.5), (1.0, 3.0), (2.0, 4.0), (4.0, 5.0)]


def test_thinning_keeps_extremes_and_gaps():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[1234], points[7777], points[5000] = (1234.0, 9.0), (7777.0, -9.0), (5000.0, math.nan)
    found = thinned(points, 100)
    assert len(found) <= 101
    assert {(1234.0, 9.0), (7777.0, -9.0)} <= set(found)
    assert sum(math.isnan(y) for _, y in found) == 1
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert thinned(points[:100], 100) == points[:100]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-11.4, -3.8), (0.1501, 0.1503), (1.0, 306.0), (0.0, 4e6), (2e-5, 3e-5)],
)
def test_ticks_are_round_within_the_range_and_labels_tell_them_apart(low, high):
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    labels = [tick_label(tick, ticks) for tick in ticks]
    assert len(set(labels)) == len(ticks)
    for tick, label in zip(ticks, labels, strict=True):
        value = float(label.replace(",", "").removesuffix("M")) * (1e6 if "M" in label else 1)
        assert value == pytest.approx(tick)


def test_whole_ticks_and_degenerate_ranges():
    assert nice_ticks(1.0, 3.0, whole=True) == [1.0, 2.0, 3.0]
    assert nice_ticks(*extent([0.1 + 0.2, 0.3]))
    assert nice_ticks(*extent([1e300, 1e300]))


def test_bars_share_one_scale_and_tell_their_parts():
    figure = stacked_bars("Time", {"a": {"x": 30.0, "y": 10.0}, "b": {"x": 20.0, "y": 0.0}}, "s")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)"', figure)]
    assert widths == [354.0, 118.0, 236.0]
    assert "a, y: 10.0 s (25.0 %)" in figure
    assert "20 s</text>" in figure


def test_numbers_of_a_run():
    one = run()
    assert one.num_steps == 4
    assert one.series("validation/em") == [(0.0, 0.125), (4.0, 0.375)]
    assert one.series("validation/em", "epoch") == [(0.0, 0.125), (2.0, 0.375)]
    assert one.phases() == {"collect": 40.0, "learn": 20.0, "validate": 0.0}
    judged = replace(one, metrics=(*one.metrics, {"step": 4, "generator_tokens_total": 2e3}))
    assert [list(r.tokens().values()) for r in (one, judged)] == [[0, 400, 1200], [400, 400, 1200]]
    statistics = one.weight_statistics()
    assert statistics["ess"] == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert statistics["ess_share"] == pytest.approx(4.5 / 8)
    assert statistics["log_weight_variance"] == pytest.approx(5.5)
    assert statistics["grad_norm_variance"] == pytest.approx((2.25 + 0.25) * 2 / 3)
    expected = [(0, 0.125, 0.25), (2, 0.375, 0.5)]
    assert [(q.iteration, q.em, q.f1) for q in one.iterations()] == expected
    assert "alarms" not in one.metric_names()


def test_an_iteration_shows_its_last_validation():
    records = [
        {"step": s, "epoch": e, "validation/em": s / 8, "validation/f1": s / 4}
        for s, e in ((0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0000000000000002), (4, 1.5))
    ]
    found = run(metrics=records).iterations()
    assert [(q.iteration, q.em) for q in found] == [(0, 0.0), (1, 0.375), (2, 0.5)]


def test_what_was_never_recorded_is_none_and_not_zero():
    bare = run(metrics=[{"step": 0, "epoch": 0.0, "failures": ["question 'q7': no answer"]}])
    assert set(bare.weight_statistics().values()) == {None}
    assert bare.iterations() == []
    assert "question 'q7': no answer" in Page(render_report([bare])).text


def test_the_page_of_one_run_is_whole_and_shows_its_numbers():
    alarm = Alarm("zero_signal", 3, "nothing to learn from")
    page = Page(render_report([run(alarms=(alarm,))]))
    assert ("h1", {}) in page.tags
    for shown in (
        "Training report: tiny, seed 0",
        "0.312 (0.200 to 0.400)",
        "0.438 (0.300 to 0.500)",
        "0.688",
        "1,240 questions; the trained system is that of step 4",
        "trained minus retriever_order",
        "+0.062 (+0.010 to +0.110) 0.016 0.031",
        "nothing to learn from",
        "1 min 00 s",
        "1,600",
        "0.375 / 0.500",
        "algorithm.num_samples",
        "draw m = 8 samples",
        "Not recorded by any run: ",
    ):
        assert shown in page.text, shown
    titles = {attributes["aria-label"] for attributes in page.all("svg") if "role" in attributes}
    assert {
        "Reward of the drawn selections",
        "Effective sample size, from 1 to m",
        "Entropy of the weights (nats)",
        "Variance of the log-weights within a question",
        "Validation EM by step",
        "Validation F1 by pass over the questions",
        "Time in each phase",
        "Tokens of training",
    } <= titles
    assert "The trained system of each run" not in page.text


def test_a_retrievers_run_shows_its_own_figures_and_system():
    validated = {"validation/em": 0.25, "validation/f1": 0.25, "validation/accuracy": 0.5}
    records = [
        {"step": step, "epoch": step / 2, "retriever/loss": 4.0 - step, **validated}
        for step in range(4)
    ]
    found = evaluation()
    found["systems"] = {"original_retriever": found["systems"]["trained"]} | {
        "tuned_retriever": found["systems"]["trained"] | {"em": 0.875}
    }
    tuned = replace(
        run(metrics=records, evaluation=found),
        config=RunConfig(
            recipe="retriever",
            retrieval=RetrievalConfig(kind="dense"),
            algorithm=OpenRAGConfig(offline_epochs=3, online_epochs=4),
        ),
    )
    page = Page(render_report([tuned, tuned]))
    for shown in ("openrag", "1.50 of 7", "0.875 (0.200 to 0.400)"):
        assert shown in page.text, shown
    titles = {attributes["aria-label"] for attributes in page.all("svg") if "role" in attributes}
    assert {"Retriever loss", "Validation accuracy (golden answer contained) by step"} <= titles
    assert "generator/loss" not in page.text
    assert "Variance against the number" not in page.text
    assert "Variance against the number" in render_report([tuned, run()])


def test_the_page_loads_nothing_and_runs_nothing():
    text = render_report([run(), run("two", num_samples=4)])
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "use"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "style"}
    assert not [name for name in names if name.startswith("on")]
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_text_of_a_run_is_escaped_everywhere():
    evil = "<script>alert('x')</script>"
    shot = FewShotExample(title=evil, text=evil, question=evil, answer=evil)
    config = RunConfig(
        recipe=evil, generator=GeneratorConfig(prompt=PromptConfig(few_shot=(shot,)))
    )
    found = evaluation()
    found["systems"][evil] = found["systems"]["trained"]
    found["paired"][evil] = found["paired"]["trained_vs_retriever_order"]
    records = [*metrics(), {"step": 5, f"reward/{evil}": 1.0, f"{evil}_s": 3.0}]
    evil_run = RunRecord(evil, config, records, (Alarm(evil, 1, evil),), found)
    text = render_report([evil_run, run("plain", 4)])
    page = Page(text)
    assert "<script" not in text
    assert page.text.count(evil) >= 8


def test_an_unfinished_run_is_said_to_be_so():
    page = Page(render_report([run(finished=False)]))
    assert "Unfinished, without a final evaluation: one (at step 4)." in page.text
    assert "unfinished" in page.text


def test_several_runs_are_overlaid_and_compared():
    other = evaluation(em=0.9375)
    page = Page(render_report([run("first"), run("second", 4, evaluation=other)]))
    assert "The trained system of each run" in page.text
    for shown in ("first", "second", "0.312 (0.200", "0.938 (0.200", "Training report: 2 runs"):
        assert shown in page.text
    assert "different questions" not in page.text
    assert "Mean variance of the log-weights" in page.text
    assert "m is not all that changes" not in page.text


def test_runs_on_different_questions_are_not_passed_off_as_comparable():
    other = evaluation() | {"hashes": {"questions": "xyz"}}
    page = Page(render_report([run("first"), run("second", evaluation=other)]))
    assert "evaluated on different questions" in page.text


def test_the_study_of_m_joins_the_means_of_equal_m():
    def at(name: str, m: int, variance: float) -> RunRecord:
        records = [{"step": 1, "epoch": 1.0, "log_weight_variance": variance}]
        return run(name, m, metrics=records)

    runs = [at("a", 2, 0.0), at("b", 2, 2.0), at("c", 4, 4.0)]
    mean, *single = paths(report_figures.against_samples(runs).partition("</figure>")[0])
    quarter = BOTTOM - (BOTTOM - TOP) / 4
    assert mean == f"M{LEFT:.1f} {quarter:.1f}L{RIGHT:.1f} {TOP:.1f}"
    assert single == [
        f"M{LEFT:.1f} {BOTTOM:.1f}h0",
        f"M{LEFT:.1f} {(BOTTOM + TOP) / 2:.1f}h0",
        f"M{RIGHT:.1f} {TOP:.1f}h0",
    ]
    assert report_figures.against_samples(runs[:2]) == ""


def test_runs_that_differ_in_more_than_m_are_named():
    wide = RunConfig(
        recipe="tiny", algorithm=DROConfig(num_samples=2, reward_temperature=2.0), seed=3
    )
    runs = [run("a"), RunRecord("b", wide, metrics(), (), None)]
    assert set(differing_fields(runs)) == {
        "seed",
        "algorithm.num_samples",
        "algorithm.reward_temperature",
    }
    page = Page(render_report(runs))
    assert "also differ in algorithm.reward_temperature: m is not all" in page.text


def test_the_numbers_are_json():
    alarm = Alarm("collapse", 2, "text")
    nan = {"step": 5, "epoch": 2.5, "ess": math.nan, "alarms": {"collapse": "text"}}
    records = [*metrics(), nan]
    found = to_json([run(metrics=records, alarms=(alarm,))])
    (one,) = json.loads(json.dumps(found, allow_nan=False))["runs"]
    assert one["metrics"]["ess"] == [[1, 3], [2, 4], [3, 5], [4, 6], [5, None]]
    assert one["weight_statistics"]["ess"] == 4.5
    assert one["alarms"] == [{"name": "collapse", "step": 2, "text": "text"}]
    assert one["evaluation"]["systems"]["trained"]["em"] == 0.3125
    assert one["iterations"][1] == {"iteration": 2, "em": 0.375, "f1": 0.5}
    assert one["config"]["recipe"] == "tiny"
    assert one["finished"] is True
