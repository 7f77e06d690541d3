"""One DRO step on two candidates, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from stand_ins import make_table
from two_candidates import LIKELIER_FIRST, FixedLogits, drawn

from rlrag.algorithms import dro
from rlrag.config import DROConfig, EnvironmentConfig, TrainingConfig
from rlrag.errors import NonFiniteLossError, RewardError
from rlrag.selection.build import build_policy
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.dro.batch import RewardedBatch, importance_weights
from rlrag.training.learners.selector import SelectorLearner

BETA1 = 0.9  # AdamW's default; its first moment after one step is (1 - BETA1) * gradient
NAN = float("nan")
SETTINGS = {"batch_size": 1, "learning_rate": 0.1}


def first_moments(learner: SelectorLearner) -> dict[str, torch.Tensor]:
    """AdamW's means of the gradient, by parameter."""
    tensors = learner.optimiser.tensors()
    return {name: tensor for name, tensor in tensors.items() if name.endswith(":exp_avg")}


class Case:
    """A policy of fixed logits with its learner."""

    def __init__(
        self,
        logits: tuple[float, float] = (0.0, 0.0),
        initial: tuple[float, float] | None = None,
        num_steps: int = 10,
        workers: SingleWorker | None = None,
        training: dict[str, float] | None = None,
        max_grad_norm: float = 100.0,
        **dro_settings,
    ) -> None:
        self.scorer = FixedLogits(logits)
        self.dro = DROConfig(**{"num_samples": 2} | dro_settings)
        self.learner = SelectorLearner(
            PlackettLucePolicy(self.scorer, 1),
            PlackettLucePolicy(FixedLogits(initial or logits), 1),
            self.dro,
            TrainingConfig(**SETTINGS | (training or {})),
            num_steps,
            workers or SingleWorker(),
            weight_decay=0.0,
            max_grad_norm=max_grad_norm,
        )

    def update(self, experience: RewardedBatch, step: int = 0) -> dict[str, float]:
        return self.learner.update(experience, importance_weights(experience, self.dro), step)

    @property
    def gradient(self) -> list[float]:
        """Of the loss, at the only step that was taken."""
        [moment] = first_moments(self.learner).values()
        return (moment / (1 - BETA1)).tolist()


def test_a_step_raises_the_logit_of_the_better_candidate():
    """With p = (1/2, 1/2) and c = w - 1/2 = (1/4, -1/4) the gradient of L is (-1/4, 1/4).

    d log p(0) / ds = (1/2, -1/2) and d log p(1) / ds = (-1/2, 1/2), so that
    dL/ds = -(1/4 (1/2, -1/2) - 1/4 (-1/2, 1/2)). AdamW's first step is the rate times its sign.
    """
    case = Case()
    metrics = case.update(drawn(LIKELIER_FIRST))
    assert case.gradient == pytest.approx([-0.25, 0.25], rel=1e-6)
    assert case.scorer.logits_N.tolist() == pytest.approx([0.1, -0.1], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(0.25 * math.sqrt(2))
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-7)  # c sums to 0 and both log p are equal
    assert metrics["policy_entropy"] == pytest.approx(math.log(2))
    assert metrics["kl_to_initial"] == 0.0
    assert metrics["learning_rate"] == 0.1


def test_without_a_baseline_the_weights_themselves_multiply():
    """dL/ds = -(3/4 (1/2, -1/2) + 1/4 (-1/2, 1/2)) = (-1/4, 1/4), and L = log 2."""
    case = Case(baseline="none")
    metrics = case.update(drawn(LIKELIER_FIRST))
    assert case.gradient == pytest.approx([-0.25, 0.25], rel=1e-6)
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_raw_weights_are_probabilities_over_m():
    """w = (0.3, 0.1) / 2, so dL/ds = -(0.15 (1/2, -1/2) + 0.05 (-1/2, 1/2)) = (-0.05, 0.05)."""
    case = Case(weighting="raw", baseline="none")
    case.update(drawn(LIKELIER_FIRST))
    assert case.gradient == pytest.approx([-0.05, 0.05], rel=1e-6)


