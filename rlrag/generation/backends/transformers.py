"""The transformers generator: generates answers and scores given answers.

The model lives in this process. Shapes: B rows of a batch, P prefix tokens, T tokens after the
prefix, A answer tokens, V vocabulary.

Prompts that start with the same prefix (instruction and examples) read its keys and values from a
cache that is computed once. The rest of a batch is padded on the left, so that all rows end at the
same column and one slice holds every position that is needed; position ids and the attention mask
skip the padding. A sliding window would not: it counts columns, and the padding stands between
prefix and rest. Models with one read every prompt whole, and so do those whose log-probabilities
come out different behind a shared prefix, which is tried when a model is opened.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rlrag.errors import ConfigError, GenerationError
from rlrag.generation.backends.model_weights import ModelWeights
from rlrag.generation.checks import answer_others, check_answers, refused_lengths
from rlrag.generation.decoding import cut_at_stop, draw_seed
from rlrag.generation.identity import generator_identity, pushed_identity
from rlrag.generation.prompts import load_tokenizer
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.models.causal_lm import check_batches, has_windows, load_causal_lm
from rlrag.models.directories import resolve_device, resolve_dtype
from rlrag.records import Generation, Prompt, Score

if TYPE_CHECKING:
    from transformers import DynamicCache

    from rlrag.generation.weights import GeneratorWeights

logger = logging.getLogger(__name__)

_ADVICE = "use generator.backend vllm where it knows the model, or another generator.model"


@dataclass(slots=True)
class _Rows:
    """A left-padded batch whose prefix is already in `past`."""

    tokens_BT: torch.Tensor
    mask_BPT: torch.Tensor
    positions_BT: torch.Tensor
    past: DynamicCache


class TransformersGenerator:
    """A causal language model in this process; implements `Generator`."""

    def __init__(
        self,
        model_dir: Path,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 16,
        shared_prefix: Sequence[int] = (),
        max_model_len: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            model_dir: Directory with safetensors weights and a tokenizer.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            device: `auto`, `cpu` or `cuda`.
            batch_size: Sequences in one forward pass.
            shared_prefix: Token ids that most prompts start with. Prompts that do not are computed
                whole; what they give is the same up to rounding.
            max_model_len: Prompt and answer tokens together; what the model reads at most where
                that is less, or when unset.

        Raises:
            ModelNotFoundError: when `model_dir` holds no weights or no tokenizer.
            ConfigError: when the model is no causal language model with keys and values, or gives
                other log-probabilities in a batch than alone.
            GenerationError: when transformers cannot load the model.
        """
        self._device = resolve_device(device)
        number_format: torch.dtype = getattr(torch, resolve_dtype(dtype, self._device))
        self._first_identity = generator_identity(model_dir, "transformers", dtype, self._device)
        self._identity, self._version = self._first_identity, 0
        self._tokenizer: Any = load_tokenizer(model_dir)
        model: Any = load_causal_lm(model_dir, number_format, _ADVICE)
        self._model: Any = model.to(self._device).eval()
        self._weights: Any = ModelWeights(self._model, model_dir, number_format)
        self._batch_size = batch_size
        self._prefix = () if has_windows(self._model.config) else tuple(shared_prefix)
        self._prefix_past: DynamicCache | None = None
        self._stop_ids = _stop_ids(self._model.generation_config, self._tokenizer)
        limits = (max_model_len, getattr(self._model.config, "max_position_embeddings", None))
        # XLNet's -1 is no limit.
        self._max_len = min((limit for limit in limits if limit and limit > 0), default=None)
        self._tokens = TokenCount()
        self._check_reading(model_dir)

    @property
    def identity(self) -> str:
        """Hash of weights, dtype, device and back end."""
        return self._identity

    @property
    def version(self) -> int:
        """Version of the weights that answer."""
        return self._version

    @property
    def tokens(self) -> TokenCount:
        """Tokens computed since this object was made."""
        return self._tokens

    def check_weights(self, shapes: Mapping[str, Sequence[int]], adapter: bool = False) -> None:
        """Refuse a set of weights, or an adapter, by its names and shapes.

        A second name of a tied tensor, and buffers, may be left out of a set.

        Raises:
            GenerationError: naming what is missing, unexpected or of another shape.
        """
        self._opened()
        self._weights.check(shapes, adapter)

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Copy the tensors into the model, in its number format.

        An adapter is merged into the weights on disk, one tensor at a time. A set that does not fit
        is refused before the model is touched.

        Raises:
            GenerationError: when the tensors do not fit the model; when the weights on disk cannot
                be read, after which the generator is closed, since part of it is new.
        """
        self._opened()
        try:
            self._weights.load(weights)
        except (OSError, SafetensorError) as error:
            self.close()
            raise GenerationError(
                "the generator was closed because the model's original weights could not be "
                f"read again to merge an adapter into them: {error}"
            ) from error
        self._prefix_past = None  # its keys and values are those of the old weights
        self._identity = pushed_identity(self._first_identity, weights.digest)
        self._version = weights.version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        """Decode one answer a prompt; one that is empty or too long gets an error in its place.

        With a temperature, the draw of a prompt depends on the seed and the prompt alone, so a
        batch changes nothing, and equal prompts under one seed get equal answers. `logp` and
        `num_tokens` count every decoded token, the one that ended the answer included; `logp` is
        the model's own, before the temperature.

        Raises:
            GenerationError: when memory runs out.
        """
        return answer_others(
            len(prompts),
            self._refused(prompts, [sampling.max_new_tokens] * len(prompts)),
            lambda places: self._generate([prompts[i] for i in places], sampling),
        )

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        results: dict[int, Generation] = {}
        with _memory_errors(), torch.inference_mode():
            for batch in self._batches([p.token_ids for p in prompts]):
                chosen = [prompts[i] for i in batch]
                results.update(zip(batch, self._generate_batch(chosen, sampling), strict=True))
        self._count(r.num_prompt_tokens + r.num_tokens for r in results.values())
        return [results[i] for i in range(len(prompts))]

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        """Teacher-forced log p(answer | prompt), summed over the answer's tokens.

        A prompt that is empty, or too long with its answer, gets an error in its place.

        Raises:
            GenerationError: when an answer is empty, or memory runs out.
        """
        check_answers(prompts, answers)
        num_new = [len(answer) for answer in answers]
        return answer_others(
            len(prompts),
            self._refused(prompts, num_new),
            lambda places: self._score([prompts[i] for i in places], [answers[i] for i in places]),
        )

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        asked: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            asked.setdefault(prompt.token_ids, []).append(i)
        sequences = list(asked)
        results: dict[int, Score] = {}
        with _memory_errors(), torch.inference_mode():
            for batch in self._batches(sequences):
                pairs = [(row, i) for row, j in enumerate(batch) for i in asked[sequences[j]]]
                wanted = [(row, answers[i]) for row, i in pairs]
                logps = self._score_batch([sequences[j] for j in batch], wanted)
                for (_, i), logp in zip(pairs, logps, strict=True):
                    num_tokens, num_prompt = len(answers[i]), len(prompts[i].token_ids)
                    results[i] = Score(logp, num_tokens, num_prompt, self._version)
        self._count(r.num_prompt_tokens + r.num_tokens for r in results.values())
        return [results[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Drop the model and the prefix cache."""
        self._model = self._weights = None
        self._prefix_past = None

    def check_prompt(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Refuse prompts that are empty or leave no room for the answer.

        Raises:
            GenerationError: with both lengths.
        """
        for error in self._refused([prompt], [max_new_tokens]).values():
            raise error

    def _check_reading(self, model_dir: Path) -> None:
        """Compare a padded batch with a plain forward pass, without a prefix and behind it.

        Raises:
            ConfigError: when they differ without a prefix. With one, it is shared no more.
        """
        shared, self._prefix = self._prefix, ()
        with _memory_errors(), torch.inference_mode():
            check_batches(self._model, self._score_one, (), self._max_len, model_dir, _ADVICE)
            self._prefix = shared
            try:
                check_batches(
                    self._model, self._score_one, shared, self._max_len, model_dir, _ADVICE
                )
            except ConfigError as error:
                self._prefix, self._prefix_past = (), None
                logger.warning("no prefix is shared between prompts, which is slower: %s", error)

    def _score_one(self, prompts: list[tuple[int, ...]], answer: tuple[int, ...]) -> float:
        """Log p of an answer to the first prompt of a batch."""
        (logp,) = self._score_batch(prompts, [(0, answer)])
        return logp

    def _opened(self) -> Any:
        if self._model is None:
            raise GenerationError("this generator is closed; create a new one")
        return self._model

    def _refused(
        self, prompts: Sequence[Prompt], num_new: Sequence[int]
    ) -> dict[int, GenerationError]:
        self._opened()
        return refused_lengths(prompts, num_new, self._max_len)

    def _count(self, tokens: Iterator[int]) -> None:
        for number in tokens:
            self._tokens.spent += number
            self._tokens.num_requests += 1

    def _batches(self, sequences: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Indices of one batch after another: with the prefix or without, and of like length."""
        order = sorted(
            range(len(sequences)), key=lambda i: (self._has_prefix(sequences[i]), len(sequences[i]))
        )
        batch: list[int] = []
        for i in order:
            same = not batch or self._has_prefix(sequences[i]) == self._has_prefix(
                sequences[batch[0]]
            )
            if len(batch) == self._batch_size or not same:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _has_prefix(self, sequence: tuple[int, ...]) -> bool:
        size = len(self._prefix)
        return size > 0 and len(sequence) > size and sequence[:size] == self._prefix

    def _rows(self, sequences: Sequence[tuple[int, ...]]) -> _Rows:
        from transformers import DynamicCache

        size = len(self._prefix) if self._has_prefix(sequences[0]) else 0
        past = self._prefix_cache(len(sequences)) if size else DynamicCache()
        width = max(map(len, sequences)) - size
        tokens_BT = torch.zeros(len(sequences), width, dtype=torch.long)
        mask_BT = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            start = width - (len(sequence) - size)
            tokens_BT[row, start:] = torch.tensor(sequence[size:])
            mask_BT[row, start:] = 1
        mask_BPT = torch.cat([torch.ones(len(sequences), size, dtype=torch.long), mask_BT], dim=1)
        positions_BT = (mask_BPT.cumsum(dim=1) - 1).clamp(min=0)[:, size:]
        device = self._device
        return _Rows(tokens_BT.to(device), mask_BPT.to(device), positions_BT.to(device), past)

    def _prefix_cache(self, num_rows: int) -> DynamicCache:
        """A fresh copy of the prefix's keys and values, one for each row."""
        if self._prefix_past is None:
            ids = torch.tensor([self._prefix], device=self._device)
            output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self._prefix_past = output.past_key_values
        past = copy.deepcopy(self._prefix_past)
        past.batch_repeat_interleave(num_rows)
        return past

    def _forward(self, rows: _Rows, num_logits: int) -> torch.Tensor:
        """Log-probabilities in float32 at the last columns (0: at all); fills `rows.past`."""
        logits = self._model(
            input_ids=rows.tokens_BT,
            attention_mask=rows.mask_BPT,
            position_ids=rows.positions_BT,
            past_key_values=rows.past,
            use_cache=True,
            logits_to_keep=num_logits,
        ).logits
        return logits.float().log_softmax(dim=-1)

    def _score_batch(
        self, prompts: list[tuple[int, ...]], wanted: list[tuple[int, tuple[int, ...]]]
    ) -> list[float]:
        """Log-probabilities of (row, answer) pairs; each prompt is read once for all its answers.

        A prompt's last column predicts the first answer token; the others follow from a second,
        short pass over the answers, padded on the right.
        """
        rows = self._rows(prompts)
        first_BV = self._forward(rows, 1)[:, -1]
        logps: list[float] = []
        for start in range(0, len(wanted), self._batch_size):
            part = wanted[start : start + self._batch_size]
            is_last = start + self._batch_size >= len(wanted)
            picks = torch.tensor([row for row, _ in part], device=self._device)
            past = rows.past if is_last else copy.deepcopy(rows.past)
            past.batch_select_indices(picks)
            width = max(len(answer) for _, answer in part)
            answers_BA = torch.zeros(len(part), width, dtype=torch.long)
            mask_BA = torch.zeros(len(part), width, dtype=torch.long)
            for row, (_, answer) in enumerate(part):
                answers_BA[row, : len(answer)] = torch.tensor(answer)
                mask_BA[row, : len(answer)] = 1
            answers_BA, mask_BA = answers_BA.to(self._device), mask_BA.to(self._device)
            logp_BAV = first_BV[picks].unsqueeze(1)
            if width > 1:
                read = _Rows(
                    tokens_BT=answers_BA[:, :-1],  # the last answer token is never read
                    mask_BPT=torch.cat([rows.mask_BPT[picks], mask_BA[:, :-1]], dim=1),
                    positions_BT=rows.positions_BT[picks, -1:]
                    + torch.arange(1, width, device=self._device),
                    past=past,
                )
                logp_BAV = torch.cat([logp_BAV, self._forward(read, 0)], dim=1)
            logp_BA = logp_BAV.gather(2, answers_BA.unsqueeze(2)).squeeze(2)
            logps += logp_BA.masked_fill(mask_BA == 0, 0.0).double().sum(dim=1).tolist()
        return logps

    def _generate_batch(self, prompts: list[Prompt], sampling: Sampling) -> list[Generation]:
        rows = self._rows([p.token_ids for p in prompts])
        draws = [
            torch.Generator().manual_seed(draw_seed(sampling.seed, p.token_ids)) for p in prompts
        ]
        decoded: list[list[int]] = [[] for _ in prompts]
        logps, texts = [0.0] * len(prompts), [""] * len(prompts)
        active = list(range(len(prompts)))  # the prompt of each row
        for _ in range(sampling.max_new_tokens):
            logp_BV = self._forward(rows, 1)[:, -1]
            tokens_B = _choose(logp_BV, sampling.temperature, [draws[i] for i in active])
            logp_B = logp_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1).tolist()
            going = []
            for row, (i, token) in enumerate(zip(active, tokens_B.tolist(), strict=True)):
                decoded[i].append(token)
                logps[i] += logp_B[row]
                text = self._tokenizer.decode(decoded[i], skip_special_tokens=True)
                texts[i], stopped = cut_at_stop(text, sampling.stop)
                if not stopped and token not in self._stop_ids:
                    going.append(row)
            if not going:
                break
            _advance(rows, tokens_B, going)
            active = [active[row] for row in going]
        return [
            Generation(texts[i].strip(), logps[i], len(decoded[i]), len(p.token_ids), self._version)
            for i, p in enumerate(prompts)
        ]


