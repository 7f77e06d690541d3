"""Each system's picks and metrics on questions small enough to answer by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import episodes
import numpy as np
import pytest
import torch
from printed_tables import printed
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import (
    EnvironmentConfig,
    EvaluationConfig,
    OpenRAGConfig,
    RetrievalConfig,
    RunConfig,
)
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, GenerationError
from rlrag.evaluation.systems import evaluate
from rlrag.evaluation.table import EvaluationTable
from rlrag.pipeline import open_policy, open_reward
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateBatch, CandidateTable
from rlrag.rewards.answer_match import exact_match
from rlrag.selection.plackett_luce import PlackettLucePolicy

# The generator repeats the last word of the first passage or, without one, of the question.
SAID = [["wrong", "paris", "rome"], ["lima", "wrong", "peru"], ["red", "green", "blue"]]
GOLDEN = [("paris",), ("lima",), ("blue sky",)]
GOLD_IDS = [["p0-1"], ["p1-0", "p1-2"], []]


class LastFirst(torch.nn.Module):
    """Prefers the retriever's last candidate, then the one before."""

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        num_candidates = batch.scores_BNC.shape[1]
        return torch.arange(num_candidates, dtype=torch.float32).expand(len(batch), -1)


class Listening(ReadingGenerator):
    """Keeps the texts of the prompts of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []

    def generate(self, prompts, sampling):
        self.calls.append([prompt.text for prompt in prompts])
        return super().generate(prompts, sampling)


OPENRAG = OpenRAGConfig()


def three_questions() -> CandidateTable:
    passages = [
        Passage(f"p{q}-{n}", "", f"it says {word}")
        for q, words in enumerate(SAID)
        for n, word in enumerate(words)
    ]
    return CandidateTable(
        questions=tuple(
            Question(f"q{q}", "which word is blue", answers, {"gold_ids": gold} if gold else {})
            for q, (answers, gold) in enumerate(zip(GOLDEN, GOLD_IDS, strict=True))
        ),
        corpus=MemoryCorpus(passages),
        rows_QN=np.arange(9).reshape(3, 3),
        scores_QNC=np.tile(np.array([3.0, 2.0, 1.0], dtype=np.float32)[:, None], (3, 1, 1)),
        score_names=("bm25",),
        question_vectors_QD=np.zeros((3, 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((9, 0), dtype=np.float32),
    )


def run(
    table: CandidateTable,
    *systems: str,
    num_selected: int = 1,
    seed: int = 0,
    generator: ReadingGenerator | None = None,
    progress=lambda name: None,
    tune_generator=lambda: None,
    retrievers=MappingProxyType({}),
    algorithm=OPENRAG,  # so that every system may be asked for
    **more,
) -> EvaluationTable:
    config = RunConfig(
        seed=seed,
        retrieval=RetrievalConfig(kind="dense"),
        environment=EnvironmentConfig(num_selected=num_selected),
        algorithm=algorithm,
        evaluation=EvaluationConfig(systems=systems),
    )
    reward = open_reward(config, generator or ReadingGenerator(), WordPrompts())
    policy = PlackettLucePolicy(LastFirst(), num_selected)
    return evaluate(config, policy, table, reward, progress, tune_generator, retrievers, **more)


@pytest.mark.parametrize(
    ("system", "em", "f1"),
    [
        ("no_retrieval", 0, 2 / 9),  # blue, three times; F1 of "blue" against "blue sky" is 2/3
        ("retriever_order", 1 / 3, 1 / 3),  # wrong, lima, red
        ("trained", 0, 2 / 9),  # rome, peru, blue
        ("oracle", 2 / 3, 8 / 9),  # paris, lima, blue
    ],
)
def test_answers_of_a_system_by_hand(system, em, f1):
    found = run(three_questions(), system).systems[system]
    assert found.em == pytest.approx(em)
    assert found.f1 == pytest.approx(f1)
    assert found.accuracy == pytest.approx(em)


@pytest.mark.parametrize(
    ("system", "num_selected", "recall", "ndcg"),
    [
        ("retriever_order", 1, (0 + 1 / 2) / 2, (0 + 1) / 2),
        ("trained", 1, (0 + 1 / 2) / 2, (0 + 1) / 2),
        ("trained", 2, (1 + 1 / 2) / 2, (1 / math.log2(3) + 1 / (1 + 1 / math.log2(3))) / 2),
        ("retriever_first", 2, (0 + 1 / 2) / 2, (0 + 1 / (1 + 1 / math.log2(3))) / 2),
        ("random_order", 3, 1.0, None),
    ],
)
def test_ranking_is_measured_over_the_questions_that_name_gold_passages(
    system, num_selected, recall, ndcg
):
    found = run(three_questions(), system, num_selected=num_selected).systems[system]
    assert found.recall == pytest.approx(recall)
    if ndcg is not None:
        assert found.ndcg == pytest.approx(ndcg)


def test_without_any_gold_passages_there_is_no_ranking_measure():
    table = three_questions()
    unnamed = tuple(Question(q.id, q.question, q.golden_answers) for q in table.questions)
    bare = CandidateTable(**{**vars(table), "questions": unnamed})
    found = run(bare, "retriever_order").systems["retriever_order"]
    assert found.recall is found.ndcg is None


def test_systems_that_rank_nothing_have_no_ranking_measure():
    systems = run(three_questions(), "no_retrieval", "oracle").systems
    assert all(found.recall is None and found.ndcg is None for found in systems.values())


def test_the_generator_reads_what_each_system_picked():
    generator, names = Listening(), []
    run(
        three_questions(),
        "no_retrieval",
        "retriever_order",
        "trained",
        "oracle",
        num_selected=2,
        generator=generator,
        progress=names.append,
    )
    question = "which word is blue"
    assert names == ["no_retrieval", "retriever_order", "oracle", "trained"]
    assert generator.calls == [
        [question] * 3,
        [f"it says {w[0]} | it says {w[1]} | {question}" for w in SAID],
        [f"it says {word} | {question}" for words in SAID for word in words],
        [f"it says {w[2]} | it says {w[1]} | {question}" for w in SAID],
    ]


def test_random_picks_are_distinct_candidates_of_the_question_and_depend_on_the_seed():
    table = make_table(40)
    read = []
    for seed in (0, 0, 1):
        generator = Listening()
        run(table, "random_order", num_selected=2, seed=seed, generator=generator)
        read.append(generator.calls[0])
    assert read[0] == read[1] != read[2]
    places = []
    for row, text in enumerate(read[0]):
        first, second, _ = text.split(" | ")
        offered = [passage.contents for passage in table.passages(row)]
        places.append((offered.index(first), offered.index(second)))
    assert all(one != two for one, two in places)
    assert {one for one, _ in places} == {two for _, two in places} == set(range(5))


def test_the_oracle_is_the_best_single_candidate_of_each_question():
    table = make_table(30)
    words = [[p.text.split()[-1] for p in table.passages(row)] for row in range(30)]
    right = np.array(
        [
            [exact_match(word, question.golden_answers) for word in offered]
            for question, offered in zip(table.questions, words, strict=True)
        ]
    )
    systems = run(table, "random_order", "retriever_order", "trained", "oracle").systems
    assert systems["oracle"].em == right.max(axis=1).mean() == 1.0
    assert systems["retriever_order"].em == pytest.approx(right[:, 0].mean())
    assert systems["trained"].em == pytest.approx(right[:, -1].mean())
    assert all(found.em <= systems["oracle"].em for found in systems.values())
    assert all(found.f1 <= systems["oracle"].f1 for found in systems.values())


def test_the_oracle_cannot_find_what_no_candidate_says():
    table = three_questions()
    hopeless = tuple(Question(q.id, q.question, ("atlantis",)) for q in table.questions)
    found = run(CandidateTable(**{**vars(table), "questions": hopeless}), "oracle")
    assert found.systems["oracle"].em == found.systems["oracle"].f1 == 0.0


def test_the_paired_test_needs_both_of_its_systems():
    assert run(three_questions(), "trained", "oracle").paired == {}
    paired = run(three_questions(), "retriever_order", "trained").paired
    assert list(paired) == ["trained_vs_retriever_order"]
    assert paired["trained_vs_retriever_order"].em_diff == pytest.approx(-1 / 3)


@pytest.mark.parametrize("num_questions", [1, 64, 65, 130])
def test_greedy_picks_do_not_depend_on_batches(small_config, num_questions):
    table = make_table(num_questions)
    policy = open_policy(small_config, table)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    picks = episodes.picks(policy, table)
    assert picks.shape == (num_questions, 1)
    one_by_one = [episodes.greedy(policy, table.batch([row]))[0] for row in range(num_questions)]
    assert picks.tolist() == np.stack(one_by_one).tolist()


def test_an_untrained_policy_is_the_retriever(small_config):
    picks = episodes.picks(open_policy(small_config, make_table(20)), make_table(20))
    assert picks.tolist() == [[0]] * 20


class Tunable(Listening):
    """Says the first word of the first passage once it was tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.tuned, self.events = False, []

    def tune(self) -> None:
        self.tuned = True
        self.events.append("tune")

    def generate(self, prompts, sampling):
        answers = super().generate(prompts, sampling)
        return [replace(a, text="tuned") for a in answers] if self.tuned else answers


