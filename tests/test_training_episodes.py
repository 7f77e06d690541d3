"""What training learns from is what happened in the episodes, step by step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import priced_environment
import pytest
import torch
from loop_runs import changed, policy_weights, start
from stand_ins import NUM_CANDIDATES, ReadingGenerator, WordPrompts, make_table

from rlrag.algorithms import dro
from rlrag.bundle import load_bundle, save_bundle
from rlrag.config import EnvironmentConfig, RunConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play, play_greedy
from rlrag.errors import RlragError
from rlrag.evaluation.systems import evaluate
from rlrag.generation.protocol import Sampling
from rlrag.pipeline import TrainingData, open_policy, open_reward
from rlrag.records import Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answering import AnsweringReward
from rlrag.rewards.composite import RewardModel
from rlrag.selection.protocol import Draws
from rlrag.serving.records import Retrieved
from rlrag.serving.selecting import Choice, SelectorPart
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.learners.optimiser import MAX_GRAD_NORM, WEIGHT_DECAY, linear_schedule
from rlrag.training.schedule import BatchSchedule
from rlrag.training.validation import validate

NUM_STEPS = 6


def worded_table(num_questions: int) -> CandidateTable:
    """Questions that share a different number of words with each of their candidates."""
    table, rng = make_table(num_questions), np.random.default_rng(4)
    words = np.array(["isle", "port", "fish", "1834"])
    passages = [
        replace(passage, text=f"{' '.join(rng.choice(words, rng.integers(1, 9)))} {passage.text}")
        for passage in table.corpus
    ]
    asked = [f"{question.question} {rng.choice(words)}" for question in table.questions]
    questions = tuple(replace(q, question=a) for q, a in zip(table.questions, asked, strict=True))
    return replace(table, questions=questions, corpus=MemoryCorpus(passages))


def by_hand(config: RunConfig, table: CandidateTable) -> dict[str, torch.Tensor]:
    """The weights after NUM_STEPS steps of DRO, from the table and the reward alone.

    No environment: Gumbel noise, sums of logs and a reward of the picked passages, in plain loops.
    """
    policy = open_policy(config, table)
    initial = copy.deepcopy(policy)
    reward = open_reward(config, ReadingGenerator(), WordPrompts())
    schedule = BatchSchedule(config.training, config.dro, len(table), config.seed)
    training, num_samples = config.training, config.dro.num_samples
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=WEIGHT_DECAY)
    stop = NUM_CANDIDATES if config.selector.may_stop else None
    for step in range(NUM_STEPS):
        rows = schedule.rows(step)
        logits_BPA = policy.logits(table.batch(rows))
        logp, rewards, actions = [], [], []
        for b, row in enumerate(rows.tolist()):
            shape = (num_samples, policy.num_selected, logits_BPA.shape[2])
            noise = np.random.default_rng(schedule.sampling_seed(step, b)).gumbel(size=shape)
            for m in range(num_samples):
                left, picks = list(range(logits_BPA.shape[2])), []
                total = torch.zeros(())
                for k in range(policy.num_selected):
                    logits_A = logits_BPA[b, min(k, logits_BPA.shape[1] - 1)]
                    values = logits_A.detach().double().numpy() + noise[m, k]
                    pick = max(left, key=lambda n: values[n])
                    total = total + logits_A[pick] - logits_A[left].logsumexp(0)
                    picks.append(pick)
                    if pick == stop:
                        break
                    left.remove(pick)
                evidence = [table.passages(row)[n] for n in picks if n != stop]
                [result] = reward([table.questions[row]], [evidence])
                rewards.append(np.nan if isinstance(result, RlragError) else result.total)
                logp.append(total)
                actions.append([*picks, *[-1] * (policy.num_selected - len(picks))])
        logp_BM = torch.stack(logp).view(len(rows), -1)
        rewards_BM = torch.tensor(rewards, dtype=torch.float64).view(len(rows), -1)
        even_BM = torch.full_like(rewards_BM, -np.log(num_samples))
        weights_BM = dro.importance_weights(rewards_BM, even_BM, 1.0, "self_normalised")
        valid_BM = dro.valid_samples(rewards_BM, even_BM)
        coefficients_BM = dro.coefficients(weights_BM, even_BM, valid_BM, "mean")
        loss = -(coefficients_BM * logp_BM).sum() / training.batch_size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = linear_schedule(
                step, schedule.num_steps, training.warmup_steps, training.learning_rate
            )
        optimizer.step()
    assert any(
        not torch.equal(a, b)
        for a, b in zip(policy.parameters(), initial.parameters(), strict=True)
    )
    return policy.state_dict()


@pytest.mark.parametrize("may_stop", [False, True])
def test_training_equals_a_loop_without_an_environment(small_config, tmp_path, may_stop):
    """Stale observations, another episode's reward, picks in another order or a mask that is not
    kept would all change the weights."""
    config = changed(
        small_config,
        environment={"num_selected": 3},
        selector={"may_stop": may_stop},
        reward={"functions": ["exact_match", "selection_cost"], "weights": [1, 0.3]},
        training={"num_epochs": NUM_STEPS * 8 // 24, "validate_every": 50, "checkpoint_every": 50},
        data={"num_validation_questions": 0},
    )
    data = TrainingData(worded_table(24), None, {})
    loop = start(config, data, tmp_path / "run")
    loop.run()
    expected = by_hand(config, data.train)
    for name, found in policy_weights(loop).items():
        assert torch.allclose(found, expected[name], atol=1e-5), name


def priced_table(num_questions: int, seed: int) -> CandidateTable:
    """Questions of which 0 to 3 of five passages hold a word."""
    rng = np.random.default_rng(seed)
    passages, questions, rows = [], [], []
    for q in range(num_questions):
        useful = rng.permutation(5)[: rng.integers(0, 4)]
        for n in range(5):
            text = f"needle{q} is here" if n in useful else "straw and more straw"
            passages.append(priced_environment.passage(f"p{q}-{n}", text))
        questions.append(Question(f"q{q}", f"needle{q}", ("here",)))
        rows.append(range(5 * q, 5 * q + 5))
    return CandidateTable(
        questions=tuple(questions),
        corpus=MemoryCorpus(passages),
        rows_QN=np.array(rows),
        scores_QNC=np.tile(-np.arange(5.0)[:, None], (num_questions, 1, 2)).astype(np.float32),
        score_names=("a", "b"),
        question_vectors_QD=np.zeros((num_questions, 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((5 * num_questions, 0), dtype=np.float32),
    )


def test_a_third_partys_environment_is_learned_to_its_optimum(small_config, model_dir, tmp_path):
    """Its episodes are as long as they need be: better than any fixed number of picks."""
    config = changed(
        small_config,
        environment={"id": priced_environment.ID, "num_selected": 5},
        retrieval={"num_candidates": 5},
        selector={"may_stop": True},
        algorithm={"num_samples": 8, "reward_temperature": 0.2},
        training={"num_epochs": 40, "learning_rate": 0.05, "validate_every": 500},
    )
    data = TrainingData(priced_table(24, 0), priced_table(8, 1), {})
    loop = start(config, data, tmp_path / "run")
    loop.run()
    unseen = priced_table(60, 2)
    episodes = open_episodes(config.environment, 60, unseen, Unrewarded())
    policy = loop.trainer.parts.policy
    found = play(episodes, policy, np.arange(60))
    worth_QN = np.array([priced_environment.needed(unseen, row) for row in range(60)]) - 0.4
    optimum = np.maximum(worth_QN, 0).sum(axis=1).mean()
    fixed = [np.sort(worth_QN)[:, ::-1][:, :k].sum(axis=1).mean() for k in range(6)]
    assert optimum > max(fixed) + 0.05
    assert found.rewards_E.mean() >= 0.98 * optimum
    assert len(set(map(len, found.evidence))) > 1
    config = changed(
        config,
        generator={"model": str(model_dir)},
        evaluation={"systems": ["trained"]},
    )
    played = [tuple(passage.id for passage in evidence) for evidence in found.evidence]
    for picks in everywhere(config, policy, unseen, tmp_path / "bundle"):
        assert picks == played


def everywhere(
    config: RunConfig, policy, table: CandidateTable, folder: Path
) -> list[list[tuple[str, ...]]]:
    """What validation, evaluation and the service end with for each question, by passage id."""
    asked: list[list[tuple[str, ...]]] = []

    class Listening(AnsweringReward):
        """Keeps what it is asked to answer from."""

        def answer(self, questions, selections):
            asked.append([tuple(p.id for p in passages) for passages in selections])
            return super().answer(questions, selections)

    rewards = RewardModel(config.reward)
    answering = Listening(ReadingGenerator(), WordPrompts(), rewards, Sampling())
    validate(config.environment, policy, table, answering, SingleWorker())
    evaluate(config, policy, table, answering)
    save_bundle(folder, config, policy, table, {"corpus": "c"}, 1)
    part = SelectorPart(allow_code=(config.environment.id,))
    version = load_bundle(folder, (config.environment.id,)).version
    part.load(version, folder)
    choices = [
        Choice(
            question.question,
            Retrieved(
                table.passages(row),
                table.scores_QNC[row],
                table.question_vectors_QD[row],
                table.passage_vectors_PD[table.rows_QN[row]],
            ),
        )
        for row, question in enumerate(table.questions)
    ]
    served = part.select(version, choices)
    ids = [[p.id for p in table.passages(row)] for row in range(len(table))]
    asked.append(
        [tuple(one[n] for n in picked.positions) for one, picked in zip(ids, served, strict=True)]
    )
    return asked


def test_validation_evaluation_and_service_play_the_same_episodes(
    small_config, model_dir, tmp_path
):
    """100 questions, of which the policy ends some before it has to."""
    config = changed(
        small_config,
        environment={"num_selected": 3},
        selector={"may_stop": True},
        generator={"model": str(model_dir)},
        evaluation={"systems": ["trained"]},
    )
    table = worded_table(100)
    policy = open_policy(config, table)
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.scorer.out.weight)
    torch.nn.init.zeros_(policy.stop_logits_K)
    validated, evaluated, served = everywhere(config, policy, table, tmp_path / "bundle")
    assert validated == evaluated == served
    assert len({len(picks) for picks in served}) > 1


class Forgetful:
    """A policy that keeps no notes between the actions of an episode."""

    def __init__(self, policy) -> None:
        self._policy = policy
        self.num_selected = policy.num_selected

    def act(self, observations, infos, turn):
        notes = {name: turn.notes[name] for name in ("noise", "generators") if name in turn.notes}
        fresh = replace(turn, notes=notes)
        chosen = self._policy.act(observations, infos, fresh)
        turn.notes.update(fresh.notes)
        return chosen


@pytest.mark.parametrize("draws", [None, Draws([[0, b] for b in range(6)], 4, temperature=1.5)])
@pytest.mark.parametrize("may_stop", [False, True])
def test_scoring_once_equals_scoring_at_every_step_to_the_last_bit(small_config, draws, may_stop):
    table = make_table(6)
    config = changed(small_config, environment={"num_selected": 3}, selector={"may_stop": may_stop})
    policy = open_policy(config, table)
    torch.nn.init.normal_(policy.scorer.out.weight)
    num_episodes = 6 * (draws.num_samples if draws else 1)
    episodes = open_episodes(config.environment, num_episodes, table, Unrewarded())
    once = play(episodes, policy, np.arange(6), draws)
    again = play(episodes, Forgetful(policy), np.arange(6), draws)
    for name in ("actions_ET", "logp_ET", "log_weights_E"):
        assert np.array_equal(getattr(once, name), getattr(again, name)), name


def test_greedy_episodes_of_many_questions_are_those_of_one(small_config, tmp_path: Path):
    table = make_table(70)
    policy = open_policy(small_config, table)
    torch.nn.init.normal_(policy.scorer.out.weight)
    environment = EnvironmentConfig(num_selected=1)
    whole = play_greedy(environment, policy, table)
    for row in (0, 63, 64, 69):
        alone = play_greedy(environment, policy, table, [row])
        assert alone.evidence == (whole.evidence[row],)
        assert alone.logp_ET[0] == pytest.approx(whole.logp_ET[row])
