"""Ranking measures against pytrec_eval, hand-computed values and edges."""

from __future__ import annotations

import math

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from rlrag.errors import DataError
from rlrag.evaluation.ranking import ndcg_at_k, recall_at_k

IDS = [f"p{i}" for i in range(12)]
RANKINGS = st.lists(st.sampled_from(IDS), max_size=8, unique=True)
GOLD = st.sets(st.sampled_from(IDS), max_size=6)


def trec_eval(ranked: list[str], gold: set[str], k: int) -> dict[str, float]:
    # A question must stand in the judgements, so one passage judged not relevant always does.
    judged = {"never ranked": 0, **dict.fromkeys(gold, 1)}
    measures = {f"recall.{k}", f"ndcg_cut.{k}"}
    evaluator = pytrec_eval.RelevanceEvaluator({"q": judged}, measures)
    scores = {passage_id: float(-rank) for rank, passage_id in enumerate(ranked)}
    return evaluator.evaluate({"q": scores})["q"]


@given(RANKINGS.filter(bool), GOLD, st.integers(1, 10))
def test_agrees_with_trec_eval(ranked: list[str], gold: set[str], k: int) -> None:
    expected = trec_eval(ranked, gold, k)
    assert recall_at_k(ranked, gold, k) == pytest.approx(expected[f"recall_{k}"])
    assert ndcg_at_k(ranked, gold, k) == pytest.approx(expected[f"ndcg_cut_{k}"])


def test_by_hand() -> None:
    ranked, gold = ["a", "b", "c", "d"], {"b", "d", "x"}
    assert recall_at_k(ranked, gold, 2) == pytest.approx(1 / 3)
    assert recall_at_k(ranked, gold, 9) == pytest.approx(2 / 3)
    gained = 1 / math.log2(3) + 1 / math.log2(5)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert ndcg_at_k(ranked, gold, 4) == pytest.approx(gained / ideal)
    assert ndcg_at_k(ranked, gold, 2) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))


@given(RANKINGS, GOLD, st.integers(1, 10))
def test_the_best_order_has_ndcg_1_and_a_miss_0(ranked, gold, k) -> None:
    best = sorted(gold) + [passage_id for passage_id in ranked if passage_id not in gold]
    assert ndcg_at_k(best, gold, k) == pytest.approx(1.0 if gold else 0.0)
    missed = [passage_id for passage_id in ranked if passage_id not in gold]
    assert ndcg_at_k(missed, gold, k) == recall_at_k(missed, gold, k) == 0.0


def test_nothing_ranked_or_nothing_gold_gives_zero() -> None:
    for ranked, gold in (([], {"a"}), (["a"], set()), ([], set())):
        assert recall_at_k(ranked, gold, 3) == ndcg_at_k(ranked, gold, 3) == 0.0


def test_gold_ids_given_as_a_list_count_once() -> None:
    assert recall_at_k(["a"], ["a", "a"], 1) == ndcg_at_k(["a"], ["a", "a"], 3) == 1.0


@pytest.mark.parametrize("measure", [recall_at_k, ndcg_at_k])
def test_a_wrong_depth_or_a_passage_ranked_twice_is_refused(measure) -> None:
    with pytest.raises(DataError, match="k is 0"):
        measure(["a"], {"a"}, 0)
    with pytest.raises(DataError, match="'b' is ranked more than once"):
        measure(["a", "b", "b"], {"a"}, 1)