def test_what_the_trained_generator_answers_comes_last_in_the_order_that_was_asked():
    """The untrained generator answers for the trained selector; the table keeps its order."""
    generator = Tunable()
    asked = (
        *("trained", "no_retrieval", "tuned_generator", "tuned_selector"),
        *("oracle", "retriever_order"),
    )
    table = run(
        three_questions(),
        *asked,
        generator=generator,
        progress=generator.events.append,
        tune_generator=generator.tune,
    )
    assert generator.events == [
        *("no_retrieval", "tuned_selector", "oracle", "retriever_order"),
        *("tune", "trained", "tuned_generator"),
    ]
    assert tuple(table.systems) == asked


def test_tuned_systems_differ_in_who_picks_and_who_answers():
    """The policy prefers the last candidate: rome, peru, blue; the retriever wrong, lima, red."""
    golden = (("rome",), ("peru",), ("tuned",))
    table = three_questions()
    questions = tuple(
        Question(q.id, q.question, answers)
        for q, answers in zip(table.questions, golden, strict=True)
    )
    table = CandidateTable(**{**vars(table), "questions": questions})
    generator = Tunable()
    found = run(
        table,
        *("retriever_order", "tuned_selector", "tuned_generator", "trained"),
        generator=generator,
        tune_generator=generator.tune,
    ).systems
    first, last = ([f"it says {words[n]} | which word is blue" for words in SAID] for n in (0, 2))
    assert generator.calls == [first, last, first, last]
    assert {name: metrics.em for name, metrics in found.items()} == pytest.approx(
        {
            "retriever_order": 0,
            "tuned_selector": 2 / 3,
            "tuned_generator": 1 / 3,
            "trained": 1 / 3,
        }
    )


