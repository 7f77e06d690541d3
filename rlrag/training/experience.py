"""A policy and an environment in; sampled selections with their rewards out (the E-step).

Shape letters: B questions, M samples, K selected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from rlrag.config import DROConfig, EnvironmentConfig
from rlrag.errors import GenerationError, RlragError
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward
from rlrag.selection.protocol import Seed, SelectionPolicy


@dataclass(frozen=True)
class Experience:
    """One batch of episodes, drawn by one version of the policy.

    `rewards_BM` holds NaN where a reward could not be computed; `errors` says why. `terms_BM` are
    the reward's terms before weighting. `log_weights_BM` are the log a_i of `SampledSelections`.
    The versions are the E-steps whose policy drew and whose generator weights scored.
    `golden_logps_BM` holds the log-likelihoods of each question's distinct golden answers, a tuple
    for each sample that was rewarded, where `reward.golden_answers` counts them all.
    """

    question_rows: np.ndarray
    positions_BMK: np.ndarray
    behaviour_logp_BM: np.ndarray
    log_weights_BM: np.ndarray
    rewards_BM: np.ndarray
    terms_BM: Mapping[str, np.ndarray]
    policy_version: int
    generator_version: int
    errors: tuple[RlragError, ...] = ()
    golden_logps_BM: np.ndarray | None = None


class ExperienceCollector:
    """Runs episodes of a fixed number of questions and samples through the vector environment.

    Args:
        config: Names the environment and the number of picks.
        dro: Episodes a question (M) and how they are drawn.
        candidates: The questions with their candidates.
        reward: Scores finished selections, all of a batch in one call.
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
        self._candidates = candidates
        self._num_samples = num_samples = dro.num_samples
        self._num_selected = config.num_selected
        self._env: VectorEnv = gymnasium.make_vec(
            config.id,
            num_envs=num_questions * num_samples,
            vectorization_mode="vector_entry_point",
            candidates=candidates,
            reward=reward,
            num_selected=config.num_selected,
            autoreset_mode=AutoresetMode.DISABLED,
        )

    def collect(
        self,
        policy: SelectionPolicy,
        question_rows: np.ndarray,
        seeds: Sequence[Seed],
        policy_version: int,
        generator_version: int,
    ) -> Experience:
        """Draw M selections a question, play them as episodes and return their rewards.

        The versions are recorded, not checked: the caller holds the policy and the generator still.

        Raises:
            RlragError: the first failure, when no reward of the whole batch could be computed.
        """
        drawn = policy.sample(
            self._candidates.batch(question_rows),
            self._num_samples,
            seeds,
            self._dro.proposal_temperature,
            self._dro.replacement,
        )
        shape = drawn.positions_BMK.shape[:2]
        self._env.reset(options={"question_rows": np.repeat(question_rows, self._num_samples)})
        actions = drawn.positions_BMK.reshape(-1, self._num_selected)
        for step in range(self._num_selected):
            _, rewards, terminated, _, info = self._env.step(actions[:, step])
        if not terminated.all():
            raise GenerationError(
                f"{int((~terminated).sum())} of {terminated.size} episodes did not end after "
                f"{self._num_selected} picks; the environment must end an episode after K picks"
            )
        errors = tuple(error for error in info.get("error", ()) if error is not None)
        if len(errors) == terminated.size:
            raise errors[0]
        golden_logps = info.get("golden_logps")
        return Experience(
            question_rows=question_rows,
            positions_BMK=drawn.positions_BMK,
            behaviour_logp_BM=drawn.logp_BM,
            log_weights_BM=drawn.log_weights_BM,
            rewards_BM=rewards.reshape(shape),
            terms_BM=_terms(info, shape),
            policy_version=policy_version,
            generator_version=generator_version,
            errors=errors,
            golden_logps_BM=None if golden_logps is None else golden_logps.reshape(shape),
        )

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def _terms(info: Mapping[str, object], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The environment's reward terms, NaN where an episode has none."""
    terms = info.get("reward_terms", {})
    assert isinstance(terms, Mapping)
    return {
        name: np.where(terms[f"_{name}"], values, np.nan).astype(np.float64).reshape(shape)
        for name, values in terms.items()
        if not name.startswith("_")
    }
