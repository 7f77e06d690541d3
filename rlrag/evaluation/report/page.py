"""Renders runs as one self-contained HTML page.

The page loads nothing: styles and figures are in it. It has one script, where there are questions
to look through, and its policy lets the browser run no other. All text that comes from a run is
escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlrag.evaluation.baselines import Baseline, baselines_from_json
from rlrag.evaluation.choices import Choices
from rlrag.evaluation.report import figures as report_figures
from rlrag.evaluation.report.paired_tests import PairedTest, between_runs, within_run
from rlrag.evaluation.report.question_browser import SCRIPT, question_browser
from rlrag.evaluation.report.run_record import RunRecord, differing_fields
from rlrag.evaluation.report.style import STYLE
from rlrag.evaluation.table import name_pair

_Row = Sequence[str]


def _hash(text: str) -> str:
    """How a page's policy names a style sheet or script that is in it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE = f"\n{STYLE}"
_POLICY = f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(SCRIPT)}"


def render_report(runs: Sequence[RunRecord]) -> str:
    """The page for one run, or for several that are compared."""
    names = [f"{run.config.recipe}, seed {run.config.seed}" for run in runs]
    title = f"Training report: {names[0] if len(runs) == 1 else f'{len(runs)} runs'}"
    sections = [
        _section("What was run", _overview(runs)),
        _section("Alarms", _alarms(runs)),
        _section("Result", _comparison(runs) + _results(runs)),
        _section("Questions", question_browser(runs)),
        _section("Stability", _figures(report_figures.stability(runs))),
        _section(
            "Convergence", _figures(report_figures.convergence(runs)) + _iteration_table(runs)
        ),
        _section("Variance against the number of samples", _samples_study(runs)),
        _section("Signal and policy", _figures(report_figures.signal(runs))),
        _section("Generator", _figures(report_figures.generator(runs))),
        _section("Retriever", _figures(report_figures.retriever(runs))),
        _section("Time and tokens", _figures(report_figures.cost(runs))),
        _section("Configuration", _configuration(runs)),
    ]
    missing = report_figures.not_recorded(runs)
    footer = f"Not recorded by any run: {', '.join(missing)}." if missing else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(sections)}"
        f'<p class="note">{escape(footer)}</p>\n</main>\n</body>\n</html>\n'
    )


def _overview(runs: Sequence[RunRecord]) -> str:
    headings = ("run", "recipe", "seed", "trains", "algorithm", "m", "K of n", "steps", "passes")
    rows = [
        (
            run.name,
            run.config.recipe,
            str(run.config.seed),
            ", ".join(run.config.algorithm.parts),
            run.algorithm,
            _count(run.num_samples),
            f"{run.config.environment.num_selected} of {run.config.retrieval.num_candidates}",
            f"{run.num_steps:,}",
            f"{run.epoch:.2f} of {run.num_epochs}",
            _duration(sum(run.phases().values())),
            f"{sum(run.tokens().values()):,.0f}",
            run.state,
        )
        for run in runs
    ]
    return _table((*headings, "time", "tokens", "state"), rows, prose=True)


def _alarms(runs: Sequence[RunRecord]) -> str:
    rows = [
        (run.name, str(alarm.step), alarm.name, alarm.text) for run in runs for alarm in run.alarms
    ]
    raised = "<p>No alarm was raised.</p>\n"
    if rows:
        raised = _table(("run", "step", "alarm", "what was seen and what to try"), rows, prose=True)
    failures = [
        (run.name, str(first), text) for run in runs for text, first in run.failures().items()
    ]
    if not failures:
        return raised
    heading = ("run", "first step", "why a reward could not be computed")
    return raised + _table(heading, failures, prose=True)


def _comparison(runs: Sequence[RunRecord]) -> str:
    """The trained system of every run, side by side; nothing for a single run."""
    if len(runs) < 2:
        return ""
    rows = []
    for run in runs:
        trained = run.system(run.main_system)
        rows.append(
            (
                run.name,
                str(run.config.seed),
                _count(run.num_samples),
                _with_interval(trained, "em"),
                _with_interval(trained, "f1"),
                f"{sum(run.tokens().values()):,.0f}",
            )
        )
    headings = ("run", "seed", "m", "EM (95 %)", "F1 (95 %)", "generator tokens of training")
    table = _table(headings, rows, "The trained system of each run")
    hashes = [(run.evaluation or {}).get("hashes", {}).get("questions") for run in runs]
    if len({found for found in hashes if found is not None}) > 1:
        table += (
            '<p class="warning">These runs were evaluated on different questions: their figures '
            "do not compare.</p>\n"
        )
    return table + _paired(
        between_runs(runs), "The trained systems of two runs on the same questions"
    )


def _results(runs: Sequence[RunRecord]) -> str:
    """The final table of every finished run, and which runs have none yet."""
    tables = [_result(run, run.evaluation) for run in runs if run.evaluation is not None]
    for state, said in (
        ("trained, not evaluated", "Trained, but not evaluated"),
        ("unfinished", "Unfinished, without a final evaluation"),
    ):
        without = [f"{r.name} (at step {r.num_steps:,})" for r in runs if r.state == state]
        if without:
            told = f"{said}: {', '.join(without)}."
            tables.append(f"<p>{escape(told)}</p>\n")
    return "".join(tables)


