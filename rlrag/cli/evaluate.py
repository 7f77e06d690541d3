"""Compare a trained bundle with its baselines on any corpus and questions.

rlrag evaluate --bundle runs/nq/bundle --corpus FILE --questions FILE --output FILE

Beside the output, `NAME.questions.jsonl` has every question, for `rlrag report` and `rlrag judge`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from rich.console import Console, RenderableType

from rlrag.cli.command_line import parse, program_name
from rlrag.cli.opened_bundle import (
    check_flags,
    is_stream,
    on_other_data,
    only_writer,
    opened_pipeline,
    say,
    say_evaluation,
    write_output,
)
from rlrag.config import RunConfig, describe_validation_error
from rlrag.config.training import System
from rlrag.errors import ConfigError, nearest_name

if TYPE_CHECKING:  # they bring torch, which --help does without
    from rlrag.bundle import Bundle
    from rlrag.evaluation.question_records import QuestionRecorder
    from rlrag.pipeline import Pipeline
    from rlrag.retrieval.candidates import CandidateTable
    from rlrag.rewards.answering import AnsweringReward
    from rlrag.selection.protocol import Policy


@dataclass(frozen=True)
class EvaluateArguments:
    """Flags of `rlrag evaluate`."""

    bundle: Path
    """Bundle directory of a finished run."""
    questions: str
    """Questions in any form that `data.eval_questions` takes."""
    output: Path
    """JSON file to write. What each system picked and answered for every question is written next
    to it to `NAME.questions.jsonl`, unless it is a pipe or a device."""
    corpus: str | None = None
    """Corpus in any form that `data.corpus` takes; that of the run when unset."""
    limit: int | None = None
    """Evaluate a seeded sample of this many questions."""
    docs_in_context: int | None = None
    """Passages shown to the generator; as in training when unset."""
    generator: str | None = None
    """Answer with another model, in any form that `generator.model` takes, to see how retriever or
    selector transfer to a generator that they were not trained with. The bundle's when unset."""
    launcher: Literal["ray", "local"] | None = None
    """Where the generator runs; as in training when unset."""
    systems: tuple[System, ...] = ()
    """Systems to compare, including ones that the run did not compare; those of
    `evaluation.systems` when unset."""
    allow_code: tuple[str, ...] = ()
    """Custom code of the bundle that may run, under the name that the bundle gives it: a reward,
    retriever, policy or generator `package.module:name`, an environment
    `module:namespace/Name-v0`."""


def main(argv: Sequence[str]) -> None:
    """Load, answer, compare, show, write."""
    arguments = parse(EvaluateArguments, None, argv, program_name("evaluate"))
    check_flags(arguments.limit, arguments.output)
    with only_writer(arguments.output):
        found = _evaluate(arguments)
        try:
            Console().print(found.shown)
        finally:  # also when standard output was closed
            found.write(arguments.output)


