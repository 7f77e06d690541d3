"""Compare a trained bundle with its baselines on any corpus and questions.

python -m jobs.evaluate --bundle runs/nq/bundle --corpus FILE --questions FILE --output FILE
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from jobs.cluster import cluster
from jobs.command_line import parse, run_program
from rlrag.config import RunConfig
from rlrag.errors import ConfigError


@dataclass(frozen=True)
class EvaluateArguments:
    """Flags of `jobs.evaluate`."""

    bundle: Path
    """Bundle directory of a finished run."""
    corpus: str
    """Corpus in any form that `data.corpus` takes."""
    questions: str
    """Questions in any form that `data.eval_questions` takes."""
    output: Path
    """JSON file to write."""
    limit: int | None = None
    """Evaluate a seeded sample of this many questions."""
    docs_in_context: int | None = None
    """Passages shown to the generator; as in training when unset."""
    launcher: Literal["ray", "local"] | None = None
    """Where the generator runs; as in training when unset."""


def main(argv: Sequence[str]) -> None:
    """Load, answer, compare, write."""
    arguments = parse(EvaluateArguments, None, argv, "python -m jobs.evaluate")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; give at least 1")
    shown = arguments.docs_in_context
    if shown is not None and shown < 1:
        raise ConfigError(f"--docs-in-context is {shown}; give at least 1")
    if not arguments.output.parent.is_dir():
        raise ConfigError(
            f"--output {arguments.output}: the directory {arguments.output.parent} does not exist"
        )

    from rlrag.bundle import load_bundle
    from rlrag.evaluation.systems import evaluate
    from rlrag.evaluation.table import render
    from rlrag.generation.build import open_generator, resolve_config
    from rlrag.pipeline import (
        open_evaluation_data,
        open_library,
        open_policy,
        open_reward,
        other_retrievers,
    )
    from rlrag.training.reporting import library_chatter_in

    bundle = load_bundle(arguments.bundle)
    launcher = arguments.launcher or bundle.config.training.launcher
    config = _configured(bundle.config, arguments)
    log = Path(tempfile.gettempdir()) / "rlrag-evaluate.log"
    with library_chatter_in(log), cluster(launcher):
        generator, prompts = open_generator(config.generator, launcher, config.cache_path)
        try:
            library = open_library(config, bundle.index_dir)
            candidates, questions_hash = open_evaluation_data(config, library)
            weights = bundle.generator_weights(resolve_config(config.generator, launcher).dtype)
            table = evaluate(
                config,
                # A run of the retriever alone has no selector that is bound to its number of picks.
                bundle.policy if shown is None else open_policy(config, candidates),
                candidates,
                open_reward(config, generator, prompts),
                progress=lambda name: print(name, file=sys.stderr, flush=True),
                tune_generator=lambda: generator.load_weights(weights) if weights else None,
                retrievers=other_retrievers(config, library, bundle.retriever_dir),
            )
        finally:
            generator.close()
    record = table.to_json() | {
        "hashes": {"corpus": library.corpus.content_hash, "questions": questions_hash},
        "bundle_step": bundle.facts.step,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(render(table))


def _configured(config: RunConfig, arguments: EvaluateArguments) -> RunConfig:
    """The bundle's configuration with other questions, and other numbers of passages shown."""
    values = config.model_dump()
    values["data"] |= {
        "corpus": arguments.corpus,
        "eval_questions": arguments.questions,
        "max_eval_questions": arguments.limit,
    }
    shown = arguments.docs_in_context
    if shown is not None:
        if config.training.parts != ("retriever",) and shown != config.environment.num_selected:
            raise ConfigError(
                f"--docs-in-context is {shown}, but the bundle's selector was trained to pick "
                f"{config.environment.num_selected}; leave the flag out"
            )
        values["environment"]["num_selected"] = shown
        for section, field in (("retrieval", "num_candidates"), ("openrag", "num_online")):
            values[section][field] = max(values[section][field], shown)
    return type(config).model_validate(values)


if __name__ == "__main__":
    run_program(main)
