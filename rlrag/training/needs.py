"""Estimates what a run occupies: memory, disk, CPUs and GPUs.

No model is loaded, and nothing is fetched: sizes of models that are not on this machine are read
from their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rlrag.config import BUILTIN_ENCODER, BUILTIN_MODELS, RunConfig
from rlrag.errors import ConfigError, RlragError
from rlrag.models.directories import model_here, named_models, resolve_model

GIB = 2**30
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
_SIZE_IN_NAME = re.compile(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", re.IGNORECASE)
_ADAPTER_SHARE = 0.01
"""A LoRA adapter's parameters as a share of the model's, roughly, at rank 16."""
_PROCESS_BYTES = GIB
_STATE_BYTES = 12
"""A trained parameter and its two AdamW moments, or its gradient and these, in float32."""
_RUN_BYTES = GIB // 8
_CACHE_BYTES = GIB
_BYTES_A_CORPUS_BYTE = 4
"""A copy of the texts, an index of their words and their vectors."""
_UNPACKED = 3
"""Text is about this much larger than its gzip file."""


@dataclass(frozen=True)
class Needs:
    """Bytes, CPUs, GPUs and nodes of a run; `unknown` names the models whose size nothing tells."""

    memory_bytes: int
    gpu_bytes: int
    """Of the fullest GPU."""
    run_bytes: int
    cache_bytes: int
    cpus: float
    gpus: float
    nodes: int
    unknown: tuple[str, ...]


def num_parameters(name: str, cache_dir: Path) -> int:
    """Parameters of a model: counted where it is on this machine, else read from its name.

    Raises:
        ConfigError: when neither says it.

    Example:
        >>> num_parameters("meta-llama/Meta-Llama-3-8B-Instruct", Path("/nowhere"))
        8000000000
    """
    named = _SIZE_IN_NAME.search(name.rsplit("/", 1)[-1])
    if named and not Path(name).expanduser().is_dir():
        return round(float(named[1]) * (1e9 if named[2].lower() == "b" else 1e6))
    from safetensors import safe_open

    directory = _on_this_machine(name, cache_dir)
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                size = 1
                for length in tensors.get_slice(key).get_shape():
                    size *= length
                total += size
    return total


def _on_this_machine(name: str, cache_dir: Path) -> Path:
    """The directory of a model that need not be fetched; a plan must not wait for a download."""
    if name in BUILTIN_MODELS:
        return resolve_model(name, cache_dir)
    directory = model_here(name, cache_dir)
    if directory is None:
        raise ConfigError(
            f"the size of model {name!r} is unknown: it is not on this machine and its name does "
            "not say it (as '8B' does); give a local path"
        )
    return directory


@dataclass(frozen=True)
class Learner:
    """A model of which one worker holds and trains so many times its parameters."""

    part: str
    model: str
    held: float
    trained: float

    def num_bytes(self, num_parameters: int) -> float:
        """Weights, gradients and two AdamW moments in float32."""
        return num_parameters * (4 * self.held + _STATE_BYTES * self.trained)


def learners_of(config: RunConfig) -> list[Learner]:
    """What one worker trains; a policy that reads no texts is too small to count."""
    found, models = [], named_models(config)
    if config.trains_generator:
        settings = config.generator_training
        shards = config.training.num_workers if settings.sharding == "fsdp2" else 1
        trained = 1 if settings.method == "full" else _ADAPTER_SHARE
        found.append(Learner("generator", config.generator.model, 1 / shards, trained / shards))
    if config.trains_retriever:
        model = models.get("vocabulary_encoder") or models.get("encoder", BUILTIN_ENCODER)
        num = config.num_trained_encoders
        found.append(Learner("retriever", model, num, num))
    if "selector" in config.algorithm.parts and "selector" in models:
        by_adapter = config.selector.kind == "listwise_lm" and config.selector.adapter_rank
        held = 0 if config.generator_training.share_base else 1
        trained = _ADAPTER_SHARE if by_adapter else 1
        found.append(Learner("selector", models["selector"], held, trained))
    return found


class _Sizes:
    """Parameters of models by name; those that are unknown count nothing and are remembered."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self.unknown: dict[str, None] = {}

    def of(self, model: str) -> int:
        try:
            return num_parameters(model, self._cache_dir)
        except RlragError:  # the check of the models says what is wrong with it
            self.unknown[model] = None
            return 0


