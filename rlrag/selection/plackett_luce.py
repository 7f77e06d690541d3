"""Plackett-Luce policies: sequential softmax over the remaining candidates.

A Plackett-Luce permutation picks one candidate after another, each with softmax probability among
those that are left (Plackett, 1975; Luce, 1959):

    log p(z | x) = sum_t [ s_{t, z_t} - logsumexp_{j not in z_<t} s_{t, j} ]

which is DRO's Eq. 1 with candidates in place of tokens. The classical model has the same logits s
at every pick t. Logits of their own for each pick say that the passage worth showing first need not
be the one worth showing last, next to the question; with equal ones a passage that must be among
the picks comes early, whatever its best place is. Adding independent Gumbel(0, 1) noise to the
logits of a pick and taking the largest that is left draws from it exactly (Yellott, 1977).

Dividing the logits by a temperature gives a flatter or sharper proposal of the same form; samples
then carry weights that correct for it.

A policy that may stop has one more logit at each pick, that of ending the episode with the passages
picked so far. It stands among the candidates' logits: what is left is picked only where it is worth
more than stopping. It never ends an episode before the first pick.

Shape letters: B questions, M samples, N candidates, K selected, P prefixes, T picks so far, E
episodes, U different questions of E episodes, A actions: N candidates, and the stop where there is
one. Logits of shape (B, N) are the same for every pick, those of shape (B, K, N) differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rlrag.errors import ConfigError, EpisodeError
from rlrag.records import Columns, Trajectories
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.gumbel_top_k import NextPick, sample_distinct
from rlrag.selection.observed import Observed, observed
from rlrag.selection.protocol import Actions, Draws, Seed, Turn

_LOWEST = np.finfo(np.float64).min


_START_OF_STOP = -2.0
"""Logit of the stop before training: the retriever's first passage, at 0, is far likelier."""


def action_logp(logits_EA: torch.Tensor, allowed_EA: torch.Tensor) -> torch.Tensor:
    """Log-probability of each action among those that are allowed, shape (E, A), in nats.

    What is not allowed has -inf; at least one action of each row must be.

    Example:
        >>> odds = torch.log(torch.tensor([[2.0, 1.0, 1.0]]))
        >>> action_logp(odds, torch.tensor([[True, False, True]])).exp().round(decimals=3)
        tensor([[0.6670, 0.0000, 0.3330]])
    """
    return logits_EA.masked_fill(~allowed_EA, float("-inf")).log_softmax(dim=-1)


def sample(
    logits: np.ndarray, num_samples: int, num_selected: int, seeds: Sequence[Seed]
) -> np.ndarray:
    """Draw ordered selections, int64 of shape (B, M, K); `seeds[b]` determines those of row b."""
    logits_BKN = np.repeat(logits[:, None], num_selected, axis=1) if logits.ndim == 2 else logits
    shape = (num_samples, *logits_BKN.shape[1:])
    noise_BMKN = np.stack([np.random.default_rng(seed).gumbel(size=shape) for seed in seeds])
    values_BMKN = logits_BKN[:, None] + noise_BMKN
    picks_BMK = np.zeros(values_BMKN.shape[:-1], dtype=np.int64)
    for step in range(num_selected):
        picks_BMK[..., step] = values_BMKN[..., step, :].argmax(axis=-1)
        np.put_along_axis(values_BMKN, picks_BMK[..., step][..., None, None], -np.inf, axis=-1)
    return picks_BMK


def next_action(logits_PA: np.ndarray, may_stop: bool) -> NextPick:
    """Log-probabilities of one question's next action after given ones; -inf for those taken.

    A single row of logits is the same for every pick. With a stop, the last action, nothing but the
    stop follows it: a short sequence is filled up with stops of probability 1.

    Example:
        >>> after = next_action(np.log([[2.0, 1.0, 1.0]]), may_stop=False)
        >>> np.exp(after(np.array([[1]]))).round(3).tolist()
        [[0.667, 0.0, 0.333]]
    """

    def logp_after(taken_PT: np.ndarray) -> np.ndarray:
        row = min(taken_PT.shape[1], len(logits_PA) - 1)
        left_PA = np.tile(logits_PA[row], (len(taken_PT), 1))
        np.put_along_axis(left_PA, taken_PT, -np.inf, axis=1)
        if may_stop:
            stopped_P = (taken_PT == left_PA.shape[1] - 1).any(axis=1)
            left_PA[stopped_P, :-1] = -np.inf
            left_PA[stopped_P, -1] = 0.0
        total_P1 = np.logaddexp.reduce(left_PA, axis=1, keepdims=True)
        return left_PA - np.maximum(total_P1, _LOWEST)  # -inf where nothing is left, not NaN

    return logp_after


@dataclass(frozen=True)
class _Sight:
    """What E episodes show, with the logits of the actions of each different question.

    `logits_UPA` has P = 1 row where all picks share it, else one a pick.
    """

    seen: Observed
    logits_UPA: torch.Tensor

    def at(self, step: int) -> torch.Tensor:
        """Logits of the actions of a step, shape (E, A)."""
        pick = min(step, self.logits_UPA.shape[1] - 1)
        places_E = torch.from_numpy(self.seen.places_E).to(self.logits_UPA.device)
        return self.logits_UPA[:, pick][places_E]


