"""The vLLM generator: generates answers and scores given answers.

The engine lives in this process, normally a Ray actor whose environment `vllm_environment` gives:
the variables are read when vLLM is imported, so they cannot be set later.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, SetupError
from rlrag.generation.backends.stepping import Update
from rlrag.generation.backends.weight_layout import (
    OUTPUT_LAYER,
    OUTPUT_MODULE,
    WeightLayout,
    check_tied,
)
from rlrag.generation.checks import answer_others, check_answers, refused_lengths
from rlrag.generation.decoding import draw_seed
from rlrag.generation.identity import generator_identity, pushed_identity
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.models.directories import resolve_device, resolve_dtype
from rlrag.records import Generation, Prompt, Score

if TYPE_CHECKING:
    from rlrag.generation.weights import GeneratorWeights

# Prefix hits are whole blocks, so short blocks share more; a CPU prefers multiples of 32 and its
# default of 128 would lose most of a few-shot prefix.
_CPU_BLOCK_SIZE = 32


def vllm_environment(config: GeneratorConfig) -> dict[str, str]:
    """Environment variables of a process that holds a vLLM engine."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares the actor's fate
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every actor binds to the same core
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def check_compiler() -> None:
    """Make sure that vLLM will find a C++ compiler; its sampler is compiled on first use.

    Raises:
        SetupError: when there is none, before minutes go into loading an engine.
    """
    named = os.environ.get("CXX")
    names = (named,) if named else ("c++", "g++", "clang++")
    if not any(shutil.which(name) for name in names):
        raise SetupError(
            f"vLLM compiles its sampler and needs a C++ compiler, but {' , '.join(names)} is not "
            "on the PATH; install g++ (Debian: apt-get install g++), set CXX, or use "
            "generator.backend transformers"
        )


