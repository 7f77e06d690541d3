"""Listwise policy: a causal language model that writes the order of the passages.

The DRO paper's selector (arXiv 2505.03075, Eq. 1, section 8.3): a language model reads the question
and n numbered passages and writes `[2] > [1] > ...`. At each fork (`listwise_prompt`) the model's
logits l are restricted to the tokens that may follow. With f over the forks on the way to ranking z

    log p(z | x) = sum_f [ l_f(token taken) - logsumexp_{tokens that may follow} l_f ]

is exact: the probabilities of all ordered selections of K among n sum to 1. Where nothing is left
to choose (K = n = 1) log p is 0. A departure from the paper's code, which samples free text and
leaves out what does not parse.

A question's prompt is read once, however many rankings are drawn or scored; see `branches`.

Shape letters: B questions, M samples, N candidates, K selected, F forks, O options of a fork,
U uniform draws, C columns with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlrag.errors import ConfigError, EpisodeError, GenerationError, PromptTooLongError
from rlrag.models.adapters import add_adapter, copy_around_frozen
from rlrag.models.causal_lm import differ, load_causal_lm, probe_tokens
from rlrag.models.directories import resolve_dtype
from rlrag.records import Columns, Trajectories
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.branches import ReadPrompts, read_branches, read_prompts
from rlrag.selection.listwise_prompt import Draft, RankingPrompt, Rankings
from rlrag.selection.observed import Observed, observed
from rlrag.selection.protocol import Actions, Draws, Turn

ATTENTION = "sdpa"
"""The implementation of attention that takes a mask of branches as it is."""
_ADVICE = (
    "for selector.kind 'listwise_lm' set selector.model to a causal language model whose layers "
    "keep keys and values, such as the one of generator.model"
)


class ListwiseLMPolicy(nn.Module):
    """A causal language model that writes the order; implements `Policy`.

    It is always in evaluation mode: dropout would make draws and gradients of one step disagree.
    With an adapter, the adapter's tensors alone are trained, saved and loaded; all others come from
    `model_dir`, and copies of the policy share them. Before training its order is not the
    retriever's: `rlrag.training.dro.imitation` makes it so.
    """

    def __init__(
        self,
        model_dir: Path,
        num_selected: int,
        max_tokens: int = 160,
        adapter_rank: int | None = None,
        micro_batch: int = 8,
        base: Any = None,
        precision: str = "float32",
    ) -> None:
        """Load the model, with its weights in float32.

        Args:
            model_dir: Directory of a causal language model and its tokenizer.
            num_selected: Passages in a selection (K).
            max_tokens: Tokens of one passage, its title included, that the model reads.
            adapter_rank: Rank of the LoRA adapter on every linear layer; all weights when unset.
            micro_batch: Questions, each with all its samples, in one forward pass.
            base: The model of `model_dir` as loaded before, frozen and with attention `ATTENTION`:
                the adapter is put around its weights, which others may use too.
            precision: Number format of the matrix products: `float32`, `bfloat16`, or `auto` for
                the second where the device multiplies it natively.

        Raises:
            ConfigError: when the directory holds no causal language model with a tokenizer.
        """
        super().__init__()
        self.num_selected = num_selected
        self.micro_batch = micro_batch
        self._precision = precision
        self.model = _load_model(model_dir) if base is None else copy_around_frozen(base)
        _check_branches(self.model, model_dir)
        self._prompt = RankingPrompt(model_dir, max_tokens, num_selected)
        if adapter_rank is not None:
            add_adapter(self.model, adapter_rank, 2 * adapter_rank)
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_miss_no_frozen)
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> ListwiseLMPolicy:
        """A policy that is trained apart from this one, around the same frozen weights."""
        return copy_around_frozen(self, memo)

    def train(self, mode: bool = True) -> ListwiseLMPolicy:
        """Stay in evaluation mode whatever `mode` is."""
        return super().train(False)

    def act(self, observations: Columns, infos: Columns, turn: Turn) -> Actions:
        """See `Policy.act`; the whole ranking is written before the first action.

        The temperature of draws applies to the logits at each fork. The stop is no action of this
        policy, and it wants candidates that stay as they are.

        Raises:
            ConfigError: when asked for draws without replacement.
            EpisodeError: when the environment changes its candidates, or goes on after K actions.
            PromptTooLongError: when a prompt does not fit into the model's context.
        """
        if "written" not in turn.notes:
            seen = observed(observations, infos)
            with torch.no_grad():
                turn.notes["written"] = seen, self._write(seen, turn.draws)
        seen, (positions_EK, logp_EK, log_ratios_E) = turn.notes["written"]
        if turn.step >= self.num_selected or not seen.still_shown(observations, infos):
            raise EpisodeError(
                "selector.kind 'listwise_lm' ranks the candidates once at the start, but the "
                f"environment changes them or continues after {self.num_selected} actions; use "
                "selector.kind features for it"
            )
        first = turn.step == 0
        return Actions(
            actions_E=positions_EK[:, turn.step],
            logp_E=logp_EK[:, turn.step],
            log_ratios_E=log_ratios_E if first else np.zeros_like(log_ratios_E),
        )

    def log_prob(self, trajectories: Trajectories) -> torch.Tensor:
        """See `Policy.log_prob`.

        Raises:
            PromptTooLongError: when a prompt does not fit into the model's context.
        """
        seen = observed(trajectories.observations[0], trajectories.infos[0])
        picks = [tuple(a for a in row if a >= 0) for row in trajectories.actions_ET.tolist()]
        num_actions = trajectories.actions_ET.shape[1]
        parts, order = [], []
        for rows, read in self._read(seen.batch):
            mine = np.flatnonzero((seen.places_E >= rows.start) & (seen.places_E < rows.stop))
            asked = [(int(seen.places_E[e]) - rows.start, picks[e]) for e in mine]
            parts.append(self._score(read, seen.batch, asked, num_actions))
            order.append(mine)
        back_E = torch.from_numpy(np.concatenate(order).argsort())
        return torch.cat(parts)[back_E.to(parts[0].device)]

    def _write(
        self, seen: Observed, draws: Draws | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rankings of E episodes (E, K), the log-probability of each pick, and log ratios (E,)."""
        if draws is None:
            picks_UK, logp_UK = self._best(seen.batch)
            places_E = seen.places_E
            return picks_UK[places_E], logp_UK[places_E], np.zeros(len(places_E))
        if not draws.replacement:
            raise ConfigError(
                "selector.kind 'listwise_lm' draws with replacement only, but "
                "algorithm.replacement is False; set it to True or use another selector.kind"
            )
        batch = seen.batch.of(seen.places_E[:: draws.num_samples])
        rankings = self._rankings(batch)
        found = []
        for rows, read in self._read(batch):
            draws_BMU = np.stack(
                [
                    np.random.default_rng(seed).random((draws.num_samples, rankings.longest))
                    for seed in draws.seeds[rows]
                ]
            )
            found.append(self._draw(read, rankings, draws_BMU, draws.temperature))
        positions, logp, proposal_logp = (np.concatenate(part) for part in zip(*found, strict=True))
        return positions, logp.astype(np.float32), (logp - proposal_logp).sum(axis=1)

    def _best(self, batch: CandidateBatch) -> tuple[np.ndarray, np.ndarray]:
        """The most probable candidate at each pick, not token, (B, K), with its log-probability."""
        num_candidates = batch.scores_BNC.shape[1]
        picks_BK, logp_BK = np.zeros((2, len(batch), self.num_selected))
        for rows, read in self._read(batch):
            chosen: list[tuple[int, ...]] = [()] * (rows.stop - rows.start)
            for step in range(self.num_selected):
                asked = [
                    (b, (*picks, n))
                    for b, picks in enumerate(chosen)
                    for n in range(num_candidates)
                    if n not in picks
                ]
                logp_SK = self._score(read, batch, asked, step + 1)
                last_BN = logp_SK[:, step].double().cpu().numpy().reshape(len(chosen), -1)
                best_B = last_BN.argmax(axis=1)
                width = num_candidates - step
                chosen = [asked[b * width + best][1] for b, best in enumerate(best_B)]
                logp_BK[rows, step] = last_BN[np.arange(len(chosen)), best_B]
            picks_BK[rows] = chosen
        return picks_BK.astype(np.int64), logp_BK

    def _rankings(self, batch: CandidateBatch) -> Rankings:
        return self._prompt.rankings(batch.scores_BNC.shape[1], self.num_selected)

    def _draw(
        self, read: ReadPrompts, rankings: Rankings, draws_BMU: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rankings (B * M, K), the log-probabilities of their picks, and those under the proposal.

        The u-th fork of a sample inverts the cumulative distribution at the u-th uniform draw.
        """
        num_questions, num_samples, _ = draws_BMU.shape
        drafts = {
            (b, m): rankings.begin() for b in range(num_questions) for m in range(num_samples)
        }
        shape = (num_questions, num_samples, self.num_selected)
        logp_BMK, proposal_logp_BMK = np.zeros((2, *shape))
        turn = 0
        while going := [place for place, draft in drafts.items() if not rankings.ended(draft)]:
            forks = [(b, drafts[b, m]) for b, m in going]
            logp_FO = self._fork_logp(read, rankings, forks).double().cpu()
            proposal_logp_FO = (logp_FO / temperature).log_softmax(dim=1)
            cumulative_FO = proposal_logp_FO.exp().cumsum(dim=1).numpy()
            for row, (b, m) in enumerate(going):
                options = rankings.options(drafts[b, m])
                level = draws_BMU[b, m, turn] * cumulative_FO[row, -1]
                # Rounding may put the level at the very top; the last option is meant then.
                found = np.searchsorted(cumulative_FO[row], level, side="right")
                taken = min(int(found), len(options) - 1)
                pick = len(drafts[b, m].picks)
                logp_BMK[b, m, pick] += logp_FO[row, taken].item()
                proposal_logp_BMK[b, m, pick] += proposal_logp_FO[row, taken].item()
                drafts[b, m] = rankings.follow(drafts[b, m], options[taken])
            turn += 1
        positions = np.array([draft.picks for draft in drafts.values()])
        flat = (num_questions * num_samples, self.num_selected)
        return positions, logp_BMK.reshape(flat), proposal_logp_BMK.reshape(flat)

    def _score(
        self,
        read: ReadPrompts,
        batch: CandidateBatch,
        asked: Sequence[tuple[int, Sequence[int]]],
        num_picks: int,
    ) -> torch.Tensor:
        """Log-probabilities of the picks of S beginnings of rankings, (S, num_picks).

        Each names its question and its picks, of which there may be fewer; the rest is 0.
        """
        rankings = self._prompt.rankings(batch.scores_BNC.shape[1], num_picks)
        forks: list[tuple[int, Draft]] = []
        taken: list[int] = []
        places: list[int] = []
        for place, (b, picks) in enumerate(asked):
            for draft, token in rankings.forks(picks):
                forks.append((b, draft))
                taken.append(rankings.options(draft).index(token))
                places.append(place * num_picks + len(draft.picks))
        logp_FO = self._fork_logp(read, rankings, forks)
        device = logp_FO.device
        taken_F1 = torch.tensor(taken, dtype=torch.long, device=device).unsqueeze(1)
        logp = logp_FO.new_zeros(len(asked) * num_picks).index_add(
            0,
            torch.tensor(places, dtype=torch.long, device=device),
            logp_FO.gather(1, taken_F1).squeeze(1),
        )
        return logp.view(len(asked), num_picks)

    def _fork_logp(
        self, read: ReadPrompts, rankings: Rankings, forks: Sequence[tuple[int, Draft]]
    ) -> torch.Tensor:
        """Log-probabilities of the options at forks of given questions, shape (F, O).

        A fork with fewer options than O has -inf behind them.
        """
        opening = len(rankings.begin().path)  # read with the prompt
        written = [draft.path[opening:] for _, draft in forks]
        paths_B: list[set[tuple[int, ...]]] = [set() for _ in read.lengths_B]
        for (b, _), path in zip(forks, written, strict=True):
            paths_B[b].add(path)
        with self._autocast():
            logits_BCV, columns = read_branches(self.model, read, paths_B)
        options = [rankings.options(draft) for _, draft in forks]
        width = max(map(len, options), default=1)
        device = logits_BCV.device
        rows_F = torch.tensor([b for b, _ in forks], dtype=torch.long, device=device)
        columns_F = torch.tensor(
            [columns[b][path] for (b, _), path in zip(forks, written, strict=True)],
            dtype=torch.long,
            device=device,
        )
        tokens_FO = torch.tensor(
            [(*tokens, *[-1] * (width - len(tokens))) for tokens in options],
            dtype=torch.long,
            device=device,
        ).view(len(forks), width)
        logits_FO = logits_BCV[rows_F[:, None], columns_F[:, None], tokens_FO.clamp(min=0)]
        logits_FO = logits_FO.masked_fill(tokens_FO < 0, float("-inf"))
        exact = torch.promote_types(logits_FO.dtype, torch.float32)
        return logits_FO.to(exact).log_softmax(dim=1)

    def _read(self, batch: CandidateBatch) -> Iterator[tuple[slice, ReadPrompts]]:
        """Read the prompts of `micro_batch` questions after another."""
        rankings = self._rankings(batch)
        opening = rankings.begin().path
        for start in range(0, len(batch), self.micro_batch):
            rows = slice(start, min(start + self.micro_batch, len(batch)))
            prompts = [
                [*self._prompt.encode(question, passages), *opening]
                for question, passages in zip(
                    batch.question_texts[rows], batch.passage_texts[rows], strict=True
                )
            ]
            self._check_lengths(prompts, rankings)
            with self._autocast():
                read = read_prompts(self.model, prompts)
            yield rows, read

    def _autocast(self) -> torch.autocast:
        device = next(self.model.parameters()).device.type
        wanted = resolve_dtype(self._precision, device) == "bfloat16"
        return torch.autocast(device, torch.bfloat16, enabled=wanted)

    def _check_lengths(self, prompts: Sequence[Sequence[int]], rankings: Rankings) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(map(len, prompts)) + rankings.longest
        if limit is not None and longest > limit:
            raise PromptTooLongError(
                f"a ranking prompt and its answer take {longest} tokens, but the model of "
                f"selector.model reads {limit}; lower selector.max_tokens or "
                "retrieval.num_candidates"
            )


def _load_model(model_dir: Path) -> Any:
    try:
        return load_causal_lm(model_dir, torch.float32, _ADVICE, ATTENTION)
    except GenerationError as error:
        raise ConfigError(f"{error}; {_ADVICE}") from error


@torch.no_grad()
def _check_branches(model: Any, model_dir: Path) -> None:
    """Compare a continuation beside another one with the same continuation alone.

    A model that goes by the columns and not by the positions given, such as MPT, sees the prompt of
    the second one too far away.
    """
    *prompt, a, b, c, taken = probe_tokens(model, 24)
    try:
        read = read_prompts(model, [prompt])
        both_BCV, columns = read_branches(model, read, [[(c, b), (a, b, c)]])
        alone_V = read_prompts(model, [[*prompt, a, b, c]]).last_BV[0]
    except Exception as error:  # what model code raises is anything
        raise ConfigError(
            f"the model in {model_dir} cannot process several continuations in parallel "
            f"({type(error).__name__}: {error}); {_ADVICE}"
        ) from error
    behind_V = both_BCV[0, columns[0][a, b, c]]
    found, expected = (float(v.float().log_softmax(dim=-1)[taken]) for v in (behind_V, alone_V))
    if differ(found, expected, 1, model.dtype):
        raise ConfigError(
            f"the model in {model_dir} gives a token log-probability {found:.4f} where "
            f"continuations are processed in parallel, but {expected:.4f} where one is processed "
            f"alone; {_ADVICE}"
        )


def _trained(module: nn.Module) -> set[str]:
    """Names of the tensors to save; of two that are tied, one."""
    return {name for name, p in module.named_parameters() if p.requires_grad}


def _drop_frozen(
    module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object
) -> None:
    saved = {prefix + name for name in _trained(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in saved]:
        del state[name]


def _miss_no_frozen(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = sorted(_trained(module).intersection(incompatible.missing_keys))
