"""What the trained system is compared with: chosen on held-back questions, and how that is told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation_systems import SAID, Tunable, run, three_questions

from rlrag.errors import DataError
from rlrag.evaluation.baselines import (
    FIXED_ORDER,
    UNTRAINED,
    Baseline,
    baselines_for,
    baselines_from_json,
    baselines_to_json,
    choose,
    contenders,
)
from rlrag.evaluation.systems import HeldBack
from rlrag.records import Question

ORDERS = ("retriever_order", "retriever_first", "retriever_reversed")
ASKED = ("no_retrieval", *ORDERS, "tuned_generator", "tuned_generator_reversed", "trained")


def values(em: list[float], f1: list[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    return np.array(em), np.array(em if f1 is None else f1)


def test_the_strongest_of_each_kind_is_chosen_by_the_first_measure_and_then_the_second() -> None:
    measured = {
        "retriever_order": values([1, 0, 0], [1, 0, 0]),
        "retriever_first": values([1, 1, 0], [1, 1, 0]),
        "retriever_reversed": values([0, 1, 1], [0.5, 1, 1]),
        "no_retrieval": values([0, 0, 0], [1, 1, 1]),
        "tuned_generator": values([1, 1, 1]),
        "tuned_generator_reversed": values([0, 0, 0]),
    }
    assert choose(measured, ASKED) == [
        Baseline("retriever_reversed", UNTRAINED, 4, 3),
        Baseline("tuned_generator", FIXED_ORDER, 2, 3),
    ]


def test_a_question_without_an_answer_counts_for_none_of_them() -> None:
    measured = {
        "retriever_order": values([1, 0, 0, np.nan]),
        "retriever_first": values([np.nan, 0, 1, 1]),
    }
    assert choose(measured, ORDERS) == [Baseline("retriever_first", UNTRAINED, 2, 2)]
    measured["retriever_first"] = values([np.nan] * 4)
    assert choose(measured, ORDERS) == []


def test_only_what_has_rivals_is_measured() -> None:
    assert contenders(ASKED) == set(ASKED) - {"trained"}
    assert contenders(("retriever_order", "tuned_generator", "trained")) == set()
    assert contenders(ORDERS) == set()


def test_what_was_not_chosen_is_told_so() -> None:
    chosen = Baseline("retriever_first", UNTRAINED, 4, 60)
    found = baselines_for(ASKED, [chosen])
    assert [(b.system, str(b)) for b in found] == [
        ("retriever_first", "the strongest untrained system on 60 validation questions"),
        (
            "tuned_generator",
            "fixed order with the trained generator, not chosen on held-back questions",
        ),
    ]
    [alone] = baselines_for(("retriever_reversed", "trained"), [chosen])
    assert (alone.system, str(alone)) == (
        "retriever_reversed",
        "the only untrained system of this table",
    )
    assert baselines_for(ORDERS, [chosen]) == ()


def test_the_choice_is_kept_for_later_evaluations() -> None:
    chosen = baselines_for(ASKED, [Baseline("retriever_first", UNTRAINED, 4, 60)])
    kept = json.loads(json.dumps({"baselines": baselines_to_json(chosen)}))
    assert baselines_from_json(kept) == chosen
    assert baselines_from_json({}) == ()
    with pytest.raises(DataError, match="baselines in the evaluation file are damaged"):
        baselines_from_json({"baselines": [{"name": "x"}]})


def test_held_back_questions_choose_what_the_trained_system_is_compared_with():
    """Test questions prefer the first passage, the held-back ones the last of the two."""
    table = three_questions()
    held_back = replace(
        table,
        questions=tuple(
            Question(f"v{q}", "which word is blue", (words[1],)) for q, words in enumerate(SAID)
        ),
    )
    generator = Tunable()
    asked = ("retriever_order", "retriever_first", "retriever_reversed", "trained", "oracle")
    found = run(table, *asked, num_selected=2, generator=generator, held_back=HeldBack(held_back))
    assert list(found.paired) == ["trained_vs_retriever_reversed"]
    assert found.baselines == (Baseline("retriever_reversed", UNTRAINED, 3, 3),)
    # Each of the three fixed choices reads both sets, the trained policy and the oracle one.
    assert len(generator.calls) == 3 * 2 + 2
    again = run(table, *asked, num_selected=2, baselines=found.baselines)
    assert list(again.paired) == ["trained_vs_retriever_reversed"]
    [unknown] = run(table, *asked, num_selected=2).baselines
    assert "not chosen on held-back questions" in str(unknown)


def test_a_trained_generator_is_also_compared_with_the_best_fixed_choice_behind_it():
    generator = Tunable()
    tuned = ("tuned_generator", "tuned_generator_first", "tuned_generator_reversed")
    table = three_questions()
    found = run(
        table,
        *("retriever_order", *tuned, "trained"),
        num_selected=2,
        generator=generator,
        tune_generator=generator.tune,
        held_back=HeldBack(table),
    )
    assert list(found.paired) == ["trained_vs_retriever_order", "trained_vs_tuned_generator"]
    texts = [call[0].count("it says") for call in generator.calls]
    assert texts == [2, 2, 2, 1, 1, 2, 2, 2]
    first = generator.calls[5][0].split(" | ")
    assert first[:2] == [f"it says {SAID[0][1]}", f"it says {SAID[0][0]}"]