class VllmGenerator:
    """A causal language model in a vLLM engine in this process; implements `Generator`."""

    def __init__(self, model_dir: Path, config: GeneratorConfig) -> None:
        """Start the engine and compile what it compiles on first use.

        Raises:
            SetupError: when no C++ compiler is installed.
            ModelNotFoundError: when `model_dir` holds no weights.
            GenerationError: when the engine cannot start.
        """
        device = resolve_device(config.device)
        self._device = device
        if device == "cpu":
            check_compiler()
        self._first_identity = generator_identity(model_dir, "vllm", config.dtype, device)
        self._identity, self._version = self._first_identity, 0
        self._layout = WeightLayout.of(model_dir)
        self._max_len = config.max_model_len
        self._is_parallel = config.tensor_parallel > 1
        self._tokens = TokenCount()
        self._num_decoded: dict[str, int] = {}  # tokens of each request between `begin` and its end
        dtype: Any = resolve_dtype(config.dtype, device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        try:
            from vllm import LLM

            self._engine: Any = LLM(
                str(model_dir),
                dtype=dtype,
                max_model_len=config.max_model_len,
                max_num_seqs=config.batch_size,
                enable_prefix_caching=True,
                trust_remote_code=False,
                seed=0,
                **_device_options(config, device),
            )
            # Asked of every process that holds a part of the model.
            self._has_output_layer = all(self._engine.collective_rpc(_has_output_layer))
            self._warm_up()
        except Exception as error:
            raise GenerationError(
                f"vLLM could not start an engine for {model_dir}: {type(error).__name__}: {error}"
            ) from error

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
        """Tokens asked of the engine since this object was made."""
        return self._tokens

    def check_weights(self, shapes: Mapping[str, Sequence[int]], adapter: bool = False) -> None:
        """Refuse a set of weights by its names and shapes; the engine is not touched.

        Raises:
            GenerationError: naming what is missing, unexpected or of another shape; any set for a
                mixture of experts on a CPU.
        """
        self._opened()
        if self._device == "cpu" and self._layout.has_experts:
            # Even the very same weights, loaded again, then give other log-probabilities.
            raise GenerationError(
                "vLLM (0.32) on a CPU packs the weights of a mixture of experts only when it "
                "first loads them, so pushed weights would give wrong answers; use "
                "generator.backend transformers with generator_training.method full"
            )
        self._layout.check(shapes, adapter)

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Take over the tensors in place and forget the keys and values of the old ones.

        An adapter is merged into the weights on disk, one tensor at a time. A set that does not fit
        is refused before the engine is touched.

        Raises:
            GenerationError: when the tensors do not fit the model; when the engine fails on them,
                after which it is closed, since part of it would answer with the old weights.
        """
        self.check_weights(weights.shapes, weights.is_adapter)
        tensors: Iterable[tuple[str, torch.Tensor]] = weights.tensors.items()
        if weights.adapter_scale is not None:
            tensors = self._layout.merged(weights.tensors, weights.adapter_scale, self._dtype)
        elif self._layout.embedding:
            check_tied(weights.tensors, {OUTPUT_LAYER: self._layout.embedding})
        pairs: Iterable[tuple[str, torch.Tensor]] = self._layout.pairs(
            tensors, self._has_output_layer
        )
        if self._is_parallel:
            pairs = list(pairs)  # for other processes
        try:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            # vLLM (0.32) keeps the prefix cache over a reload.
            emptied = self._engine.reset_prefix_cache()
        except Exception as error:
            self.close()
            raise GenerationError(
                f"vLLM failed while loading weights of version {weights.version} and was closed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not emptied:
            self.close()
            raise GenerationError(
                "vLLM could not reset its prefix cache, which still has keys and values of the "
                "old weights, and was closed; push weights when no request is running"
            )
        self._identity = pushed_identity(self._first_identity, weights.digest)
        self._version = weights.version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        """Decode one answer a prompt; one that is empty or too long gets an error in its place.

        With a temperature, the draw of a prompt depends on the seed and the prompt alone. `logp`
        and `num_tokens` count every decoded token, the one that ended the answer included; `logp`
        is the model's own, before the temperature.

        Raises:
            GenerationError: when the engine fails.
        """
        return answer_others(
            len(prompts),
            self._refused(prompts, [sampling.max_new_tokens] * len(prompts)),
            lambda places: self._generate([prompts[i] for i in places], sampling),
        )

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        results = []
        params = [_answer_params(p, sampling) for p in prompts]
        outputs = self._ask([list(p.token_ids) for p in prompts], params)
        for prompt, output in zip(prompts, outputs, strict=True):
            answer = output.outputs[0]
            results.append(
                Generation(
                    text=answer.text.strip(),
                    logp=float(answer.cumulative_logprob),
                    num_tokens=len(answer.token_ids),
                    num_prompt_tokens=len(prompt.token_ids),
                    version=self._version,
                )
            )
        self._count(results)
        return results

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        """Teacher-forced log p(answer | prompt), summed over the answer's tokens.

        A prompt that is empty, or too long with its answer, gets an error in its place.

        Raises:
            GenerationError: when an answer is empty, or the engine fails.
        """
        check_answers(prompts, answers)
        # The engine decodes one token after the answer, which is thrown away.
        refused = self._refused(prompts, [len(answer) + 1 for answer in answers])
        lengths = [len(p.token_ids) + len(a) for p, a in zip(prompts, answers, strict=True)]
        cache = self._engine.llm_engine.vllm_config.cache_config
        capacity = cache.num_gpu_blocks * cache.block_size // 2
        return answer_others(
            len(prompts),
            refused,
            lambda places: [
                score
                for part in parts_within(places, lengths, capacity)
                for score in self._score([prompts[i] for i in part], [answers[i] for i in part])
            ],
        )

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        sequences = [[*p.token_ids, *a] for p, a in zip(prompts, answers, strict=True)]
        starts = [len(p.token_ids) for p in prompts]
        # The engine computes probabilities over the vocabulary for every token of a scored sequence
        # that its cache does not hold, so the prompts go there first, each but its last token.
        heads = {p.token_ids[:-1] for p in prompts if len(p.token_ids) > 1}
        self._ask([list(head) for head in sorted(heads)], [_reading_params()] * len(heads))
        outputs = self._ask(sequences, [_score_params(read_cache=True)] * len(sequences))
        logps = [
            answer_logp(output.prompt_logprobs, output.num_cached_tokens, start, answer)
            for output, start, answer in zip(outputs, starts, answers, strict=True)
        ]
        redo = [i for i, logp in enumerate(logps) if logp is None]
        params = [_score_params(read_cache=False)] * len(redo)
        for i, output in zip(redo, self._ask([sequences[i] for i in redo], params), strict=True):
            logps[i] = answer_logp(output.prompt_logprobs, 0, starts[i], answers[i])
        results = []
        for logp, start, answer in zip(logps, starts, answers, strict=True):
            if logp is None:
                raise GenerationError(
                    "vLLM returned no finite log-probability for an answer of "
                    f"{len(answer)} tokens after {start} prompt tokens; try dtype float32"
                )
            results.append(Score(logp, len(answer), start, self._version))
        self._count(results)
        return results

    def begin(self, request_id: str, prompt: Prompt, sampling: Sampling) -> None:
        """Take a request in, which `step` answers as `generate` would; see `Stepper`.

        Until it has finished or is aborted, `generate` and `score` must not be called: they would
        take its pieces.

        Raises:
            GenerationError: when the prompt is empty or too long, or the engine refuses it.
        """
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        for error in self._refused([prompt], [sampling.max_new_tokens]).values():
            raise error
        params = _answer_params(prompt, sampling)
        params.output_kind = RequestOutputKind.DELTA
        tokens = tokens_input(list(prompt.token_ids))
        try:
            self._engine.llm_engine.add_request(request_id, tokens, params)
        except Exception as error:
            raise GenerationError(
                f"vLLM rejected a prompt of {len(prompt.token_ids)} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._num_decoded[request_id] = 0

    def step(self) -> list[tuple[str, Update]]:
        """Decode the next token of as many requests as fit; see `Stepper`.

        Text that a stop string may yet remove is held back.

        Raises:
            GenerationError: when the engine fails.
        """
        self._opened()
        try:
            outputs = self._engine.llm_engine.step()
        except Exception as error:
            raise GenerationError(
                f"vLLM failed on {len(self._num_decoded)} requests: {type(error).__name__}: {error}"
            ) from error
        updates = []
        for output in outputs:
            name, answer = output.request_id, output.outputs[0]
            self._num_decoded[name] += len(answer.token_ids)
            num_tokens = self._num_decoded[name]
            if output.finished:
                del self._num_decoded[name]
                self._tokens.spent += len(output.prompt_token_ids) + num_tokens
                self._tokens.num_requests += 1
            if answer.text or output.finished:
                logp = float(answer.cumulative_logprob)
                updates.append((name, Update(answer.text, logp, num_tokens, output.finished)))
        return updates

    def abort(self, request_id: str) -> None:
        """Forget a request and free its place in the batch and in the key-value cache."""
        if self._num_decoded.pop(request_id, None) is not None and self._engine is not None:
            self._engine.llm_engine.abort_request([request_id])

    def close(self) -> None:
        """Shut the engine down."""
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
            self._engine = None

    def _warm_up(self) -> None:
        """Compile the two kernels of log-probabilities before anybody waits for an answer."""
        prompt = Prompt(token_ids=(1, 2), text="", num_passages=0)
        self.generate([prompt], Sampling(max_new_tokens=1))
        self.score([prompt], [(1,)])
        self._engine.reset_prefix_cache()
        self._tokens = TokenCount()

    def _ask(self, sequences: list[list[int]], params: list[Any]) -> list[Any]:
        if not sequences:
            return []
        inputs = [{"prompt_token_ids": sequence} for sequence in sequences]
        try:
            outputs = self._engine.generate(inputs, params, use_tqdm=False)
        except Exception as error:
            raise GenerationError(
                f"vLLM failed on {len(sequences)} prompts: {type(error).__name__}: {error}"
            ) from error
        return list(outputs)

    def _opened(self) -> None:
        if self._engine is None:
            raise GenerationError("this generator is closed; create a new one")

    def _refused(
        self, prompts: Sequence[Prompt], num_new: Sequence[int]
    ) -> dict[int, GenerationError]:
        self._opened()
        return refused_lengths(prompts, num_new, self._max_len)

    def _count(self, results: Sequence[Generation | Score]) -> None:
        self._tokens.spent += sum(r.num_prompt_tokens + r.num_tokens for r in results)
        self._tokens.num_requests += len(results)


def _has_output_layer(worker: Any) -> bool:
    """Whether a vLLM worker's model has an output layer beside its embedding, tied or not."""
    modules = worker.get_model().named_modules()
    return any(name.rpartition(".")[2] == OUTPUT_MODULE for name, _ in modules)


def answer_logp(
    prompt_logprobs: Any, num_cached: int, start: int, answer: Sequence[int]
) -> float | None:
    """Sum of an answer's log-probabilities in a vLLM result, or None when it cannot be trusted.

    vLLM (0.32) writes log-probabilities only for tokens that it computed. Where the prefix cache
    held `num_cached` tokens, entries up to and including that index are uninitialised memory, so
    an answer that starts there has to be asked again without the cache.
    """
    if num_cached >= start:
        return None
    total = 0.0
    for offset, token in enumerate(answer):
        entry = prompt_logprobs[start + offset]
        if not entry or token not in entry:
            return None
        logp = entry[token].logprob
        if not math.isfinite(logp) or logp > 1e-3:
            return None
        total += logp
    return total


def _answer_params(prompt: Prompt, sampling: Sampling) -> Any:
    from vllm import SamplingParams

    seed = draw_seed(sampling.seed, prompt.token_ids) if sampling.temperature else None
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        stop=[mark for mark in sampling.stop if mark],
        logprobs=0,
        seed=seed,
    )


def _reading_params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)


def _score_params(read_cache: bool) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=not read_cache,
    )


def _device_options(config: GeneratorConfig, device: str) -> dict[str, Any]:
    size = config.tensor_parallel
    # Its own processes, and not Ray's, which would look for resources that the actor holds.
    parallel = {"tensor_parallel_size": size, "distributed_executor_backend": "mp"}
    options: dict[str, Any] = parallel if size > 1 else {}
    if device == "cpu":
        # A compiled graph takes minutes to build and is no faster on a CPU.
        return {**options, "enforce_eager": True, "block_size": _CPU_BLOCK_SIZE}
    # Actors that share a GPU each take their part of its memory.
    share = 0.85 * min(1.0, config.gpus_per_actor or 1.0)
    return {**options, "gpu_memory_utilization": share}


def parts_within(places: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Split places into runs whose lengths sum to the capacity at most; a longer one stands alone.

    Example:
        >>> parts_within([0, 2, 3, 4], [3, 9, 2, 4, 6], capacity=6)
        [[0, 2], [3], [4]]
    """
    parts: list[list[int]] = []
    total = 0
    for place in places:
        total += lengths[place]
        if not parts or total > capacity:
            parts.append([])
            total = lengths[place]
        parts[-1].append(place)
    return parts
