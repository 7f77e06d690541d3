"""The policy protocol: chooses actions and computes their log-probabilities.

Shape letters: B questions, M episodes of one question, E = B * M episodes, T actions of the longest
one, A actions of the environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from rlrag.records import Columns, Trajectories

Seed = int | Sequence[int]
"""Whatever numpy.random.default_rng takes to start a generator."""


@dataclass(frozen=True, slots=True)
class Draws:
    """How actions are drawn: M episodes of each of B questions, those of one question together.

    `seeds[b]` alone determines the draws of question b, so that they do not depend on which worker
    or batch the question falls into. Each action is drawn from softmax(logits / temperature); above
    1 explores more than the policy does. Without `replacement` the M episodes of a question differ;
    where fewer than M exist, all are played and the rest is padding.

    An episode then carries the logarithm of a sample weight a_i such that sum_i a_i f(tau_i) is an
    unbiased estimate of E_{tau~p}[f(tau)] over the episodes of a question:

    - independent draws: a_i = p(tau_i) / (M q(tau_i)), which is 1/M when the proposal q is p;
    - draws without replacement: a_i = p(tau_i) / q_i(kappa), see `rlrag.selection.gumbel_top_k`.

    A log weight of -inf marks padding: the episode repeats another one and must count for nothing.
    """

    seeds: Sequence[Seed]
    num_samples: int = 1
    temperature: float = 1.0
    replacement: bool = True


@dataclass(slots=True)
class Turn:
    """Which action of the episodes comes next, and how it is chosen.

    `draws` unset asks for the most probable action, ties in the environment's order. `notes` is the
    policy's own memory for these episodes: empty before the first action, read by nobody else.
    """

    draws: Draws | None = None
    step: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Actions:
    """One action for each of E episodes.

    `logp_E` are their log-probabilities in nats under the policy itself, given what it saw.
    `log_ratios_E` are log p - log q, where q is the probability with which they were drawn; over an
    episode they add up to the logarithm of M times its sample weight.
    """

    actions_E: np.ndarray
    logp_E: np.ndarray
    log_ratios_E: np.ndarray


class Policy(Protocol):
    """A distribution over the actions of an environment, given what it shows."""

    def act(self, observations: Columns, infos: Columns, turn: Turn) -> Actions:
        """Choose the next action of E episodes.

        Args:
            observations: What the environment shows, a row an episode; `action_mask` says what is
                allowed.
            infos: Texts beside it, such as `question` and `passages`, a row an episode.
            turn: Number of the action and how it is chosen. With draws, episode b * M + m is
                sample m of question b.

        Returns:
            An allowed action for every episode; those of episodes that are over are not read.
        """
        ...

    def log_prob(self, trajectories: Trajectories) -> torch.Tensor:
        """Log-probability of each action in nats, shape (E, T), 0 beyond the end of an episode.

        It is differentiable in the policy's parameters and reads the trajectories alone.
        """
        ...
