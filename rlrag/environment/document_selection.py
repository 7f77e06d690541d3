"""The scalar selection environment: one question per episode, one pick per step."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded

from rlrag.environment import transitions
from rlrag.environment.rendering import (
    RENDER_MODES,
    check_render_mode,
    draw_episode,
    render_episode,
)
from rlrag.environment.task import (
    DEFAULT_INVALID_REWARD,
    DEFAULT_NUM_SELECTED,
    EpisodeTexts,
    Outcome,
    SelectionTask,
    check_options,
)
from rlrag.environment.transitions import Episodes
from rlrag.errors import ConfigError
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward

_ONE = np.ones(1, dtype=np.bool_)


class DocumentSelectionEnv(gymnasium.Env[dict[str, Any], np.int64]):
    """Choose and order the passages that a question is answered from.

    ## Description
    A retriever has found N candidate passages for a question. The agent picks up to K of them, one
    at a time and best first, and may stop early. Then the ordered selection is rewarded, for
    instance by the answer that a language model gives from it. One episode is one question and one
    ordered selection z, so the sum of the log-probabilities of its actions is log p(z | x).

    Without arguments the environment uses a small built-in corpus, candidates ranked by shared
    words (N = 8) and a reward that needs no language model.

    ## Action Space
    `Discrete(N + 1)`:

    - 0 to N - 1: pick this candidate; candidates stand in the retriever's order.
    - N: stop.

    Allowed actions are given four times with the same content: `observation["action_mask"]` (int8,
    for policies that see observations only), `info["action_mask"]` (bool), the method
    `action_masks()` (bool, which sb3-contrib asks for), and `action_space.sample(mask=...)` takes
    the int8 form.

    ## Observation Space
    A `Dict` of arrays whose shapes never change:

    | Key                    | Shape    | Type    | Content                                        |
    |------------------------|----------|---------|------------------------------------------------|
    | `question_embedding`   | (D,)     | float32 | the question's vector                          |
    | `candidate_embeddings` | (N, D)   | float32 | one vector for each candidate                  |
    | `retriever_scores`     | (N, C)   | float32 | the ranking score first, then its components   |
    | `picked`               | (N,)     | int8    | 1 where a candidate has been picked            |
    | `order`                | (K,)     | int64   | positions picked, best first; N where none yet |
    | `action_mask`          | (N + 1,) | int8    | 1 where an action is allowed                   |

    Both embeddings are absent when the candidates have no vectors (D = 0). Float bounds are those
    of float32: scores and vectors are finite, and nothing more is promised, so that an agent can
    move to other data with its spaces unchanged. In the last observation of an episode only the
    stop is allowed. Texts are in `info`.

    ## Starting State
    A question drawn uniformly with the generator that `reset(seed=)` seeds, nothing picked.
    `reset(options={"question_row": i})` takes question i instead and draws nothing.

    ## Rewards
    0 for every step before the last. The last step gives the reward of the whole ordered selection,
    which is empty when the first action is the stop. By default: 1 if a golden answer is contained
    in the picked passages, less 0.1 for each passage.

    Picking a candidate twice is an invalid action. It raises nothing: the episode ends with
    `invalid_reward`, the reward function is not asked and `info["valid"]` is False. With rewards
    that can fall below -1, such as log-likelihoods, choose `invalid_reward` below them all.

    A reward that could not be computed is raised as the `RlragError` that explains it; no number is
    made up. The vector environment reports it for each sub-environment instead.

    ## Episode End
    - Termination: K passages are picked, or the stop is chosen, or an action is invalid.
    - Truncation: never; an episode has at most K steps.

    ## Information
    At every step and reset:

    - `question_id`, `question`: id and text (str).
    - `question_row`: row of the question in the candidate table (int).
    - `passages`: title and text of each candidate (tuple of N str).
    - `golden_answers`: accepted answers (tuple of str).
    - `action_mask`: allowed actions (bool array of length N + 1).

    At the last step also:

    - `evidence`, `selection`: the picked passages and their ids, best first (tuples).
    - `answer`: the generator's text, or None where the reward uses no generator.
    - `reward_terms`: the parts of the reward (dict of float); empty after an invalid action.
    - `golden_logps`: log-likelihoods of the distinct golden answers (tuple of float), where
      `reward.golden_answers` is `all`.
    - `valid`: False after an invalid action, else True.

    ## Arguments
    - `candidates`: questions with their candidates; the built-in sample when omitted.
    - `reward`: scores ordered selections; `PassageReward(cost_per_passage=0.1)` when omitted.
    - `num_selected=3`: the most passages in a selection (K), from 1 to N.
    - `invalid_reward=-1.0`: the reward of an episode that an invalid action ends.
    - `render_mode`: None; `"ansi"`, which gives question, picks, answer and reward as text; or
      `"rgb_array"`, a picture of the picks, which Stable-Baselines3 asks for by default.

    ```python
    >>> import gymnasium as gym, rlrag.environment
    >>> env = gym.make("rlrag/DocumentSelection-v1", num_selected=2)
    >>> env.action_space
    Discrete(9)
    >>> _, info = env.reset(seed=0)
    >>> int(info["action_mask"].sum())
    9

    ```

    ## References
    - Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models,
      arXiv 2505.03075: selection as an ordered pick, trained from the answers that follow.

    ## Version History
    - v1: first version.
    """

    metadata = {  # noqa: RUF012  Gymnasium's own form
        "render_modes": [*RENDER_MODES],
        "render_fps": 4,
    }

    def __init__(
        self,
        candidates: CandidateTable | None = None,
        reward: SelectionReward | None = None,
        num_selected: int = DEFAULT_NUM_SELECTED,
        render_mode: str | None = None,
        invalid_reward: float = DEFAULT_INVALID_REWARD,
    ) -> None:
        check_render_mode(render_mode, self.metadata)
        self._task = SelectionTask(candidates, reward, num_selected, invalid_reward)
        self.action_space = self._task.action_space
        self.observation_space = self._task.observation_space
        self.render_mode = render_mode
        self._episodes: Episodes = self._task.start(1)
        self._texts: EpisodeTexts | None = None
        self._features: dict[str, np.ndarray] = {}
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode: of `options["question_row"]`, or of a question drawn at random.

        Raises:
            ConfigError: for an unknown option or a row that the table does not have.
        """
        row = check_options(options, known=("question_row",)).get("question_row")
        num_questions = len(self._task.candidates)
        if row is not None and not _is_row(row, num_questions):
            raise ConfigError(
                f"options['question_row'] is {row!r}; give an integer from 0 to {num_questions - 1}"
            )
        super().reset(seed=seed)
        row = int(self.np_random.integers(num_questions) if row is None else row)
        self._episodes = self._task.start(1)
        self._texts = self._task.texts(row)
        self._features = self._task.features(np.array([row]))
        self._outcome = None
        return self._observation(), self._texts.info() | {"action_mask": self.action_masks()}

    def step(
        self, action: int | np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Pick a candidate or stop; see the class for what an invalid pick does.

        Raises:
            ResetNeeded: before the first reset and after the end of an episode.
            InvalidAction: for something outside the action space.
            RlragError: the reward's own error, when it could not be computed.
        """
        if self._texts is None or self._episodes.over_B[0]:
            raise ResetNeeded("the episode is over or has not begun; call reset() before step()")
        if not self.action_space.contains(action):
            raise InvalidAction(f"action {action!r} is outside {self.action_space}")
        self._episodes, ended_B, valid_B = transitions.advance(
            self._episodes, np.array([int(action)]), _ONE
        )
        info = self._texts.info() | {"action_mask": self.action_masks()}
        if not ended_B[0]:
            return self._observation(), 0.0, False, False, info
        [self._outcome] = self._task.conclude(
            [self._texts], [self._episodes.selection(0)], [bool(valid_B[0])]
        )
        if self._outcome.error is not None:
            raise self._outcome.error
        info |= self._outcome.info()
        return self._observation(), self._outcome.reward, True, False, info

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed now: bool, length N + 1."""
        return transitions.action_masks(self._episodes)[0]

    def render(self) -> str | np.ndarray | None:
        """The episode so far, as text or as a picture; None without a render mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() needs render_mode='ansi' or 'rgb_array' when the environment is created"
            )
            return None
        if self._texts is None:
            raise ResetNeeded("there is no episode to show yet; call reset() before render()")
        selection, most = self._episodes.selection(0), self._task.num_selected
        if self.render_mode == "rgb_array":
            return draw_episode(selection, len(self._texts.passages), most, self._outcome)
        return render_episode(self._texts, selection, most, self._outcome)

    def _observation(self) -> dict[str, np.ndarray]:
        batch = self._task.observe(self._features, self._episodes)
        return {name: array[0] for name, array in batch.items()}


def _is_row(row: Any, num_questions: int) -> bool:
    is_integer = isinstance(row, (int, np.integer)) and not isinstance(row, bool)
    return is_integer and 0 <= int(row) < num_questions
