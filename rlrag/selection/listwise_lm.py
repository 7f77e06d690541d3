"""Questions and passages in; selections that a causal language model writes, and their log p, out.

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

from rlrag.adapters import add_adapter, copy_around_frozen
from rlrag.causal_lm import differ, load_causal_lm, probe_tokens
from rlrag.errors import ConfigError, GenerationError, PromptTooLongError
from rlrag.models import resolve_dtype
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.branches import ReadPrompts, read_branches, read_prompts
from rlrag.selection.listwise_prompt import Draft, RankingPrompt, Rankings
from rlrag.selection.protocol import SampledSelections, Seed

ATTENTION = "sdpa"
"""The implementation of attention that takes a mask of branches as it is."""
_ADVICE = (
    "for selector.kind 'listwise_lm' set selector.model to a causal language model whose layers "
    "keep keys and values, such as the one of generator.model"
)


class ListwiseLMPolicy(nn.Module):
    """A causal language model that writes the order; implements `SelectionPolicy`.

    It is always in evaluation mode: dropout would make draws and gradients of one step disagree.
    With an adapter, the adapter's tensors alone are trained, saved and loaded; all others come from
    `model_dir`, and copies of the policy share them. Before training its order is not the
    retriever's: `rlrag.training.imitation` makes it so.
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

    def sample(
        self,
        batch: CandidateBatch,
        num_samples: int,
        seeds: Sequence[Seed],
        temperature: float = 1.0,
        replacement: bool = True,
    ) -> SampledSelections:
        """See `SelectionPolicy.sample`; the temperature applies to the logits at each fork.

        Raises:
            ConfigError: when asked for draws without replacement.
            PromptTooLongError: when a prompt does not fit into the model's context.
        """
        if not replacement:
            raise ConfigError(
                "selector.kind 'listwise_lm' draws with replacement only, but dro.replacement is "
                "False; set it to True or use another selector.kind"
            )
        shape = (len(batch), num_samples)
        positions_BMK = np.zeros((*shape, self.num_selected), dtype=np.int64)
        logp_BM, proposal_logp_BM = np.zeros(shape), np.zeros(shape)
        rankings = self._prompt.rankings(batch.scores_BNC.shape[1], self.num_selected)
        with torch.no_grad():
            for rows, read in self._read(batch, rankings):
                draws_BMU = np.stack(
                    [
                        np.random.default_rng(seed).random((num_samples, rankings.longest))
                        for seed in seeds[rows]
                    ]
                )
                drawn = self._draw(read, rankings, draws_BMU, temperature)
                positions_BMK[rows], logp_BM[rows], proposal_logp_BM[rows] = drawn
        log_weights_BM = logp_BM - proposal_logp_BM - np.log(num_samples)
        return SampledSelections(positions_BMK, logp_BM.astype(np.float32), log_weights_BM)

    def log_prob(self, batch: CandidateBatch, positions_BMK: np.ndarray) -> torch.Tensor:
        """See `SelectionPolicy.log_prob`.

        Fewer than `num_selected` positions give the probability that a ranking begins with them. A
        repeated position has log-probability -inf.

        Raises:
            PromptTooLongError: when a prompt does not fit into the model's context.
        """
        rankings = self._prompt.rankings(batch.scores_BNC.shape[1], positions_BMK.shape[2])
        parts = [
            self._score(read, rankings, positions_BMK[rows].tolist())
            for rows, read in self._read(batch, rankings)
        ]
        return torch.cat(parts)

    def pick_log_prob(self, batch: CandidateBatch, positions_BK: np.ndarray) -> np.ndarray:
        """See `SelectionPolicy.pick_log_prob`; each longer beginning is scored anew."""
        lengths = range(1, positions_BK.shape[1] + 1)
        with torch.no_grad():
            sums_KB = [self.log_prob(batch, positions_BK[:, None, :k])[:, 0] for k in lengths]
        return np.diff(torch.stack(sums_KB, dim=1).double().cpu().numpy(), prepend=0.0)

    def greedy(self, batch: CandidateBatch) -> np.ndarray:
        """See `SelectionPolicy.greedy`: the most probable candidate at each pick, not token."""
        num_candidates = batch.scores_BNC.shape[1]
        rankings = self._prompt.rankings(num_candidates, self.num_selected)
        picks_BK: list[list[int]] = []
        with torch.no_grad():
            for rows, read in self._read(batch, rankings):
                chosen: list[list[int]] = [[] for _ in range(len(batch))[rows]]
                for step in range(self.num_selected):
                    longer = [
                        [[*picks, n] for n in range(num_candidates) if n not in picks]
                        for picks in chosen
                    ]
                    begun = self._prompt.rankings(num_candidates, step + 1)
                    best_B = self._score(read, begun, longer).cpu().numpy().argmax(axis=1)
                    chosen = [options[i] for options, i in zip(longer, best_B, strict=True)]
                picks_BK += chosen
        return np.array(picks_BK, dtype=np.int64)

    def first_pick_probabilities(self, batch: CandidateBatch) -> np.ndarray:
        """Probability that each candidate is picked first, shape (B, N)."""
        num_candidates = batch.scores_BNC.shape[1]
        positions_N1 = np.arange(num_candidates)[:, None]
        with torch.no_grad():
            logp_BN = self.log_prob(batch, np.tile(positions_N1, (len(batch), 1, 1)))
        return logp_BN.exp().cpu().numpy()

    def _draw(
        self, read: ReadPrompts, rankings: Rankings, draws_BMU: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Selections, their log-probabilities, and those under the proposal.

        The u-th fork of a sample inverts the cumulative distribution at the u-th uniform draw.
        """
        num_questions, num_samples, _ = draws_BMU.shape
        drafts = {
            (b, m): rankings.begin() for b in range(num_questions) for m in range(num_samples)
        }
        logp_BM, proposal_logp_BM = np.zeros((2, num_questions, num_samples))
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
                logp_BM[b, m] += logp_FO[row, taken].item()
                proposal_logp_BM[b, m] += proposal_logp_FO[row, taken].item()
                drafts[b, m] = rankings.follow(drafts[b, m], options[taken])
            turn += 1
        positions = np.array([draft.picks for draft in drafts.values()])
        return positions.reshape(num_questions, num_samples, -1), logp_BM, proposal_logp_BM

    def _score(
        self, read: ReadPrompts, rankings: Rankings, picks_BM: Sequence[Sequence[Sequence[int]]]
    ) -> torch.Tensor:
        """Log-probabilities of given selections, shape (B, M)."""
        shape = (len(picks_BM), len(picks_BM[0]))
        flat = [(b, picks) for b, picks_M in enumerate(picks_BM) for picks in picks_M]
        repeated = torch.tensor([len(set(picks)) < len(picks) for _, picks in flat])
        forks: list[tuple[int, Draft]] = []
        taken: list[int] = []
        places: list[int] = []
        for place, (b, picks) in enumerate(flat):
            for draft, token in [] if repeated[place] else rankings.forks(picks):
                forks.append((b, draft))
                taken.append(rankings.options(draft).index(token))
                places.append(place)
        logp_FO = self._fork_logp(read, rankings, forks)
        device = logp_FO.device
        taken_F1 = torch.tensor(taken, dtype=torch.long, device=device).unsqueeze(1)
        logp_BM = logp_FO.new_zeros(len(flat)).index_add(
            0,
            torch.tensor(places, dtype=torch.long, device=device),
            logp_FO.gather(1, taken_F1).squeeze(1),
        )
        return logp_BM.masked_fill(repeated.to(device), float("-inf")).view(shape)

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

    def _read(
        self, batch: CandidateBatch, rankings: Rankings
    ) -> Iterator[tuple[slice, ReadPrompts]]:
        """Read the prompts of `micro_batch` questions after another."""
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
            f"the model in {model_dir} cannot read continuations side by side "
            f"({type(error).__name__}: {error}); {_ADVICE}"
        ) from error
    behind_V = both_BCV[0, columns[0][a, b, c]]
    found, expected = (float(v.float().log_softmax(dim=-1)[taken]) for v in (behind_V, alone_V))
    if differ(found, expected, 1, model.dtype):
        raise ConfigError(
            f"the model in {model_dir} gives a token log-probability {found:.4f} where "
            f"continuations are read side by side, and {expected:.4f} where one is read alone; "
            f"{_ADVICE}"
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
