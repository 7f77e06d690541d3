"""Generation in the service: one engine per set of weights of the loaded bundle versions.

Versions whose generators have the same weights share one engine.
"""

from __future__ import annotations

import importlib.util
import json
import math
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rlrag.bundle import read_bundle
from rlrag.config import GeneratorConfig
from rlrag.errors import (
    ConfigError,
    GenerationError,
    OverloadedError,
    RequestError,
)
from rlrag.generation.backends.stepping import Update
from rlrag.generation.build import open_prompts
from rlrag.generation.identity import hashed_files, model_hash
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Sampling
from rlrag.models.directories import resolve_generator
from rlrag.pipeline import sampling_of
from rlrag.records import Passage, Prompt, Question
from rlrag.serving.endpoint_engine import open_endpoint_engine
from rlrag.serving.engine_process import open_engine_process
from rlrag.serving.records import AnswerPiece, Decoding
from rlrag.serving.settings import ServeSettings
from rlrag.serving.versions.registry import check_version

# What two versions must have in common to be answered by one engine.
_ENGINE_FIELDS = frozenset(
    (
        "backend",
        "dtype",
        "key_variable",
        "kv_cache_gib",
        "max_model_len",
        "options",
        "request_timeout_s",
    )
)


class Engine(Protocol):
    """A running language model that answers many prompts at once."""

    def stream(
        self, prompt: Prompt, sampling: Sampling, streamed: bool
    ) -> AsyncGenerator[Update, None]:
        """The answer as it is decoded; closing the iterator frees its slot.

        Args:
            prompt: What the answer follows.
            sampling: How it is decoded.
            streamed: Whether its pieces are wanted as they come; otherwise they are joined.

        Raises:
            GenerationError: when the engine refuses the prompt or has failed.
            OverloadedError: when its process has ended.
        """
        ...

    def failure(self) -> str | None:
        """Why no request can be answered any more; None while the engine works. Never waits."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class EngineOpener(Protocol):
    """Starts an engine; see `rlrag.serving.engine_process.open_engine_process`."""

    def __call__(
        self, config: GeneratorConfig, model_dir: Path, prefix_ids: tuple[int, ...]
    ) -> Engine:
        """Returns when the engine answers; waits no longer than `config.start_timeout_s`.

        Raises:
            SetupError, GenerationError: what kept it from starting.
        """
        ...


@dataclass(frozen=True)
class _Loaded:
    key: str
    engine: Engine
    prompts: PromptBuilder
    sampling: Sampling
    max_len: int


class GeneratorPart:
    """The generators of every version that is loaded.

    A version whose engine has failed counts as not loaded, so that it is loaded again, with another
    engine. `load` and `drop` may run in other threads than the rest.

    Args:
        settings: Back end, threads, reservations and waits of the engines.
        open_engine: Starts an engine.
    """

    def __init__(
        self, settings: ServeSettings, open_engine: EngineOpener = open_engine_process
    ) -> None:
        self._settings = settings
        self._open_engine = open_engine
        self._loaded: dict[str, _Loaded] = {}
        self._loading = threading.Lock()

    def loaded(self) -> tuple[str, ...]:
        """Versions that can be asked."""
        loaded = self._loaded.items()
        return tuple(version for version, one in loaded if one.engine.failure() is None)

    def load(self, version: str, directory: Path) -> None:
        """Start the engine of a bundle, unless one with the same weights runs and works.

        Raises:
            RlragError: what is wrong with the bundle, or what kept its engine from starting.
        """
        with self._loading:
            files = read_bundle(directory)
            check_version(version, files.version, directory)
            files.check_code("generator.backend", self._settings.allow_code)
            config = engine_config(files.config.generator, self._settings)
            model_dir = files.generator_dir or resolve_generator(config, files.config.cache_path)
            weights = model_hash(config, model_dir)
            if files.generator_dir is None:
                expected = files.facts.generator_weights
                files.check_model(config.model, hashed_files(config), weights, expected)
            prompts = open_prompts(config, model_dir)
            key = _engine_key(config, weights, prompts.prefix_ids)
            opener = open_endpoint_engine if config.is_remote else self._open_engine
            engine = self._running(key) or opener(config, model_dir, prompts.prefix_ids)
            max_len = _max_len(config, model_dir)
            loaded = _Loaded(key, engine, prompts, sampling_of(files.config), max_len)
            self._loaded = {**self._loaded, version: loaded}

    def drop(self, version: str) -> None:
        """Forget a version, and end its engine if no other one uses it."""
        with self._loading:
            dropped = self._loaded.get(version)
            self._loaded = {v: loaded for v, loaded in self._loaded.items() if v != version}
            if dropped and all(v.engine is not dropped.engine for v in self._loaded.values()):
                dropped.engine.close()

    def check_health(self) -> None:
        """Return while all engines work or are being replaced; else the part is to be.

        Raises:
            GenerationError: naming a version and what is wrong with its engine.
        """
        if self._loading.locked():
            return
        for version, loaded in self._loaded.items():
            why = loaded.engine.failure()
            if why is not None:
                raise GenerationError(f"the engine of version {version} has failed: {why}")

    def _running(self, key: str) -> Engine | None:
        """A working engine of this kind; failed ones are ended, to free what they hold."""
        found = None
        for loaded in self._loaded.values():
            if loaded.key == key:
                if loaded.engine.failure() is None:
                    found = loaded.engine
                else:
                    loaded.engine.close()
        return found

    async def generate(
        self, version: str, question: str, passages: Sequence[Passage], decoding: Decoding
    ) -> AsyncGenerator[AnswerPiece, None]:
        """The answer as it is decoded, in one piece unless `decoding.streamed`.

        Closing the iterator frees the engine's slot.

        Raises:
            OverloadedError: when the version is not loaded here yet, or its engine has ended.
            RequestError: when the answer cannot be decoded so.
            PromptTooLongError: when the question leaves no room in the prompt.
            GenerationError: when the engine failed.
        """
        loaded = self._loaded.get(version)
        if loaded is None or loaded.engine.failure() is not None:
            raise OverloadedError(f"version {version} is still being loaded; try again")
        prompt = loaded.prompts.build(Question("asked", question, ()), passages)
        num_prompt_tokens = len(prompt.token_ids)
        sampling = decoded_so(loaded.sampling, decoding, loaded.max_len - num_prompt_tokens)
        pieces = loaded.engine.stream(prompt, sampling, decoding.streamed)
        async with aclosing(pieces) as updates:
            async for update in updates:
                yield AnswerPiece(
                    text=update.text,
                    logp=update.logp,
                    num_tokens=update.num_tokens,
                    num_prompt_tokens=num_prompt_tokens,
                    num_passages=prompt.num_passages,
                    num_cut_tokens=prompt.num_cut_tokens,
                    finished=update.finished,
                )


def engine_config(config: GeneratorConfig, settings: ServeSettings) -> GeneratorConfig:
    """A bundle's generator with the resources that the service gives its engine.

    Raises:
        ConfigError: when the service would load a model in the place of a server or of a generator
            of somebody's own.
    """
    backend: str = settings.generator_backend
    if config.is_remote or config.is_own:
        if backend != "auto":
            raise ConfigError(
                f"generator_backend is {backend!r}, but the bundle's generator is "
                f"{config.url or config.backend}; leave the setting at auto"
            )
        backend = config.backend
    elif backend == "auto":
        backend = "transformers" if importlib.util.find_spec("vllm") is None else "vllm"
    return config.model_copy(
        update={
            "backend": backend,
            "device": "auto",  # a bundle that was trained on GPUs may be served without
            "batch_size": settings.generator.max_batch_size,
            "cpus_per_actor": settings.generator.num_cpus,
            "gpus_per_actor": settings.generator.num_gpus,
            "threads_per_actor": settings.threads,
            "start_timeout_s": settings.start_timeout_s,
        }
    )


def decoded_so(sampling: Sampling, decoding: Decoding, room: int) -> Sampling:
    """How one answer is decoded: as in the bundle, but for what the request sets.

    Args:
        sampling: Of the bundle.
        decoding: Of the request; its seed 0 stands for the bundle's.
        room: Tokens that the model can still read after the prompt.

    Raises:
        RequestError: when a value is impossible.

    Example:
        >>> decoded_so(Sampling(12), Decoding(max_new_tokens=3), room=100).max_new_tokens
        3
    """
    most, heat = decoding.max_new_tokens, decoding.temperature
    wanted = replace(
        sampling,
        max_new_tokens=sampling.max_new_tokens if most is None else most,
        temperature=sampling.temperature if heat is None else heat,
    )
    if not 1 <= wanted.max_new_tokens <= room:
        raise RequestError.about(
            "max_new_tokens",
            f"is {wanted.max_new_tokens}; after this question's prompt the model can write from 1 "
            f"to {room} tokens",
        )
    if not (math.isfinite(wanted.temperature) and wanted.temperature >= 0):
        raise RequestError.about("temperature", f"is {wanted.temperature}; give 0 (greedy) or more")
    if wanted.temperature == 0:
        return replace(wanted, seed=0)
    return replace(wanted, seed=decoding.seed or wanted.seed)


def _engine_key(config: GeneratorConfig, weights: str, prefix_ids: tuple[int, ...]) -> str:
    """Equal for versions that one engine can answer as two would."""
    parts: list[object] = [
        weights,
        config.model_dump_json(include=set(_ENGINE_FIELDS)),
    ]
    if config.backend == "transformers":  # computes this prefix apart from the rest of a prompt
        parts.append(prefix_ids)
    return repr(parts)


def _max_len(config: GeneratorConfig, model_dir: Path) -> int:
    """Prompt and answer tokens together: what the engine allows and the model can read."""
    path = model_dir / "config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    return min(config.max_model_len, settings.get("max_position_embeddings", config.max_model_len))
