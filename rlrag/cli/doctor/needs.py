"""Estimates what a run occupies: memory, disk, CPUs and GPUs.

The sums are those of `rlrag.training.plan`, with what each process takes by itself added.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlrag.config import BUILTIN_ENCODER, RunConfig
from rlrag.errors import RlragError
from rlrag.training.plan import ADAPTER_SHARE, GIB, NUMBER_BYTES, num_parameters

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
    return config.training.experience is None or bool(config.systems)


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
    held, trained = _learner(config, sizes)
    learner = 4 * held + _STATE_BYTES * trained
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


def _learner(config: RunConfig, sizes: _Sizes) -> tuple[float, float]:
    """Parameters that one worker holds, and those of them that it trains."""
    held = trained = 0.0
    if config.trains_generator:
        size = sizes.of(config.generator.model)
        settings = config.generator_training
        shards = config.training.num_workers if settings.sharding == "fsdp2" else 1
        held += size / shards
        trained += size / shards * (1 if settings.method == "full" else ADAPTER_SHARE)
    if config.trains_retriever:
        retrieval = config.retrieval
        model = retrieval.encoder or BUILTIN_ENCODER
        if retrieval.kind == "semi_parametric":
            model = retrieval.vocabulary_encoder
        size = sizes.of(model) * config.num_trained_encoders
        held, trained = held + size, trained + size
    if "selector" in config.training.parts and config.selector.reads_texts:
        size = sizes.of(config.selector.model)
        by_adapter = config.selector.kind == "listwise_lm" and config.selector.adapter_rank
        held += 0 if config.generator_training.share_base else size
        trained += size * (ADAPTER_SHARE if by_adapter else 1)
    return held, trained


def _corpus_bytes(corpus: str) -> int:
    """What copy and indexes of a corpus on disk take; 0 where it is no file."""
    path = Path(corpus).expanduser()
    files = path.glob("corpus.jsonl*") if path.is_dir() else [path]
    return sum(
        _BYTES_A_CORPUS_BYTE * file.stat().st_size * (_UNPACKED if file.suffix == ".gz" else 1)
        for file in files
        if file.is_file()
    )
