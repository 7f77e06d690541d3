"""The generator trains on the first golden answer, to its end, behind the rewarded prompts."""

from __future__ import annotations

from dataclasses import replace

import episodes
import numpy as np
import pytest
import torch
from stand_ins import CutPrompts, ReadingGenerator, WordPrompts, make_table

from rlrag.algorithms import dro
from rlrag.config import DROConfig, EnvironmentConfig, RewardConfig, RunConfig, SelectorConfig
from rlrag.errors import ConfigError, PromptTooLongError
from rlrag.generation.protocol import Sampling
from rlrag.records import Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answering import AnsweringReward
from rlrag.rewards.composite import RewardModel
from rlrag.selection.build import build_policy
from rlrag.training.dro.e_step import BatchCollector
from rlrag.training.learners.generator import thinned, weighted_examples

ROWS = np.array([4, 1])
POSITIONS_BMK = np.array([[[0, 3], [3, 0], [2, 1]], [[4, 2], [0, 1], [1, 0]]])
WEIGHTS_BM = torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.75, 0.0]], dtype=torch.float64)


def renamed(table: CandidateTable, golden: dict[int, tuple[str, ...]]) -> CandidateTable:
    """The same candidates for questions with other golden answers."""
    questions = tuple(
        Question(q.id, q.question, golden.get(row, q.golden_answers))
        for row, q in enumerate(table.questions)
    )
    return replace(table, questions=questions)


def built(table: CandidateTable, weights_BM: torch.Tensor = WEIGHTS_BM, prompts=None):
    rewards_BM = np.zeros(WEIGHTS_BM.shape)
    drawn = episodes.experience(table, ROWS, POSITIONS_BMK, rewards_BM)
    return weighted_examples(table.questions, prompts or WordPrompts(), drawn, weights_BM)


def examples(*arguments, **named):
    return built(*arguments, **named).examples


def test_each_selection_of_weight_above_zero_is_an_example_with_its_weight():
    table = make_table(6)
    found = examples(table)
    assert [example.weight for example in found] == [0.5, 0.5, 0.25, 0.75]
    expected = [(4, (0, 3)), (4, (2, 1)), (1, (4, 2)), (1, (0, 1))]
    for example, (row, positions) in zip(found, expected, strict=True):
        passages = [table.passages(row)[n] for n in positions]
        text = " | ".join([*(p.contents for p in passages), f"what is value {row}?"])
        assert bytes(example.prompt_ids).decode() == text
        assert bytes(example.answer_ids).decode() == f"answer{row}\n"


def test_prompts_are_those_that_the_reward_scored():
    class Listening(ReadingGenerator):
        """Keeps the tokens that it was asked to score."""

        asked: tuple[tuple[int, ...], ...] = ()

        def score(self, prompts, answers):
            self.asked = tuple(prompt.token_ids for prompt in prompts)
            return super().score(prompts, answers)

    table, generator = make_table(6), Listening()
    reward = AnsweringReward(generator, WordPrompts(), RewardModel(RewardConfig()), Sampling())
    rows = np.repeat(ROWS, 3)
    picks = POSITIONS_BMK.reshape(-1, 2)
    reward(
        [table.questions[row] for row in rows],
        [[table.passages(row)[n] for n in pick] for row, pick in zip(rows, picks, strict=True)],
    )
    found = examples(table, torch.ones(2, 3))
    assert tuple(example.prompt_ids for example in found) == generator.asked


def test_the_target_is_the_first_golden_answer_that_is_not_blank():
    table = renamed(make_table(6), {4: (" ", "", "second", "third"), 1: ("one", "two")})
    targets = [bytes(example.answer_ids).decode() for example in examples(table)]
    assert targets == ["second\n", "second\n", "one\n", "one\n"]


@pytest.mark.parametrize("golden", [(), ("",), (" ", "\n")])
def test_a_question_without_a_golden_answer_gives_no_example(golden):
    found = examples(renamed(make_table(6), {4: golden}))
    assert [bytes(example.answer_ids).decode() for example in found] == ["answer1\n", "answer1\n"]