def test_leaving_one_out_subtracts_the_other_samples_likelihood():
    """c = (0.3 - 0.1, 0.1 - 0.3) / 2, so dL/ds = -(0.1 (1/2, -1/2) - 0.1 (-1/2, 1/2))."""
    case = Case(weighting="raw", baseline="leave_one_out")
    case.update(drawn(LIKELIER_FIRST))
    assert case.gradient == pytest.approx([-0.1, 0.1], rel=1e-6)


def test_the_temperature_flattens_the_weights():
    """At temperature 2 the weights are sqrt(3) / (sqrt(3) + 1) and the rest."""
    case = Case(reward_temperature=2.0)
    case.update(drawn(LIKELIER_FIRST))
    slope = math.sqrt(3) / (math.sqrt(3) + 1) - 0.5
    assert case.gradient == pytest.approx([-slope, slope], rel=1e-6)


def test_equal_rewards_move_nothing_under_the_mean_baseline():
    case = Case(logits=(0.3, -0.2))
    before = case.scorer.logits_N.tolist()
    metrics = case.update(drawn([[-2.0, -2.0]]))
    assert metrics["grad_norm"] == 0.0
    assert metrics["loss"] == 0.0
    assert case.scorer.logits_N.tolist() == before


def test_a_question_without_signal_leaves_the_gradient_of_the_others():
    alone, both = Case(), Case(training={"batch_size": 2})
    alone.update(drawn(LIKELIER_FIRST))
    both.update(drawn([*LIKELIER_FIRST, [-2.0, -2.0]]))
    assert both.gradient == pytest.approx([value / 2 for value in alone.gradient], rel=1e-6)


def test_duplicates_count_with_their_multiplicity():
    """Samples 0, 0, 1 with equal rewards: c = w - 1/3 = 0, yet without a baseline 0 gains."""
    case = Case(num_samples=3, baseline="none")
    case.update(drawn([[-1.0, -1.0, -1.0]], [[0, 0, 1]]))
    slope = (2 / 3 - 1 / 3) / 2
    assert case.gradient == pytest.approx([-slope, slope], rel=1e-5)


@pytest.mark.parametrize("clip_ratio", [None, 0.2])
@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_a_repeated_selection_counts_each_time(baseline, clip_ratio):
    """The gradient is autograd's on the same objective, sample by sample."""
    experience = drawn([[-1.0, -1.0, -3.0, -1.0]], [[0, 0, 1, 0]], behaviour=(0.58, 0.42))
    case = Case((0.4, 0.1), num_samples=4, baseline=baseline, clip_ratio=clip_ratio)
    metrics = case.update(experience)
    logits = torch.tensor([0.4, 0.1], requires_grad=True)
    logp_M = logits.log_softmax(0)[torch.tensor([0, 0, 1, 0])]
    odds = [math.exp(-1.0)] * 4
    odds[2] = math.exp(-3.0)
    loss = torch.zeros(())
    for i, behaviour in enumerate([0.58, 0.58, 0.42, 0.58]):
        weight = odds[i] / sum(odds) - (0.25 if baseline == "mean" else 0.0)
        ratio = (logp_M[i] - math.log(behaviour)).exp()
        loss = loss - weight * (logp_M[i] if clip_ratio is None else ratio)
    loss.backward()
    assert (ratio - 1).abs() < 0.2
    assert case.gradient == pytest.approx(logits.grad.tolist(), rel=1e-4, abs=1e-7)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("behaviour", "loss", "slope"),
    [
        # rho = (5/6, 5/4): neither is clipped, as c < 0 is bounded from below alone
        ((0.6, 0.4), -(0.25 * 5 / 6 - 0.25 * 5 / 4), 0.125 * 5 / 6 + 0.125 * 5 / 4),
        # rho = (5/4, 5/6): the first is beyond 1.2 and has no gradient
        ((0.4, 0.6), -(0.25 * 1.2 - 0.25 * 5 / 6), 0.125 * 5 / 6),
        # rho = (2, 2/3): both are beyond
        ((0.25, 0.75), -(0.25 * 1.2 - 0.25 * 0.8), 0.0),
    ],
)
def test_the_clipped_ratio_bounds_a_step_on_old_samples(behaviour, loss, slope):
    """c = (1/4, -1/4), p = (1/2, 1/2), e = 0.2: L = -sum min(rho c, clip(rho) c).

    d rho_i / ds = rho_i d log p(i) / ds, so what is not clipped gives rho / 8 to each logit.
    """
    case = Case(clip_ratio=0.2)
    metrics = case.update(drawn(LIKELIER_FIRST, behaviour=behaviour))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert case.gradient == pytest.approx([-slope, slope], rel=1e-5, abs=1e-8)


