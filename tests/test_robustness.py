"""Changed contexts of a question, and what their changes do, by hand and by enumeration."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, DataError
from rlrag.evaluation.probe.robustness import (
    GoldContext,
    by_setting,
    gold_at_places,
    gold_questions,
    order_sensitivity,
    orders,
    shuffled,
)
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateTable

PASSAGES = [
    Passage("rome", "", "Rome is the capital of Italy."),
    Passage("paris", "", "Paris is the capital of France."),
    Passage("seine", "", "The Seine flows through Paris."),  # holds the answer, is not gold
    Passage("lyon", "", "Lyon lies on the Rhone."),
    Passage("nice", "", "Nice lies by the sea."),
]


def table(*questions: Question) -> CandidateTable:
    """Everyone's candidates are all passages in their order."""
    num = len(questions)
    return CandidateTable(
        questions=questions,
        corpus=MemoryCorpus(PASSAGES),
        rows_QN=np.tile(np.arange(len(PASSAGES)), (num, 1)),
        scores_QNC=np.zeros((num, len(PASSAGES), 1), dtype=np.float32),
        score_names=("bm25",),
        question_vectors_QD=np.zeros((num, 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((len(PASSAGES), 0), dtype=np.float32),
    )


def asks(name: str, *golden: str, gold_ids: tuple[str, ...] = ()) -> Question:
    return Question(name, "which capital?", golden, {"gold_ids": list(gold_ids)})


def ids(passages) -> list[str]:
    return [passage.id for passage in passages]


def test_distractors_are_candidates_that_say_nothing_of_the_answer():
    found = gold_questions(table(asks("q", "Paris", gold_ids=("paris",))), 3)
    (context,) = found.contexts
    assert context is not None
    assert ids(context.gold) == ["paris"]
    assert ids(context.distractors) == ["rome", "lyon", "nice"]
    assert found.rows == [0]
    assert found.left_out == {}


def test_gold_passages_come_from_the_corpus_in_the_order_named_each_once():
    few = table(asks("q", "Rhone", gold_ids=("lyon", "rome", "lyon")))
    few = CandidateTable(**{**vars(few), "rows_QN": np.array([[1, 2]])})
    (context,) = gold_questions(few, 2).contexts
    assert context is not None
    assert ids(context.gold) == ["lyon", "rome"]
    assert ids(context.distractors) == ["paris", "seine"]


def test_questions_without_known_gold_are_counted_by_the_reason():
    found = gold_questions(
        table(
            asks("no answer", gold_ids=("rome",)),
            asks("a blank answer", " ", gold_ids=("rome",)),
            asks("no gold", "Paris"),
            asks("gold elsewhere", "Oslo", gold_ids=("oslo",)),
            asks("half of the gold elsewhere", "Rome", gold_ids=("rome", "oslo")),
            asks("the answer is everywhere", "the", "is", "lies", "flows", gold_ids=("rome",)),
            asks("good", "Rome", gold_ids=("rome",)),
        ),
        num_distractors=4,
    )
    assert found.rows == [6]
    assert found.left_out == {
        "unanswerable": 2,
        "no_gold_named": 1,
        "gold_not_in_corpus": 2,
        "too_few_distractors": 1,
    }


def test_a_shuffle_is_decided_by_question_seed_and_ids():
    order = shuffled("q1", PASSAGES)
    assert sorted(ids(order)) == sorted(ids(PASSAGES))
    assert shuffled("q1", PASSAGES[::-1]) == order == shuffled("q1", PASSAGES, seed=0)
    others = [shuffled("q2", PASSAGES), shuffled("q1", PASSAGES, seed=1)]
    assert all(other != order for other in others)


def test_one_passage_more_leaves_the_order_of_the_others():
    for names in itertools.combinations(PASSAGES, 3):
        kept = [passage for passage in shuffled("q1", PASSAGES) if passage in names]
        assert list(shuffled("q1", names)) == kept
    twice, thrice = (shuffled("q1", PASSAGES[:1] * n + PASSAGES[1:]) for n in (2, 3))
    assert ids(thrice).count("rome") == 3
    assert [i for i in ids(thrice) if i != "rome"] == [i for i in ids(twice) if i != "rome"]


def test_shuffles_put_the_first_passage_everywhere():
    places = [ids(shuffled(f"q{n}", PASSAGES)).index("rome") for n in range(500)]
    counts = np.bincount(places, minlength=5)
    assert len(counts) == 5
    assert (abs(counts - 100) < 5 * np.sqrt(80)).all()  # binomial(500, 1/5), five deviations


def test_gold_takes_every_place_among_the_distractors():
    first, second, *others = PASSAGES
    context = GoldContext((second, first), tuple(others))
    assert [ids(passages) for passages in gold_at_places(context, 2)] == [
        ["paris", "rome", "seine", "lyon"],
        ["seine", "paris", "rome", "lyon"],
        ["seine", "lyon", "paris", "rome"],
    ]
    assert gold_at_places(context, 0) == [(second, first)]


@pytest.mark.parametrize("num_passages", [1, 2, 3, 4])
def test_all_orders_where_the_bound_allows_them(num_passages):
    found = orders(num_passages, max_orders=24)
    assert found[0] == tuple(range(num_passages))
    assert set(found) == set(itertools.permutations(range(num_passages)))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("max_orders", [2, 23, 119])
def test_drawn_orders_beyond_the_bound_are_distinct_and_repeat_with_the_seed(max_orders):
    found = orders(5, max_orders, seed=1)
    assert len(set(found)) == len(found) == max_orders
    assert found[0] == (0, 1, 2, 3, 4)
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in found)
    assert found == orders(5, max_orders, seed=1)
    assert found != orders(5, max_orders, seed=2)


def test_one_order_shows_no_sensitivity():
    with pytest.raises(ConfigError, match=r"max_orders is 1; .* compares at least 2"):
        orders(3, max_orders=1)
    with pytest.raises(DataError, match="at least two orders"):
        order_sensitivity(np.ones((4, 1)), np.ones((4, 1)))
    with pytest.raises(DataError, match=r"shape \(4, 2\) and f1 \(4, 3\)"):
        order_sensitivity(np.ones((4, 2)), np.ones((4, 3)))


def test_order_sensitivity_by_hand():
    right = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0]], dtype=float)
    f1 = np.array([[1, 1, 1], [0, 0.3, 0.6], [0.5, 1, 0.5]])
    found = order_sensitivity(right, f1)
    assert found["changes"].tolist() == [0, 0, 1]
    assert found["accuracy_mean"].tolist() == pytest.approx([1, 0, 1 / 3])
    assert found["f1_mean"].tolist() == pytest.approx([1, 0.3, 2 / 3])
    assert found["f1_spread"].tolist() == pytest.approx([statistics.pstdev(row) for row in f1])
    assert found["f1_range"].tolist() == pytest.approx([0, 0.6, 0.5])