def test_a_selection_whose_prompt_cannot_be_built_gives_no_example():
    class Narrow(WordPrompts):
        """Has no room for the first question."""

        def build(self, question, passages):
            if question.id == "q4":
                raise PromptTooLongError("question 'q4' is too long; raise max_prompt_tokens")
            return super().build(question, passages)

    found = built(make_table(6), prompts=Narrow())
    assert [example.weight for example in found.examples] == [0.25, 0.75]
    assert [str(error)[:13] for error in found.errors] == ["question 'q4'"] * 2


def test_what_prompts_left_out_is_counted_over_those_that_are_read():
    """Of two passages each the last is not shown; two prompts have weight 0 and are not built."""

    class WithoutTheLast(CutPrompts):
        def build(self, question, passages):
            return super().build(question, passages[:-1])

    found = built(make_table(6), prompts=WithoutTheLast())
    assert found.prompt_counts.shares() == {
        "prompt_cut_share": 0.5,
        "dropped_passage_share": 0.5,
    }


def test_without_a_limit_every_weight_stays():
    assert thinned(WEIGHTS_BM, None, [[0], [1]]) is WEIGHTS_BM


@pytest.mark.parametrize("num", [1, 2, 3])
def test_thinning_keeps_the_sum_of_a_question_and_at_most_so_many_samples(num):
    weights_BM = torch.tensor([[0.2, 0.5, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0], [0.9, 0.3, 0.6, 0.3]])
    for trial in range(20):
        found_BM = thinned(weights_BM, num, [[trial, row] for row in range(3)])
        assert found_BM.sum(dim=1).tolist() == pytest.approx([1.0, 0.0, 2.1])
        assert ((found_BM > 0).sum(dim=1) <= num).all()
        assert (found_BM[weights_BM == 0] == 0).all()
        assert torch.equal(found_BM, thinned(weights_BM, num, [[trial, row] for row in range(3)]))


@pytest.mark.parametrize("num", [1, 3])
def test_thinning_keeps_the_mean(num):
    """Over 4,000 seeds the standard error of a mean is below 0.5 W / sqrt(4000) = 0.008 W."""
    weights_BM = torch.tensor([[0.2, 0.5, 0.0, 0.3], [0.9, 0.3, 0.6, 0.3]])
    total_BM = torch.zeros(2, 4)
    for trial in range(4000):
        total_BM += thinned(weights_BM, num, [[trial, row] for row in range(2)])
    assert torch.allclose(total_BM / 4000, weights_BM, atol=4 * 0.008 * 2.1)


def test_a_question_draws_from_its_own_seed():
    """What a question trains on does not depend on the batch, so workers may share it."""
    weights_BM = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    seeds = [[7, 2, 3, row] for row in range(6)]
    whole_BM = thinned(weights_BM, 1, seeds)
    halves = [thinned(weights_BM[part::2], 1, seeds[part::2]) for part in range(2)]
    assert torch.equal(whole_BM[0::2], halves[0])
    assert torch.equal(whole_BM[1::2], halves[1])


def test_the_loss_of_thinned_weights_has_the_mean_of_the_whole():
    """One sample a question: over many seeds the mean lies within four standard errors."""
    weights_BM = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    logp_BM = torch.tensor([[-1.0, -2.0, -7.0]], dtype=torch.float64)
    losses = [
        dro.generator_loss(logp_BM, thinned(weights_BM, 1, [[trial]])).item()
        for trial in range(2000)
    ]
    exact = dro.generator_loss(logp_BM, weights_BM).item()
    error = np.std(losses) / len(losses) ** 0.5
    assert abs(np.mean(losses) - exact) < 4 * error


