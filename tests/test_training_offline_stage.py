"""The stage that fills the pools: what it finds, says and asks for, and how it goes on."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import episodes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_runs import changed
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import OpenRAGConfig, RetrievalConfig, RunConfig, TrainingConfig
from rlrag.errors import CheckpointError, DataError, GenerationError
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.protocol import Sampling
from rlrag.records import Question, Score
from rlrag.retrieval.candidates import CandidateTable
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.dro.experience_log import ExperienceLog
from rlrag.training.openrag.offline_stage import describe_pools, run_offline_stage
from rlrag.training.openrag.pools import judging_order, load_pools
from rlrag.training.schedule import openrag_schedule


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(
        cache_dir=str(tmp_path / "cache"),
        retrieval=RetrievalConfig(kind="dense"),
        algorithm=OpenRAGConfig(num_offline=5),
        training=TrainingConfig(launcher="local", batch_size=4),
    )


def run_stage(
    config,
    candidates,
    generator,
    directory: Path,
    said: list[str] | None = None,
    experience: Path | None = None,
):
    say = (lambda text: None) if said is None else said.append
    return run_offline_stage(
        config, candidates, generator, WordPrompts(), directory, say, experience
    )


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
    assert written["all"]["auc"] == written["all"]["best_score_is_positive"] == 1.0
    assert written["all"]["first_is_positive"] == np.mean([of[0] for of in expected])
    text = "\n".join(said)
    assert "6 of 6 questions" in text
    assert "6 of 6 questions have positives and negatives; 20.0% of the passages" in text
    assert "AUC 1.000" in text
    assert f"{generator.tokens.spent:,} generator tokens computed" in text
    assert found.num_tokens == again.num_tokens == loaded.num_tokens == generator.tokens.spent > 0
    assert found.seconds == again.seconds == loaded.seconds > 0


def test_pools_that_are_not_there_are_named(config, tmp_path):
    with pytest.raises(CheckpointError, match=r"none does not exist; run the offline stage"):
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
        changed(config, algorithm={"labels": "gold"}), make_table(6), generator, tmp_path / "pools"
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


def test_what_rewarded_selections_tell_is_not_judged_again(config, tmp_path):
    """In one run candidate 0 of question 2 helped and 1 did not; none was drawn elsewhere."""
    candidates, asked, said = make_table(6), list[tuple](), list[str]()
    experience = tmp_path / "experience"
    batch = episodes.experience(candidates, [2], [[[0], [1]]], [[-0.5, -5.0]])
    ExperienceLog(experience, SingleWorker(), candidates).append(0, batch)
    found = run_stage(config, candidates, Dying(asked), tmp_path / "pools", said, experience)
    assert found.labels_QN[2, :2].tolist() == [1, 0]
    assert np.isnan(found.logp_QN[2, :2]).all()
    assert np.isfinite(found.logp_QN).sum() == 6 * 5 - 2
    assert len(asked) == 2 * (6 * 5 - 2)
    assert "offline stage: 2 labels from selections that were rewarded" in said
    strict = changed(config, algorithm={"contribution_margin": 5.0})
    whole = run_stage(
        strict, candidates, ReadingGenerator(), tmp_path / "whole", experience=experience
    )
    assert np.isfinite(whole.logp_QN).all()


def test_passages_are_judged_as_the_run_answers(config, tmp_path):
    asked: list[Sampling] = []

    class Listening(ReadingGenerator):
        """Notes how it is to decode."""

        def generate(self, prompts, sampling):
            asked.append(sampling)
            return super().generate(prompts, sampling)

    warm = changed(config, generator={"max_new_tokens": 7, "temperature": 0.5, "stop": ["!"]})
    warm = warm.model_copy(update={"seed": 3})
    run_stage(warm, make_table(6), Listening(), tmp_path / "pools")
    assert set(asked) == {Sampling(max_new_tokens=7, temperature=0.5, stop=("!",), seed=3)}


@pytest.mark.parametrize(("allowed", "ends"), [(0.1, True), (0.2, False)])
def test_more_passages_without_a_judgement_than_allowed_end_the_stage(
    config, tmp_path, allowed, ends
):
    """The generator cannot read one question of six, a sixth of the passages."""

    class Blind(ReadingGenerator):
        """Cannot score what is asked of value 3."""

        def score(self, prompts, answers):
            return [
                Score(math.nan, 1, 1) if "what is value 3?" in p.text else found
                for p, found in zip(prompts, super().score(prompts, answers), strict=True)
            ]

    lenient = changed(config, training={"max_failed_share": allowed})
    if ends:
        with pytest.raises(GenerationError, match=r"5 passages could not be judged, more than"):
            run_stage(lenient, make_table(6), Blind(), tmp_path / "pools")
        assert not (tmp_path / "pools").exists()
    else:
        pools = run_stage(lenient, make_table(6), Blind(), tmp_path / "pools")
        assert pools.usable.tolist() == [0, 1, 2, 4, 5]


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
    assert "(AUC 0.000, below 0.60)" in caplog.text
    assert "algorithm.online_epochs 0" in caplog.text
    assert found.usable.tolist() == list(range(6))
    summary = json.loads((directory / "summary.json").read_text())["all"]
    assert summary["auc"] == summary["best_score_is_positive"] == 0.0


def test_gold_passages_stand_in_where_the_generator_is_never_right(config, tmp_path):
    candidates, said = make_table(6), []
    questions = [
        replace(q, golden_answers=("nothing",)) if n < 4 else q
        for n, q in enumerate(candidates.questions)
    ]
    hopeless = replace(candidates, questions=tuple(questions))
    named = [[p.id in q.gold_ids for p in hopeless.passages(n)] for n, q in enumerate(questions)]
    else_gold = changed(config, algorithm={"labels": "generator_else_gold"})
    pools = run_stage(else_gold, hopeless, ReadingGenerator(), tmp_path / "pools", said)
    assert "offline stage: 4 questions labelled by their gold passages" in said
    assert pools.labels_QN.tolist() == [[int(is_gold) for is_gold in of] for of in named]
    assert np.isnan(pools.logp_QN[:4]).all()
    assert np.isfinite(pools.logp_QN[4:]).all()
    with pytest.raises(CheckpointError, match="else gold passages and not from"):
        run_stage(config, hopeless, ReadingGenerator(), tmp_path / "pools")


@pytest.mark.parametrize("openrag", [{"labels": "gold"}, {}])
def test_without_a_reason_nobody_is_warned(config, tmp_path, caplog, openrag):
    with caplog.at_level(logging.WARNING):
        run_stage(
            changed(config, algorithm=openrag),
            make_table(6),
            ReadingGenerator(),
            tmp_path / "pools",
        )
    assert caplog.records == []


def test_pools_that_are_all_empty_end_the_run_with_what_to_do(config, tmp_path):
    """What was found out stays and says why."""
    made = make_table(6)
    hopeless = tuple(Question(q.id, q.question, ("atlantis",)) for q in made.questions)
    candidates = replace(made, questions=hopeless)
    with pytest.raises(
        DataError,
        match=r"only 0 of 6 questions.*too few to train on; use more questions, a larger "
        r"algorithm.num_offline, a generator or prompt",
    ):
        run_stage(config, candidates, ReadingGenerator(), tmp_path / "pools")
    written = json.loads((tmp_path / "pools" / "summary.json").read_text())
    assert written["all"]["num_without_positive"] == 6


def with_answers_to(num: int) -> CandidateTable:
    """Six questions of which the first `num` have an answer among their candidates."""
    made = make_table(6)
    questions = tuple(
        q if n < num else replace(q, golden_answers=("atlantis",))
        for n, q in enumerate(made.questions)
    )
    return replace(made, questions=questions)


def test_fewer_usable_questions_than_a_batch_make_smaller_steps_and_say_so(
    config, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        pools = run_stage(config, with_answers_to(3), ReadingGenerator(), tmp_path / "pools")
    assert "only 3 of 6 questions have both" in caplog.text
    assert "steps use 3 questions instead of training.batch_size 4" in caplog.text
    assert len(openrag_schedule(config, len(pools.usable)).rows(0)) == 3


def test_the_steps_do_not_depend_on_how_many_workers_share_them(config):
    """A run may go on with another number of them: here 27 questions, in batches of up to 32."""
    schedules = [
        openrag_schedule(
            changed(config, training={"launcher": "ray", "num_workers": n, "batch_size": 32}), 27
        )
        for n in (1, 4)
    ]
    assert [each.batch_size for each in schedules] == [27, 27]
    assert schedules[0].num_steps == schedules[1].num_steps


def test_one_usable_question_is_too_few(config, tmp_path):
    with pytest.raises(DataError, match="only 1 of 6 questions have both"):
        run_stage(config, with_answers_to(1), ReadingGenerator(), tmp_path / "pools")


def test_a_token_budget_leaves_questions_out_and_says_how_many(config, tmp_path):
    """All questions cost the same, so that the limit buys its share of them."""
    candidates, said = make_table(40), []
    whole = run_stage(config, candidates, ReadingGenerator(), tmp_path / "whole")
    limits = {"max_generator_tokens": whole.num_tokens}
    limited = changed(config, training=limits, algorithm={"offline_token_share": 0.6})
    pools = run_stage(limited, candidates, ReadingGenerator(), tmp_path / "pools", said)
    assert pools.num_tokens == pytest.approx(0.6 * whole.num_tokens, rel=0.02)
    assert len(pools.judged) == 24
    assert pools.judged.tolist() != list(range(24))  # drawn, and not the first ones
    assert pools.usable.tolist() == pools.judged.tolist()
    judged = whole.labels_QN[pools.judged]
    assert pools.labels_QN[pools.judged].tolist() == judged.tolist()
    spent = int(0.6 * whole.num_tokens)
    assert any(
        f"16 of 40 questions are left out, as judging them would take more than {spent:,} "
        "generator tokens" in line
        for line in said
    )
    assert any("24 of 24 questions have positives and negatives; 20.0%" in line for line in said)
    summary = json.loads((tmp_path / "pools" / "summary.json").read_text())["all"]
    assert (summary["num_questions"], summary["num_left_out"]) == (40, 16)
    assert summary["positive_share"] == pytest.approx(0.2)
    assert summary["num_failed"] == summary["num_without_positive"] == 0
    again = run_stage(limited, candidates, ReadingGenerator(), tmp_path / "again")
    assert again.labels_QN.tolist() == pools.labels_QN.tolist()
    seeded = limited.model_copy(update={"seed": 1})
    other = run_stage(seeded, candidates, ReadingGenerator(), tmp_path / "other")
    assert other.judged.tolist() != pools.judged.tolist()


def test_without_an_online_stage_judgements_may_take_the_whole_budget(config, tmp_path):
    candidates = make_table(8)
    whole = run_stage(config, candidates, ReadingGenerator(), tmp_path / "whole")
    limited = changed(
        config,
        training={"max_generator_tokens": whole.num_tokens},
        algorithm={"online_epochs": 0},
    )
    pools = run_stage(limited, candidates, ReadingGenerator(), tmp_path / "pools")
    assert len(pools.judged) == 8


def test_questions_left_out_are_not_labelled_by_their_gold_passages(config, tmp_path):
    candidates = with_answers_to(0)
    whole = run_stage(
        changed(config, algorithm={"labels": "generator_else_gold"}),
        candidates,
        ReadingGenerator(),
        tmp_path / "whole",
    )
    limited = changed(
        config,
        training={"max_generator_tokens": whole.num_tokens // 2, "batch_size": 2},
        algorithm={"labels": "generator_else_gold", "offline_token_share": 1.0},
    )
    pools = run_stage(limited, candidates, ReadingGenerator(), tmp_path / "pools")
    assert len(pools.judged) == 3
    assert pools.usable.tolist() == pools.judged.tolist()


@given(
    costs=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    share=st.floats(0, 1.2),
    seed=st.integers(0, 9),
)
def test_groups_of_questions_end_near_the_limit(costs, share, seed):
    """No question comes twice, and none is left out that the mean cost leaves room for."""
    limit, asked = int(share * sum(costs)), list[int]()

    def spent_so_far() -> int:
        return sum(costs[question] for question in asked)

    for group in judging_order(len(costs), limit, seed, spent_so_far):
        assert 1 <= len(group) <= 16
        asked += group
    assert len(asked) == len(set(asked))
    spent = spent_so_far()
    if len(asked) < len(costs):
        assert (limit - spent) * len(asked) / spent <= 0.5
    if len(asked) > 1 and len(set(costs)) == 1:
        assert spent <= limit + costs[0] / 2


def test_without_a_limit_questions_come_in_their_order():
    assert list(judging_order(40)) == [
        list(range(16)),
        list(range(16, 32)),
        list(range(32, 40)),
    ]