@pytest.mark.parametrize(
    ("systems", "times"),
    [
        (("no_retrieval", "retriever_order", "tuned_selector", "oracle"), 0),
        (("trained",), 1),
        (("tuned_generator",), 1),
        (("tuned_generator", "random_order", "trained"), 1),
    ],
)
def test_the_generator_is_tuned_once_and_only_where_it_is_asked(systems, times):
    generator = Tunable()
    run(three_questions(), *systems, generator=generator, tune_generator=generator.tune)
    assert generator.events == ["tune"] * times


class Fetched:
    """Tables of other retrievers by system; counts how often each was asked for."""

    def __init__(self, **orders: tuple[int, int, int]) -> None:
        table, self.times = three_questions(), dict.fromkeys(orders, 0)
        self._tables = {
            name: replace(table, rows_QN=table.rows_QN[:, list(order)])
            for name, order in orders.items()
        }
        self.systems = {name: partial(self._fetch, name) for name in orders}

    def _fetch(self, name: str) -> CandidateTable:
        self.times[name] += 1
        return self._tables[name]


def test_a_retriever_is_the_first_of_its_own_candidates_in_its_own_order():
    """Candidates 0, 1, 2 say wrong paris rome, lima wrong peru, red green blue."""
    fetched = Fetched(bm25=(1, 0, 2), tuned_retriever=(2, 1, 0))
    generator = Listening()
    found = run(
        three_questions(),
        *("bm25", "retriever_order", "tuned_retriever"),
        num_selected=2,
        generator=generator,
        retrievers=fetched.systems,
    ).systems
    question = "which word is blue"
    assert generator.calls == [
        [f"it says {w[i]} | it says {w[j]} | {question}" for w in SAID]
        for i, j in ((1, 0), (0, 1), (2, 1))
    ]
    assert found["bm25"].em == pytest.approx(1 / 3)  # paris, wrong, green
    assert found["bm25"].recall == pytest.approx((1 + 1 / 2) / 2)
    assert found["tuned_retriever"].ndcg == pytest.approx(
        (1 / math.log2(3) + 1 / (1 + 1 / math.log2(3))) / 2
    )


