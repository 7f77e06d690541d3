"""Bundle versions and candidates in; the passages that each version's policy picks out.

Exploration. With probability e (`feedback.explore_share`) the selection z is drawn from the policy
p, else it is the policy's most probable one, g. Whatever coin fell, its propensity is

    mu(z | x) = e p(z | x) + (1 - e) [z = g(x)]

which is what a log of selections must hold to be trained on (Horvitz and Thompson, 1952).

Shape letters: B questions, M samples, N candidates, K selected.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlrag.bundle import load_bundle
from rlrag.errors import OverloadedError, RequestError, RlragError
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.protocol import SelectionPolicy
from serve.records import Picked, Retrieved
from serve.versions import check_version


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
    """

    def __init__(self, explore_share: float = 0.0) -> None:
        self._explore_share = explore_share
        self._policies: dict[str, SelectionPolicy] = {}
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
            bundle = load_bundle(directory)
            check_version(version, bundle.version, directory)
            bundle.policy.eval()
            self._policies = {**self._policies, version: bundle.policy}

    def drop(self, version: str) -> None:
        """Forget a version."""
        with self._loading:
            self._policies = {v: policy for v, policy in self._policies.items() if v != version}

    def select(self, version: str, choices: Sequence[Choice]) -> list[Picked | RlragError]:
        """The pick of each question, or what is wrong with its request.

        Questions with equally many candidates are picked for together.

        Raises:
            OverloadedError: when the version is not loaded here yet.
        """
        policy = self._policies.get(version)
        if policy is None:
            raise OverloadedError(f"version {version} is being loaded here; try again")
        found: dict[int, Picked | RlragError] = {}
        together: dict[tuple[int, int], list[int]] = {}
        for place, choice in enumerate(choices):
            wanted = policy.num_selected
            if choice.num_selected is not None:
                wanted = choice.num_selected
            num_candidates = len(choice.retrieved.passages)
            if not 1 <= wanted <= policy.num_selected or policy.num_selected > num_candidates:
                found[place] = _impossible(wanted, policy.num_selected, num_candidates)
            else:
                together.setdefault((num_candidates, wanted), []).append(place)
        for (_, wanted), places in together.items():
            picked = self._pick(policy, [choices[place] for place in places], wanted)
            found.update(zip(places, picked, strict=True))
        return [found[place] for place in range(len(choices))]

    def _pick(
        self, policy: SelectionPolicy, choices: Sequence[Choice], wanted: int
    ) -> list[Picked]:
        batch = _batch(choices)
        greedy_BK = policy.greedy(batch)[:, :wanted]
        explored = [choice.explore for choice in choices]
        picks_BK = greedy_BK.copy()
        if any(explored):
            seeds = [choice.seed for choice in choices]
            drawn_BK = policy.sample(batch, 1, seeds).positions_BMK[:, 0, :wanted]
            picks_BK[explored] = drawn_BK[explored]
        pick_logp_BK = policy.pick_log_prob(batch, picks_BK)
        return [
            Picked(
                positions=tuple(picks_BK[b].tolist()),
                probs=tuple(np.exp(pick_logp_BK[b]).tolist()),
                propensity_logp=propensity_logp(
                    float(pick_logp_BK[b].sum()),
                    is_greedy=bool((picks_BK[b] == greedy_BK[b]).all()),
                    explore_share=self._explore_share,
                ),
                explored=explored[b],
            )
            for b in range(len(choices))
        ]


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


def _batch(choices: Sequence[Choice]) -> CandidateBatch:
    return CandidateBatch(
        question_texts=tuple(choice.question for choice in choices),
        passage_texts=tuple(
            tuple(passage.contents for passage in choice.retrieved.passages) for choice in choices
        ),
        scores_BNC=np.stack([choice.retrieved.scores_NC for choice in choices]),
        question_vectors_BD=np.stack([choice.retrieved.question_vector_D for choice in choices]),
        passage_vectors_BND=np.stack([choice.retrieved.passage_vectors_ND for choice in choices]),
    )