def test_on_policy_the_clipped_gradient_is_that_of_the_plain_loss():
    plain, clipped = Case((0.4, 0.1)), Case((0.4, 0.1), clip_ratio=0.2)
    now = tuple(torch.tensor([0.4, 0.1]).softmax(0).tolist())
    for case in (plain, clipped):
        case.update(drawn(LIKELIER_FIRST, behaviour=now))
    assert clipped.gradient == pytest.approx(plain.gradient, rel=1e-5)


# p = (3/4, 1/4), and four draws in exactly these proportions: every estimate is an expectation.
THREE_TO_ONE = (math.log(3.0), 0.0)
EXACT_DRAWS = drawn([[-1.0] * 4], [[0, 0, 0, 1]], behaviour=(0.75, 0.25))


def test_the_entropy_term_follows_the_gradient_of_the_entropy():
    """Equal rewards leave that term alone: the loss falls as 0.3 H(p) rises."""
    case = Case(THREE_TO_ONE, num_samples=4, entropy_weight=0.3)
    metrics = case.update(EXACT_DRAWS)
    logits = torch.tensor(THREE_TO_ONE, requires_grad=True)
    probability = logits.softmax(0)
    entropy = -(probability * probability.log()).sum()
    (-0.3 * entropy).backward()
    assert case.gradient == pytest.approx(logits.grad.tolist(), rel=1e-5)
    assert case.gradient[0] > 0 > case.gradient[1]  # towards equal logits
    assert metrics["policy_entropy"] == pytest.approx(entropy.item(), rel=1e-6)


def test_the_kl_term_follows_the_gradient_of_the_divergence():
    """Equal rewards leave that term alone: the loss rises with 0.3 KL(p || p0)."""
    case = Case(THREE_TO_ONE, initial=(-0.5, 0.5), num_samples=4, kl_weight=0.3)
    metrics = case.update(EXACT_DRAWS)
    logits = torch.tensor(THREE_TO_ONE, requires_grad=True)
    first = torch.tensor([-0.5, 0.5]).log_softmax(0)
    logp = logits.log_softmax(0)
    divergence = (logp.exp() * (logp - first)).sum()
    (0.3 * divergence).backward()
    assert case.gradient == pytest.approx(logits.grad.tolist(), rel=1e-5)
    assert metrics["kl_to_initial"] == pytest.approx(divergence.item(), rel=1e-5)


@pytest.mark.parametrize("clip_ratio", [None, 0.2])
def test_in_later_passes_both_terms_follow_the_policy_as_it_has_become(clip_ratio):
    """Drawn from (3/4, 1/4), which has since become (2/5, 3/5); the ratios correct for that."""
    now = torch.tensor([math.log(0.4), math.log(0.6)], requires_grad=True)
    settings = {"num_samples": 4, "clip_ratio": clip_ratio, "entropy_weight": 0.2}
    case = Case(tuple(now.tolist()), initial=(-0.5, 0.5), kl_weight=0.3, **settings)
    metrics = case.update(EXACT_DRAWS)
    logp, first = now.log_softmax(0), torch.tensor([-0.5, 0.5]).log_softmax(0)
    divergence = (logp.exp() * (logp - first)).sum()
    (0.3 * divergence + 0.2 * (logp.exp() * logp).sum()).backward()
    assert case.gradient == pytest.approx(now.grad.tolist(), rel=1e-5)
    assert metrics["kl_to_initial"] == pytest.approx(divergence.item(), rel=1e-5)


