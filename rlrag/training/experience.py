"""Experience: one batch of episodes with their rewards (the E-step).

Shape letters: B questions, M samples, E = B * M episodes, T actions of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlrag.config import DROConfig, EnvironmentConfig
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import play
from rlrag.errors import RlragError
from rlrag.records import Columns, Trajectories
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward
from rlrag.selection.protocol import Draws, Policy, Seed


@dataclass(frozen=True)
class Experience:
    """M episodes of each of B questions, drawn by one version of the policy.

    Episode b * M + m of `trajectories` is sample m of question b. The versions are the E-steps
    whose policy drew and whose generator weights scored.
    """

    trajectories: Trajectories
    num_samples: int
    policy_version: int
    generator_version: int

    @property
    def question_rows(self) -> np.ndarray:
        """The questions, shape (B,)."""
        return self.trajectories.question_rows_E[:: self.num_samples]

    @property
    def rewards_BM(self) -> np.ndarray:
        """Rewards, NaN where one could not be computed."""
        return self.by_question(self.trajectories.rewards_E)

    @property
    def log_weights_BM(self) -> np.ndarray:
        """The log a_i of `rlrag.selection.protocol.Draws`."""
        return self.by_question(self.trajectories.log_weights_E)

    @property
    def behaviour_logp_BM(self) -> np.ndarray:
        """Log-probabilities of the episodes under the policy that drew them, in nats."""
        return self.by_question(self.trajectories.logp_E)

    @property
    def actions_BMT(self) -> np.ndarray:
        """The actions, -1 beyond the end of an episode."""
        return self.by_question(self.trajectories.actions_ET)

    @property
    def terms_BM(self) -> Columns:
        """The reward's terms before weighting."""
        return {name: self.by_question(t) for name, t in self.trajectories.terms.items()}

    @property
    def errors(self) -> tuple[RlragError, ...]:
        """Why rewards could not be computed."""
        return tuple(error for error in self.trajectories.errors if error is not None)

    def by_question(self, values_E: np.ndarray) -> np.ndarray:
        """Values of episodes, (E, ...), as (B, M, ...)."""
        return values_E.reshape(-1, self.num_samples, *values_E.shape[1:])


class ExperienceCollector:
    """Plays batches of a fixed number of questions and samples.

    Args:
        config: Names the environment and the number of picks.
        dro: Episodes a question (M) and how they are drawn.
        candidates: The questions with their candidates.
        reward: Scores what episodes end with, all of a batch in one call.
        num_questions: Questions a batch (B), over this worker's share.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        dro: DROConfig,
        candidates: CandidateTable,
        reward: SelectionReward,
        num_questions: int,
    ) -> None:
        self._dro = dro
        num_episodes = num_questions * dro.num_samples
        self._episodes = open_episodes(config, num_episodes, candidates, reward)

    def collect(
        self,
        policy: Policy,
        question_rows: np.ndarray,
        seeds: Sequence[Seed],
        policy_version: int,
        generator_version: int,
    ) -> Experience:
        """Play M episodes of each question.

        The versions are recorded, not checked: the caller holds the policy and the generator still.

        Raises:
            EpisodeError: when the environment or the policy break their contracts.
            RlragError: the first failure, when no reward of the whole batch could be computed.
        """
        dro = self._dro
        draws = Draws(seeds, dro.num_samples, dro.proposal_temperature, dro.replacement)
        trajectories = play(self._episodes, policy, question_rows, draws)
        experience = Experience(trajectories, dro.num_samples, policy_version, generator_version)
        if len(experience.errors) == len(trajectories):
            raise experience.errors[0]
        return experience

    def close(self) -> None:
        """Close the environment."""
        self._episodes.close()
