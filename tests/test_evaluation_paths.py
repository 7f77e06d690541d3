"""What runs that look further are compared with and measured by, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hop_cases import Edges
from printed_tables import printed
from pydantic import ValidationError
from stand_ins import ReadingGenerator, WordPrompts

from rlrag.config import HOPS, EnvironmentConfig, EvaluationConfig, HopSettings, RunConfig
from rlrag.config.sections import EDGES, RetrievalConfig, SelectorConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.evaluation.hop_rules import hop_selections
from rlrag.evaluation.question_records import QuestionRecorder, questions_path, read_questions
from rlrag.evaluation.report.question_browser import pack
from rlrag.evaluation.systems import evaluate
from rlrag.pipeline import open_policy, open_reward
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateTable, Sources
from rlrag.selection.slot_features import EDGE_KINDS
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.validation import validate

PASSAGES = [
    Passage("mali", "Mali - Anthem", "To thee Mali"),
    Passage("peak", "Mali - Terrain", "the tallest peak is Hombori"),
    Passage("river", "Mali - Tallest peak", "a river"),
    Passage("far", "Chad - Terrain", "the tallest peak of Chad"),
]
DOCUMENT, SHARED = EDGE_KINDS.index("document"), EDGE_KINDS.index("shared")


class TitleEncoder:
    """One dimension: how many of the question's words a text has."""

    def encode(self, texts):
        return np.array(
            [[sum(word in text.lower() for word in ("tallest", "peak"))] for text in texts], "f4"
        )


def table(vectors: bool) -> CandidateTable:
    """One question, whose first hit is the anthem; only the graph leads to the peak."""
    question = Question(
        "q",
        "the tallest peak where the anthem is played",
        ("Hombori",),
        {"gold_ids": ["mali", "peak"]},
    )
    size = int(vectors)
    edges = {
        0: [(1, DOCUMENT, 1.0), (2, DOCUMENT, 1.0), (3, SHARED, 9.0)],
    }
    return CandidateTable(
        questions=(question,),
        corpus=MemoryCorpus(PASSAGES),
        rows_QN=np.array([[0, 3]]),
        scores_QNC=np.array([[[2.0], [1.0]]], dtype=np.float32),
        score_names=("bm25",),
        question_vectors_QD=np.ones((1, size), dtype=np.float32),
        passage_vectors_PD=np.array([[0.1], [0.9], [0.2], [5.0]], dtype=np.float32)[:, :size],
        sources=Sources(None, Edges(edges), TitleEncoder() if vectors else None),
    )


def ids(selections) -> list[str]:
    return [passage.id for passage in selections[0]]


def test_the_kinds_of_edges_that_settings_name_are_those_of_the_graph():
    assert EDGES == EDGE_KINDS


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("hop_text", ["mali", "peak", "river"]),  # .9 and .2
        ("hop_title", ["mali", "river", "peak"]),  # "Tallest peak" has 2 of its words, "Terrain" 0
        ("hop_both", ["mali", "river", "peak"]),  # .2 + 2 against .9 + 0
    ],
)
def test_hop_rules_take_the_likest_neighbours_of_the_first_passage(rule, found):
    assert ids(hop_selections(rule, table(vectors=True), ["document"], 3)) == found
    assert ids(hop_selections(rule, table(vectors=True), ["document"], 2)) == found[:2]
    assert ids(hop_selections(rule, table(vectors=True), ["linked"], 3)) == ["mali"]


def test_hop_rules_without_vectors_count_words():
    """Of tallest, peak, anthem and played the text of `peak` has two, its title none."""
    found = table(vectors=False)
    assert ids(hop_selections("hop_text", found, ["document"], 2)) == ["mali", "peak"]
    assert ids(hop_selections("hop_title", found, ["document"], 2)) == ["mali", "river"]
    every = hop_selections("hop_text", found, ["document", "shared"], 4)
    assert ids(every) == ["mali", "peak", "river", "far"]  # equal ones in the order of rows


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    hops = HopSettings(edges=("document",), num_revealed=2)
    return RunConfig(
        cache_dir=str(tmp_path),
        retrieval=RetrievalConfig(kind="bm25", encoder=None, num_candidates=2),
        environment=EnvironmentConfig(id=HOPS, num_selected=2, hops=hops),
        selector=SelectorConfig(kind="slots"),
    )


