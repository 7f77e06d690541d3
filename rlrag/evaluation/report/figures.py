"""The charts of a report.

The DRO paper (arXiv 2505.03075) studies stability (section 5 and figure 4), convergence (table 3)
and the number of samples m (figure 6). Runs are overlaid, each in its own colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlrag.evaluation.report.charts import NEUTRAL, Series, line_chart, stacked_bars
from rlrag.evaluation.report.run_record import RunRecord

Panel = tuple[str, str]
"""A metric's name and the title of its figure, with the unit."""

STABILITY: tuple[Panel, ...] = (
    ("reward", "Reward of the drawn selections"),
    ("ess", "Effective sample size, from 1 to m"),
    ("weight_entropy", "Entropy of the weights (nats)"),
    ("log_weight_variance", "Variance of the log-weights within a question"),
)
SIGNAL: tuple[Panel, ...] = (
    ("zero_signal_share", "Share of questions with equal rewards"),
    ("duplicate_share", "Share of selections drawn before for their question"),
    ("policy_entropy", "Entropy of the policy (nats)"),
    ("kl_to_initial", "KL of the policy to the untrained one (nats)"),
    ("loss", "Selector loss"),
    ("grad_norm", "Norm of the selector's gradient"),
    ("staleness", "Staleness (versions behind the newest weights)"),
    ("num_failed", "Selections whose reward could not be computed"),
    ("validation/changed_share", "Share of validation questions whose selection changed"),
)
GENERATOR: tuple[Panel, ...] = (
    ("generator/loss", "Generator loss"),
    ("generator/grad_norm", "Norm of the generator's gradient"),
    ("generator/grad_variance", "Variance of the generator's gradient over micro-batches"),
    ("generator/mean_answer_logp", "Log-probability of the golden answers (nats)"),
    ("validation/answer_words", "Words in a validation answer"),
)
RETRIEVER: tuple[Panel, ...] = (
    ("retriever/loss", "Retriever loss"),
    ("retriever/accuracy", "Share of questions whose positive ranks first in the batch"),
    ("retriever/score_gap", "Score of the positive above that of the negative"),
    ("retriever/grad_norm", "Norm of the retriever's gradient"),
    ("validation/recall", "Validation recall of the passages shown"),
    ("num_walked", "Passages met on the walks of a batch"),
    ("online_positives", "Positives of a batch that were found online"),
    ("online_negatives", "Negatives of a batch that were found online"),
    ("index_age", "Age of the index (steps)"),
)
JSA: tuple[Panel, ...] = (
    ("retriever/loss", "Loss of both retrievers"),
    ("retriever/grad_norm", "Norm of the retrievers' gradient"),
    ("validation/recall", "Validation recall of the passages shown"),
    ("jsa/acceptance", "Share of proposals that the chains accepted"),
    ("jsa/ess", "Effective sample size of a chain's proposals"),
    ("jsa/num_visited", "Different passages that a chain visited"),
    ("jsa/kl", "KL of the posterior retriever from the prior (nats)"),
    ("jsa/answer_logp", "Log-probability of the answer, by the passages' weights (nats)"),
)
COST: tuple[Panel, ...] = (
    ("rollouts_per_s", "Rollouts a second"),
    ("generator/tokens_per_s", "Tokens a second that the generator trained on"),
)
AGAINST_SAMPLES: tuple[Panel, ...] = (
    ("log_weight_variance", "Mean variance of the log-weights"),
    ("grad_norm_variance", "Variance of the gradient norm over steps"),
    ("generator_grad_variance", "Mean variance of the generator's gradient"),
    ("ess_share", "Mean effective sample size, as a share of m"),
)


def stability(runs: Sequence[RunRecord]) -> str:
    """Reward and weights at every step."""
    return _panels(runs, STABILITY)


def convergence(runs: Sequence[RunRecord]) -> str:
    """Validation quality against steps, and against passes over the training questions."""
    known = {name for run in runs for name in run.metric_names()}
    measures = [("validation/em", "Validation EM"), ("validation/f1", "Validation F1")]
    if "validation/accuracy" in known:
        measures.append(("validation/accuracy", "Validation accuracy (golden answer contained)"))
    if "validation/reward" in known:
        measures.append(("validation/reward", "Validation reward"))
    return "".join(
        line_chart(f"{title} {by}", _overlaid(runs, name, against), label)
        for against, by, label in (
            ("step", "by step", "step"),
            ("epoch", "by pass over the questions", "passes over the training questions"),
        )
        for name, title in measures
    )


