"""The comparison of systems: its figures, its JSON form and what is drawn of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from printed_tables import printed

from rlrag.errors import DataError
from rlrag.evaluation.baselines import UNTRAINED, Baseline
from rlrag.evaluation.choices import Choices
from rlrag.evaluation.significance import (
    bootstrap_ci,
    paired_randomization_ci,
    paired_randomization_test,
)
from rlrag.evaluation.table import EvaluationTable, SystemMetrics
from rlrag.evaluation.table import build_table as build


def metrics(em: list[float], **ranking: list[float]) -> SystemMetrics:
    values = np.array(em)
    arrays = {name: np.array(given) for name, given in ranking.items()}
    return SystemMetrics(em=values, f1=(values + 1) / 2, accuracy=values, **arrays)


SYSTEMS = {
    "no_retrieval": metrics([0.0, 0.0, 1.0, 0.0]),
    "retriever_order": metrics([1.0, 0.0, 0.0, 0.0], recall=[1, 0, 0, math.nan], ndcg=[1, 0, 0, 0]),
    "trained": metrics([1.0, 1.0, 1.0, 0.0], recall=[1, 1, 0, math.nan], ndcg=[math.nan] * 4),
}


CHOSEN = (Baseline("retriever_order", UNTRAINED, 2, 60),)


def build_table(systems: dict[str, SystemMetrics], *args: int, **keywords: int) -> EvaluationTable:
    """With the retriever's order as what the trained system is compared with."""
    return build(systems, *args, baselines=CHOSEN, **keywords)  # type: ignore[arg-type]


def test_figures_by_hand() -> None:
    table = build_table(SYSTEMS, num_selected=3, num_resamples=500)
    trained = table.systems["trained"]
    assert (trained.em, trained.f1, trained.accuracy) == (0.75, 0.875, 0.75)
    assert trained.recall == pytest.approx(2 / 3)
    assert trained.ndcg is None
    assert table.systems["retriever_order"].ndcg == 0.25
    assert table.systems["no_retrieval"].recall is None
    pair = table.paired["trained_vs_retriever_order"]
    assert (pair.em_diff, pair.f1_diff) == (0.5, 0.25)
    # Two differences of one sign: 2 of 4 sign patterns are as extreme.
    assert pair.p_value == pair.f1_p_value == 0.5


def test_intervals_and_tests_are_those_of_the_values() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = metrics(list(rng.random(40))), metrics(list(rng.random(40)))
    systems = {"trained": ours, "retriever_order": theirs}
    table = build_table(systems, num_selected=1, num_resamples=300, seed=9)
    assert table.systems["trained"].em_ci95 == bootstrap_ci(ours.em, 300, 9)
    assert table.systems["trained"].f1_ci95 == bootstrap_ci(ours.f1, 300, 9)
    pair = table.paired["trained_vs_retriever_order"]
    assert pair.ci95 == paired_randomization_ci(ours.em, theirs.em, 300, 9)
    assert pair.f1_ci95 == paired_randomization_ci(ours.f1, theirs.f1, 300, 9)
    assert pair.p_value == paired_randomization_test(ours.em, theirs.em, 300, 9)
    assert pair.f1_p_value == paired_randomization_test(ours.f1, theirs.f1, 300, 9)


def test_json_has_the_promised_keys_and_plain_values() -> None:
    found = build_table(SYSTEMS, num_selected=5, num_resamples=200).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"num_questions", "systems", "paired", "baselines"}
    assert found["num_questions"] == 4
    assert list(found["systems"]) == list(SYSTEMS)
    for system in found["systems"].values():
        assert set(system) == {
            "em",
            "f1",
            "accuracy",
            "recall@5",
            "ndcg@5",
            "em_ci95",
            "f1_ci95",
        }
    assert set(found["paired"]["trained_vs_retriever_order"]) == {
        "em_diff",
        "f1_diff",
        "accuracy_diff",
        "ci95",
        "f1_ci95",
        "accuracy_ci95",
        "p_value",
        "f1_p_value",
        "accuracy_p_value",
    }


