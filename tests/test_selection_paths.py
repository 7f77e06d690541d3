"""Policies over slots: identities of whole trajectories, and a task that needs a hop."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import hop_cases as cases
import numpy as np
import pytest
import torch
from hop_cases import Anew, Answers, Edges, OnTitle, make_env, ring
from tiny_models import save_tiny_encoder

from rlrag.algorithms import dro
from rlrag.config import HOPS, EnvironmentConfig, HopSettings, SelectorConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.document_hops import DocumentHopsVectorEnv
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import play
from rlrag.errors import ConfigError, EpisodeError
from rlrag.records import Passage, Question, RewardResult
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.build import build_policy
from rlrag.selection.protocol import Actions, Draws
from rlrag.selection.slot_features import GLOBAL_FEATURES, SLOT_FEATURES
from rlrag.selection.slot_policy import SlotPolicy
from rlrag.training.dro.stop_rewards import StopRewards

F, G = len(SLOT_FEATURES), len(GLOBAL_FEATURES)


def hop_environment(name: str, **parts) -> EnvironmentConfig:
    """Registers the environment with these parts under a name of its own."""

    def make(num_envs, autoreset_mode, candidates, reward, num_selected):
        return DocumentHopsVectorEnv(
            num_envs,
            candidates,
            reward,
            num_selected,
            autoreset_mode=autoreset_mode,
            **parts,
        )

    gym.registry.pop(f"tests/{name}-v0", None)
    gym.register(f"tests/{name}-v0", vector_entry_point=make)
    return EnvironmentConfig(id=f"tests/{name}-v0", num_selected=2)


SMALL = {
    "edges": ring(),
    "writers": (Anew(), OnTitle()),
    "settings": {"num_first": 2, "num_slots": 4, "num_revealed": 1, "num_hits": 1},
}


def small_parts():
    """A task with few trajectories: two first hits, two picks, one search, four slots."""
    settings = SMALL["settings"] | {"max_queries": 1}
    answers = Answers({f"Title {i}": [(i + 6) % 12] for i in range(12)})
    return {**SMALL, "retriever": answers, "settings": settings}


def all_trajectories():
    """Every sequence of allowed actions of question 0, shape (E, T), -1 beyond the end."""
    env = make_env(num_selected=2, **small_parts())
    found, open_paths = [], [[]]
    while open_paths:
        path = open_paths.pop()
        result = env.reset(options={"question_row": 0})
        for action in path:
            result = env.step(action)
        if len(result) == 5 and result[2]:
            found.append(path)
        else:
            open_paths += [[*path, int(a)] for a in np.flatnonzero(result[-1]["action_mask"])]
    longest = max(map(len, found))
    return np.array([path + [-1] * (longest - len(path)) for path in found])


class Given:
    """Takes given actions."""

    def __init__(self, actions_ET):
        self.actions_ET = actions_ET

    def act(self, observations, infos, turn):
        nothing_E = np.zeros(len(self.actions_ET))
        return Actions(self.actions_ET[:, turn.step], nothing_E, nothing_E)


class Recall:
    """The share of a question's gold passages that were picked, less a cost for each pick."""

    def __call__(self, questions, selections):
        results = []
        for question, passages in zip(questions, selections, strict=True):
            gold = set(question.gold_ids)
            recall = len(gold & {passage.id for passage in passages}) / max(len(gold), 1)
            results.append(RewardResult(recall - 0.05 * len(passages), {"recall": recall}))
        return results


@pytest.fixture(scope="module")
def enumerated():
    """All trajectories of the small task, as the environment played them."""
    actions_ET = all_trajectories()
    config = hop_environment("Small", **small_parts())
    rows = np.zeros(len(actions_ET), dtype=np.int64)
    batch = open_episodes(config, len(rows), cases.make_table(), cases.OrderReward())
    found = play(batch, Given(actions_ET), rows)
    assert len(found) > 20
    assert ((found.actions_ET >= 4) & (found.actions_ET < 8)).any()  # searches among them
    return found


def small_policy(hidden_size: int = 5, projection_size: int = 2) -> SlotPolicy:
    """With weights that are all different from zero, in float64."""
    policy = SlotPolicy(F, G, 2, hidden_size, 2, projection_size).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return policy


