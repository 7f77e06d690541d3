"""Supervised pretraining of a selection policy on given rankings.

An untrained language model ranks by habit, not by use. Supervised steps on the order of a ranker
give it a start from which rewards can teach it, as the warm-up of the DRO paper's code does (arXiv
2505.03075). The loss is the mean of -log p(target | question) over the batch, in nats.

A target that never varies leaves a policy that always writes it: no two samples differ, and DRO has
nothing to compare. So the targets may be drawn around the order, from the Plackett-Luce
distribution that the other policies start from: each rank costs `prior_scale` nats. The loss then
ends at the entropy of that distribution, and the policy explores as the others do.

A language model is shown the candidates in the retriever's order. Imitating that very order needs
no reading, so few steps do; to teach it to read, give the orders of a better ranker, such as those
of a run file.

Shape letters: Q questions, B questions of a batch, M targets of a question, N candidates,
K selected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlrag.config import EnvironmentConfig
from rlrag.data.ranking_run import read_ranking_run
from rlrag.environment.rollout import replay
from rlrag.errors import DataError, NonFiniteLossError
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection import plackett_luce
from rlrag.selection.feature_scorer import retriever_prior
from rlrag.selection.listwise_lm import ListwiseLMPolicy

LEARNING_RATE = 1e-3
"""Of AdamW. The order of a ranker is simple, and a small adapter learns it at this rate."""
_MAX_GRAD_NORM = 1.0
_QUESTIONS_PER_PASS = 8
_DRAWN_TARGETS = 8


@dataclass(frozen=True)
class RunOrders:
    """Orders to imitate, of shape (Q, K), and how many of them the run did not give whole.

    `num_short` counts questions of which the run ranks fewer than K candidates, `num_missing` those
    that it does not name.
    """

    positions_QK: np.ndarray
    num_short: int
    num_missing: int


def orders_of_run(path: Path, candidates: CandidateTable, num_selected: int) -> RunOrders:
    """The candidates of each question as a TREC run ranks them, best first.

    What the run ranks besides the candidates is left out. Where it ranks fewer than K of them, the
    others follow in the retriever's order.

    Raises:
        DataError: when the file is no run, or one of other questions or passages.
    """
    positions = [
        {passage.id: n for n, passage in enumerate(candidates.passages(row))}
        for row in range(len(candidates))
    ]
    ids = [question.id for question in candidates.questions]
    run = read_ranking_run(path, dict(zip(ids, positions, strict=True)))
    orders: list[list[int]] = []
    for question_id, position in zip(ids, positions, strict=True):
        ranked = [position[passage_id] for passage_id in run.get(question_id, ())]
        rest = [n for n in position.values() if n not in ranked]
        orders.append([*ranked, *rest][:num_selected])
    return RunOrders(
        positions_QK=np.array(orders),
        num_short=sum(
            len(run[question_id]) < num_selected for question_id in ids if question_id in run
        ),
        num_missing=sum(question_id not in run for question_id in ids),
    )


def imitate(
    policy: ListwiseLMPolicy,
    candidates: CandidateTable,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    orders: np.ndarray | None = None,
    prior_scale: float | None = None,
) -> list[float]:
    """Train `policy` in place to rank by the orders; returns the loss of each step.

    What is learned depends on the arguments and the policy's weights alone, so workers that start
    alike end alike.

    Args:
        policy: The policy; its weights that require gradients change.
        candidates: Questions with their candidates.
        steps: AdamW steps, with gradients clipped to norm 1.
        batch_size: Questions a step; all of them where there are fewer.
        learning_rate: Step size, constant.
        seed: Determines the batches, one shuffled pass over the questions after another, and the
            targets that are drawn.
        orders: Target positions of shape (Q, K), best first; the retriever's order when unset.
        prior_scale: Nats that each rank costs a drawn target; unset takes the orders themselves.

    Raises:
        DataError: when `orders` has another shape or repeats a position.
        NonFiniteLossError: when a loss or gradient is not finite.
    """
    if orders is None:
        orders = np.tile(np.arange(policy.num_selected), (len(candidates), 1))
    _check_orders(orders, candidates, policy.num_selected)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    batch_size = min(batch_size, len(candidates))
    waiting = np.array([], dtype=np.int64)
    losses: list[float] = []
    for step in range(steps):
        if len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(len(candidates))])
        rows, waiting = waiting[:batch_size], waiting[batch_size:]
        targets_BMK = orders[rows][:, None]
        if prior_scale is not None:
            seeds = [(seed, step, int(row)) for row in rows]
            targets_BMK = _draw_around(orders[rows], candidates.num_candidates, prior_scale, seeds)
        optimizer.zero_grad()
        losses.append(_accumulate(policy, candidates, rows, targets_BMK))
        norm = nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM).item()
        if not math.isfinite(losses[-1] + norm):
            raise NonFiniteLossError(
                f"imitation step {step + 1} has loss {losses[-1]} and gradient norm {norm}; use "
                "fewer selector.imitation_steps or another selector.model"
            )
        optimizer.step()
    return losses


def _draw_around(
    orders_BK: np.ndarray, num_candidates: int, scale: float, seeds: list[tuple[int, int, int]]
) -> np.ndarray:
    """Targets of shape (B, M, K); candidates outside an order rank behind it, as retrieved."""
    everyone = range(num_candidates)
    ranked_BN = np.array(
        [[*order, *(n for n in everyone if n not in order)] for order in orders_BK.tolist()]
    )
    logits_BN = np.zeros(ranked_BN.shape)
    prior_N = retriever_prior(num_candidates, scale).double().numpy()
    np.put_along_axis(logits_BN, ranked_BN, np.broadcast_to(prior_N, ranked_BN.shape), axis=1)
    return plackett_luce.sample(logits_BN, _DRAWN_TARGETS, orders_BK.shape[1], seeds)


def _accumulate(
    policy: ListwiseLMPolicy, candidates: CandidateTable, rows: np.ndarray, targets_BMK: np.ndarray
) -> float:
    """Add the gradient of a batch, some questions at a time to bound memory; returns the loss."""
    total = 0.0
    for start in range(0, len(rows), _QUESTIONS_PER_PASS):
        part = slice(start, start + _QUESTIONS_PER_PASS)
        num_questions, num_targets, num_selected = targets_BMK[part].shape
        trajectories = replay(
            EnvironmentConfig(num_selected=num_selected),
            candidates,
            np.repeat(rows[part], num_targets),
            targets_BMK[part].reshape(-1, num_selected),
        )
        logp_E = policy.log_prob(trajectories).sum(dim=1)
        loss = -logp_E.view(num_questions, num_targets).mean(dim=1).sum() / len(rows)
        loss.backward()
        total += loss.item()
    return total


def _check_orders(orders: np.ndarray, candidates: CandidateTable, num_selected: int) -> None:
    shape, n = (len(candidates), num_selected), candidates.num_candidates
    if orders.shape != shape:
        raise DataError(
            f"the orders to imitate have shape {orders.shape}, but {shape} is needed: one row "
            "per question, with environment.num_selected positions"
        )
    for row, order in enumerate(orders.tolist()):
        if len(set(order)) < num_selected or not all(0 <= place < n for place in order):
            raise DataError(
                f"the order to imitate for question {candidates.questions[row].id!r} is {order}; "
                f"give distinct positions from 0 to {n - 1}"
            )
