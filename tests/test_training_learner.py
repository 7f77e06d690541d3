"""One DRO step on two candidates, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import make_table

from rlrag.config import DROConfig, TrainingConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import GenerationError, NonFiniteLossError, RewardError
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateBatch, CandidateTable
from rlrag.selection.build import build_policy
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.training.experience import Experience
from rlrag.training.learner import SelectorLearner
from rlrag.training.workers import SingleWorker

BETA1 = 0.9  # AdamW's default; its first moment after one step is (1 - BETA1) * gradient
NAN = float("nan")


class FixedLogits(torch.nn.Module):
    """The same two logits for every question: the smallest scorer that can be trained."""

    def __init__(self, logits: tuple[float, float]) -> None:
        super().__init__()
        self.logits_N = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        return self.logits_N.expand(len(batch), -1)


def two_candidates(num_questions: int = 2) -> CandidateTable:
    return CandidateTable(
        questions=tuple(Question(f"q{q}", "?", ("a",)) for q in range(num_questions)),
        corpus=MemoryCorpus([Passage("p0", "", "a"), Passage("p1", "", "b")]),
        rows_QN=np.tile(np.arange(2), (num_questions, 1)),
        scores_QNC=np.zeros((num_questions, 2, 1), dtype=np.float32),
        score_names=("bm25",),
        question_vectors_QD=np.zeros((num_questions, 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((2, 0), dtype=np.float32),
    )


def make_learner(
    logits: tuple[float, float] = (0.0, 0.0),
    dro: DROConfig | None = None,
    num_steps: int = 10,
    **training,
) -> tuple[FixedLogits, SelectorLearner]:
    settings = {"batch_size": 1, "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 100.0}
    scorer = FixedLogits(logits)
    learner = SelectorLearner(
        PlackettLucePolicy(scorer, 1),
        two_candidates(),
        dro or DROConfig(num_samples=2),
        TrainingConfig(**settings | training),
        num_steps,
        SingleWorker(),
    )
    return scorer, learner


def drawn(
    rewards: list[list[float]],
    positions: list[list[int]] | None = None,
    errors: tuple[RewardError, ...] = (),
) -> Experience:
    """Samples of each question with their rewards; by default one of each candidate."""
    rewards_BM = np.array(rewards, dtype=np.float64)
    positions = positions or [[0, 1]] * len(rewards)
    return Experience(
        question_rows=np.arange(len(rewards)),
        positions_BMK=np.array(positions)[..., None],
        behaviour_logp_BM=np.zeros_like(rewards_BM),
        rewards_BM=rewards_BM,
        terms_BM={"answer_logp": rewards_BM},
        policy_version=0,
        errors=errors,
    )


LIKELIER_FIRST = [[math.log(0.3), math.log(0.1)]]  # importance weights 3/4 and 1/4


def first_moment(scorer: FixedLogits, learner: SelectorLearner) -> list[float]:
    return learner.optimizer.state[scorer.logits_N]["exp_avg"].tolist()


def test_a_step_raises_the_logit_of_the_better_candidate():
    """With p = (1/2, 1/2) and c = w - 1/2 = (1/4, -1/4) the gradient of L is (-1/4, 1/4).

    d log p(0) / ds = (1/2, -1/2) and d log p(1) / ds = (-1/2, 1/2), so that
    dL/ds = -(1/4 (1/2, -1/2) - 1/4 (-1/2, 1/2)). AdamW's first step is the rate times its sign.
    """
    scorer, learner = make_learner()
    metrics = learner.update(drawn(LIKELIER_FIRST), step=0)
    assert first_moment(scorer, learner) == pytest.approx(
        [-0.25 * (1 - BETA1), 0.25 * (1 - BETA1)], rel=1e-6
    )
    assert scorer.logits_N.tolist() == pytest.approx([0.1, -0.1], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(0.25 * math.sqrt(2))
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-7)  # c sums to 0 and both log p are equal
    assert metrics["ess"] == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert metrics["weight_entropy"] == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )
    assert metrics["policy_entropy"] == pytest.approx(math.log(2))
    assert metrics["reward"] == pytest.approx((math.log(0.3) + math.log(0.1)) / 2)
    assert metrics["reward/answer_logp"] == metrics["reward"]
    assert metrics["zero_signal_share"] == metrics["duplicate_share"] == 0.0
    assert (metrics["num_rollouts"], metrics["num_failed"]) == (2.0, 0.0)
    assert metrics["learning_rate"] == 0.1


def test_without_a_baseline_the_weights_themselves_multiply():
    """dL/ds = -(3/4 (1/2, -1/2) + 1/4 (-1/2, 1/2)) = (-1/4, 1/4), and L = log 2."""
    scorer, learner = make_learner(dro=DROConfig(num_samples=2, baseline="none"))
    metrics = learner.update(drawn(LIKELIER_FIRST), step=0)
    assert first_moment(scorer, learner) == pytest.approx([-0.025, 0.025], rel=1e-6)
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_raw_weights_are_probabilities_over_m():
    """w = (0.3, 0.1) / 2, so dL/ds = -(0.15 (1/2, -1/2) + 0.05 (-1/2, 1/2)) = (-0.05, 0.05)."""
    dro = DROConfig(num_samples=2, weighting="raw", baseline="none")
    scorer, learner = make_learner(dro=dro)
    metrics = learner.update(drawn(LIKELIER_FIRST), step=0)
    assert first_moment(scorer, learner) == pytest.approx([-0.005, 0.005], rel=1e-6)
    assert metrics["ess"] == pytest.approx(1.6)


def test_the_temperature_flattens_the_weights():
    """At temperature 2 the weights are sqrt(3) / (sqrt(3) + 1) and the rest."""
    scorer, learner = make_learner(dro=DROConfig(num_samples=2, reward_temperature=2.0))
    learner.update(drawn(LIKELIER_FIRST), step=0)
    weight = math.sqrt(3) / (math.sqrt(3) + 1)
    slope = (1 - BETA1) * (weight - 0.5)
    assert first_moment(scorer, learner) == pytest.approx([-slope, slope], rel=1e-6)


def test_equal_rewards_move_nothing_under_the_mean_baseline():
    scorer, learner = make_learner(logits=(0.3, -0.2))
    before = scorer.logits_N.tolist()
    metrics = learner.update(drawn([[-2.0, -2.0]]), step=0)
    assert metrics["grad_norm"] == 0.0
    assert metrics["zero_signal_share"] == 1.0
    assert metrics["loss"] == 0.0
    assert scorer.logits_N.tolist() == before


def test_a_question_without_signal_leaves_the_gradient_of_the_others():
    alone, alone_learner = make_learner(batch_size=1)
    alone_learner.update(drawn(LIKELIER_FIRST), step=0)
    both, learner = make_learner(batch_size=2)
    metrics = learner.update(drawn([*LIKELIER_FIRST, [-2.0, -2.0]]), step=0)
    half = [value / 2 for value in first_moment(alone, alone_learner)]
    assert first_moment(both, learner) == pytest.approx(half, rel=1e-6)
    assert metrics["zero_signal_share"] == 0.5
    assert metrics["ess"] == pytest.approx((1.6 + 2.0) / 2)


def test_duplicates_count_with_their_multiplicity():
    """Samples 0, 0, 1 with equal rewards: c = w - 1/3 = 0, yet without a baseline 0 gains."""
    dro = DROConfig(num_samples=3, baseline="none")
    scorer, learner = make_learner(dro=dro)
    metrics = learner.update(drawn([[-1.0, -1.0, -1.0]], [[0, 0, 1]]), step=0)
    assert metrics["duplicate_share"] == pytest.approx(1 / 3)
    slope = (1 - BETA1) * (2 / 3 - 1 / 3) / 2
    assert first_moment(scorer, learner) == pytest.approx([-slope, slope], rel=1e-5)


def test_the_gradient_is_clipped_to_its_global_norm_and_reported_unclipped():
    scorer, learner = make_learner(max_grad_norm=0.01)
    metrics = learner.update(drawn(LIKELIER_FIRST), step=0)
    assert metrics["grad_norm"] == pytest.approx(0.25 * math.sqrt(2))
    each = 0.01 / math.sqrt(2) * (1 - BETA1)
    assert first_moment(scorer, learner) == pytest.approx([-each, each], rel=1e-5)


@pytest.mark.parametrize(
    ("warmup_steps", "rates"),
    [
        (0, {0: 0.1, 5: 0.05, 9: 0.01}),
        (4, {0: 0.025, 1: 0.05, 3: 0.1, 4: 0.1, 7: 0.05, 9: 0.1 / 6}),
        (10, {0: 0.01, 9: 0.1}),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(warmup_steps, rates):
    _, learner = make_learner(num_steps=10, warmup_steps=warmup_steps)
    found = {step: learner.update(drawn(LIKELIER_FIRST), step)["learning_rate"] for step in rates}
    assert found == pytest.approx(rates)


def test_a_failed_reward_is_left_out_and_counted():
    """The valid samples 0, 1 of three give what two samples give."""
    failed = (RewardError("no reward"),)
    scorer, learner = make_learner(dro=DROConfig(num_samples=3), max_failed_share=0.4)
    metrics = learner.update(drawn([[*LIKELIER_FIRST[0], NAN]], [[0, 1, 1]], failed), step=0)
    two, two_learner = make_learner()
    expected = two_learner.update(drawn(LIKELIER_FIRST), step=0)
    assert first_moment(scorer, learner) == pytest.approx(first_moment(two, two_learner), rel=1e-6)
    assert (metrics["num_failed"], metrics["num_rollouts"]) == (1.0, 3.0)
    assert metrics["reward"] == pytest.approx(expected["reward"])
    assert metrics["ess"] == pytest.approx(expected["ess"])


def test_too_many_failed_rewards_end_the_run_before_the_step():
    scorer, learner = make_learner(max_failed_share=0.3)
    failed = (RewardError("reward f for question 'q0': it raised"),)
    with pytest.raises(GenerationError) as caught:
        learner.update(drawn([[-1.0, NAN]], errors=failed), step=0)
    assert "1 of 2 rewards" in str(caught.value)
    assert "max_failed_share 0.3" in str(caught.value)
    assert "the first: reward f for question 'q0': it raised" in str(caught.value)
    assert scorer.logits_N.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("logit", [float("inf"), NAN])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(logit):
    scorer, learner = make_learner(logits=(logit, 0.0))
    with pytest.raises(NonFiniteLossError, match=r"gradient of step 4 is not finite; lower"):
        learner.update(drawn(LIKELIER_FIRST), step=4)
    assert not learner.optimizer.state
    assert scorer.logits_N[1].item() == 0.0


class TwoEqualWorkers(SingleWorker):
    """A group of two in which the other worker always has what this one has."""

    size = 2

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def test_two_workers_with_half_a_batch_each_take_the_step_of_one():
    """Two shares of one question each, alike, are a batch with that question twice."""
    whole, whole_learner = make_learner(batch_size=2)
    one = whole_learner.update(drawn(LIKELIER_FIRST * 2), step=0)
    share = FixedLogits((0.0, 0.0))
    share_learner = SelectorLearner(
        PlackettLucePolicy(share, 1),
        two_candidates(),
        DROConfig(num_samples=2),
        TrainingConfig(batch_size=2, learning_rate=0.1, weight_decay=0.0, max_grad_norm=100.0),
        10,
        TwoEqualWorkers(),
    )
    two = share_learner.update(drawn(LIKELIER_FIRST), step=0)
    assert torch.equal(whole.logits_N, share.logits_N)
    assert one == pytest.approx(two, rel=1e-6, abs=1e-7)


def test_a_step_on_the_real_policy_follows_the_gradient_of_the_loss(small_config, tmp_path: Path):
    """The first moments are those of autograd on -sum c log p, written out with plain softmax."""
    table = make_table(3)
    arguments = (small_config.selector, 1, 2, table.vector_size, tmp_path, 0)
    policy, plain = build_policy(*arguments), build_policy(*arguments)
    positions_BM = np.array([[0, 3], [1, 1], [4, 2]])
    rewards_BM = np.array([[-1.0, -3.0], [-2.0, -2.0], [-6.0, -0.5]])
    learner = SelectorLearner(
        policy,
        table,
        DROConfig(num_samples=2),
        TrainingConfig(batch_size=3, max_grad_norm=1e9),
        10,
        SingleWorker(),
    )
    learner.update(drawn(rewards_BM.tolist(), positions_BM.tolist()), step=0)
    probabilities_BN = plain.scorer(table.batch(range(3))).softmax(dim=1)
    loss = torch.zeros(())
    for question in range(3):
        odds = np.exp(rewards_BM[question])
        for sample in range(2):
            advantage = odds[sample] / odds.sum() - 0.5
            picked = probabilities_BN[question, positions_BM[question, sample]]
            loss = loss - advantage * picked.log() / 3
    loss.backward()
    for trained, reference in zip(policy.parameters(), plain.parameters(), strict=True):
        moment = learner.optimizer.state[trained]["exp_avg"] / (1 - BETA1)
        assert torch.allclose(moment, reference.grad, atol=1e-7)