@pytest.mark.parametrize(("hidden_size", "projection_size"), [(0, 0), (5, 0), (5, 2)])
def test_the_probabilities_of_all_trajectories_sum_to_one(enumerated, hidden_size, projection_size):
    policy = small_policy(hidden_size, projection_size)
    logp_ET = policy.log_prob(enumerated)
    assert logp_ET.shape == enumerated.actions_ET.shape
    assert not logp_ET[torch.from_numpy(~enumerated.acts_ET)].any()
    assert logp_ET.sum(dim=1).exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_the_gradient_of_dro_over_all_trajectories_is_that_of_the_log_mean(enumerated):
    policy, temperature = small_policy(), 0.7
    rewards_BM = torch.from_numpy(enumerated.rewards_E)[None]
    logp_BM = policy.log_prob(enumerated).sum(dim=1)[None]
    log_weights_BM = logp_BM.detach()
    weights_BM = dro.importance_weights(rewards_BM, log_weights_BM, temperature, "self_normalised")
    valid_BM = dro.valid_samples(rewards_BM, log_weights_BM)
    coefficients_BM = dro.coefficients(weights_BM, log_weights_BM, valid_BM, "mean")
    parameters = list(policy.parameters())
    ours = torch.autograd.grad(
        dro.selector_loss(logp_BM, coefficients_BM).sum(), parameters, retain_graph=True
    )
    exact = torch.autograd.grad(-(logp_BM + rewards_BM / temperature).logsumexp(dim=1), parameters)
    assert any(gradient.abs().max() > 1e-3 for gradient in exact)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.fixture(scope="module")
def stop_rewards(enumerated):
    config = hop_environment("Small", **small_parts())
    return StopRewards(config, cases.make_table(), cases.OrderReward()).of(enumerated)


def test_what_stopping_is_worth_is_what_the_environment_gives_for_it(enumerated, stop_rewards):
    env = make_env(num_selected=2, reward=cases.OrderReward(), **small_parts())
    stop = int(env.action_space.n) - 1
    for actions, acts, rewards in zip(
        enumerated.actions_ET.tolist(), enumerated.acts_ET, stop_rewards, strict=True
    ):
        assert np.isnan(rewards[~acts]).all()
        for step in np.flatnonzero(acts).tolist():
            env.reset(options={"question_row": 0})
            for action in [*actions[:step], stop]:
                _, reward, *_ = env.step(action)
            assert rewards[step] == pytest.approx(reward)
    assert set(stop_rewards[enumerated.acts_ET]) == {0.0, 1.0}


def test_each_reward_of_stopping_is_asked_for_once(enumerated):
    asked = []

    class Asked(cases.OrderReward):
        def __call__(self, questions, selections):
            asked.append(len(selections))
            return super().__call__(questions, selections)

    config = hop_environment("Small", **small_parts())
    StopRewards(config, cases.make_table(), Asked()).of(enumerated)
    beginnings = {
        tuple(actions[:step])
        for actions, acts in zip(enumerated.actions_ET.tolist(), enumerated.acts_ET, strict=True)
        for step in np.flatnonzero(acts).tolist()
    }
    assert sum(asked) == len(beginnings)


@pytest.mark.parametrize("known", [True, False])
def test_the_prefix_baseline_leaves_the_gradient_over_all_trajectories(
    enumerated, stop_rewards, known
):
    policy, temperature = small_policy(), 0.7
    rewards_BM = torch.from_numpy(enumerated.rewards_E)[None]
    before_BMT = torch.from_numpy(stop_rewards)[None]
    if not known:
        before_BMT = before_BMT.clone()
        before_BMT[:, :, 0] = float("nan")  # stopping at once is not allowed
    logp_BMT = policy.log_prob(enumerated)[None]
    logp_BM = logp_BMT.sum(dim=2)
    found_BMT = dro.prefix_coefficients(rewards_BM, before_BMT, logp_BM.detach(), temperature)
    acts_BMT = torch.from_numpy(enumerated.acts_ET)[None]
    parameters = list(policy.parameters())
    ours = torch.autograd.grad(
        dro.selector_loss(logp_BMT, torch.where(acts_BMT, found_BMT, 0.0)).sum(),
        parameters,
        retain_graph=True,
    )
    worth_M = (enumerated.rewards_E / temperature, before_BMT[0].numpy() / temperature)
    highest_M = np.maximum(worth_M[0], np.nan_to_num(worth_M[1], nan=-np.inf).max(axis=1))
    total = float((logp_BM[0].exp().detach().numpy() * np.exp(highest_M)).sum())
    exact = torch.autograd.grad(
        -(logp_BM.exp() * (rewards_BM / temperature).exp()).sum() / total, parameters
    )
    assert any(gradient.abs().max() > 1e-3 for gradient in exact)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_one_sample_gives_no_gradient(enumerated):
    policy = small_policy()
    logp_BM = policy.log_prob(enumerated.of([7])).sum(dim=1)[None]
    rewards_BM, log_weights_BM = torch.tensor([[0.3]]), torch.zeros(1, 1)
    weights_BM = dro.importance_weights(rewards_BM, log_weights_BM, 0.2, "self_normalised")
    valid_BM = dro.valid_samples(rewards_BM, log_weights_BM)
    coefficients_BM = dro.coefficients(weights_BM, log_weights_BM, valid_BM, "mean")
    dro.selector_loss(logp_BM, coefficients_BM).sum().backward()
    assert all(not parameter.grad.any() for parameter in policy.parameters())


