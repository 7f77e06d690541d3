"""The identity of a generator, the key of its cached results."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rlrag import plugins
from rlrag.config import GeneratorConfig
from rlrag.models.directories import resolve_dtype, tokenizer_hash, weights_hash


def generator_identity(model_dir: Path, backend: str, dtype: str, device: str) -> str:
    """First 16 hex digits of a SHA-256 over what decides a generator's results.

    Needs no engine: the weights are hashed from their files. `dtype` may be `auto`; `device` is
    `cpu` or `cuda`. The same model on another device or in another format has another identity,
    because its log-probabilities differ in their last digits.
    """
    parts = (weights_hash(model_dir), backend, resolve_dtype(dtype, device), device)
    return _hashed(parts)


def endpoint_identity(config: GeneratorConfig, model_dir: Path) -> str:
    """The identity of a model on a server, whose weights cannot be read.

    Address, the server's name of the model and the tokenizer in `model_dir` decide it.
    """
    address = (config.url or "").rstrip("/")
    return _hashed(("endpoint", address, config.answering_model, tokenizer_hash(model_dir)))


def own_identity(config: GeneratorConfig, model_dir: Path) -> str:
    """The identity of a generator of somebody's own; see `rlrag.plugins.identity`.

    The files in `model_dir`, which it may read, decide too.
    """
    part = plugins.identity("generator", config.backend, config.options)
    return _hashed(("own", *part, model_hash(config, model_dir)))


def model_hash(config: GeneratorConfig, model_dir: Path) -> str:
    """What a bundle remembers of its generator; `hashed_files` says what that is."""
    if config.is_remote:
        return endpoint_identity(config, model_dir)
    if config.is_own and not any(model_dir.glob("*.safetensors")):
        return tokenizer_hash(model_dir)
    return weights_hash(model_dir)


def hashed_files(config: GeneratorConfig) -> str:
    """What `model_hash` reads of a model, for messages."""
    return "tokenizer" if config.is_remote else "files" if config.is_own else "weights"


def pushed_identity(identity: str, digest: str | None) -> str:
    """Identity of a generator that took over published weights.

    `identity` is the one that it started with, which stands for tokenizer, number format, back end
    and device; `digest` names the tensors, and without one they are those that it started with. The
    version does not count, so that equal weights of
    different runs share cached results.

    Example:
        >>> pushed_identity("a", "d") == pushed_identity("a", "d") != pushed_identity("b", "d")
        True
        >>> pushed_identity("a", None)
        'a'
    """
    return identity if digest is None else _hashed((identity, "pushed", digest))


def _hashed(parts: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
