"""The scalar selection environment: one question per episode, one pick per step."""

from __future__ import annotations

from rlrag.environment.scalar import SimulatedEnv
from rlrag.environment.simulation import SelectionSimulation
from rlrag.environment.task import DEFAULT_INVALID_REWARD, DEFAULT_NUM_SELECTED, SelectionTask
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward


class DocumentSelectionEnv(SimulatedEnv):
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

    def __init__(
        self,
        candidates: CandidateTable | None = None,
        reward: SelectionReward | None = None,
        num_selected: int = DEFAULT_NUM_SELECTED,
        render_mode: str | None = None,
        invalid_reward: float = DEFAULT_INVALID_REWARD,
    ) -> None:
        task = SelectionTask(candidates, reward, num_selected, invalid_reward)
        super().__init__(SelectionSimulation(task, 1), render_mode)
