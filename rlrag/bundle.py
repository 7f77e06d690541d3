"""Bundles: a trained pipeline on disk, as evaluation and serving load it.

`rlrag.bundle_files` says which files it holds, and reads them without the policy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rlrag import __version__
from rlrag.bundle_files import (
    CONFIG,
    EVALUATION,
    FACTS,
    FORMAT,
    GENERATOR,
    GOLDEN,
    RETRIEVER,
    SELECTOR,
    BundleFacts,
    BundleFiles,
    Evaluated,
    bundle_version,
    golden_json,
    read_bundle,
)
from rlrag.config import RunConfig
from rlrag.files.directories import (
    MANIFEST,
    check_finite,
    find_whole,
    load_tensors,
    load_weights,
    save_weights,
    whole_directory,
)
from rlrag.generation.identity import hashed_files, model_hash
from rlrag.models.directories import resolve_generator, resolve_model, weights_hash
from rlrag.models.licences import LICENCES_FILE, licences_json, licences_of
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.build import TrainablePolicy, build_policy

__all__ = [
    "FORMAT",
    "Bundle",
    "BundleFacts",
    "add_evaluation",
    "bundle_version",
    "copy_bundle",
    "load_bundle",
    "read_bundle",
    "save_bundle",
]


@dataclass(frozen=True)
class Bundle(BundleFiles):
    """One version of a tuned pipeline, with its policy."""

    policy: TrainablePolicy


def save_bundle(
    directory: Path,
    config: RunConfig,
    policy: TrainablePolicy,
    candidates: CandidateTable,
    hashes: Mapping[str, str],
    step: int,
    save_generator: Callable[[Path], None] | None = None,
    save_retriever: Callable[[Path], None] | None = None,
    evaluated: Evaluated | None = None,
    finish: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write a bundle; one that is there is replaced as a whole.

    Args:
        directory: Where the bundle goes.
        config: How its parts are built.
        policy: The trained selection policy.
        candidates: Any candidates of the run, for their shapes.
        hashes: Of the sources.
        step: Where the weights come from.
        save_generator: Writes the trained generator into a new directory, where there is one.
        save_retriever: Writes the trained encoder into a new directory, where there is one.
        evaluated: What the run's final evaluation found; `add_evaluation` adds it later.
        finish: Adds files to the otherwise finished bundle before it is sealed.

    Raises:
        CheckpointError: when the directory cannot be written.
    """
    facts = BundleFacts(
        format=FORMAT,
        code_version=__version__,
        step=step,
        score_names=candidates.score_names,
        vector_size=candidates.vector_size,
        generator_weights=_generator_hash(config),
        selector_model_weights=_selector_model_hash(config),
        hashes=dict(hashes),
    )
    with whole_directory(directory) as staging:
        (staging / CONFIG).write_text(config.to_json())
        (staging / FACTS).write_text(json.dumps(asdict(facts), indent=2) + "\n")
        (staging / GOLDEN).write_text(golden_json(()))
        (staging / LICENCES_FILE).write_text(licences_json(licences_of(config)))
        save_weights(policy, staging / SELECTOR)
        if save_generator is not None:
            save_generator(staging / GENERATOR)
        if save_retriever is not None:
            save_retriever(staging / RETRIEVER)
        if evaluated is not None:
            _write_evaluated(staging, evaluated)
        finish(staging)


def add_evaluation(directory: Path, evaluated: Evaluated) -> None:
    """Put the golden questions and the comparison into a finished bundle.

    The bundle is replaced as a whole and has another version afterwards.

    Raises:
        CheckpointError: when the bundle is damaged or cannot be written.
    """
    copy_bundle(directory, directory, lambda staging: _write_evaluated(staging, evaluated))


def copy_bundle(
    source: Path, target: Path, finish: Callable[[Path], None] = lambda directory: None
) -> None:
    """Write a bundle again, with what `finish` adds to it or replaces.

    Args:
        source: A whole bundle.
        target: Where the copy goes; `source` itself is replaced as a whole.
        finish: Adds or rewrites text files before the copy is sealed; tensors it leaves alone.

    Raises:
        CheckpointError: when the source is damaged or the target cannot be written.
    """
    read_bundle(source)  # sealing it again would vouch for a damaged file
    copy = _copy_or_link if source == target else shutil.copyfile
    with whole_directory(target) as staging:
        place = find_whole(source)
        for path in place.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                shutil.copytree(path, staging / path.name, copy_function=copy)
            elif path.name != MANIFEST and not path.name.startswith("."):
                copy(path, staging / path.name)
        finish(staging)


def load_bundle(directory: Path, allow_code: Collection[str] = ()) -> Bundle:
    """Check every file and rebuild the policy.

    Args:
        directory: The bundle.
        allow_code: Environment, policy, retriever and generator of somebody's own, `module:...`,
            that the bundle names and that may be imported; without it such a bundle is refused. Its
            reward functions are for `BundleFiles.check_code` to look at, where they are used.

    Raises:
        CheckpointError: when the bundle is absent, damaged, of another format, holds weights that
            are not finite, or a model has other weights than it was trained with.
        ConfigError: when its configuration is none of this version, or names code that the caller
            does not.
    """
    files = read_bundle(directory)
    files.check_code_to_answer(allow_code)
    config, facts = files.config, files.facts
    files.check_model(
        config.generator.model,
        hashed_files(config.generator),
        _generator_hash(config),
        facts.generator_weights,
    )
    files.check_model(
        config.selector.model,
        "weights",
        _selector_model_hash(config),
        facts.selector_model_weights,
    )
    policy = build_policy(
        config.selector,
        config.environment,
        len(facts.score_names),
        facts.vector_size,
        config.cache_path,
        config.seed,
    )
    load_weights(policy, files.directory / SELECTOR)
    for path in files.retriever_dir.rglob("*.safetensors") if files.retriever_dir else ():
        check_finite(load_tensors(path), str(path))
    return Bundle(**vars(files), policy=policy)


def _generator_hash(config: RunConfig) -> str:
    return model_hash(config.generator, resolve_generator(config.generator, config.cache_path))


def _selector_model_hash(config: RunConfig) -> str | None:
    """Of the model that the selector starts from: a bundle may hold an adapter alone."""
    if not config.selector.reads_texts:
        return None
    return weights_hash(resolve_model(config.selector.model, config.cache_path))


def _write_evaluated(staging: Path, evaluated: Evaluated) -> None:
    """Golden questions, the comparison, and the hash of its questions among those of the run."""
    (staging / GOLDEN).write_text(golden_json(evaluated.golden))
    (staging / EVALUATION).write_text(json.dumps(evaluated.table, indent=2) + "\n")
    facts = json.loads((staging / FACTS).read_text())
    facts["hashes"] |= evaluated.table.get("hashes", {})
    (staging / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def _copy_or_link(source: str | Path, target: str | Path) -> None:
    """Tensors are never rewritten in place, so that old and new version may share them on disk."""
    if Path(source).suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # file systems without hard links
            pass
    shutil.copyfile(source, target)