class PlackettLucePolicy(nn.Module):
    """Plackett-Luce over the logits that `scorer` gives the candidates; implements `Policy`.

    The scorer reads a question once, however many actions follow, as long as the environment shows
    the same candidates; where they change it reads them anew.

    Args:
        scorer: A module that maps a `CandidateBatch` to logits of shape (B, K, N), or (B, N) for
            all picks. Before training it must rank as the retriever does; the scorers of this
            package do.
        num_selected: Passages in a selection (K).
        may_stop: Whether stopping before K picks is one of its actions.
    """

    micro_batch: int | None = None
    """Questions that a learner has in one forward pass; None takes all that it has."""

    def __init__(self, scorer: nn.Module, num_selected: int, may_stop: bool = False) -> None:
        super().__init__()
        self.scorer = scorer
        self.num_selected = num_selected
        self.stop_logits_K = (
            nn.Parameter(torch.full((num_selected,), _START_OF_STOP)) if may_stop else None
        )

    @property
    def may_stop(self) -> bool:
        """Whether stopping is one of its actions."""
        return self.stop_logits_K is not None

    def logits(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of the actions, shape (B, P, A): P = 1 where all picks share them, else K.

        Raises:
            ConfigError: when the scorer gives another shape.
        """
        logits = self.scorer(batch)
        num_questions, num_candidates = batch.scores_BNC.shape[:2]
        for_all = (num_questions, num_candidates)
        for_each = (num_questions, self.num_selected, num_candidates)
        if tuple(logits.shape) not in (for_all, for_each):
            raise ConfigError(
                f"{type(self.scorer).__name__} gave logits of shape {tuple(logits.shape)}; a "
                f"scorer must give {for_all}, a logit for each candidate, or {for_each}, one for "
                "each pick and candidate"
            )
        logits_BPN = logits.unsqueeze(1) if logits.ndim == 2 else logits
        if self.stop_logits_K is None:
            return logits_BPN
        logits_BKN = logits_BPN.expand(for_each)
        stop_BK1 = self.stop_logits_K[None, :, None].expand(num_questions, -1, 1)
        return torch.cat([logits_BKN, stop_BK1.to(logits_BKN.dtype)], dim=-1)

    def act(self, observations: Columns, infos: Columns, turn: Turn) -> Actions:
        """See `Policy.act`.

        Sample weights are computed in float64 on the CPU: they are ratios of probabilities, which
        may be far apart.
        """
        with torch.no_grad():
            sight = self._look(observations, infos, turn)
            logits_EA = sight.at(turn.step)
            allowed_EA, only_stop_E = self._allowed(observations, logits_EA.shape[1])
            exact_EA = logits_EA.double().cpu()
            draws = turn.draws
            log_ratios_E = np.zeros(len(exact_EA))
            if draws is None:
                taken_E = _largest(exact_EA.numpy(), allowed_EA)
            elif draws.replacement:
                proposal_EA = exact_EA / draws.temperature
                noise_EA = self._noise(draws, turn, logits_EA.shape[1])
                taken_E = _largest(proposal_EA.numpy() + noise_EA, allowed_EA)
                mask = torch.from_numpy(allowed_EA)
                drawn_logp_EA = action_logp(proposal_EA, mask)
                log_ratios_E = _at(action_logp(exact_EA, mask) - drawn_logp_EA, taken_E)
            else:
                taken_E, log_ratios_E = self._distinct(sight, draws, turn)
            mask = torch.from_numpy(allowed_EA).to(logits_EA.device)
            logp_E = _at(action_logp(logits_EA, mask), taken_E)
        stop = observations["action_mask"].shape[1] - 1
        return Actions(
            actions_E=np.where(only_stop_E, stop, taken_E),
            logp_E=np.where(only_stop_E, np.float32(0), logp_E),
            log_ratios_E=np.where(only_stop_E & (log_ratios_E > -np.inf), 0.0, log_ratios_E),
        )

    def log_prob(self, trajectories: Trajectories) -> torch.Tensor:
        """See `Policy.log_prob`."""
        acts_ET = trajectories.acts_ET
        turn, columns = Turn(), []
        for step in range(acts_ET.shape[1]):
            observations = trajectories.observations[step]
            logits_EA = self._look(observations, trajectories.infos[step], turn).at(step)
            allowed_EA, only_stop_E = self._allowed(observations, logits_EA.shape[1])
            device = logits_EA.device
            counts_E = acts_ET[:, step] & ~only_stop_E
            allowed_EA |= ~counts_E[:, None]
            logp_EA = action_logp(logits_EA, torch.from_numpy(allowed_EA).to(device))
            actions_E1 = np.where(counts_E, trajectories.actions_ET[:, step], 0)[:, None]
            logp_E = logp_EA.gather(1, torch.from_numpy(actions_E1).to(device)).squeeze(1)
            columns.append(torch.where(torch.from_numpy(counts_E).to(device), logp_E, 0.0))
        return torch.stack(columns, dim=1)

    def _look(self, observations: Columns, infos: Columns, turn: Turn) -> _Sight:
        """What the episodes show now, scored once for as long as they show the same."""
        sight: _Sight | None = turn.notes.get("sight")
        if sight is None or not sight.seen.still_shown(observations, infos):
            seen = observed(observations, infos)
            sight = _Sight(seen, self.logits(seen.batch))
            turn.notes["sight"] = sight
        return sight

    def _allowed(self, observations: Columns, num_actions: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of its actions an episode allows, bool (E, A), and where only a stop is left (E,).

        Where only a stop is left that the policy does not choose by itself, the first array has
        True throughout.

        Raises:
            EpisodeError: when the environment has other actions than candidates and a stop.
        """
        mask_EA = np.asarray(observations["action_mask"]).astype(np.bool_)
        num_candidates = num_actions - self.may_stop
        if mask_EA.shape[1] != num_candidates + 1:
            raise EpisodeError(
                f"the environment has {mask_EA.shape[1]} actions, but this policy has one for "
                f"each of the {num_candidates} candidates and one to stop"
            )
        allowed_EA = mask_EA[:, :num_actions].copy()
        only_stop_E = np.logical_not(allowed_EA.any(axis=1))
        allowed_EA[only_stop_E] = True
        return allowed_EA, only_stop_E

    def _noise(self, draws: Draws, turn: Turn, num_actions: int) -> np.ndarray:
        """Gumbel noise of a step, (E, A): a question's seed determines that of all its steps."""
        if "noise" not in turn.notes:
            turn.notes["generators"] = [np.random.default_rng(seed) for seed in draws.seeds]
            shape = (draws.num_samples, self.num_selected, num_actions)
            drawn = [generator.gumbel(size=shape) for generator in turn.notes["generators"]]
            turn.notes["noise"] = np.concatenate(drawn)
        if turn.step < self.num_selected:
            return turn.notes["noise"][:, turn.step]
        later = (draws.num_samples, num_actions)  # an environment with longer episodes
        return np.concatenate([each.gumbel(size=later) for each in turn.notes["generators"]])

    def _distinct(self, sight: _Sight, draws: Draws, turn: Turn) -> tuple[np.ndarray, np.ndarray]:
        """Actions of a step from whole sequences that differ, and log ratios of a step.

        The sequences are drawn before the first action, and their log ratios given with it.
        """
        if "plan" not in turn.notes:
            exact_UPA = sight.logits_UPA.double().cpu().numpy()
            first_B = sight.seen.places_E[:: draws.num_samples]
            drawn = [
                sample_distinct(
                    next_action(exact_UPA[place] / draws.temperature, self.may_stop),
                    draws.num_samples,
                    self.num_selected,
                    seed,
                )
                for place, seed in zip(first_B, draws.seeds, strict=True)
            ]
            plan_EK = np.concatenate([each.positions_MK for each in drawn])
            log_rate_E = np.concatenate([each.log_inclusion_M for each in drawn])
            logp_E = self._sequence_logp(exact_UPA[sight.seen.places_E], plan_EK)
            ratios_E = logp_E - log_rate_E + math.log(draws.num_samples)
            turn.notes.update(plan=plan_EK, scored=sight, ratios=ratios_E)
        if turn.notes["scored"] is not sight or turn.step >= self.num_selected:
            raise ConfigError(
                "algorithm.replacement False draws whole selections before the first pick, but the "
                "environment changes its candidates or continues after them; set it to True"
            )
        ratios_E = turn.notes["ratios"]
        return turn.notes["plan"][:, turn.step], ratios_E if turn.step == 0 else np.zeros(
            len(ratios_E)
        )

    def _sequence_logp(self, logits_EPA: np.ndarray, plan_EK: np.ndarray) -> np.ndarray:
        """Log-probability of each planned sequence under the policy itself, shape (E,)."""
        total_E = np.zeros(len(plan_EK))
        for e, (logits_PA, plan_K) in enumerate(zip(logits_EPA, plan_EK, strict=True)):
            logp_after = next_action(logits_PA, self.may_stop)
            for step, action in enumerate(plan_K):
                total_E[e] += logp_after(plan_K[None, :step])[0, action]
        return total_E


def _largest(values_EA: np.ndarray, allowed_EA: np.ndarray) -> np.ndarray:
    """The allowed action with the largest value, the first of equal ones, shape (E,)."""
    return np.where(allowed_EA, values_EA, -np.inf).argmax(axis=1)


def _at(values_EA: torch.Tensor, taken_E: np.ndarray) -> np.ndarray:
    """The values of the actions taken, shape (E,)."""
    return (
        values_EA.gather(1, torch.from_numpy(taken_E)[:, None].to(values_EA.device))[:, 0]
        .cpu()
        .numpy()
    )