def test_the_kl_term_holds_a_policy_that_uses_its_samples_many_times():
    """Sample weights equal to the probabilities make every estimate an expectation."""
    found = []
    for kl_weight in (0.0, 10.0):
        case = Case(num_steps=1000, baseline="none", passes=20, kl_weight=kl_weight)
        half = math.log(0.5)
        for step in range(20):
            case.update(drawn(LIKELIER_FIRST, log_weights=[[half, half]]), step)
        logp = case.scorer.logits_N.detach().log_softmax(0)
        found.append((logp.exp() * (logp - half)).sum().item())
    assert found[0] > 0.1
    # L = -3/4 log p - 1/4 log(1 - p) + 10 KL(p || 1/2) is smallest at p = .512
    assert found[1] < 0.002


def test_by_default_neither_term_acts():
    case = Case(THREE_TO_ONE, initial=(-0.5, 0.5), num_samples=4)
    assert case.update(EXACT_DRAWS)["grad_norm"] == pytest.approx(0.0, abs=1e-7)


def test_a_tempered_proposal_is_corrected_by_the_sample_weights():
    """Drawn evenly from p = (3/4, 1/4): a = (3/4, 1/4), w = (9/10, 1/10), c = w - a."""
    log_weights = [[math.log(0.75), math.log(0.25)]]
    case = Case(THREE_TO_ONE)
    case.update(drawn(LIKELIER_FIRST, behaviour=(0.75, 0.25), log_weights=log_weights))
    # d log p(0) / ds = (1/4, -1/4), d log p(1) / ds = (-3/4, 3/4), c = (0.15, -0.15)
    assert case.gradient == pytest.approx([-0.15, 0.15], rel=1e-5)


def test_padding_counts_for_nothing():
    """Draws without replacement may leave rows that repeat another one, with weight 0."""
    half = math.log(0.5)
    padded = drawn([[*LIKELIER_FIRST[0], -5.0]], [[0, 1, 1]], log_weights=[[half, half, -np.inf]])
    case, plain = Case(num_samples=3, replacement=False), Case()
    found, expected = case.update(padded), plain.update(drawn(LIKELIER_FIRST))
    assert case.gradient == pytest.approx(plain.gradient, rel=1e-6)
    assert found == pytest.approx(expected, abs=1e-7)


def test_the_gradient_is_clipped_to_its_global_norm_and_reported_unclipped():
    case = Case(max_grad_norm=0.01)
    metrics = case.update(drawn(LIKELIER_FIRST))
    assert metrics["grad_norm"] == pytest.approx(0.25 * math.sqrt(2))
    each = 0.01 / math.sqrt(2)
    assert case.gradient == pytest.approx([-each, each], rel=1e-5)