def test_what_is_trained_picks_from_what_the_tuned_retriever_finds():
    """The policy prefers the last: of the tuned table, whose order is turned, it is the first."""
    asked = ("tuned_selector", "trained", "oracle")
    for orders, last in (({"tuned_retriever": (2, 1, 0), "bm25": (0, 1, 2)}, 0), ({}, 2)):
        generator = Listening()
        run(three_questions(), *asked, generator=generator, retrievers=Fetched(**orders).systems)
        picked, _, by_trained = generator.calls
        assert picked == [f"it says {w[2]} | which word is blue" for w in SAID]
        assert by_trained == [f"it says {w[last]} | which word is blue" for w in SAID]


def test_tables_are_fetched_only_when_their_turn_comes():
    fetched = Fetched(bm25=(0, 1, 2), dense=(0, 1, 2), tuned_retriever=(0, 1, 2))
    seen = []
    run(
        three_questions(),
        *("retriever_order", "tuned_retriever", "dense"),
        retrievers=fetched.systems,
        progress=lambda name: seen.append((name, dict(fetched.times))),
    )
    none = {"bm25": 0, "dense": 0, "tuned_retriever": 0}
    assert seen == [
        ("retriever_order", none),
        ("tuned_retriever", none),
        ("dense", none | {"tuned_retriever": 1}),
    ]
    assert fetched.times == {"bm25": 0, "dense": 1, "tuned_retriever": 1}


def test_retrievers_that_are_missing_are_named_before_anything_is_answered():
    generator = Listening()
    with pytest.raises(ConfigError, match=r"asks for dense, tuned_retriever, but .*leave it out"):
        run(
            three_questions(),
            *("retriever_order", "dense", "bm25", "tuned_retriever"),
            generator=generator,
            retrievers=Fetched(bm25=(0, 1, 2)).systems,
        )
    assert generator.calls == []


def test_the_tuned_retriever_is_compared_with_the_original():
    fetched = Fetched(original_retriever=(0, 1, 2), tuned_retriever=(1, 0, 2))
    table = run(
        three_questions(),
        *("original_retriever", "tuned_retriever"),
        retrievers=fetched.systems,
    )
    assert list(table.paired) == ["tuned_retriever_vs_original_retriever"]
    pair = table.paired["tuned_retriever_vs_original_retriever"]
    assert pair.accuracy_diff == pytest.approx(0.0)  # paris instead of lima


class Picky(ReadingGenerator):
    """Does not survive prompts with a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word

    def generate(self, prompts, sampling):
        answers = super().generate(prompts, sampling)
        return [
            GenerationError("the engine died") if self._word in prompt.text else answer
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def test_a_question_without_an_answer_counts_for_no_system_and_is_named():
    """`lima` is first in the retriever's order of the second question, and last in the policy's."""
    systems = ("no_retrieval", "retriever_order", "trained", "oracle")
    found = run(three_questions(), *systems, generator=Picky("lima"))
    assert found.num_questions == 2
    assert found.left_out == {"q1": "question 'q1': the engine died"}
    assert found.systems["retriever_order"].f1 == 0  # wrong, red
    assert found.systems["no_retrieval"].f1 == pytest.approx((0 + 2 / 3) / 2)
    assert found.systems["trained"].recall == pytest.approx(0)
    assert found.systems["oracle"].em == pytest.approx(1 / 2)  # paris, blue
    assert found.to_json()["left_out"] == dict(found.left_out)
    assert "left out question 'q1'" in printed(found)
    assert "left_out" not in run(three_questions(), "oracle").to_json()


def test_the_oracle_does_without_a_candidate_that_led_to_no_answer():
    found = run(three_questions(), "oracle", generator=Picky("paris"))
    assert found.left_out == {}
    assert found.systems["oracle"].em == pytest.approx(1 / 3)  # lima
    with pytest.raises(GenerationError, match="the engine died"):
        run(three_questions(), "oracle", generator=Picky("says"))
