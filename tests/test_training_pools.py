"""Pools of passages that help and that do not, against what is found by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from loop_runs import changed
from stand_ins import make_table

from rlrag.algorithms.rag_labels import Thresholds
from rlrag.config import OpenRAGConfig, RetrievalConfig, RunConfig, TrainingConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import CheckpointError, DataError, GenerationError, RewardError
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.training.openrag.offline_stage import describe_pools
from rlrag.training.openrag.passage_judge import Judgement
from rlrag.training.openrag.pools import (
    FAILED,
    Pools,
    filled_by_gold,
    gold_pools,
    judge_candidates,
    pools_source,
)

NAN = float("nan")
ROWS = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [2, 3, 4]])
# What the judge of these tests says of each candidate: right, wrong, or nothing.
SAID = [
    [(-1.0, True), (-3.0, False), (-0.5, True)],
    [(-4.0, False), (-5.0, False), (-2.0, False)],
    [(-1.0, False), None, (-2.0, True)],
    [(-1.0, True), (-1.0, True), (-6.0, True)],
]


def table(questions: tuple[Question, ...] | None = None, rows=ROWS) -> CandidateTable:
    questions = questions or tuple(
        Question(f"q{n}", f"what is {n}?", (f"a{n}",), {"type": "odd" if n % 2 else "even"})
        for n in range(4)
    )
    corpus = MemoryCorpus(Passage(f"p{n}", "", f"text {n}") for n in range(12))
    return CandidateTable(
        questions=questions,
        corpus=corpus,
        rows_QN=np.array(rows),
        scores_QNC=np.zeros((*np.shape(rows), 1), dtype=np.float32),
        score_names=("bm25",),
        question_vectors_QD=np.zeros((len(questions), 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((12, 0), dtype=np.float32),
    )


def scripted(questions, passages, with_labels):
    assert with_labels
    said = {
        (f"q{q}", f"p{row}"): SAID[q][n] for q in range(4) for n, row in enumerate(ROWS[q].tolist())
    }
    found = [said[q.id, p.id] for q, p in zip(questions, passages, strict=True)]
    return [RewardError("unreadable") if pair is None else Judgement(*pair) for pair in found]


@pytest.fixture
def pools() -> Pools:
    return judge_candidates(table(), scripted, "the source", max_failed_share=0.1)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(
        cache_dir=str(tmp_path / "cache"),
        retrieval=RetrievalConfig(kind="dense"),
        algorithm=OpenRAGConfig(num_offline=5),
        training=TrainingConfig(launcher="local", batch_size=4),
    )


def test_pools_by_hand(pools):
    assert pools.rows_QN.tolist() == ROWS.tolist()
    assert pools.labels_QN.tolist() == [[1, 0, 1], [0, 0, 0], [0, FAILED, 1], [1, 1, 1]]
    assert pools.usable.tolist() == [0, 2]
    assert pools.of_label(0, 1) == [0, 2]
    assert pools.of_label(0, 0) == [1]
    assert pools.of_label(2, 1) == [8]
    assert pools.of_label(3, 0) == []
    assert pools.known(2) == {6: 0, 8: 1}
    assert pools.known_logp(2) == {6: -1.0, 8: -2.0}
    assert pools.thresholds(0) == Thresholds(max_negative=-3.0, min_positive=-1.0)
    assert pools.thresholds(2) == Thresholds(max_negative=-1.0, min_positive=-2.0)
    assert pools.thresholds(1) == Thresholds(max_negative=-2.0, min_positive=-math.inf)


def test_the_auc_is_a_mean_over_questions_with_both_labels(pools):
    """Question 0 ranks both pairs right, question 2 its only one wrong; the others have none."""
    assert pools.auc_of(np.arange(4)) == 0.5
    assert pools.auc_of(np.array([0, 1])) == 1.0
    assert pools.auc_of(np.array([2])) == 0.0
    assert math.isnan(pools.auc_of(np.array([1, 3])))


def test_the_description_by_question_type_by_hand(pools):
    found = describe_pools(pools, table().questions)
    assert list(found) == ["all", "even", "odd"]
    assert found["even"] == {
        "num_questions": 2,
        "num_left_out": 0,
        "num_usable": 2,
        "num_without_positive": 0,
        "num_without_negative": 0,
        "num_failed": 1,
        "positive_share": pytest.approx(3 / 6),
        "first_is_positive": 0.5,
        "best_score_is_positive": 0.5,
        "auc": 0.5,
    }
    assert found["odd"] == {
        "num_questions": 2,
        "num_left_out": 0,
        "num_usable": 0,
        "num_without_positive": 1,
        "num_without_negative": 1,
        "num_failed": 0,
        "positive_share": 0.5,
        "first_is_positive": 0.5,
        "best_score_is_positive": 0.5,
        "auc": None,
    }
    assert found["all"]["num_questions"] == 4
    assert found["all"]["num_usable"] == 2
    assert found["all"]["auc"] == 0.5


def test_a_label_without_a_score_is_known_and_its_score_is_not():
    """As labels from rewarded selections are; thresholds and areas leave it out."""
    known = {"q0": {0: 1, 1: 0}, "q1": {4: 1}, "elsewhere": {3: 1}}
    asked = []

    def judge(questions, passages, with_labels):
        asked.extend((q.id, p.id) for q, p in zip(questions, passages, strict=True))
        return scripted(questions, passages, with_labels)

    found = judge_candidates(table(), judge, "s", 0.1, known)
    assert len(asked) == 12 - 3
    assert not {("q0", "p0"), ("q0", "p1"), ("q1", "p4")} & set(asked)
    assert found.labels_QN.tolist() == [[1, 0, 1], [0, 1, 0], [0, FAILED, 1], [1, 1, 1]]
    assert found.known(0) == {0: 1, 1: 0, 2: 1}
    assert found.known_logp(0) == {2: -0.5}
    assert found.known_logp(1) == {3: -4.0, 5: -2.0}
    assert found.thresholds(0) == Thresholds(max_negative=math.inf, min_positive=-0.5)
    assert math.isnan(found.auc_of(np.array([0, 1])))
    assert found.usable.tolist() == [0, 1, 2]


def test_questions_without_a_type_are_others(pools):
    untyped = tuple(Question(q.id, q.question, q.golden_answers) for q in table().questions)
    found = describe_pools(pools, untyped)
    assert list(found) == ["all", "other"]
    assert found["all"] == found["other"]


def test_what_is_saved_loads_back_equal(pools, tmp_path):
    pools = replace(pools, num_tokens=12, seconds=3.5, prompts={"prompt_cut_share": 0.25})
    assert pools.failures == ("unreadable",)
    pools.save(tmp_path / "pools", {"all": {"auc": 0.5}})
    found = Pools.load(tmp_path / "pools", "the source")
    asked = (found.num_tokens, found.seconds, found.failures, found.prompts)
    assert asked == (pools.num_tokens, pools.seconds, pools.failures, pools.prompts)
    for name in ("rows_QN", "labels_QN", "logp_QN"):
        before, after = getattr(pools, name), getattr(found, name)
        assert before.dtype == after.dtype
        assert np.array_equal(before, after, equal_nan=True)
    assert found.source == "the source"
    assert found.usable.tolist() == [0, 2]
    assert json.loads((tmp_path / "pools" / "summary.json").read_text()) == {"all": {"auc": 0.5}}
    assert Pools.load(tmp_path / "none", "the source") is None


def test_pools_of_another_version_are_named(pools, tmp_path, monkeypatch):
    pools.save(tmp_path / "pools", {})
    older = {"source": "the source", "num_tokens": 1}
    monkeypatch.setattr("rlrag.training.openrag.pools.json.loads", lambda text: older)
    monkeypatch.setattr("rlrag.training.openrag.pools.check_whole", lambda directory: None)
    with pytest.raises(CheckpointError, match="written by another version of rlrag; delete it"):
        Pools.load(tmp_path / "pools", "the source")


@pytest.mark.parametrize("name", ["pools.safetensors", "source.json", "summary.json"])
def test_a_damaged_file_is_refused_by_name(pools, tmp_path, name):
    pools.save(tmp_path / "pools", {})
    path = tmp_path / "pools" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=rf"pools/{name} is missing, truncated.*delete"):
        Pools.load(tmp_path / "pools", "the source")


def test_another_source_is_refused_with_the_way_out(pools, tmp_path):
    pools.save(tmp_path / "pools", {})
    with pytest.raises(
        CheckpointError,
        match=r"built from the source and not from another; delete it, or use another --run-dir",
    ):
        Pools.load(tmp_path / "pools", "another")


def test_the_source_changes_with_all_that_decides_a_label(config):
    candidates = table()
    first, *rest = candidates.questions
    other_questions = [
        replace(candidates, questions=(replace(first, **change), *rest))
        for change in (
            {"id": "other"},
            {"question": "other?"},
            {"golden_answers": ("other",)},
            {"metadata": {"choices": ["a", "b"]}},
        )
    ]
    named = replace(candidates, questions=(replace(first, metadata={"gold_ids": ["p1"]}), *rest))
    sources = [
        pools_source(config, candidates, "g"),
        pools_source(config, candidates, "h"),
        *(pools_source(config, other, "g") for other in other_questions),
        pools_source(config, table(rows=ROWS[:, ::-1]), "g"),
        *(
            pools_source(changed(config, generator=change), candidates, "g")
            for change in (
                {"max_new_tokens": 3},
                {"stop": ["."]},
                {"prompt": {"instruction": "Say."}},
            )
        ),
        pools_source(changed(config, algorithm={"labels": "gold"}), candidates, "g"),
        *(
            pools_source(changed(config, algorithm={"labels": "generator_else_gold"}), each, "g")
            for each in (candidates, named)
        ),
        *(
            pools_source(
                changed(config, **limited).model_copy(update={"seed": seed}), candidates, "g"
            )
            for limited in (
                {"training": {"max_generator_tokens": 900}},
                {"training": {"max_generator_tokens": 902}},
                {"training": {"max_generator_tokens": 900}, "algorithm": {"online_epochs": 0}},
            )
            for seed in (0, 1)
        ),
    ]
    assert len(set(sources)) == len(sources)
    assert pools_source(config, named, "g") == sources[0]
    assert pools_source(config.model_copy(update={"seed": 1}), candidates, "g") == sources[0]
    learning = changed(config, training={"learning_rate": 1.0}, algorithm={"num_online": 9})
    assert pools_source(learning, candidates, "g") == sources[0]


def test_gold_pools_do_not_depend_on_the_generator(config):
    """Nor on golden answers; on gold passages they do."""
    config = changed(config, algorithm={"labels": "gold"})
    first, *rest = table().questions
    source = pools_source(config, table(), "g")
    assert pools_source(config, table(), "h") == source
    assert pools_source(changed(config, generator={"max_new_tokens": 3}), table(), "g") == source
    other = replace(first, golden_answers=("other",))
    assert pools_source(config, table((other, *rest)), "g") == source
    named = replace(first, metadata={"gold_ids": ["p1"]})
    assert pools_source(config, table((named, *rest)), "g") != source


def test_too_many_failures_end_the_stage_with_the_first_reason():
    """One of 12 failed."""
    with pytest.raises(
        GenerationError, match=r"1 passages.*max_failed_share 0.08 allows; the first: unreadable"
    ):
        judge_candidates(table(), scripted, "s", max_failed_share=0.08)
    assert judge_candidates(table(), scripted, "s", max_failed_share=1 / 12).usable.tolist() == [
        0,
        2,
    ]


def test_progress_counts_questions():
    told = []
    made = make_table(40)

    def judge(questions, passages, with_labels):
        return [Judgement(-1.0, True)] * len(questions)

    judge_candidates(made, judge, "s", 0.0, progress=lambda done, of: told.append((done, of)))
    assert [of for _, of in told] == [40] * len(told)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (40, 40)


def gold(*ids: str, n: int = 0) -> Question:
    return Question(f"q{n}", "?", ("a",), {"gold_ids": list(ids)} if ids else {})


@pytest.mark.parametrize(
    ("ids", "rows", "labels"),
    [
        (("p1",), [0, 1, 2], [0, 1, 0]),  # found
        (("p9",), [0, 1, 9], [0, 0, 1]),  # missed: takes the place of the worst
        (("p2", "p9"), [0, 2, 9], [0, 1, 1]),  # the worst is gold: the one before makes room
        (("p9", "p0", "p10"), [0, 10, 9], [1, 1, 1]),  # no negative is left
        (("p5", "p6", "p7", "p8"), [5, 6, 7], [1, 1, 1]),  # no room for the last
        (("p9", "elsewhere"), [0, 1, 9], [0, 0, 1]),  # not in the corpus
        (("elsewhere",), [0, 1, 2], [0, 0, 0]),
        ((), [0, 1, 2], [0, 0, 0]),
    ],
)
def test_gold_pools_by_hand(ids, rows, labels):
    candidates = table((gold(*ids), gold("p4", n=1)), ROWS[:2])
    found = gold_pools(candidates, "s")
    assert found.rows_QN[0].tolist() == rows
    assert found.labels_QN[0].tolist() == labels
    assert found.rows_QN[1].tolist() == [3, 4, 5]
    assert found.labels_QN[1].tolist() == [0, 1, 0]
    assert np.isnan(found.logp_QN).all()
    assert 1 in found.usable
    assert candidates.rows_QN.tolist() == ROWS[:2].tolist()  # untouched


def test_gold_pools_never_lose_a_gold_passage():
    rng = np.random.default_rng(0)
    questions, rows = [], []
    for n in range(60):
        ids = [f"p{row}" for row in rng.choice(12, rng.integers(1, 5), replace=False)]
        questions.append(gold(*ids, n=n))
        rows.append(rng.choice(12, 5, replace=False))
    candidates = table(tuple(questions), rows)
    found = gold_pools(candidates, "s")
    for n, question in enumerate(questions):
        wanted = {int(id_[1:]) for id_ in question.gold_ids}
        assert set(found.of_label(n, 1)) == wanted
        assert len(set(found.rows_QN[n].tolist())) == 5
        kept = [row for row in rows[n] if row in found.rows_QN[n]]
        assert found.rows_QN[n].tolist()[: len(kept)] == kept  # in the retriever's order
        negatives = [row for row in rows[n] if row not in wanted]
        assert found.of_label(n, 0) == negatives[: 5 - len(wanted)]  # the hardest stay


def test_gold_fills_the_pools_of_questions_without_a_positive_alone():
    """Of four questions: one is answered, two are not, of which one names no gold passage."""
    questions = (gold("p2"), gold("p9", n=1), gold(n=2), gold("p1", n=3))
    candidates = table(questions, ROWS[[0, 0, 0, 0]])
    rows_QN = candidates.rows_QN
    labels_QN = np.zeros(rows_QN.shape, dtype=np.int8)
    labels_QN[0, 0] = labels_QN[3, 1] = 1
    labels_QN[1, 1] = FAILED
    logp_QN = np.arange(labels_QN.size, dtype=float).reshape(labels_QN.shape)
    pools = Pools(rows_QN, labels_QN, logp_QN, "s", num_tokens=7)
    filled, num_filled = filled_by_gold(pools, gold_pools(candidates, "s"))
    assert num_filled == 1
    for kept in (0, 2, 3):
        assert filled.rows_QN[kept].tolist() == rows_QN[kept].tolist()
        assert filled.labels_QN[kept].tolist() == labels_QN[kept].tolist()
        assert filled.logp_QN[kept].tolist() == logp_QN[kept].tolist()
    assert filled.of_label(1, 1) == [9]
    assert filled.of_label(1, 0) == rows_QN[1].tolist()[:-1]
    assert filled.known_logp(1) == {}
    assert (filled.num_tokens, filled.source) == (7, "s")
    assert filled.auc_of(np.array([0, 3])) == pools.auc_of(np.array([0, 3]))
    assert filled.usable.tolist() == [0, 1, 3]


def test_gold_labels_need_questions_that_name_gold_passages():
    with pytest.raises(DataError, match=r"metadata.gold_ids.*use algorithm.labels generator"):
        gold_pools(table((gold(), gold(n=1)), ROWS[:2]), "s")
