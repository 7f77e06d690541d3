"""A trained pipeline on disk: what evaluation and serving load.

bundle/config.json            how every part is built
bundle/selector.safetensors   the trained selection policy
bundle/retriever/             the trained encoder of the retriever, where one was trained
bundle/generator/             the trained generator as a Hugging Face model, where one was trained
bundle/bundle.json            shapes, source hashes, the step that the weights come from
bundle/manifest.json          SHA-256 of each file
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError
from rlrag.generation.weights import GeneratorWeights, pack_weights
from rlrag.models import resolve_model, weights_hash
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.build import TrainablePolicy, build_policy
from rlrag.storage import check_whole, find_whole, load_weights, save_weights, whole_directory

FORMAT = 3


@dataclass(frozen=True)
class BundleFacts:
    """What a run found out that its configuration does not say."""

    format: int
    step: int
    score_names: tuple[str, ...]
    vector_size: int
    generator_weights: str
    selector_model_weights: str | None
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Bundle:
    """One version of a tuned pipeline."""

    config: RunConfig
    facts: BundleFacts
    policy: TrainablePolicy
    generator_dir: Path | None
    retriever_dir: Path | None

    def generator_weights(self, dtype: str) -> GeneratorWeights | None:
        """The trained generator for engines that run in `dtype`; None where none was trained."""
        if self.generator_dir is None:
            return None
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(self.generator_dir.glob("*.safetensors")):
            tensors |= load_file(path)
        wanted = getattr(torch, dtype)
        return pack_weights({name: t.to(wanted) for name, t in tensors.items()}, version=1)


def save_bundle(
    directory: Path,
    config: RunConfig,
    policy: TrainablePolicy,
    candidates: CandidateTable,
    hashes: Mapping[str, str],
    step: int,
    save_generator: Callable[[Path], None] | None = None,
    save_retriever: Callable[[Path], None] | None = None,
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

    Raises:
        CheckpointError: when the directory cannot be written.
    """
    facts = BundleFacts(
        format=FORMAT,
        step=step,
        score_names=candidates.score_names,
        vector_size=candidates.vector_size,
        generator_weights=weights_hash(resolve_model(config.generator.model, config.cache_path)),
        selector_model_weights=_selector_model_hash(config),
        hashes=dict(hashes),
    )
    with whole_directory(directory) as staging:
        (staging / "config.json").write_text(config.to_json())
        (staging / "bundle.json").write_text(json.dumps(asdict(facts), indent=2) + "\n")
        save_weights(policy, staging / "selector.safetensors")
        if save_generator is not None:
            save_generator(staging / "generator")
        if save_retriever is not None:
            save_retriever(staging / "retriever")


def load_bundle(directory: Path) -> Bundle:
    """Check every file and rebuild the policy.

    Raises:
        CheckpointError: when the bundle is absent, damaged, of another format, or a model has other
            weights than it was trained with.
    """
    directory = find_whole(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"bundle {directory} does not exist; give the bundle directory of a finished run"
        )
    check_whole(directory)
    known = json.loads((directory / "bundle.json").read_text())
    if known["format"] != FORMAT:
        raise CheckpointError(
            f"bundle {directory} has format {known['format']}, this version reads {FORMAT}; load "
            "it with the version that wrote it"
        )
    config = RunConfig.from_json((directory / "config.json").read_text(), str(directory))
    facts = BundleFacts(**{**known, "score_names": tuple(known["score_names"])})
    generator_hash = weights_hash(resolve_model(config.generator.model, config.cache_path))
    for model, here, expected in (
        (config.generator.model, generator_hash, facts.generator_weights),
        (config.selector.model, _selector_model_hash(config), facts.selector_model_weights),
    ):
        if here != expected:
            raise CheckpointError(
                f"the model {model!r} has weights {here} here, but bundle {directory} was trained "
                f"with {expected}; provide those weights"
            )
    policy = build_policy(
        config.selector,
        config.environment.num_selected,
        len(facts.score_names),
        facts.vector_size,
        config.cache_path,
        config.seed,
    )
    load_weights(policy, directory / "selector.safetensors")
    generator_dir, retriever_dir = directory / "generator", directory / "retriever"
    return Bundle(
        config,
        facts,
        policy,
        generator_dir if generator_dir.is_dir() else None,
        retriever_dir if retriever_dir.is_dir() else None,
    )


def _selector_model_hash(config: RunConfig) -> str | None:
    """Of the model that the selector starts from: a bundle may hold an adapter alone."""
    if config.selector.kind == "features":
        return None
    return weights_hash(resolve_model(config.selector.model, config.cache_path))