def test_permuting_slots_permutes_their_logits(enumerated):
    policy = small_policy()
    shown = {name: array.copy() for name, array in enumerated.observations[1].items()}
    order = np.array([2, 0, 3, 1])
    other = dict(shown)
    for name in ("slot_features", "slot_embeddings", "filled", "picked"):
        other[name] = shown[name][:, order]
    place_of = np.append(np.argsort(order), 4)  # where each slot went; 4 is "none yet"
    other["order"] = place_of[shown["order"]]
    ours, theirs = policy.logits(shown), policy.logits(other)
    torch.testing.assert_close(ours[:, order], theirs[:, :4])
    searches = [each[:, 4:-1].reshape(-1, 2, 2) for each in (ours, theirs)]
    there = torch.from_numpy(shown["order"] < 4)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(searches[0][there], searches[1][there])
    torch.testing.assert_close(ours[:, -1], theirs[:, -1])


def test_draws_are_those_of_the_probabilities_and_carry_their_ratio():
    """Of the first action: shares, log-probabilities, and weights of a flatter proposal."""
    config = hop_environment("Small", **small_parts())
    policy, num_samples = small_policy(), 400
    batch = open_episodes(config, num_samples, cases.make_table(), cases.OrderReward())
    draws = Draws([[3]], num_samples, temperature=2.0)
    found = play(batch, policy, np.array([0]), draws)
    np.testing.assert_allclose(
        policy.log_prob(found).detach().numpy(), found.logp_ET, rtol=0, atol=1e-9
    )
    weights_E = np.exp(found.log_weights_E)
    assert weights_E.sum() == pytest.approx(1.0, abs=0.15)
    mask_A = torch.from_numpy(found.observations[0]["action_mask"][0].astype(bool))
    logits_A = policy.logits(found.observations[0])[0].detach()
    proposal_A = (logits_A / 2).masked_fill(~mask_A, -torch.inf).softmax(0).numpy()
    shares_A = np.bincount(found.actions_ET[:, 0], minlength=len(proposal_A)) / num_samples
    np.testing.assert_allclose(shares_A, proposal_A, atol=0.08)
    again = play(batch, policy, np.array([0]), draws)
    np.testing.assert_array_equal(found.actions_ET, again.actions_ET)


def test_untrained_it_takes_every_allowed_action_equally(enumerated):
    policy = SlotPolicy(F, G, 2, 5, 2, 2)
    assert not policy.logits(enumerated.observations[1]).any()