def against_samples(runs: Sequence[RunRecord]) -> str:
    """What the weights were like against m, for runs that differ in it; empty for a single m.

    One marked point a run; the line joins the means of the runs with the same m.
    """
    drawn = [(i, run, run.num_samples) for i, run in enumerate(runs) if run.num_samples]
    if len({m for _, _, m in drawn}) < 2:
        return ""
    figures = []
    for name, title in AGAINST_SAMPLES:
        found: dict[int, list[float]] = {}
        points = []
        for i, run, m in drawn:
            value = run.weight_statistics()[name]
            if value is not None:
                found.setdefault(m, []).append(value)
                points.append(Series(run.name, [(float(m), value)], i))
        means = [(float(m), sum(values) / len(values)) for m, values in sorted(found.items())]
        if not points:
            continue
        series = [Series("mean of each m", means, NEUTRAL), *points]
        figures.append(line_chart(title, series, "samples a question (m)"))
    return "".join(figures)


def signal(runs: Sequence[RunRecord]) -> str:
    """Whether there is something to learn from, and how far the policy has moved."""
    return _panels(runs, (*_reward_terms(runs), *SIGNAL))


def generator(runs: Sequence[RunRecord]) -> str:
    """How the generator trains and how long its answers are; empty where it is not trained."""
    return _panels(runs, GENERATOR)


def retriever(runs: Sequence[RunRecord]) -> str:
    """How the retriever trains and what walks or chains meet; empty where it is not trained."""
    return _panels(runs, _retriever_panels(runs))


def cost(runs: Sequence[RunRecord]) -> str:
    """Time, tokens and speed."""
    saved = [Series(run.name, _saved_share(run), i) for i, run in enumerate(runs)]
    return (
        stacked_bars("Time in each phase", {run.name: run.phases() for run in runs}, "s")
        + stacked_bars("Tokens of training", {run.name: run.tokens() for run in runs}, "tokens")
        + _panels(runs, COST)
        + line_chart("Share of tokens found in the generator's cache", saved, "step")
    )


def not_recorded(runs: Sequence[RunRecord]) -> list[str]:
    """Metrics that have a figure but that no run recorded."""
    known = {name for run in runs for name in run.metric_names()}
    of_retriever = _retriever_panels(runs)
    of_policy = (*STABILITY, *SIGNAL, *GENERATOR)
    if all(run.main_system == "tuned_retriever" for run in runs):
        of_policy = ()
    panels = (*of_policy, *of_retriever, *COST)
    return [name for name, _ in panels if name not in known]


def _retriever_panels(runs: Sequence[RunRecord]) -> tuple[Panel, ...]:
    """What runs that train a retriever record: by OpenRAG, by JSA, or some by each."""
    by_openrag = RETRIEVER if any(run.config.trains_by_openrag for run in runs) else ()
    by_jsa = JSA if any(run.config.algorithm.name == "jsa" for run in runs) else ()
    return tuple({**dict(by_jsa), **dict(by_openrag)}.items())


def _panels(runs: Sequence[RunRecord], panels: Sequence[Panel]) -> str:
    """A figure for each metric that some run recorded."""
    known = {name for run in runs for name in run.metric_names()}
    return "".join(
        line_chart(title, _overlaid(runs, name), "step") for name, title in panels if name in known
    )


def _overlaid(runs: Sequence[RunRecord], name: str, against: str = "step") -> list[Series]:
    return [Series(run.name, run.series(name, against), i) for i, run in enumerate(runs)]


def _reward_terms(runs: Sequence[RunRecord]) -> list[Panel]:
    """Terms of a reward that has several; a single one is the reward itself."""
    names = dict.fromkeys(name for run in runs for name in run.metric_names())
    terms = [name for name in names if name.startswith("reward/")]
    return [(n, f"Reward term {n.removeprefix('reward/')}") for n in terms] if terms[1:] else []


def _saved_share(run: RunRecord) -> list[tuple[float, float]]:
    spent, saved = (run.series(f"generator_tokens_{kind}") for kind in ("spent", "saved"))
    return [
        (step, kept / (new + kept) if new + kept else math.nan)
        for (step, new), (_, kept) in zip(spent, saved, strict=True)
    ]
