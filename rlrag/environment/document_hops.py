"""The environments whose pool of passages grows: pick, hop along a graph, search again, stop."""

from __future__ import annotations

from collections.abc import Sequence

from gymnasium.vector import AutoresetMode

from rlrag.config import HopSettings
from rlrag.environment.hop_parts import PassageEdges, Search
from rlrag.environment.hop_simulation import HopSimulation
from rlrag.environment.hop_task import HopTask
from rlrag.environment.scalar import SimulatedEnv
from rlrag.environment.task import DEFAULT_INVALID_REWARD, DEFAULT_NUM_SELECTED
from rlrag.environment.vector import SimulatedVectorEnv, check_num_envs
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward
from rlrag.selection.queries.protocol import QueryWriter


class DocumentHopsEnv(SimulatedEnv):
    """Find the passages that a question is answered from, step by step.

    ## Description
    The pool of an episode has N slots. It starts with the n0 first hits of the question and the
    passages whose titles the question names. The agent picks up to K passages, best first. A pick
    reveals up to b neighbours of its passage in a passage graph, so that picking is hopping. The
    agent may search again with a query that one of R query writers wrote, and stops when it has
    enough. Then the picks are rewarded in their order, for instance by the answer that a language
    model gives from them.

    With no edges, no writers and N candidates at the start it plays as `DocumentSelectionEnv` does:
    equal actions give equal candidates, masks, rewards and draws of questions.

    Without arguments the environment uses a small built-in corpus with its graph, a search by
    shared words and one query writer.

    ## Action Space
    `Discrete(N + R K + 1)`:

    - 0 to N - 1: pick the passage in this slot. It is appended to the order, and the best new
      neighbours of its passage enter the next free slots, by edge weight plus similarity to the
      question.
    - N + r K + k: search with what writer r writes on the k-th pick, k from 0. A writer that needs
      no pick has k = 0 alone. New hits enter the next free slots.
    - N + R K: stop.

    A pick or a search is a turn. Slots never change once they are filled, and none is emptied.

    What is allowed, as everywhere in `action_mask`:

    - a slot that is filled and not picked, while fewer than K are picked;
    - a search with a new query, by the rules of `rlrag.selection.queries.protocol.fresh_query` (the
      question counts as issued), while fewer than Q are issued, a turn is left after it, the pool
      has a free slot and fewer than K are picked;
    - the stop, with `require_pick` after the first pick only.

    ## Observation Space
    A `Dict` of arrays whose shapes never change:

    | Key                  | Shape    | Type    | Content                                        |
    |----------------------|----------|---------|------------------------------------------------|
    | `question_embedding` | (D,)     | float32 | the question's vector                          |
    | `slot_embeddings`    | (N, D)   | float32 | a vector for each slot, 0 where it is empty    |
    | `slot_features`      | (N, F)   | float32 | `slot_features.SLOT_FEATURES`  , 0 where empty |
    | `filled`             | (N,)     | int8    | 1 where a slot holds a passage                 |
    | `picked`             | (N,)     | int8    | 1 where a slot has been picked                 |
    | `order`              | (K,)     | int64   | slots picked, best first; N where none yet     |
    | `global`             | (G,)     | float32 | `slot_features.GLOBAL_FEATURES`                |
    | `action_mask`        | (A,)     | int8    | 1 where an action is allowed                   |

    Both embeddings are absent when the candidates have no vectors (D = 0). In the last observation
    of an episode only the stop is allowed.

    ## Starting State
    A question drawn uniformly with the generator that `reset(seed=)` seeds, its pool as above and
    nothing picked. `reset(options={"question_row": i})` takes question i and draws nothing.

    ## Rewards
    0 for every step before the last. The last step gives the reward of the ordered picks less
    `pick_cost` for each pick, `query_cost` for each search and `turn_cost` for each turn.

    An action that is not allowed raises nothing: the episode ends with `invalid_reward`, the reward
    function is not asked and `info["valid"]` is False. A reward that could not be computed is
    raised as the `RlragError` that explains it.

    ## Episode End
    - Termination: the stop is chosen, K passages are picked (with `auto_stop`), or an action is
      invalid.
    - Truncation: after H turns the stop is forced. The picks are rewarded as after a stop, so that
      no later reward is missing: both `terminated` and `truncated` are True, and agents do not
      bootstrap a value at the end.

    ## Where little is found
    - A search that finds nothing costs its turn and its query, and the episode goes on.
    - A pick of a passage without edges reveals nothing.
    - In a full pool searches are not allowed, and picks reveal nothing.
    - What has no room any more is counted in the path (`num_left_out`).
    - A writer that gives None, or an empty query, has nothing to ask: that search is not allowed.
    - A failure of retriever, graph or writers is raised, and leaves the episodes as they were.

    ## Information
    At every step and reset, as in `DocumentSelectionEnv`: `question_id`, `question`,
    `question_row`, `golden_answers`, `action_mask`, and `passages`, title and text of each filled
    slot. Besides:

    - `queries`: what each search action would ask (tuple of R K str), None where there is nothing
      new to ask. Writers are asked as soon as the picks change, since the mask follows from it.

    At the last step also what `DocumentSelectionEnv` tells: `evidence`, `selection`, `answer`,
    `reward_terms` (with `num_picks`, `num_queries` and `num_turns`), `golden_logps`, `valid`. And:

    - `path`: what was done and what that found (`hop_path.HopPath`); its `turns()` gives a
      `rlrag.records.PathTurn` for the start and for each action.

    ## Arguments
    - `candidates`: questions with their first hits; the built-in sample when omitted.
    - `reward`: scores ordered selections; `PassageReward(cost_per_passage=0.1)` when omitted.
    - `num_selected=3`: the most passages in a selection (K).
    - `edges`: a graph over the corpus of `candidates`; without it no pick reveals anything.
    - `retriever`: searches that corpus.
    - `writers`: query writers; without them there are no searches.
    - `settings`: a `HopSettings` or a dict of its values: sizes, limits and costs.
    - `invalid_reward=-1.0`, `render_mode`: as in `DocumentSelectionEnv`.

    ```python
    >>> import gymnasium as gym, rlrag.environment
    >>> env = gym.make("rlrag/DocumentHops-v1", settings={"num_first": 4, "num_revealed": 2})
    >>> env.action_space
    Discrete(24)
    >>> observation, info = env.reset(options={"question_row": 0})
    >>> len(info["passages"]), info["queries"]
    (4, (None, None, None))
    >>> observation, *_, info = env.step(0)
    >>> len(info["passages"]), info["queries"][0]
    (6, 'Where does the council of Velmora meet? Mountains of Velmora')

    ```

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
        edges: PassageEdges | None = None,
        retriever: Search | None = None,
        writers: Sequence[QueryWriter] = (),
        settings: HopSettings | dict[str, object] | None = None,
    ) -> None:
        task = HopTask(
            candidates, reward, num_selected, invalid_reward, edges, retriever, writers, settings
        )
        super().__init__(HopSimulation(task, 1), render_mode)


class DocumentHopsVectorEnv(SimulatedVectorEnv):
    """Many `DocumentHopsEnv` at once: one search and one reward call a step for all.

    ## Description
    Each sub-environment follows the rules of `DocumentHopsEnv`. All that search in the same step
    are answered by one call of the retriever, to which equal queries are passed once; a hop needs
    none. A writer is called once a step for all whose picks changed, and all episodes that end in
    the same step are rewarded in one call.

    Spaces, reset options, autoreset modes and the form of `info` are those of
    `DocumentSelectionVectorEnv`. `terminations` is True for every episode that ends, and
    `truncations` beside it for one that the turn limit ended. With autoreset disabled a batch is
    over after at most H + 1 steps.

    ## Arguments
    - `num_envs=1`: sub-environments (B).
    - `autoreset_mode`: an `AutoresetMode` or its value, such as `"Disabled"`.
    - all others as in the scalar environment.

    ```python
    >>> import gymnasium as gym, rlrag.environment
    >>> batch = gym.make_vec("rlrag/DocumentHops-v1", num_envs=4)
    >>> batch.reset(seed=0)[0]["slot_features"].shape
    (4, 33, 20)

    ```

    ## Version History
    - v1: first version.
    """

    def __init__(
        self,
        num_envs: int = 1,
        candidates: CandidateTable | None = None,
        reward: SelectionReward | None = None,
        num_selected: int = DEFAULT_NUM_SELECTED,
        render_mode: str | None = None,
        invalid_reward: float = DEFAULT_INVALID_REWARD,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        edges: PassageEdges | None = None,
        retriever: Search | None = None,
        writers: Sequence[QueryWriter] = (),
        settings: HopSettings | dict[str, object] | None = None,
    ) -> None:
        check_num_envs(num_envs)
        task = HopTask(
            candidates, reward, num_selected, invalid_reward, edges, retriever, writers, settings
        )
        super().__init__(HopSimulation(task, num_envs), num_envs, render_mode, autoreset_mode)