def test_a_tuned_retriever_is_compared_with_the_original_one() -> None:
    systems = {
        "original_retriever": SYSTEMS["retriever_order"],
        "tuned_retriever": SYSTEMS["trained"],
    }
    paired = build_table(systems, num_selected=1, num_resamples=300, seed=9).paired
    assert list(paired) == ["tuned_retriever_vs_original_retriever"]
    ours, theirs = systems["tuned_retriever"].accuracy, systems["original_retriever"].accuracy
    [pair] = paired.values()
    assert pair.accuracy_diff == np.mean(ours) - np.mean(theirs)
    assert pair.accuracy_ci95 == paired_randomization_ci(ours, theirs, 300, 9)
    assert pair.accuracy_p_value == paired_randomization_test(ours, theirs, 300, 9)


def test_without_the_two_systems_there_is_no_comparison() -> None:
    table = build_table({"oracle": SYSTEMS["trained"]}, num_selected=1, num_resamples=200)
    assert table.to_json()["paired"] == {}
    assert "minus" not in printed(table)


def test_the_table_says_what_was_measured_of_each_system() -> None:
    text = printed(build_table(SYSTEMS, num_selected=3, num_resamples=200))
    [trained] = [line for line in text.splitlines() if line.startswith("trained  ")]
    cells = [cell for cell in trained.split() if not cell.startswith("(")]
    assert cells == ["trained", ".750", ".875", ".750", ".667", "-"]
    assert "EM +0.500" in text
    assert "p = 0.5" in text
    assert "4 questions" in text


def test_the_drawn_table_fits_a_terminal_without_folding() -> None:
    table = build_table(SYSTEMS, num_selected=10, num_resamples=200)
    lines = printed(table, width=80).splitlines()
    assert sum(line.startswith(tuple(SYSTEMS)) for line in lines) == 3
    assert len(lines) == 1 + 2 + 3 + 5  # the comparison's name takes two lines
    assert not any("…" in line for line in lines)


def test_the_comparison_says_why_it_is_made_and_what_was_picked() -> None:
    choices = Choices.of([(1, 0)] * 30, 5, 2)
    table = build(SYSTEMS, 2, 200, baselines=CHOSEN, choices=choices)
    text = " ".join(printed(table).split())
    assert (
        "trained minus retriever_order, the strongest untrained system on 60 validation questions"
        in text
    )
    assert "other passages than the retriever's first 2 for 0 of 30 questions" in text
    assert "the policy picks positions (2, 1) for 30 of 30 questions: it has learned" in text
    found = table.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["baselines"][0]["system"] == "retriever_order"
    assert found["choices"]["num_other_order"] == 30
    assert "not a choice" in found["choices"]["constant"]


def test_the_longest_names_fit_a_terminal_without_folding() -> None:
    names = ("retriever_reversed", "tuned_generator_reversed", "trained")
    values = SYSTEMS["retriever_order"]
    table = build(dict.fromkeys(names, values), num_selected=2, num_resamples=200)
    lines = printed(table, width=80).splitlines()
    assert sum(line.startswith(names) and ")" in line for line in lines) == 3
    assert len(lines) == 1 + 2 + 3


def test_bad_input_is_refused() -> None:
    three = metrics([1.0, 0.0, 0.0])
    with pytest.raises(DataError, match="'three': 3"):
        build_table({**SYSTEMS, "three": three}, num_selected=1)
    with pytest.raises(DataError, match="no systems were evaluated"):
        build_table({}, num_selected=1)
    with pytest.raises(DataError, match="shape"):
        build_table({"none": metrics([])}, num_selected=1)
    with pytest.raises(DataError, match=r"values\[0\] is nan"):
        build_table({"nan": replace(three, em=np.array([math.nan, 1.0, 0.0]))}, num_selected=1)
    with pytest.raises(DataError, match="'short': ndcg has shape"):
        build_table({"short": metrics([1.0, 0.0], ndcg=[1.0])}, num_selected=1)
    with pytest.raises(DataError, match="'odd': accuracy"):
        build_table({"odd": replace(three, accuracy=np.full(3, math.inf))}, num_selected=1)