@pytest.mark.parametrize(
    ("warmup_steps", "rates"),
    [
        (0, {0: 0.1, 5: 0.05, 9: 0.01}),
        (4, {0: 0.025, 1: 0.05, 3: 0.1, 4: 0.1, 7: 0.05, 9: 0.1 / 6}),
        (10, {0: 0.01, 9: 0.1}),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(warmup_steps, rates):
    case = Case(num_steps=10, training={"warmup_steps": warmup_steps})
    found = {step: case.update(drawn(LIKELIER_FIRST), step)["learning_rate"] for step in rates}
    assert found == pytest.approx(rates)


def test_a_failed_reward_is_left_out():
    """The valid samples 0, 1 of three give what two samples give."""
    failed = (RewardError("no reward"),)
    case, two = Case(num_samples=3), Case()
    case.update(drawn([[*LIKELIER_FIRST[0], NAN]], [[0, 1, 1]], failed))
    two.update(drawn(LIKELIER_FIRST))
    assert case.gradient == pytest.approx(two.gradient, rel=1e-6)


@pytest.mark.parametrize("logit", [float("inf"), NAN])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(logit):
    case = Case(logits=(logit, 0.0))
    with pytest.raises(NonFiniteLossError, match=r"gradient of step 4 is not finite; lower"):
        case.update(drawn(LIKELIER_FIRST), step=4)
    assert case.learner.optimiser.tensors() == {}
    assert case.scorer.logits_N[1].item() == 0.0


class TwoEqualWorkers(SingleWorker):
    """A group of two in which the other worker always has what this one has."""

    size = 2

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def test_two_workers_with_half_a_batch_each_take_the_step_of_one():
    """Two shares of one question each, alike, are a batch with that question twice."""
    whole = Case(training={"batch_size": 2}, entropy_weight=0.1, kl_weight=0.1, initial=(0.5, 0.0))
    one = whole.update(drawn(LIKELIER_FIRST * 2))
    share = Case(
        workers=TwoEqualWorkers(),
        training={"batch_size": 2},
        entropy_weight=0.1,
        kl_weight=0.1,
        initial=(0.5, 0.0),
    )
    two = share.update(drawn(LIKELIER_FIRST))
    assert torch.equal(whole.scorer.logits_N, share.scorer.logits_N)
    assert one == pytest.approx(two, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("num_selected", "micro_batch"), [(1, None), (2, None), (2, 1), (2, 2), (2, 5)]
)
def test_a_step_on_the_real_policy_follows_the_gradient_of_the_loss(
    small_config, tmp_path: Path, num_selected, micro_batch
):
    """The first moments are those of autograd on -sum c log p, written out with plain softmax."""
    table = make_table(3)
    environment = EnvironmentConfig(num_selected=num_selected)
    arguments = (small_config.selector, environment, 2, table.vector_size, tmp_path, 0)
    policy, initial, plain = (build_policy(*arguments) for _ in range(3))
    policy.micro_batch = micro_batch
    positions_BMK = np.array([[[0, 1], [3, 0]], [[1, 2], [1, 4]], [[4, 3], [2, 0]]])
    rewards_BM = np.array([[-1.0, -3.0], [-2.0, -2.5], [-6.0, -0.5]])
    config = DROConfig(num_samples=2)
    learner = SelectorLearner(
        policy,
        initial,
        config,
        TrainingConfig(batch_size=3),
        10,
        SingleWorker(),
        max_grad_norm=1e9,
    )
    experience = episodes.experience(table, range(3), positions_BMK[..., :num_selected], rewards_BM)
    learner.update(experience, importance_weights(experience, config), step=0)
    logits_BKN = plain.scorer(table.batch(range(3)))
    loss = torch.zeros(())
    for question in range(3):
        odds = np.exp(rewards_BM[question])
        for sample in range(2):
            advantage = odds[sample] / odds.sum() - 0.5
            left = list(range(5))
            for pick, place in enumerate(positions_BMK[question, sample, :num_selected]):
                strengths = logits_BKN[question, pick].exp()
                loss = loss - advantage * (strengths[place] / strengths[left].sum()).log() / 3
                left.remove(int(place))
    loss.backward()
    moments = first_moments(learner).values()
    for moment, reference in zip(moments, plain.parameters(), strict=True):
        assert torch.allclose(moment / (1 - BETA1), reference.grad, atol=1e-7)


def test_what_multiplies_is_what_the_mathematics_says():
    """With all terms on, the gradient is that of sum c log p with c from `rlrag.algorithms.dro`."""
    experience = drawn(
        [[-1.0, -2.0, NAN, -1.0]], [[0, 1, 1, 0]], (RewardError("none"),), (0.75, 0.25)
    )
    case = Case(THREE_TO_ONE, initial=(0.2, 0.0), num_samples=4, entropy_weight=0.2, kl_weight=0.4)
    case.update(experience)
    rewards, logp = (
        torch.from_numpy(x).double()
        for x in (experience.rewards_BM, experience.behaviour_logp_BMT.sum(axis=2))
    )
    log_weights = torch.from_numpy(experience.log_weights_BM)
    first = torch.tensor([0.2, 0.0]).double().log_softmax(0)[torch.tensor([[0, 1, 1, 0]])]
    weights = dro.importance_weights(rewards, log_weights, 1.0, "self_normalised")
    total = (
        dro.coefficients(weights, log_weights, ~rewards.isnan(), "mean")
        + 0.2 * dro.entropy_coefficients(logp, logp, log_weights)
        + 0.4 * dro.kl_coefficients(logp, logp, first, log_weights)
    )[0]
    # d log p(0) / ds_0 = 1/4 and d log p(1) / ds_0 = -3/4
    slope = -float((total[0] + total[3]) / 4 - (total[1] + total[2]) * 3 / 4)
    assert case.gradient == pytest.approx([slope, -slope], rel=1e-5)