def evaluate(
    bundle: Path | str,
    corpus: str | None,
    questions: str,
    output: Path | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compare a bundle with its baselines on any corpus and questions.

    Args:
        bundle: Directory of the bundle.
        corpus: In any form that `data.corpus` takes; None takes that of the run.
        questions: In any form that `data.eval_questions` takes.
        output: JSON file to write, with `NAME.questions.jsonl` beside it; none when unset.
        options: Further fields of `EvaluateArguments`, such as `limit` and `systems`.

    Returns:
        What `rlrag evaluate` writes: `systems` has each system's measures with their intervals.

    Raises:
        ConfigError: when an option is unknown or wrong.
        RlragError: what is wrong with the bundle or the data.
    """
    known = {field.name for field in fields(EvaluateArguments)}
    for name in options.keys() - known:
        hint = nearest_name(name, known, f"there are: {', '.join(sorted(known))}")
        raise ConfigError(f"evaluate has no option {name!r}; {hint}")
    wanted = None if output is None else Path(output)
    arguments = EvaluateArguments(
        Path(bundle), questions, wanted or Path("evaluation.json"), corpus, **options
    )
    if wanted is None:
        return _evaluate(arguments).record
    check_flags(arguments.limit, wanted)
    with only_writer(wanted):
        found = _evaluate(arguments)
        found.write(wanted)
    return found.record


@dataclass(frozen=True)
class _Compared:
    """An evaluation: its record, its table to print, and every question."""

    record: dict[str, Any]
    shown: RenderableType
    questions: QuestionRecorder

    def write(self, output: Path) -> None:
        from rlrag.evaluation.question_records import questions_path

        if not is_stream(output):
            self.questions.write(questions_path(output), self.record)
        write_output(output, json.dumps(self.record, indent=2) + "\n")


def _evaluate(arguments: EvaluateArguments) -> _Compared:
    from rlrag.bundle import load_bundle
    from rlrag.evaluation import systems
    from rlrag.evaluation.baselines import baselines_from_json
    from rlrag.evaluation.question_records import QuestionRecorder
    from rlrag.evaluation.table import render
    from rlrag.generation.prompts import cut_warning
    from rlrag.pipeline import open_evaluation_data, open_library, other_retrievers

    shown = arguments.docs_in_context
    if shown is not None and shown < 1:
        raise ConfigError(f"--docs-in-context is {shown}; give at least 1")
    bundle = load_bundle(arguments.bundle, arguments.allow_code)
    if systems.prefers_reward(bundle.config):
        bundle.check_code("reward.functions", arguments.allow_code)
    launcher = arguments.launcher or bundle.config.training.launcher
    config = _configured(bundle.config, arguments)
    recorder = QuestionRecorder(config.environment.num_selected)
    with opened_pipeline(bundle, config, launcher, "rlrag-evaluate") as pipeline:
        library = open_library(config, bundle.index_dir)
        candidates, questions_hash = open_evaluation_data(config, library)
        answering = _answering(config, pipeline, candidates, arguments.allow_code)
        table = systems.evaluate(
            config,
            _policy(bundle, config, candidates),
            candidates,
            answering,
            progress=say_evaluation(config, len(candidates)),
            tune_generator=pipeline.tune,
            retrievers=other_retrievers(config, library, bundle.retriever_dir),
            keep=recorder.keep,
            baselines=baselines_from_json(bundle.evaluation or {}),
        )
    record = table.to_json() | {
        "hashes": {"corpus": candidates.corpus.content_hash, "questions": questions_hash},
        "bundle_step": bundle.facts.step,
        "generator": config.generator.answering_model,
        "prompts": answering.prompt_counts.shares(),
    }
    if warning := cut_warning(record["prompts"]):
        say(warning)
    return _Compared(record, render(table), recorder)


def _answering(
    config: RunConfig,
    pipeline: Pipeline,
    candidates: CandidateTable,
    allow_code: Sequence[str],
) -> AnsweringReward:
    """What answers, with the reward where answers are judged by it."""
    from rlrag.evaluation.systems import judged_by_reward
    from rlrag.pipeline import open_answering, open_reward

    if not judged_by_reward(config, candidates):
        return open_answering(config, pipeline.generator, pipeline.prompts)
    pipeline.bundle.check_code("reward.functions", allow_code)
    return open_reward(config, pipeline.generator, pipeline.prompts)


def _policy(bundle: Bundle, config: RunConfig, candidates: CandidateTable) -> Policy:
    """The bundle's; one that keeps the retriever's order where another number is to be picked.

    That is allowed of a run of the retriever alone, which trained no selector.
    """
    from rlrag.pipeline import open_policy

    picked = config.environment.num_selected
    if picked == bundle.config.environment.num_selected:
        return bundle.policy
    return open_policy(config, candidates)


def _configured(config: RunConfig, arguments: EvaluateArguments) -> RunConfig:
    """The bundle's configuration with other questions, generator and numbers of passages shown."""
    if arguments.systems:
        evaluation = config.evaluation.model_copy(update={"systems": arguments.systems})
        try:
            config = type(config).model_validate(
                config.model_dump() | {"evaluation": evaluation.model_dump()}
            )
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error)) from error
    if not config.systems:
        raise ConfigError(
            f"--bundle {arguments.bundle} is from a run whose evaluation.systems is empty, so "
            "there is nothing to compare; choose some with --systems, or use rlrag probe"
        )
    config = on_other_data(config, arguments.corpus, arguments.questions, arguments.limit)
    if arguments.generator is not None:
        if config.trains_generator:
            raise ConfigError(
                f"--generator is {arguments.generator!r}, but the bundle contains trained "
                f"weights of {config.generator.model!r}; leave the flag out, or give a bundle "
                "without a trained generator"
            )
        config = config.model_copy(
            update={"generator": config.generator.with_model(arguments.generator)}
        )
    shown = arguments.docs_in_context
    if shown is not None:
        if config.algorithm.parts != ("retriever",) and shown != config.environment.num_selected:
            raise ConfigError(
                f"--docs-in-context is {shown}, but the bundle's selector was trained to pick "
                f"{config.environment.num_selected}; leave the flag out"
            )
        values = config.model_dump()
        values["environment"]["num_selected"] = shown
        for section, field in (("retrieval", "num_candidates"), ("algorithm", "num_online")):
            if field in values[section]:
                values[section][field] = max(values[section][field], shown)
        config = type(config).model_validate(values)
    return config
