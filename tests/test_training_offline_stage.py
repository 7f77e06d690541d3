"""The stage that fills the pools: what it finds, says and asks for, and how it goes on."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from loop_runs import changed
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import OpenRAGConfig, RetrievalConfig, RunConfig, TrainingConfig
from rlrag.errors import CheckpointError, DataError, GenerationError
from rlrag.generation.cache import CachedGenerator
from rlrag.records import Question, Score
from rlrag.training.offline_stage import describe_pools, run_offline_stage
from rlrag.training.pools import load_pools


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(
        cache_dir=str(tmp_path / "cache"),
        retrieval=RetrievalConfig(kind="dense"),
        openrag=OpenRAGConfig(num_offline=5),
        training=TrainingConfig(parts=("retriever",), launcher="local", batch_size=4),
    )


def run_stage(config, candidates, generator, directory: Path, said: list[str] | None = None):
    say = (lambda text: None) if said is None else said.append
    return run_offline_stage(config, candidates, generator, WordPrompts(), directory, say)


def test_the_stage_judges_saves_and_loads_what_it_saved(config, tmp_path):
    """The last word of a passage is what the generator says: one of five candidates is right."""
    candidates, generator, said = make_table(6), ReadingGenerator(), []
    found = run_stage(config, candidates, generator, tmp_path / "pools", said)
    names = [[p.text.split()[-1] for p in candidates.passages(q)] for q in range(6)]
    expected = [[int(name == f"answer{q}") for name in of] for q, of in enumerate(names)]
    assert found.labels_QN.tolist() == expected
    assert found.logp_QN.tolist() == [[-0.5 if right else -6.0 for right in of] for of in expected]
    calls = generator.num_calls
    again = run_stage(config, candidates, generator, tmp_path / "pools")
    assert generator.num_calls == calls
    assert again.labels_QN.tolist() == expected
    loaded = load_pools(config, candidates, generator.identity, tmp_path / "pools")
    assert loaded.labels_QN.tolist() == expected
    written = json.loads((tmp_path / "pools" / "summary.json").read_text())
    assert written == describe_pools(found, candidates.questions)
    assert written["all"]["auc"] == 1.0
    text = "\n".join(said)
    assert "6 of 6 questions" in text
    assert "6 of 6 questions have positives and negatives; 20.0% of the passages" in text
    assert "AUC 1.000" in text
    assert f"{generator.tokens.spent:,} generator tokens computed" in text
    assert found.num_tokens == again.num_tokens == loaded.num_tokens == generator.tokens.spent > 0
    assert found.seconds == again.seconds == loaded.seconds > 0


def test_pools_that_are_not_there_are_named(config, tmp_path):
    with pytest.raises(CheckpointError, match=r"none does not exist; the offline stage comes"):
        load_pools(config, make_table(6), "g", tmp_path / "none")


def test_pools_of_another_prompt_are_refused(config, tmp_path):
    candidates = make_table(6)
    run_stage(config, candidates, ReadingGenerator(), tmp_path / "pools")
    other = changed(config, generator={"prompt": {"instruction": "Say it."}})
    with pytest.raises(CheckpointError, match=r"with prompt .* delete it, or use another"):
        run_stage(other, candidates, ReadingGenerator(), tmp_path / "pools")


def test_gold_labels_ask_the_generator_for_nothing(config, tmp_path):
    generator = ReadingGenerator()
    found = run_stage(
        changed(config, openrag={"labels": "gold"}), make_table(6), generator, tmp_path / "pools"
    )
    assert generator.num_calls == 0
    assert found.usable.tolist() == list(range(6))
    assert json.loads((tmp_path / "pools" / "summary.json").read_text())["all"]["auc"] is None


class Dying(ReadingGenerator):
    """Notes every request and fails after some calls."""

    def __init__(self, asked: list[tuple], num_calls_to_live: float = math.inf) -> None:
        super().__init__()
        self.asked, self.left = asked, num_calls_to_live

    def _note(self, requests: list[tuple]) -> None:
        if not self.left:
            raise GenerationError("the engine died")
        self.left -= 1
        self.asked += requests

    def generate(self, prompts, sampling):
        self._note([("generate", p.token_ids) for p in prompts])
        return super().generate(prompts, sampling)

    def score(self, prompts, answers):
        self._note([("score", p.token_ids, a) for p, a in zip(prompts, answers, strict=True)])
        return super().score(prompts, answers)


@pytest.mark.parametrize("lives", [[1], [7], [13], [3, 4, 5]])
def test_a_stage_that_was_stopped_asks_for_nothing_twice(config, tmp_path, lives):
    """40 questions with 5 candidates: 200 answers and 200 scores, whatever happens between."""
    candidates, asked = make_table(40), []
    for num in lives:
        stopped = CachedGenerator(Dying(asked, num), tmp_path / "cache", chunk_size=16)
        with pytest.raises(GenerationError, match="the engine died"):
            run_stage(config, candidates, stopped, tmp_path / "pools")
        assert not (tmp_path / "pools").exists()
    before = len(asked)
    assert 0 < before < 400
    last = CachedGenerator(Dying(asked), tmp_path / "cache", chunk_size=16)
    found = run_stage(config, candidates, last, tmp_path / "pools")
    assert len(asked) == len(set(asked)) == 400
    assert last.tokens.num_cached == before
    whole = run_stage(config, candidates, ReadingGenerator(), tmp_path / "whole")
    assert found.labels_QN.tolist() == whole.labels_QN.tolist()
    assert found.logp_QN.tolist() == whole.logp_QN.tolist()
    assert found.num_tokens == last.tokens.spent + last.tokens.saved  # whatever was cached


class Contrary(ReadingGenerator):
    """Finds the answer the less likely the more the passage helps."""

    def score(self, prompts, answers):
        found = super().score(prompts, answers)
        return [Score(-6.5 - s.logp, s.num_tokens, s.num_prompt_tokens) for s in found]


def test_a_score_that_does_not_predict_the_label_gives_one_warning(config, tmp_path, caplog):
    candidates, directory = make_table(6), tmp_path / "pools"
    with caplog.at_level(logging.WARNING):
        found = run_stage(config, candidates, Contrary(), directory)
    assert found.auc_of(np.arange(6)) == 0.0
    assert len(caplog.records) == 1
    assert "AUC 0.000 is below openrag.min_auc 0.60" in caplog.text
    assert "openrag.stages offline" in caplog.text
    assert found.usable.tolist() == list(range(6))
    assert json.loads((directory / "summary.json").read_text())["all"]["auc"] == 0.0


def test_gold_passages_stand_in_where_the_generator_is_never_right(config, tmp_path):
    candidates, said = make_table(6), []
    questions = [
        replace(q, golden_answers=("nothing",)) if n < 4 else q
        for n, q in enumerate(candidates.questions)
    ]
    hopeless = replace(candidates, questions=tuple(questions))
    named = [[p.id in q.gold_ids for p in hopeless.passages(n)] for n, q in enumerate(questions)]
    else_gold = changed(config, openrag={"labels": "generator_else_gold"})
    pools = run_stage(else_gold, hopeless, ReadingGenerator(), tmp_path / "pools", said)
    assert "offline stage: 4 questions labelled by their gold passages" in said
    assert pools.labels_QN.tolist() == [[int(is_gold) for is_gold in of] for of in named]
    assert np.isnan(pools.logp_QN[:4]).all()
    assert np.isfinite(pools.logp_QN[4:]).all()
    with pytest.raises(CheckpointError, match="else gold passages and not from"):
        run_stage(config, hopeless, ReadingGenerator(), tmp_path / "pools")


@pytest.mark.parametrize("openrag", [{"labels": "gold"}, {"min_auc": 0.0}, {}])
def test_without_a_reason_nobody_is_warned(config, tmp_path, caplog, openrag):
    generator = Contrary() if "min_auc" in openrag else ReadingGenerator()
    with caplog.at_level(logging.WARNING):
        run_stage(changed(config, openrag=openrag), make_table(6), generator, tmp_path / "pools")
    assert caplog.records == []


def test_pools_that_are_all_empty_end_the_run_with_what_to_do(config, tmp_path):
    """What was found out stays and says why."""
    made = make_table(6)
    hopeless = tuple(Question(q.id, q.question, ("atlantis",)) for q in made.questions)
    candidates = replace(made, questions=hopeless)
    with pytest.raises(
        DataError,
        match=r"only 0 of 6 questions.*batch_size 4; use more questions, a larger "
        r"openrag.num_offline, a generator or prompt",
    ):
        run_stage(config, candidates, ReadingGenerator(), tmp_path / "pools")
    written = json.loads((tmp_path / "pools" / "summary.json").read_text())
    assert written["all"]["num_without_positive"] == 6


def test_fewer_usable_questions_than_a_batch_are_refused(config, tmp_path):
    made = make_table(6)
    questions = tuple(
        q if n < 3 else Question(q.id, q.question, ("atlantis",))
        for n, q in enumerate(made.questions)
    )
    with pytest.raises(DataError, match="only 3 of 6 questions"):
        run_stage(
            config, replace(made, questions=questions), ReadingGenerator(), tmp_path / "pools"
        )
