"""Built-in rewards by hand, and what each asks for."""

from __future__ import annotations

import pytest

from rlrag.errors import RewardError
from rlrag.records import Passage
from rlrag.rewards.builtin import BUILTIN_REWARDS
from rlrag.rewards.plugin import KEYWORDS, load_reward

PASSAGES = (
    Passage(id="p1", title="Niger", text="The capital is Niamey."),
    Passage(id="p2", title="Nigeria", text="The capital is Abuja."),
)
ROLLOUT = {
    "question": "What is the capital of Niger?",
    "answer": "Niamey, Niger",
    "golden_answers": ("Niamey", "Niamey City"),
    "selection": ("p1", "p2"),
    "passages": PASSAGES,
    "answer_logp": -6.0,
    "num_answer_tokens": 4,
    "metadata": {"gold_ids": ["p1", "p7", "p8", "p9"]},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exact_match", 0.0),
        ("token_f1", 2 / 3),
        ("answer_contained", 1.0),
        ("rouge_l", 2 / 3),
        ("answer_logp", -6.0),
        ("answer_logp_mean", -1.5),
        ("selection_contains_answer", 1.0),
        ("selection_recall", 0.25),
        ("selection_cost", -2.0),
    ],
)
def test_each_built_in_by_hand(name: str, value: float) -> None:
    reward = load_reward(name)
    assert reward.is_builtin
    assert reward.function(**{key: ROLLOUT[key] for key in reward.wants}) == pytest.approx(value)


def test_the_example_knows_every_keyword_and_the_cases_every_built_in() -> None:
    assert set(ROLLOUT) == set(KEYWORDS)
    assert len(BUILTIN_REWARDS) == 9


def test_only_what_needs_the_generator_asks_for_it() -> None:
    asks = {name: load_reward(name).wants for name in BUILTIN_REWARDS}
    answers = {name for name, wants in asks.items() if "answer" in wants}
    scores = {name for name, wants in asks.items() if "answer_logp" in wants}
    assert answers == {"exact_match", "token_f1", "answer_contained", "rouge_l"}
    assert scores == {"answer_logp", "answer_logp_mean"}


def test_picking_nothing() -> None:
    contains = BUILTIN_REWARDS["selection_contains_answer"]
    assert contains(passages=(), golden_answers=("Niamey",)) == 0.0
    assert contains(passages=(), golden_answers=()) == 1.0
    assert BUILTIN_REWARDS["selection_cost"](selection=()) == 0.0
    assert BUILTIN_REWARDS["selection_recall"](selection=(), metadata={"gold_ids": ["p"]}) == 0.0


def test_recall_without_gold_passages_is_an_error_not_a_number() -> None:
    with pytest.raises(RewardError, match="gold_ids"):
        BUILTIN_REWARDS["selection_recall"](selection=("p1",), metadata={})