def _result(run: RunRecord, evaluation: Mapping[str, Any]) -> str:
    """The final table of one run with the paired test."""
    systems: Mapping[str, Mapping[str, Any]] = evaluation["systems"]
    ranked = [n for n in next(iter(systems.values()), {}) if n.startswith(("recall@", "ndcg@"))]
    has_reward = any("reward" in summary for summary in systems.values())
    rows = [
        (
            name,
            _with_interval(summary, "em"),
            _with_interval(summary, "f1"),
            *(_number(summary.get(measure)) for measure in ("accuracy", *ranked)),
            *([_with_interval(summary, "reward")] if has_reward else []),
        )
        for name, summary in systems.items()
    ]
    caption = f"{evaluation['num_questions']:,} questions"
    if "bundle_step" in evaluation:
        caption += f"; the trained system is that of step {evaluation['bundle_step']:,}"
    headings = ("system", "EM (95 %)", "F1 (95 %)", "accuracy", *ranked)
    headings = (*headings, "reward (95 %)") if has_reward else headings
    heading = f"<h3>{escape(run.name)}</h3>\n"
    tests = _paired(
        within_run(evaluation),
        "Differences on the same questions",
        baselines_from_json(evaluation),
    )
    return heading + _table(headings, rows, caption) + tests + _choices(evaluation)


def _choices(evaluation: Mapping[str, Any]) -> str:
    """What the trained policy picked; nothing where none was trained."""
    if "choices" not in evaluation:
        return ""
    choices = Choices.from_json(evaluation["choices"])
    told = "".join(f"<p>{escape(line)}.</p>\n" for line in choices.describe())
    return told + (
        f'<p class="warning">{escape(choices.constant)}.</p>\n' if choices.constant else ""
    )


def _paired(tests: Sequence[PairedTest], caption: str, baselines: Sequence[Baseline] = ()) -> str:
    """Differences on the same questions; nothing without any."""
    if not tests:
        return ""
    rows = [
        (
            name_pair(f"{test.ours}_vs_{test.theirs}", baselines),
            test.measure,
            f"{test.difference:+.3f} ({test.ci95[0]:+.3f} to {test.ci95[1]:+.3f})",
            f"{test.p_value:.2g}",
            f"{test.corrected_p_value:.2g}",
        )
        for test in tests
    ]
    headings = ("systems", "measure", "difference (95 %)", "p", f"p, Holm over {len(tests)}")
    return _table(headings, rows, caption)


def _iteration_table(runs: Sequence[RunRecord]) -> str:
    """EM and F1 after each pass; a pass is an iteration of the paper where it is refreshed so."""
    found = {run.name: {q.iteration: q for q in run.iterations()} for run in runs}
    numbers = sorted({number for by_number in found.values() for number in by_number})
    if not numbers:
        by_reward = any("validation/reward" in run.metric_names() for run in runs)
        return "" if by_reward else "<p>No run was validated.</p>\n"
    rows = [
        (name, *(f"{q.em:.3f} / {q.f1:.3f}" if (q := have.get(n)) else "-" for n in numbers))
        for name, have in found.items()
    ]
    caption = "Last validation EM / F1 within each pass over the training questions; 0 is untrained"
    return _table(("run", *map(str, numbers)), rows, caption)


def _samples_study(runs: Sequence[RunRecord]) -> str:
    """What the weights were like, of the runs that weighed selections; nothing without these."""
    runs = [run for run in runs if run.num_samples and run.mean("ess") is not None]
    if not runs:
        return ""
    rows = []
    for run in runs:
        statistics = run.weight_statistics()
        rows.append((run.name, _count(run.num_samples), *map(_number, statistics.values())))
    headings = ("run", "m", "ESS", "ESS / m", "weight entropy", "log-weight variance")
    table = _table(
        (*headings, "gradient norm", "its variance", "generator's gradient variance"),
        rows,
        "Weights and gradient, over all steps",
    )
    figures = report_figures.against_samples(runs)
    if not figures:
        return table + (
            f"<p>All runs here draw m = {_count(runs[0].num_samples)} samples a question. Give "
            "runs that differ in algorithm.num_samples to see how the weights vary with m.</p>\n"
        )
    free = {"seed", "algorithm.num_samples", "cache_dir", "recipe"}
    others = [name for name in differing_fields(runs) if name not in free]
    if others:
        table += (
            '<p class="warning">These runs also differ in '
            f"{escape(', '.join(others))}: m is not all that changes.</p>\n"
        )
    return _figures(figures) + table


def _configuration(runs: Sequence[RunRecord]) -> str:
    """What differs between the runs in the open, and everything behind a fold."""
    flat = [run.flat_config() for run in runs]
    headings = ("field", *(run.name for run in runs))

    def table(names: Sequence[str]) -> str:
        rows = [(name, *(_setting(leaves.get(name)) for leaves in flat)) for name in names]
        return _table(headings, rows, prose=True)

    different = differing_fields(runs)
    shown = f"<p>The runs differ in:</p>\n{table(different)}" if different else ""
    names = list(dict.fromkeys(name for leaves in flat for name in leaves))
    return f"{shown}<details>\n<summary>All settings</summary>\n{table(names)}</details>\n"


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def _figures(content: str) -> str:
    return f'<div class="figures">\n{content}</div>\n' if content else ""


def _table(headings: _Row, rows: Sequence[_Row], caption: str = "", prose: bool = False) -> str:
    """An HTML table; columns after the first are set as figures unless they hold prose."""
    kind = ' class="prose"' if prose else ""
    named = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table{kind}>\n{named}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _with_interval(summary: Mapping[str, Any] | None, measure: str) -> str:
    if summary is None or summary.get(measure) is None:
        return "-"
    low, high = summary[f"{measure}_ci95"]
    return f"{summary[measure]:.3f} ({low:.3f} to {high:.3f})"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    """Three decimals, or more where these would hide a small value."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def _setting(value: Any) -> str:
    """A configured value as it stands in config.json, so that line breaks can be seen."""
    return json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"
