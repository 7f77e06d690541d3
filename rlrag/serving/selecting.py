"""Selection in the service: applies a version's policy to a question's candidates.

Exploration. With probability e (`feedback.explore_share`) the selection z is drawn from the policy
p, else it is the policy's most probable one, g. Whatever coin fell, its propensity is

    mu(z | x) = e p(z | x) + (1 - e) [z = g(x)]

which is what a log of selections must hold to be trained on (Horvitz and Thompson, 1952).

Shape letters: N candidates, T actions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlrag.bundle import load_bundle
from rlrag.config import EnvironmentConfig
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play, play_greedy
from rlrag.errors import EpisodeError, OverloadedError, RequestError, RlragError
from rlrag.records import Passage, Question, Trajectories
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.protocol import Draws, Policy
from rlrag.serving.records import Picked, Retrieved
from rlrag.serving.versions.registry import check_version


@dataclass(frozen=True, slots=True)
class Choice:
    """One question whose candidates are to be picked from.

    `seed` determines the draw of a selection that explores.
    """

    question: str
    retrieved: Retrieved
    num_selected: int | None = None
    explore: bool = False
    seed: int = 0


class SelectorPart:
    """The policies of every version that is loaded.

    `load` and `drop` may run in other threads than `select`.

    Args:
        explore_share: With which probability callers mark a choice `explore`.
        allow_code: Environments, policies and retrievers `module:...` that bundles may name.
    """

    def __init__(self, explore_share: float = 0.0, allow_code: Collection[str] = ()) -> None:
        self._explore_share = explore_share
        self._allow_code = allow_code
        self._policies: dict[str, tuple[Policy, EnvironmentConfig]] = {}
        self._loading = threading.Lock()

    def loaded(self) -> tuple[str, ...]:
        """Versions that can be asked."""
        return tuple(self._policies)

    def load(self, version: str, directory: Path) -> None:
        """Rebuild a bundle's policy.

        Raises:
            RlragError: what is wrong with the bundle.
        """
        with self._loading:
            bundle = load_bundle(directory, self._allow_code)
            check_version(version, bundle.version, directory)
            bundle.policy.eval()
            loaded = bundle.policy, bundle.config.environment
            self._policies = {**self._policies, version: loaded}

    def drop(self, version: str) -> None:
        """Forget a version."""
        with self._loading:
            self._policies = {v: loaded for v, loaded in self._policies.items() if v != version}

    def select(self, version: str, choices: Sequence[Choice]) -> list[Picked | RlragError]:
        """The pick of each question, or what is wrong with its request.

        Questions with equally many candidates are picked for together.

        Raises:
            OverloadedError: when the version is not loaded here yet.
        """
        loaded = self._policies.get(version)
        if loaded is None:
            raise OverloadedError(f"version {version} is being loaded here; try again")
        policy, environment = loaded
        most = environment.num_selected
        found: dict[int, Picked | RlragError] = {}
        together: dict[tuple[int, int], list[int]] = {}
        for place, choice in enumerate(choices):
            wanted = most
            if choice.num_selected is not None:
                wanted = choice.num_selected
            num_candidates = len(choice.retrieved.passages)
            if not 1 <= wanted <= most or most > num_candidates:
                found[place] = _impossible(wanted, most, num_candidates)
            else:
                together.setdefault((num_candidates, wanted), []).append(place)
        for (_, wanted), places in together.items():
            fewer = environment.model_copy(update={"num_selected": wanted})
            picked = self._pick(policy, fewer, [choices[place] for place in places])
            found.update(zip(places, picked, strict=True))
        return [found[place] for place in range(len(choices))]

    def _pick(
        self, policy: Policy, environment: EnvironmentConfig, choices: Sequence[Choice]
    ) -> list[Picked]:
        table = _table(choices)
        greedy = play_greedy(environment, policy, table)
        explored = np.flatnonzero([choice.explore for choice in choices])
        drawn = {}
        if len(explored):
            seeds = [choices[place].seed for place in explored]
            episodes = open_episodes(environment, len(explored), table, Unrewarded())
            found = play(episodes, policy, explored, Draws(seeds))
            episodes.close()
            drawn = {int(place): (found, row) for row, place in enumerate(explored)}
        picked = []
        for place, choice in enumerate(choices):
            played, row = drawn.get(place, (greedy, place))
            actions, logp_T = _acted(played, row)
            propensity = propensity_logp(
                float(logp_T.sum()),
                is_greedy=actions == _acted(greedy, place)[0],
                explore_share=self._explore_share,
            )
            positions = _positions(choice, played.evidence[row])
            probs = tuple(np.exp(logp_T[: len(positions)]).tolist())
            picked.append(Picked(positions, probs, actions, propensity, choice.explore))
        return picked


def _acted(played: Trajectories, row: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The actions of an episode and their log-probabilities."""
    acts_T = played.acts_ET[row]
    return tuple(played.actions_ET[row][acts_T].tolist()), played.logp_ET[row][acts_T]