def _advance(rows: _Rows, tokens_B: torch.Tensor, going: list[int]) -> None:
    """Make `tokens_B` the next column, and drop the rows that have ended."""
    if len(going) < len(tokens_B):
        keep = torch.tensor(going, device=tokens_B.device)
        rows.past.batch_select_indices(keep)
        tokens_B = tokens_B[keep]
        rows.mask_BPT, rows.positions_BT = rows.mask_BPT[keep], rows.positions_BT[keep]
    rows.tokens_BT = tokens_B.unsqueeze(1)
    rows.mask_BPT = torch.cat([rows.mask_BPT, torch.ones_like(rows.tokens_BT)], dim=1)
    rows.positions_BT = rows.positions_BT[:, -1:] + 1


def _choose(
    logp_BV: torch.Tensor, temperature: float, draws: Sequence[torch.Generator]
) -> torch.Tensor:
    if temperature == 0.0:
        return logp_BV.argmax(dim=-1)
    probability_BV = (logp_BV / temperature).softmax(dim=-1).cpu()
    drawn = [
        torch.multinomial(probability_V, 1, generator=draw)
        for probability_V, draw in zip(probability_BV, draws, strict=True)
    ]
    return torch.cat(drawn).to(logp_BV.device)


def _stop_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the model's and the tokenizer's end-of-text tokens."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


class _memory_errors:
    """Turns a device that is out of memory into an error that says what to lower."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise GenerationError(
                "the device ran out of memory in a forward pass; lower generator.batch_size or "
                f"prompt.max_prompt_tokens ({error})"
            ) from error
