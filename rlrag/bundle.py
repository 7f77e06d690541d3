"""A trained pipeline on disk: what evaluation and serving load.

bundle/config.json            how every part is built
bundle/selector.safetensors   the trained selection policy
bundle/bundle.json            shapes, source hashes, the step that the weights come from
bundle/manifest.json          SHA-256 of each file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError
from rlrag.models import resolve_model, weights_hash
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.build import build_policy
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.storage import check_whole, load_weights, save_weights, whole_directory

FORMAT = 1


@dataclass(frozen=True)
class BundleFacts:
    """What a run found out that its configuration does not say."""

    format: int
    step: int
    score_names: tuple[str, ...]
    vector_size: int
    generator_weights: str
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Bundle:
    """One version of a tuned pipeline."""

    config: RunConfig
    facts: BundleFacts
    policy: PlackettLucePolicy


def save_bundle(
    directory: Path,
    config: RunConfig,
    policy: PlackettLucePolicy,
    candidates: CandidateTable,
    hashes: Mapping[str, str],
    step: int,
) -> None:
    """Write a bundle; one that is there is replaced as a whole.

    Raises:
        CheckpointError: when the directory cannot be written.
    """
    facts = BundleFacts(
        format=FORMAT,
        step=step,
        score_names=candidates.score_names,
        vector_size=candidates.vector_size,
        generator_weights=weights_hash(resolve_model(config.generator.model, config.cache_path)),
        hashes=dict(hashes),
    )
    with whole_directory(directory) as staging:
        (staging / "config.json").write_text(config.to_json())
        (staging / "bundle.json").write_text(json.dumps(asdict(facts), indent=2) + "\n")
        save_weights(policy, staging / "selector.safetensors")


def load_bundle(directory: Path) -> Bundle:
    """Check every file and rebuild the policy.

    Raises:
        CheckpointError: when the bundle is absent, damaged, of another format, or its generator has
            other weights than the one that it was trained with.
    """
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
    found = weights_hash(resolve_model(config.generator.model, config.cache_path))
    if found != facts.generator_weights:
        raise CheckpointError(
            f"the generator {config.generator.model!r} has weights {found} here, but bundle "
            f"{directory} was trained with {facts.generator_weights}; provide those weights"
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
    return Bundle(config, facts, policy)
