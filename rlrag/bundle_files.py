"""Reads and checks the files of a bundle without building or loading any model.

bundle/config.json            how every part is built
bundle/bundle.json            shapes, source hashes, the step that the weights come from
bundle/selector.safetensors   the trained selection policy
bundle/retriever/             the trained encoder of the retriever, where one was trained
bundle/generator/             the trained generator as a Hugging Face model, where one was trained
bundle/adapter/               where asked for, the generator's LoRA adapter alone, as peft writes it
bundle/index/                 where asked for, the indexes that it searches
bundle/golden.json            questions with the answers of the run's final evaluation; may be empty
bundle/evaluation.json        that evaluation, where there was one
bundle/licences.json          of its parts
bundle/README.md              a model card, where asked for
bundle/manifest.json          SHA-256 of each of these

Nothing in a bundle runs: it holds tensors, arrays and text alone, arrays are read without pickle,
and models are loaded without code of their own. What its configuration names of other code, an
environment's module or a reward function, runs only where the caller names it too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors.torch import load_file

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, ConfigError, RlragError
from rlrag.files.directories import MANIFEST, check_finite, check_whole, find_whole
from rlrag.generation.weights import GeneratorWeights, pack_weights
from rlrag.models.licences import LICENCES_FILE, PartLicence
from rlrag.records import Generation, Passage, Question
from rlrag.retrieval.tuned import tuned_retrieval
from rlrag.submitted_job import where_to_look

FORMAT = 4
NUM_GOLDEN = 20
CONFIG, FACTS, SELECTOR = "config.json", "bundle.json", "selector.safetensors"
GOLDEN, EVALUATION, CARD = "golden.json", "evaluation.json", "README.md"
GENERATOR, RETRIEVER, ADAPTER, INDEX = "generator", "retriever", "adapter", "index"

_INDEX_SUFFIXES = (".npy", ".faiss", ".json")
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja", ".md")
_IN_A_CACHE = ("models", "corpora", "indexes", "candidates", "generations.sqlite")
_VERSION_DIGITS = 12
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class BundleFacts:
    """What a run found out that its configuration does not say."""

    __pydantic_config__ = _STRICT

    format: int
    code_version: str
    step: Annotated[int, Field(ge=0)]
    score_names: tuple[str, ...]
    vector_size: Annotated[int, Field(ge=0, le=65_536)]
    generator_weights: str
    selector_model_weights: str | None
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class GoldenQuestion:
    """A question with what the pipeline made of it in the run's final evaluation.

    `passage_ids` are the picked passages, best first; `answer_logp` is the answer's summed
    log-probability in nats, None where the generator does not give it.
    """

    __pydantic_config__ = _STRICT

    id: str
    question: str
    answer: str
    passage_ids: tuple[str, ...]
    answer_logp: float | None


@dataclass(frozen=True)
class Evaluated:
    """What the final evaluation of a run adds to its bundle."""

    golden: tuple[GoldenQuestion, ...]
    table: Mapping[str, Any]


@dataclass(frozen=True)
class BundleFiles:
    """One version of a tuned pipeline, as its files say.

    `golden` is empty and `evaluation` None where no final evaluation was made.
    """

    directory: Path
    version: str
    config: RunConfig
    facts: BundleFacts
    golden: tuple[GoldenQuestion, ...]
    evaluation: Mapping[str, Any] | None
    licences: tuple[PartLicence, ...]
    generator_dir: Path | None
    retriever_dir: Path | None
    adapter_dir: Path | None
    index_dir: Path | None

    @property
    def searching_config(self) -> RunConfig:
        """The configuration, with the trained encoder where there is one."""
        if self.retriever_dir is None:
            return self.config
        retrieval = tuned_retrieval(self.config.retrieval, self.retriever_dir)
        return self.config.model_copy(update={"retrieval": retrieval})

    def check_code(self, field: str, allow_code: Collection[str]) -> None:
        """Refuse code that the configuration names and the caller does not.

        To be called before the field is used: whoever made the bundle chose the names, and to
        import a module is to run it.

        Args:
            field: What is about to be used, a key of `code_named_by`.
            allow_code: Names that the caller gives, as the configuration writes them.

        Raises:
            ConfigError: naming the first that the caller did not give.
        """
        for name in code_named_by(self.config)[field]:
            if name not in allow_code:
                raise ConfigError(
                    f"bundle {self.directory} uses custom code, {field} {name!r}, which would "
                    f"run on this machine; if you trust it, allow it with --allow-code {name} "
                    "(in a service with the setting allow_code, in Python with the allow_code "
                    "argument of load_bundle)"
                )

    def check_model(self, model: str, what: str, here: str | None, expected: str | None) -> None:
        """Refuse a model that is not the one that the bundle was trained with.

        Args:
            model: Its name.
            what: Which of its files are compared.
            here: Their hash on this machine.
            expected: Their hash in training.

        Raises:
            CheckpointError: when they differ.
        """
        if here != expected:
            raise CheckpointError(
                f"the model {model!r} has {what} {here} here, but bundle {self.directory} was "
                f"trained with {expected}; use the files of that model"
            )

    def check_code_to_answer(self, allow_code: Collection[str]) -> None:
        """`check_code` for everything that is imported to answer a question.

        Raises:
            ConfigError: naming the first that the caller did not give.
        """
        for field in ANSWERING:
            self.check_code(field, allow_code)

    def generator_weights(self, dtype: str) -> GeneratorWeights | None:
        """The trained generator for engines that run in `dtype`; None where none was trained.

        Raises:
            CheckpointError: when it holds a number that is not finite.
        """
        if self.generator_dir is None:
            return None
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(self.generator_dir.glob("*.safetensors")):
            tensors |= load_file(path)
        check_finite(tensors, str(self.generator_dir))
        wanted = getattr(torch, dtype)
        return pack_weights({name: t.to(wanted) for name, t in tensors.items()}, version=1)


def bundle_version(directory: Path) -> str:
    """First 12 hex digits of the SHA-256 of the manifest, and so of every file.

    Raises:
        CheckpointError: when there is no manifest.
    """
    path = find_whole(directory) / MANIFEST
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:_VERSION_DIGITS]
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give the bundle directory of a finished run"
        ) from error


ANSWERING = (
    "environment.id",
    "environment.hops.edge_sources",
    "environment.hops.writers",
    "selector.kind",
    "retrieval.kind",
    "generator.backend",
)
"""Fields whose code is imported to answer a question."""


def code_to_answer(config: RunConfig) -> tuple[str, ...]:
    """What is imported to answer a question, of what a configuration names."""
    named = code_named_by(config)
    return tuple(name for field in ANSWERING for name in named[field])


def code_named_by(config: RunConfig) -> Mapping[str, tuple[str, ...]]:
    """By field, what a configuration names of modules to import; built-in names are none.

    Example:
        >>> config = RunConfig.model_validate({"generator": {"backend": "mine:Writer"}})
        >>> code_named_by(config)["generator.backend"]
        ('mine:Writer',)
    """
    named = {
        "environment.id": (config.environment.id,),
        "environment.hops.edge_sources": config.environment.hops.edge_sources,
        "environment.hops.writers": config.environment.hops.writers,
        "selector.kind": (config.selector.kind,),
        "retrieval.kind": (config.retrieval.kind,),
        "generator.backend": (config.generator.backend,),
        "reward.functions": config.reward.functions,
    }
    return {field: tuple(n for n in names if ":" in n) for field, names in named.items()}


def read_bundle(directory: Path) -> BundleFiles:
    """Check and read a bundle.

    Every file is compared with its hash. No model is loaded, nor asked for its own hash. The cache
    directory of its run is used where it is one on this machine; else this user's is.

    Raises:
        CheckpointError: when the bundle is absent, damaged, of another format or holds a file that
            is neither tensors nor text.
        ConfigError: when its configuration is none of this version.
    """
    directory = find_whole(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"bundle {directory} does not exist; "
            + where_to_look(directory, "give the bundle directory of a finished run")
        )
    version = bundle_version(directory)
    check_whole(directory)
    _check_names(directory)
    found = parse_bundle(directory, version)
    found = replace(found, config=_with_known_cache(found.config))
    if bundle_version(directory) != version:
        raise CheckpointError(
            f"bundle {directory} was replaced while it was being read; load it again"
        )
    return found


def _with_known_cache(config: RunConfig) -> RunConfig:
    """The configuration, with the default cache where the one that it names holds none.

    So a bundle from another machine works here, and none can have folders made where it wants.
    """
    # Not Path.exists, which fails where the directory is that of another user.
    if any(os.path.exists(config.cache_path / name) for name in _IN_A_CACHE):
        return config
    return config.model_copy(update={"cache_dir": RunConfig.model_fields["cache_dir"].default})


def parse_bundle(directory: Path, version: str = "") -> BundleFiles:
    """What `read_bundle` returns, of files that were not compared with their hashes.

    For those who are still writing them.
    """
    _check_format(directory)
    evaluation = directory / EVALUATION
    return BundleFiles(
        directory=directory,
        version=version,
        config=_config(directory / CONFIG),
        facts=_parsed(directory / FACTS, BundleFacts),
        golden=_parsed(directory / GOLDEN, tuple[GoldenQuestion, ...]),
        evaluation=_parsed(evaluation, dict[str, Any]) if evaluation.is_file() else None,
        licences=_parsed(directory / LICENCES_FILE, tuple[PartLicence, ...]),
        generator_dir=_directory(directory / GENERATOR),
        retriever_dir=_directory(directory / RETRIEVER),
        adapter_dir=_directory(directory / ADAPTER),
        index_dir=_directory(directory / INDEX),
    )


def golden_sample(
    questions: Sequence[Question],
    selections: Sequence[Sequence[Passage]],
    answers: Sequence[Generation | RlragError],
) -> tuple[GoldenQuestion, ...]:
    """At most `NUM_GOLDEN` of those with answers, always the same of equal numbers, in order."""
    answered = [
        (question, selection, answer)
        for question, selection, answer in zip(questions, selections, answers, strict=True)
        if not isinstance(answer, RlragError)
    ]
    number = min(NUM_GOLDEN, len(answered))
    rows = np.sort(np.random.default_rng(0).choice(len(answered), number, replace=False))
    return tuple(
        GoldenQuestion(
            id=question.id,
            question=question.question,
            answer=answer.text,
            passage_ids=tuple(passage.id for passage in selection),
            answer_logp=answer.logp,
        )
        for question, selection, answer in (answered[row] for row in rows)
    )


def golden_json(golden: Sequence[GoldenQuestion]) -> str:
    """As the file of a bundle holds them."""
    return json.dumps([asdict(each) for each in golden], indent=2, allow_nan=False) + "\n"


def _check_format(directory: Path) -> None:
    found = _read_json(directory / FACTS)
    format_found = found.get("format") if isinstance(found, dict) else None
    if format_found != FORMAT:
        raise CheckpointError(
            f"bundle {directory} has format {format_found!r}, this version reads {FORMAT}; load "
            "it with the version that wrote it"
        )


def _check_names(directory: Path) -> None:
    """Refuse what some loader of models might run; `check_whole` read the manifest before."""
    for name in _read_json(directory / MANIFEST)["files"]:
        path = PurePosixPath(name)
        if path.suffix not in (_INDEX_SUFFIXES if path.parts[0] == INDEX else _SUFFIXES):
            raise CheckpointError(
                f"bundle {directory} contains {name!r}, which is neither tensors nor text and "
                "may run code when it is loaded; do not use it"
            )


def _config(path: Path) -> RunConfig:
    _read_json(path)
    return RunConfig.from_json(_read(path), str(path))


def _parsed(path: Path, kind: type[_Value]) -> _Value:
    """A JSON file as a checked value."""
    text = _read(path)
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        raise CheckpointError(
            f"{path} is invalid: {place}: {first['msg']}; export the bundle again"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; export the bundle again") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}), but a bundle needs it; export the "
            "bundle again"
        ) from error


def _directory(path: Path) -> Path | None:
    return path if path.is_dir() else None