def _positions(choice: Choice, evidence: Sequence[Passage]) -> tuple[int, ...]:
    """Where the passages that an episode ended with stand among the candidates."""
    places = {passage.id: n for n, passage in enumerate(choice.retrieved.passages)}
    unknown = [passage.id for passage in evidence if passage.id not in places]
    if unknown:
        raise EpisodeError(
            f"the environment selected passages {unknown[:3]}, which are not candidates of the "
            "question; a service can only answer from candidates"
        )
    return tuple(places[passage.id] for passage in evidence)


def propensity_logp(logp: float, is_greedy: bool, explore_share: float) -> float:
    """Log of mu(z | x) in nats; see the module.

    Args:
        logp: log p(z | x) under the policy.
        is_greedy: Whether z is the policy's most probable selection.
        explore_share: The probability of drawing.

    Example:
        >>> round(math.exp(propensity_logp(math.log(0.25), is_greedy=True, explore_share=0.2)), 6)
        0.85
        >>> propensity_logp(-3.0, is_greedy=True, explore_share=0.0)
        0.0
    """
    drawn = explore_share * math.exp(logp)
    total = drawn + (1 - explore_share if is_greedy else 0.0)
    return math.log(total) if total > 0 else -math.inf


def _impossible(wanted: int, trained: int, num_candidates: int) -> RequestError:
    if num_candidates < trained:
        return RequestError(
            f"the question has {num_candidates} candidates, but this bundle's selector picks "
            f"{trained}; ask for at least {trained} candidates"
        )
    return RequestError.about(
        "num_selected",
        f"is {wanted}, but this bundle's selector was trained to pick {trained}; give a number "
        f"from 1 to {trained}",
    )


def _table(choices: Sequence[Choice]) -> CandidateTable:
    """The candidates of these questions, each a row of its own."""
    passages = [passage for choice in choices for passage in choice.retrieved.passages]
    num_candidates = len(choices[0].retrieved.passages)
    scores_QNC = np.stack([choice.retrieved.scores_NC for choice in choices])
    return CandidateTable(
        questions=tuple(Question(str(q), c.question, ()) for q, c in enumerate(choices)),
        corpus=_Candidates(passages),
        rows_QN=np.arange(len(passages)).reshape(-1, num_candidates),
        scores_QNC=scores_QNC,
        score_names=("",) * scores_QNC.shape[2],
        question_vectors_QD=np.stack([choice.retrieved.question_vector_D for choice in choices]),
        passage_vectors_PD=np.concatenate(
            [choice.retrieved.passage_vectors_ND for choice in choices]
        ),
    )


class _Candidates(list[Passage]):
    """The candidates of several questions one after another; a passage may be there twice."""

    content_hash = ""

    def row_of(self, passage_id: str) -> int | None:
        """The first row with this passage."""
        return next((row for row, passage in enumerate(self) if passage.id == passage_id), None)