def test_runs_that_look_further_compare_with_rules_that_hop(config):
    assert config.systems == (
        "no_retrieval",
        "retriever_first",
        "retriever_reversed",
        "retriever_order",
        "hop_text",
        "hop_title",
        "hop_both",
        "trained",
        "gold_passages",
    )
    no_edges = config.environment.model_copy(update={"hops": HopSettings(edges=())})
    assert "hop_text" not in config.model_copy(update={"environment": no_edges}).systems


def test_a_rule_that_hops_needs_a_graph():
    with pytest.raises(ValidationError, match="asks for hop_text, which follows a passage graph"):
        RunConfig(evaluation=EvaluationConfig(systems=("hop_text", "trained")))


def evaluated(config: RunConfig, recorder: QuestionRecorder):
    found = table(vectors=False)
    answering = open_reward(config, ReadingGenerator(), WordPrompts())
    policy = open_policy(config, found)
    systems = ("no_retrieval", "retriever_order", "hop_text", "trained", "gold_passages")
    config = config.model_copy(update={"evaluation": EvaluationConfig(systems=systems)})
    return evaluate(config, policy, found, answering, keep=recorder.keep)


def test_gold_passages_picks_and_searches_are_counted(config):
    compared = evaluated(config, QuestionRecorder(2))
    found = compared.to_json()["systems"]
    assert {name: system["all_gold"] for name, system in found.items()} == {
        "no_retrieval": 0.0,
        "retriever_order": 0.0,
        "hop_text": 1.0,
        "trained": 1.0,  # untrained, it picks the first hit and what that leads to first
        "gold_passages": 1.0,
    }
    assert {name: system["picks"] for name, system in found.items()} == {
        "no_retrieval": 0.0,
        "retriever_order": 2.0,
        "hop_text": 2.0,
        "trained": 2.0,
        "gold_passages": 2.0,
    }
    assert {system["searches"] for system in found.values()} == {0.0}
    assert found["hop_text"]["tokens"] > found["no_retrieval"]["tokens"] > 0
    shown = printed(compared)
    assert "all gold" in shown
    assert "nDCG" not in shown


def test_records_and_report_have_the_path(config, tmp_path):
    recorder = QuestionRecorder(2)
    evaluated(config, recorder)
    path = questions_path(tmp_path / "evaluation.json")
    recorder.write(path, {"hashes": {}})
    (question,) = read_questions(path).questions
    turns = question.systems["trained"].path
    assert [(turn.action, turn.passage, turn.found) for turn in turns] == [
        ("start", None, ("mali", "far")),
        ("pick", "mali", ("peak", "river")),
        ("pick", "peak", ()),
    ]
    assert turns[0].query == question.question
    assert question.systems["hop_text"].path == ()
    assert question.systems["hop_text"].picked == ("mali", "peak")
    assert pack({"run": read_questions(path)})


def test_validation_tells_what_paths_do(config):
    found = table(vectors=False)
    answering = open_reward(config, ReadingGenerator(), WordPrompts())
    metrics = validate(
        config.environment, open_policy(config, found), found, answering, SingleWorker()
    )
    assert metrics["validation/picks"] == 2.0
    assert metrics["validation/searches"] == 0.0
    assert metrics["validation/all_gold"] == 1.0
    plain = replace(found, sources=None)
    selection = config.model_copy(
        update={
            "environment": EnvironmentConfig(num_selected=2),
            "selector": SelectorConfig(kind="features"),
        }
    )
    assert "validation/picks" not in validate(
        selection.environment, open_policy(selection, plain), plain, answering, SingleWorker()
    )
