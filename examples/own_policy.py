"""A policy of your own, chosen by a flag.

    python -m jobs.train factbook --run-dir runs/agreement \
        --selector.kind examples.own_policy:AgreementPolicy --environment.num-selected 1

It picks one passage. Shape letters: E episodes, N candidates, A actions, D vector length.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rlrag.records import Columns, Trajectories
from rlrag.selection.plackett_luce import action_logp
from rlrag.selection.protocol import Actions, Turn


class AgreementPolicy(nn.Module):
    """Picks by the retriever's rank and a learned view of how question and passage agree."""

    def __init__(self, vector_size: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(vector_size))

    def act(self, observations: Columns, infos: Columns, turn: Turn) -> Actions:
        """The most probable action, or one that is drawn."""
        with torch.no_grad():
            logp_EA = self._logp(observations)
        values_EA = logp_EA.double().numpy()
        if turn.draws is not None:
            generators = turn.notes.setdefault(
                "generators", [np.random.default_rng(seed) for seed in turn.draws.seeds]
            )
            shape = (turn.draws.num_samples, values_EA.shape[1])
            values_EA = values_EA + np.concatenate([g.gumbel(size=shape) for g in generators])
        actions_E = values_EA.argmax(axis=1)
        logp_E = logp_EA.numpy()[np.arange(len(actions_E)), actions_E]
        return Actions(actions_E, logp_E, np.zeros(len(actions_E)))

    def log_prob(self, trajectories: Trajectories) -> torch.Tensor:
        """Log-probability of each action; every episode has one."""
        actions_E1 = torch.from_numpy(trajectories.actions_ET)
        return self._logp(trajectories.observations[0]).gather(1, actions_E1)

    def _logp(self, observations: Columns) -> torch.Tensor:
        question_E1D = torch.from_numpy(observations["question_embedding"])[:, None]
        passage_END = torch.from_numpy(observations["candidate_embeddings"])
        rank_N = torch.arange(passage_END.shape[1])
        logits_EN = (question_E1D * passage_END) @ self.weights - 0.5 * rank_N
        never_E1 = torch.full((len(logits_EN), 1), -1e9)  # it does not stop by itself
        allowed_EA = torch.from_numpy(observations["action_mask"]).bool()
        return action_logp(torch.cat([logits_EN, never_E1], dim=1), allowed_EA)