def test_a_question_that_was_not_asked_in_all_orders_says_nothing_of_their_order():
    """Neither that its answer changes nor that it does not."""
    asked = np.array([[1, 0], [math.nan, math.nan]])
    found = order_sensitivity(asked, asked)
    assert found["changes"][0] == 1
    assert all(math.isnan(values[1]) for values in found.values())


def test_the_order_of_orders_does_not_matter():
    rng = np.random.default_rng(0)
    right, f1 = (rng.random((20, 6)) < 0.5).astype(float), rng.random((20, 6))
    turned = order_sensitivity(right[:, ::-1], f1[:, ::-1])
    for name, values in order_sensitivity(right, f1).items():
        assert values == pytest.approx(turned[name])


def test_settings_have_columns_and_a_change_and_keep_what_was_not_asked():
    nan = np.nan
    right = np.array([[1, 1, 0], [nan, nan, nan]])
    f1 = np.array([[1, 0.5, 0.25], [nan, nan, nan]])
    found = by_setting([0, 2, 4], right, f1)
    assert list(found) == [
        *("accuracy@0", "accuracy@2", "accuracy@4", "accuracy_change"),
        *("f1@0", "f1@2", "f1@4", "f1_change"),
    ]
    assert {name: values[0] for name, values in found.items()} == {
        "accuracy@0": 1,
        "accuracy@2": 1,
        "accuracy@4": 0,
        "accuracy_change": -1,
        "f1@0": 1,
        "f1@2": 0.5,
        "f1@4": 0.25,
        "f1_change": -0.75,
    }
    assert all(np.isnan(values[1]) for values in found.values())


@pytest.mark.parametrize("settings", [[], [1], [1, 2, 3]])
def test_every_setting_needs_its_column(settings):
    with pytest.raises(DataError, match="each one column per setting"):
        by_setting(settings, np.ones((4, 2)), np.ones((4, 2)))
