"""Selection in the service: applies a version's policy to a question's candidates.

Exploration. With probability e (`feedback.explore_share`) the selection z is drawn from the policy
p, else it is the policy's most probable one, g. Whatever coin fell, its propensity is

    mu(z | x) = e p(z | x) + (1 - e) [z = g(x)]

which is what a log of selections must hold to be trained on (Horvitz and Thompson, 1952). It is
the product of the propensities of the actions, mu of what was done up to one over mu of what was
done before it; a log of paths holds those.

A bundle whose episodes look further than a question's candidates has its corpus, retrievers and
graph opened here too, and its candidates are rows of that corpus.

Shape letters: N candidates, T actions, X passages in no corpus.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from rlrag.bundle import load_bundle
from rlrag.config import HOPS, EnvironmentConfig
from rlrag.data.corpus import ExtendedCorpus
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play, play_greedy
from rlrag.errors import EpisodeError, OverloadedError, RequestError, RlragError
from rlrag.pipeline import Library
from rlrag.records import Passage, Question, Trajectories
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.protocol import Draws, Policy
from rlrag.serving.libraries import OpenedLibrary, open_shared
from rlrag.serving.records import Picked, PickedPath, Retrieved
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


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A version; `opened` is what its episodes look further in, if they do."""

    policy: Policy
    environment: EnvironmentConfig
    opened: OpenedLibrary | None


class SelectorPart:
    """The policies of every version that is loaded.

    `load` and `drop` may run in other threads than `select`.

    Args:
        explore_share: With which probability callers mark a choice `explore`.
        allow_code: Environments, policies and retrievers `module:...` that bundles may name.
        corpus: Takes the place of the corpus that a bundle's configuration names, as in
            `rlrag.serving.retrieving.RetrieverPart`; unset keeps it.
    """

    def __init__(
        self,
        explore_share: float = 0.0,
        allow_code: Collection[str] = (),
        corpus: str | None = None,
    ) -> None:
        self._explore_share = explore_share
        self._allow_code = allow_code
        self._corpus = corpus
        self._loaded: dict[str, _Loaded] = {}
        self._loading = threading.Lock()

    def loaded(self) -> tuple[str, ...]:
        """Versions that can be asked."""
        return tuple(self._loaded)

    def load(self, version: str, directory: Path) -> None:
        """Rebuild a bundle's policy, and open what its episodes look further in.

        Raises:
            RlragError: what is wrong with the bundle, or with that.
        """
        with self._loading:
            bundle = load_bundle(directory, self._allow_code)
            check_version(version, bundle.version, directory)
            bundle.policy.eval()
            environment, opened = bundle.config.environment, None
            if environment.looks_further:
                others = [other.opened for other in self._loaded.values() if other.opened]
                opened = open_shared(bundle, self._corpus, others, looks_further=True)
            self._loaded = {**self._loaded, version: _Loaded(bundle.policy, environment, opened)}

    def drop(self, version: str) -> None:
        """Forget a version; what no other one shares is freed."""
        with self._loading:
            self._loaded = {v: loaded for v, loaded in self._loaded.items() if v != version}

    def select(self, version: str, choices: Sequence[Choice]) -> list[Picked | RlragError]:
        """The pick of each question, or what is wrong with its request.

        Questions with equally many candidates are picked for together. Where episodes look further,
        `num_selected` bounds the picks of the whole path, the candidates must be enough for its
        first hits, and filtered candidates are refused: a path could leave them.

        Raises:
            OverloadedError: when the version is not loaded here yet.
        """
        loaded = self._loaded.get(version)
        if loaded is None:
            raise OverloadedError(f"version {version} is being loaded here; try again")
        found: dict[int, Picked | RlragError] = {}
        together: dict[tuple[int, int], list[int]] = {}
        for place, choice in enumerate(choices):
            wanted = loaded.environment.num_selected
            if choice.num_selected is not None:
                wanted = choice.num_selected
            num_candidates = len(choice.retrieved.passages)
            problem = _problem(choice, wanted, loaded.environment)
            if problem is not None:
                found[place] = problem
            else:
                together.setdefault((num_candidates, wanted), []).append(place)
        for (_, wanted), places in together.items():
            fewer = loaded.environment.model_copy(update={"num_selected": wanted})
            asked = replace(loaded, environment=fewer)
            picked = self._pick(asked, [choices[place] for place in places])
            found.update(zip(places, picked, strict=True))
        return [found[place] for place in range(len(choices))]

    def _pick(self, loaded: _Loaded, choices: Sequence[Choice]) -> list[Picked]:
        environment, policy = loaded.environment, loaded.policy
        table = _table(choices) if loaded.opened is None else _rows(choices, loaded.opened.library)
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
            best, _ = _acted(greedy, place)
            actions, logp_T = _acted(played, row)
            if loaded.opened is None:
                propensity = propensity_logp(
                    float(logp_T.sum()),
                    is_greedy=actions == best,
                    explore_share=self._explore_share,
                )
                positions = _positions(choice, played.evidence[row])
                probs = tuple(np.exp(logp_T[: len(positions)]).tolist())
                picked.append(Picked(positions, probs, actions, propensity, choice.explore))
            else:
                logps = action_logps(actions, logp_T, best, self._explore_share)
                way = played.paths[row]
                path = PickedPath(
                    turns=way.turns() if way is not None else (),
                    writers=environment.hops.writers,
                    action_logps=logps,
                    num_selected=environment.num_selected,
                )
                picked.append(_picked(choice, table, played.evidence[row], path, actions, logp_T))
        return picked


