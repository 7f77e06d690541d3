"""Policies over the slots of a growing pool: a logit for each action, drawn step by step.

They act in `rlrag/DocumentHops-v1`. The actions are those of the environment: a slot each, a search
for each query writer and pick, and the stop.

Shape letters: E episodes, T actions of the longest one, N slots, K picks, R query writers,
S = R K searches, A = N + S + 1 actions, F slot features, G global features, D embedding, P
projection.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rlrag.errors import ConfigError, EpisodeError
from rlrag.records import Columns, Trajectories
from rlrag.selection.encoder_scorers import PairScorer
from rlrag.selection.plackett_luce import action_logp
from rlrag.selection.protocol import Actions, Draws, Turn
from rlrag.selection.slot_features import SLOT_FEATURES

_READ = ("slot_features", "filled", "order", "global", "action_mask")


class SlotPolicy(nn.Module):
    """Softmax over the actions that are allowed; implements `Policy`.

    The logit of a slot is a function of its features and those of the episode, the same for every
    slot, so that permuting slots permutes logits. That of a search is one of the features of the
    pick that its query is written on and those of the episode, with an output for each writer; that
    of the stop is a function of the episode's features alone. All output layers start at zero, so
    that before training the logit of a slot is the prior's: each rank in the list of what found it,
    hits of a query or neighbours of a pick, costs `prior_scale` nats.

    With a projection, a slot has q^T A^T B t more, the learned low-rank form of the vectors of
    question and passage. A starts small and random, B at zero. With a reader, it has what that
    gives for the texts of question and passage.

    Args:
        num_slot_features: Features of a slot (F).
        num_global_features: Features of an episode (G).
        num_writers: Query writers of the environment (R).
        hidden_size: Width of the hidden layer; 0 makes it linear.
        vector_size: Length of the embeddings (D).
        projection_size: Rank of the form of the embeddings (P); 0 leaves them out.
        may_stop: Whether it stops while it could go on; without, only where nothing else is left.
        reader: A trained encoder of pairs of question and passage.
        prior_scale: What a rank costs, in nats; 0 makes all allowed actions equally likely.
    """

    def __init__(
        self,
        num_slot_features: int,
        num_global_features: int,
        num_writers: int = 0,
        hidden_size: int = 0,
        vector_size: int = 0,
        projection_size: int = 0,
        may_stop: bool = True,
        reader: PairScorer | None = None,
        prior_scale: float = 0.0,
    ) -> None:
        super().__init__()
        if projection_size and not vector_size:
            raise ConfigError(
                f"projection_size is {projection_size}, but there are no embeddings to project; "
                "configure an encoder, or set it to 0"
            )
        self.num_writers = num_writers
        self.may_stop = may_stop
        self.reader = reader
        self.prior_scale = prior_scale
        self.slot = _scorer(num_slot_features + num_global_features, hidden_size, 1)
        self.search: nn.Module | None = None
        if num_writers:
            num_inputs = num_slot_features + num_global_features
            self.search = _scorer(num_inputs, hidden_size, num_writers)
        self.stop = _scorer(num_global_features, hidden_size, 1)
        self.project_question: nn.Linear | None = None
        if projection_size:
            self.project_question = nn.Linear(vector_size, projection_size, bias=False)
            self.project_passage = nn.Linear(vector_size, projection_size, bias=False)
            nn.init.zeros_(self.project_passage.weight)

    def logits(self, observations: Columns, infos: Columns | None = None) -> torch.Tensor:
        """Logits of all actions, allowed or not, shape (E, A).

        Args:
            observations: What the environment shows.
            infos: The texts beside it, which a reader needs.

        Raises:
            EpisodeError: when the environment does not show what this policy reads.
        """
        missing = [name for name in _READ if name not in observations]
        if self.project_question is not None:
            names = ("question_embedding", "slot_embeddings")
            missing += [name for name in names if name not in observations]
        if missing:
            raise EpisodeError(
                f"the environment does not show {', '.join(missing)}, which this policy reads; use "
                "rlrag/DocumentHops-v1, or a policy for the environment that you have"
            )
        features_ENF = self._tensor(observations["slot_features"])
        global_EG = self._tensor(observations["global"])
        num_episodes, num_slots, _ = features_ENF.shape
        global_ENG = global_EG[:, None].expand(-1, num_slots, -1)
        both_ENX = torch.cat([features_ENF, global_ENG], dim=-1)
        slot_EN = self.slot(both_ENX).squeeze(-1)
        if self.prior_scale:
            nearness_EN = features_ENF[:, :, SLOT_FEATURES.index("reciprocal_rank")]
            rank_EN = 1 / torch.where(nearness_EN > 0, nearness_EN, 1.0)
            slot_EN = slot_EN - self.prior_scale * (rank_EN - 1)
        if self.project_question is not None:
            question_EP = self.project_question(self._tensor(observations["question_embedding"]))
            passage_ENP = self.project_passage(self._tensor(observations["slot_embeddings"]))
            slot_EN = slot_EN + torch.einsum("ep,enp->en", question_EP, passage_ENP)
        if self.reader is not None:
            slot_EN = slot_EN + self._read(self.reader, observations, infos).to(slot_EN)
        search_ES = slot_EN[:, :0]
        if self.search is not None:
            # A pick that is not there yet has no search either, so that any slot stands in for it.
            order_EK = torch.from_numpy(observations["order"]).to(slot_EN.device)
            place_EKX = order_EK.clamp(max=num_slots - 1)[:, :, None]
            picked_EKX = both_ENX.gather(1, place_EKX.expand(-1, -1, both_ENX.shape[-1]))
            search_ES = self.search(picked_EKX).transpose(1, 2).reshape(num_episodes, -1)
        logits_EA = torch.cat([slot_EN, search_ES, self.stop(global_EG)], dim=1)
        num_actions = observations["action_mask"].shape[1]
        if logits_EA.shape[1] != num_actions:
            raise EpisodeError(
                f"the environment has {num_actions} actions, but this policy knows "
                f"{logits_EA.shape[1]}, with {self.num_writers} query writers; give both the same "
                "number of writers"
            )
        return logits_EA

    def act(self, observations: Columns, infos: Columns, turn: Turn) -> Actions:
        """See `Policy.act`.

        Raises:
            ConfigError: for draws without replacement, which need all actions before the first.
        """
        with torch.no_grad():
            exact_EA = self.logits(observations, infos).double().cpu()
        allowed_EA = self._allowed(observations)
        logp_EA = action_logp(exact_EA, allowed_EA)
        if turn.draws is None:
            taken_E = logp_EA.argmax(dim=1)
            log_ratios_E = np.zeros(len(taken_E))
        else:
            proposal_EA = action_logp(exact_EA / turn.draws.temperature, allowed_EA)
            noise_EA = torch.from_numpy(_noise(turn.draws, turn, exact_EA.shape[1]))
            taken_E = (proposal_EA + noise_EA).argmax(dim=1)
            log_ratios_E = (_at(logp_EA, taken_E) - _at(proposal_EA, taken_E)).numpy()
        return Actions(taken_E.numpy(), _at(logp_EA, taken_E).numpy(), log_ratios_E)

    def log_prob(self, trajectories: Trajectories) -> torch.Tensor:
        """See `Policy.log_prob`."""
        columns = []
        for step, acts_E in enumerate(trajectories.acts_ET.T):
            observations = trajectories.observations[step]
            logits_EA = self.logits(observations, trajectories.infos[step])
            counts_E = torch.from_numpy(acts_E).to(logits_EA.device)
            allowed_EA = self._allowed(observations)
            allowed_EA = allowed_EA.to(logits_EA.device) | ~counts_E[:, None]
            actions_E = torch.from_numpy(np.where(acts_E, trajectories.actions_ET[:, step], 0))
            logp_E = _at(action_logp(logits_EA, allowed_EA), actions_E.to(logits_EA.device))
            columns.append(torch.where(counts_E, logp_E, 0.0))
        return torch.stack(columns, dim=1)

    def _read(
        self, reader: PairScorer, observations: Columns, infos: Columns | None
    ) -> torch.Tensor:
        """What the reader gives for each slot, shape (E, N); 0 where it is empty."""
        if infos is None or "question" not in infos or "passages" not in infos:
            raise EpisodeError(
                "the environment does not show question and passages, which this policy reads; "
                "add them to its infos, or use selector.kind slots"
            )
        filled_EN = torch.from_numpy(observations["filled"].astype(np.bool_))
        pairs = [
            (question, passage)
            for question, passages in zip(infos["question"], infos["passages"], strict=True)
            for passage in passages
        ]
        scores_X = reader(pairs)
        read_EN = torch.zeros(filled_EN.shape, dtype=scores_X.dtype, device=scores_X.device)
        # Passages stand in the order of their slots, which are filled from the first on.
        return read_EN.masked_scatter(filled_EN.to(scores_X.device), scores_X)

    def _allowed(self, observations: Columns) -> torch.Tensor:
        """Which actions it may take, bool (E, A)."""
        allowed_EA = observations["action_mask"].astype(np.bool_)
        if not self.may_stop:
            allowed_EA[:, -1] &= ~allowed_EA[:, :-1].any(axis=1)
        return torch.from_numpy(allowed_EA)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """An array in the type and on the device of the weights."""
        weight = next(self.parameters())
        return torch.from_numpy(array).to(weight.device, weight.dtype)


def _scorer(num_inputs: int, hidden_size: int, num_outputs: int) -> nn.Module:
    """A linear layer, or one with a hidden layer before it, whose outputs start at zero."""
    out = nn.Linear(hidden_size or num_inputs, num_outputs)
    nn.init.zeros_(out.bias)
    nn.init.zeros_(out.weight)
    if not hidden_size:
        return out
    return nn.Sequential(nn.Linear(num_inputs, hidden_size), nn.GELU(), out)


def _noise(draws: Draws, turn: Turn, num_actions: int) -> np.ndarray:
    """Gumbel noise of an action, (E, A): a question's seed determines that of all its episodes."""
    if not draws.replacement:
        raise ConfigError(
            "algorithm.replacement False draws whole selections at once, but this policy chooses "
            "each action by what the last one found; set it to True"
        )
    if turn.step == 0:
        turn.notes["generators"] = [np.random.default_rng(seed) for seed in draws.seeds]
    shape = (draws.num_samples, num_actions)
    return np.concatenate([each.gumbel(size=shape) for each in turn.notes["generators"]])


def _at(values_EA: torch.Tensor, taken_E: torch.Tensor) -> torch.Tensor:
    """The values of the actions taken, shape (E,)."""
    return values_EA.gather(1, taken_E[:, None])[:, 0]