def asks_generator(config: RunConfig) -> bool:
    """Whether a run opens a generator at all."""
    return config.feedback is None or bool(config.systems)


def uses_vllm(config: RunConfig) -> bool:
    """Whether a run opens vLLM engines."""
    backend = config.generator.backend
    chosen = backend == "vllm" or (backend == "auto" and config.training.launcher == "ray")
    return chosen and asks_generator(config)


def needs_of(config: RunConfig) -> Needs:
    """What a run needs, over all its processes."""
    sizes = _Sizes(config.cache_path)
    on_ray = config.training.launcher == "ray"
    generator, training = config.generator, config.training
    is_here = asks_generator(config) and not generator.is_remote
    num_actors = (generator.num_actors if on_ray else 1) if is_here else 0
    num_workers = training.num_workers if on_ray else 1
    learners = [(each, sizes.of(each.model)) for each in learners_of(config)]
    learner = sum(each.num_bytes(size) for each, size in learners)
    trained = sum(size * each.trained for each, size in learners)
    weights = _generator_bytes(config, sizes) if num_actors else 0
    engine_on_gpu = bool(generator.gpus_per_actor) or generator.device == "cuda"
    memory: float = _PROCESS_BYTES
    if num_actors and not engine_on_gpu:
        cache = generator.kv_cache_gib * GIB if uses_vllm(config) else 0
        memory += num_actors * (weights + cache)
    if on_ray:
        memory += (num_actors + num_workers) * _PROCESS_BYTES
    if not training.worker_gpus:
        memory += num_workers * learner
    return Needs(
        memory_bytes=round(memory),
        gpu_bytes=round(
            max(weights if engine_on_gpu else 0, learner if training.worker_gpus else 0)
        ),
        run_bytes=round(_RUN_BYTES + (training.keep_checkpoints + 3) * _STATE_BYTES * trained),
        cache_bytes=_CACHE_BYTES + _corpus_bytes(config.data.corpus),
        cpus=num_actors * generator.cpus_per_actor + num_workers * training.worker_cpus
        if on_ray
        else 1,
        gpus=num_actors * generator.gpus_per_actor + num_workers * training.worker_gpus
        if on_ray
        else float(generator.device == "cuda" and num_actors > 0),
        nodes=_nodes(config, num_actors) if on_ray else 1,
        unknown=tuple(sizes.unknown),
    )


def _generator_bytes(config: RunConfig, sizes: _Sizes) -> int:
    """Weights of one engine."""
    generator = config.generator
    if generator.is_own:
        sizes.unknown[generator.backend] = None
        return 0
    return sizes.of(generator.model) * NUMBER_BYTES[generator.dtype]


def _nodes(config: RunConfig, num_actors: int) -> int:
    """How many a `strict_spread` asks for."""
    spread = [1]
    if config.generator.placement == "strict_spread":
        spread.append(num_actors)
    if config.training.worker_placement == "strict_spread":
        spread.append(config.training.num_workers)
    return max(spread)


def _corpus_bytes(corpus: str | None) -> int:
    """What copy and indexes of a corpus on disk take; 0 where it is no file."""
    if corpus is None:
        return 0
    path = Path(corpus).expanduser()
    files = path.glob("corpus.jsonl*") if path.is_dir() else [path]
    return sum(
        _BYTES_A_CORPUS_BYTE * file.stat().st_size * (_UNPACKED if file.suffix == ".gz" else 1)
        for file in files
        if file.is_file()
    )