def _acted(played: Trajectories, row: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The actions of an episode and their log-probabilities."""
    acts_T = played.acts_ET[row]
    return tuple(played.actions_ET[row][acts_T].tolist()), played.logp_ET[row][acts_T]


def _picked(
    choice: Choice,
    table: CandidateTable,
    evidence: Sequence[Passage],
    path: PickedPath,
    actions: tuple[int, ...],
    logp_T: np.ndarray,
) -> Picked:
    """What an episode that looked further ended with, and what it found besides."""
    candidates = choice.retrieved.passages
    places = {passage.id: n for n, passage in enumerate(candidates)}
    further: list[Passage] = []

    def add(passage: Passage) -> int:
        if passage.id not in places:
            places[passage.id] = len(candidates) + len(further)
            further.append(passage)
        return places[passage.id]

    for turn in path.turns:
        for found in turn.found:
            row = table.corpus.row_of(found.passage_id)
            assert row is not None  # it came from there
            add(table.corpus[row])
    acts = path.turns[1:]  # behind the start stands a turn for each action
    probs_T = np.exp(logp_T).tolist()
    if acts:
        probs = [p for turn, p in zip(acts, probs_T, strict=True) if turn.action == "pick"]
    else:
        probs = probs_T[: len(evidence)]
    return Picked(
        positions=tuple(add(passage) for passage in evidence),
        probs=tuple(probs),
        actions=actions,
        propensity_logp=sum(path.action_logps),
        explored=choice.explore,
        further=tuple(further),
        path=path,
    )


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


def action_logps(
    actions: Sequence[int], logp_T: np.ndarray, greedy: Sequence[int], explore_share: float
) -> tuple[float, ...]:
    """Log-propensity of each action given those before it, in nats; see the module.

    Args:
        actions: What was done.
        logp_T: Its log-probabilities under the policy.
        greedy: The policy's most probable actions.
        explore_share: The probability of drawing.

    Example:
        >>> logps = action_logps([0, 3], np.log([0.5, 0.25]), [0, 2], explore_share=0.2)
        >>> [round(math.exp(logp), 6) for logp in logps]
        [0.9, 0.027778]
    """
    totals = [0.0]
    for number, logp in enumerate(np.cumsum(logp_T).tolist(), start=1):
        is_greedy = tuple(actions[:number]) == tuple(greedy[:number])
        totals.append(propensity_logp(logp, is_greedy, explore_share))
    return tuple(after - before for before, after in pairwise(totals))


def _problem(choice: Choice, wanted: int, environment: EnvironmentConfig) -> RequestError | None:
    """What is wrong with a request, if anything is."""
    trained, num_candidates = environment.num_selected, len(choice.retrieved.passages)
    if choice.retrieved.filtered and _may_leave_candidates(environment):
        return RequestError.about(
            "filters",
            "choose among what the question's own search finds, but this bundle looks further, "
            "along the passage graph or with queries of its own, and could leave them; leave the "
            "filters out",
        )
    num_first = environment.hops.num_first or trained
    if num_candidates < num_first:
        does = "picks" if environment.hops.num_first is None else "starts with"
        return RequestError(
            f"the question has {num_candidates} candidates, but this bundle's selector {does} "
            f"{num_first}; ask for at least {num_first} candidates"
        )
    if 1 <= wanted <= trained:
        return None
    return RequestError.about(
        "num_selected",
        f"is {wanted}, but this bundle's selector was trained to pick {trained}; give a number "
        f"from 1 to {trained}",
    )


def _may_leave_candidates(environment: EnvironmentConfig) -> bool:
    """Whether an episode may find what its question's own search did not.

    An environment of somebody's own may search whenever it looks further.
    """
    hops = environment.hops
    is_ours = environment.id == HOPS
    return environment.looks_further and not (is_ours and not hops.edges and not hops.writers)


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


def _rows(choices: Sequence[Choice], library: Library) -> CandidateTable:
    """The candidates of these questions as rows of a library's corpus, with its sources.

    Candidates that the corpus lacks were brought by a retriever, and follow it.
    """
    corpus = library.corpus
    row_of: dict[Passage, int] = {}
    brought_XD: list[np.ndarray] = []
    for choice in choices:
        retrieved = choice.retrieved
        for n, passage in enumerate(retrieved.passages):
            if passage in row_of:
                continue
            row = corpus.row_of(passage.id)
            if row is None or corpus[row] != passage:
                row = len(corpus) + len(brought_XD)
                brought_XD.append(retrieved.passage_vectors_ND[n])
            row_of[passage] = row
    brought = [passage for passage, row in row_of.items() if row >= len(corpus)]
    scores_QNC = np.stack([choice.retrieved.scores_NC for choice in choices])
    table = CandidateTable(
        questions=tuple(Question(str(q), c.question, ()) for q, c in enumerate(choices)),
        corpus=ExtendedCorpus(corpus, brought) if brought else corpus,
        rows_QN=np.array([[row_of[p] for p in choice.retrieved.passages] for choice in choices]),
        scores_QNC=scores_QNC,
        score_names=library.retrievers.score_names,
        question_vectors_QD=np.stack([choice.retrieved.question_vector_D for choice in choices]),
        passage_vectors_PD=library.retrievers.passage_vectors,
        brought_vectors_XD=np.stack(brought_XD) if brought else np.zeros((0, 0), np.float32),
    )
    return library.with_sources(table)


class _Candidates(list[Passage]):
    """The candidates of several questions one after another; a passage may be there twice."""

    content_hash = ""

    def row_of(self, passage_id: str) -> int | None:
        """The first row with this passage."""
        return next((row for row, passage in enumerate(self) if passage.id == passage_id), None)