def test_a_set_of_answers_has_the_gradient_of_its_enumerated_likelihood():
    """K = 1 of three passages: d/dtheta log sum_z p(z) sum_y p(y | x, d_z), equal answers once."""
    table = renamed(make_table(6), {4: ("one", " two ", "one\n", " ", "two", "one")})
    prior_logp_M = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    rng = torch.Generator().manual_seed(0)
    logits_MY = torch.randn(3, 4, generator=rng, dtype=torch.float64).requires_grad_()
    logp_MY = logits_MY.log_softmax(dim=1)[:, :2]  # two answers of four are golden
    (exact,) = torch.autograd.grad(
        (prior_logp_M[:, None] + logp_MY).logsumexp((0, 1)), logits_MY, retain_graph=True
    )
    rewards_BM = logp_MY.detach().logsumexp(dim=1)[None]
    weights_BM = dro.importance_weights(rewards_BM, prior_logp_M[None], 1.0, "self_normalised")
    drawn = episodes.experience(table, [4], np.arange(3).reshape(1, 3, 1), rewards_BM)
    golden_logps = tuple(tuple(logps) for logps in logp_MY.tolist())
    trajectories = replace(drawn.trajectories, golden_logps=golden_logps)
    drawn = replace(drawn, trajectories=trajectories)
    found = weighted_examples(table.questions, WordPrompts(), drawn, weights_BM).examples
    places = [(m, y) for m in range(3) for y in range(2)]
    assert [bytes(e.answer_ids) for e in found] == [b"one\n", b"two\n"] * 3
    gain = sum(e.weight * logp_MY[place] for e, place in zip(found, places, strict=True))
    assert torch.allclose(torch.autograd.grad(gain, logits_MY)[0], exact, atol=1e-12)


def test_the_likelihoods_of_a_set_come_from_the_rewards_through_the_environment(tmp_path):
    """The reward is their log-sum-exp; `ReadingGenerator` scores what the prompt holds as -0.5."""
    table = renamed(make_table(6), {4: ("answer4", "never", "answer4 "), 1: ("answer1",)})
    rewards = RewardModel(RewardConfig(golden_answers="all"))
    reward = AnsweringReward(ReadingGenerator(), WordPrompts(), rewards, Sampling())
    config = DROConfig(num_samples=4)
    collector = BatchCollector(EnvironmentConfig(num_selected=1), config, table, reward, 2)
    policy = build_policy(
        SelectorConfig(),
        EnvironmentConfig(),
        table.scores_QNC.shape[2],
        table.vector_size,
        tmp_path,
        0,
    )
    found = collector.collect(policy, ROWS, [[0, 0], [0, 1]], 0, 0)
    collector.close()
    golden_logps = found.trajectories.golden_logps
    assert all(len(logps) == 2 for logps in golden_logps[:4])
    assert set(golden_logps) <= {
        (-0.5, -6.0),
        (-6.0, -6.0),
        (-0.5,),
        (-6.0,),
    }
    expected = [np.logaddexp.reduce(logps) for logps in golden_logps]
    assert np.allclose(found.trajectories.rewards_E, expected, atol=1e-12)
    likeliest = AnsweringReward(
        ReadingGenerator(), WordPrompts(), RewardModel(RewardConfig()), Sampling()
    )
    (result,) = likeliest([table.questions[4]], [table.passages(4)[:1]])
    assert result.golden_logps is None
    assert result.total in (-0.5, -6.0)


def test_a_set_of_answers_is_refused_where_nothing_scores_it():
    with pytest.raises(ConfigError, match="uses answer_logp"):
        RewardModel(RewardConfig(functions=("exact_match",), golden_answers="all"))
    with pytest.raises(ValueError, match="tokens of one"):
        RewardConfig(functions=("answer_logp_mean",), golden_answers="all")
    with pytest.raises(ValueError, match=r"golden_answers 'all' .* 'sft'"):
        RunConfig.model_validate(
            {
                "reward": {"golden_answers": "all"},
                "algorithm": {"name": "sft"},
            }
        )