def test_before_training_each_rank_costs_the_prior(enumerated):
    """The first slots are ranks 1 and 2 of the question, the third is rank 1 of a hop or search."""
    policy = SlotPolicy(F, G, 2, 5, prior_scale=0.5)
    shown = enumerated.observations[1]
    found = shown["filled"].astype(bool)[:, :3].all(axis=1)
    assert found.any()
    logits = policy.logits(shown)[torch.from_numpy(found), :3]
    assert logits[0].tolist() == pytest.approx([0.0, -0.5, 0.0])


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A policy that reads texts, with an output that is not zero."""
    config = SelectorConfig(
        kind="slot_texts",
        may_stop=True,
        max_tokens=32,
        model=str(save_tiny_encoder(tmp_path_factory.mktemp("encoder"))),
    )
    environment = EnvironmentConfig(
        id=HOPS, num_selected=2, hops=HopSettings(writers=("title", "text"))
    )
    policy = build_policy(config, environment, 1, 2, Path(), 0).double()
    policy.prior_scale = 0.0
    with torch.no_grad():
        policy.reader.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    return policy


def test_a_policy_that_reads_gives_each_slot_what_its_text_is_worth(enumerated, reading):
    observations, infos = enumerated.observations[1], enumerated.infos[1]
    logits_EN = reading.logits(observations, infos)[:, :4]
    for episode in (0, len(enumerated) - 1):
        passages, question = infos["passages"][episode], infos["question"][episode]
        alone = [reading.reader([(question, passage)]).item() for passage in passages]
        found = logits_EN[episode, : len(passages)].tolist()
        assert found == pytest.approx(alone, abs=1e-5)
        assert len(set(np.round(alone, 6))) == len(set(passages))
    assert not logits_EN[~observations["filled"].astype(bool)].any()


def test_a_policy_that_reads_is_a_distribution_and_learns_to_read(enumerated, reading):
    logp_ET = reading.log_prob(enumerated)
    assert logp_ET.sum(dim=1).exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    logp_ET[:5].sum().backward()
    gradients = [parameter.grad for parameter in reading.reader.encoder.model.parameters()]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(EpisodeError, match="does not show question and passages"):
        reading.logits(enumerated.observations[0], {})


def test_what_does_not_fit_is_named(enumerated):
    with pytest.raises(ConfigError, match="no embeddings to project"):
        SlotPolicy(F, G, projection_size=3)
    with pytest.raises(EpisodeError, match="has 9 actions, but this policy knows 7"):
        SlotPolicy(F, G, num_writers=1).logits(enumerated.observations[0])
    shown = {"action_mask": enumerated.observations[0]["action_mask"]}
    with pytest.raises(EpisodeError, match="does not show slot_features, filled"):
        SlotPolicy(F, G, 2).logits(shown)
    batch = open_episodes(
        hop_environment("Small", **small_parts()), 2, cases.make_table(), cases.OrderReward()
    )
    with pytest.raises(ConfigError, match=r"algorithm\.replacement False"):
        play(batch, small_policy(), np.array([0]), Draws([[0]], 2, replacement=False))


NUM_FIRST, NUM_NEAR = 4, 5


def two_hop_task(num_questions: int = 24):
    """The second gold passage is in no list: an edge of one kind leads to it from the first one.

    The first is the hit that is most similar to the question. It has other neighbours, by another
    kind of edge and as strong, and so has every other hit.
    """
    rng = np.random.default_rng(0)
    block = NUM_FIRST * (1 + NUM_NEAR)
    passages = [Passage(f"p{i}", f"title {i}", f"text {i}") for i in range(num_questions * block)]
    vectors_PD = np.zeros((len(passages), 1), dtype=np.float32)
    edges: dict[int, list[tuple[int, int, float]]] = {}
    rows, questions = [], []
    for q in range(num_questions):
        first = q * block + np.arange(NUM_FIRST)
        bridge = int(rng.integers(NUM_FIRST))
        vectors_PD[first[bridge]] = 1.0
        for place, row in enumerate(first.tolist()):
            near = q * block + NUM_FIRST + place * NUM_NEAR + np.arange(NUM_NEAR)
            wanted = int(rng.integers(NUM_NEAR))
            edges[row] = [(int(n), 0 if i == wanted else 3, 1.0) for i, n in enumerate(near)]
            if place == bridge:
                gold = (f"p{row}", f"p{near[wanted]}")
        rows.append(first)
        questions.append(Question(f"q{q}", f"question {q}", ("x",), {"gold_ids": gold}))
    scores = np.tile(-np.arange(NUM_FIRST, dtype=np.float32)[:, None], (num_questions, 1, 1))
    table = CandidateTable(
        questions=tuple(questions),
        corpus=MemoryCorpus(passages),
        rows_QN=np.array(rows),
        scores_QNC=scores,
        score_names=("bm25",),
        question_vectors_QD=np.ones((num_questions, 1), dtype=np.float32),
        passage_vectors_PD=vectors_PD,
    )
    return table, Edges(edges)


def trained_recall(config: EnvironmentConfig, table: CandidateTable, num_steps: int = 30):
    """Mean recall of the greedy policy on all questions, after training on half of them."""
    num_questions, num_samples, temperature = len(table) // 2, 8, 0.2
    torch.manual_seed(0)
    policy = SlotPolicy(F, G)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.3)
    batch = open_episodes(config, num_questions * num_samples, table, Recall())
    for step in range(num_steps):
        seeds = [[7, step, q] for q in range(num_questions)]
        found = play(batch, policy, np.arange(num_questions), Draws(seeds, num_samples))
        shape = (num_questions, num_samples)
        rewards_BM = torch.from_numpy(found.rewards_E).float().reshape(shape)
        log_weights_BM = torch.from_numpy(found.log_weights_E).float().reshape(shape)
        weights_BM = dro.importance_weights(
            rewards_BM, log_weights_BM, temperature, "self_normalised"
        )
        valid_BM = dro.valid_samples(rewards_BM, log_weights_BM)
        coefficients_BM = dro.coefficients(weights_BM, log_weights_BM, valid_BM, "mean")
        logp_BM = policy.log_prob(found).sum(dim=1).reshape(shape)
        optimizer.zero_grad()
        dro.selector_loss(logp_BM, coefficients_BM).mean().backward()
        optimizer.step()
    held_back = np.arange(num_questions, len(table))
    evaluated = open_episodes(config, len(held_back), table, Recall())
    return float(play(evaluated, policy, held_back).terms["recall"].mean())


def test_dro_learns_to_hop_where_the_flat_policy_cannot():
    """Reward is gold recall less a cost for each pick; no language model, questions held back."""
    table, edges = two_hop_task()
    settings = {"num_revealed": NUM_NEAR, "num_slots": NUM_FIRST + 2 * NUM_NEAR}
    with_hops = trained_recall(hop_environment("Hops", edges=edges, settings=settings), table)
    flat = trained_recall(hop_environment("Flat"), table)
    assert flat <= 0.5  # the second gold passage is in no list
    assert with_hops >= 0.9
