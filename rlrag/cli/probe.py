"""Probe how robust a bundle's answers are to changes of the context, and where they come from.

    rlrag probe --bundle runs/nq/bundle --output probe.json
    rlrag probe --bundle runs/nq/bundle --measures mirage,order --baseline \
        --corpus FILE --questions FILE --limit 200 --output probe.json

The bundle answers as `rlrag evaluate` lets its system `trained` answer, but greedily, whatever
temperature it was trained with. Measures that change what stands around the gold passages need
questions that name them (`metadata.gold_ids`); the others are counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from rlrag.cli.command_line import parse, program_name
from rlrag.cli.opened_bundle import (
    check_flags,
    on_other_data,
    only_writer,
    opened_pipeline,
    write_output,
)
from rlrag.config import RunConfig
from rlrag.errors import ConfigError, nearest_name

if TYPE_CHECKING:  # they bring torch, which --help does without
    from rlrag.evaluation.picked import Part, Picked
    from rlrag.evaluation.probe.measures import Measured, ProbeSettings
    from rlrag.evaluation.probe.robustness import GoldQuestions
    from rlrag.pipeline import Library, Pipeline
    from rlrag.retrieval.candidates import CandidateTable
    from rlrag.selection.protocol import Policy


@dataclass(frozen=True)
class ProbeArguments:
    """Flags of `rlrag probe`."""

    bundle: Path
    """Bundle directory of a finished run."""
    output: Path
    """JSON file to write."""
    measures: tuple[str, ...] = ()
    """Measures, separated by spaces or commas: mirage, order, position, distractors, duplicates,
    contradictions, attribution, abstention, calibration, cost. All that fit the questions and the
    bundle when unset."""
    corpus: str | None = None
    """Corpus in any form that `data.corpus` takes; that of the run when unset."""
    questions: str | None = None
    """Questions in any form that `data.eval_questions` takes; those of the run when unset."""
    limit: int | None = None
    """Ask a seeded sample of this many questions; when unset all of `questions`, or the sample that
    the run was evaluated on."""
    baseline: bool = False
    """Also measure the retriever's order with the untrained generator, and compare."""
    num_distractors: int = 4
    """Number of distractors added to the gold passages in mirage, position, duplicates and
    contradictions."""
    distractor_counts: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of distractors that `distractors` tries, in ascending order."""
    copies: tuple[int, ...] = (1, 2, 3)
    """Numbers of copies of the gold passages that `duplicates` tries, in ascending order."""
    contradictions: tuple[int, ...] = (0, 1, 2)
    """Numbers of contradicting copies of the gold passages that `contradictions` tries, in
    ascending order."""
    max_orders: int = 24
    """Maximum number of orders that `order` tries for a question; it samples them where there are
    more."""
    launcher: Literal["ray", "local"] | None = None
    """Where the generator runs; as in training when unset."""
    allow_code: tuple[str, ...] = ()
    """Custom code of the bundle that may run, under the name that the bundle gives it: an
    environment `module:namespace/Name-v0`, a retriever, policy or generator
    `package.module:name`."""


@dataclass(frozen=True)
class Searched:
    """What one retriever finds for the questions."""

    config: RunConfig
    library: Library
    candidates: CandidateTable
    questions_hash: str = field(repr=False)


def main(argv: Sequence[str]) -> None:
    """Load, ask, measure, show, write."""
    arguments = parse(ProbeArguments, None, argv, program_name("probe"))
    check_flags(arguments.limit, arguments.output)
    with only_writer(arguments.output):
        _probe(arguments)


def _probe(arguments: ProbeArguments) -> None:
    from rlrag.bundle import load_bundle
    from rlrag.evaluation.probe.measures import MEASURES, ProbeSettings
    from rlrag.evaluation.probe.robustness import gold_questions
    from rlrag.evaluation.probe.table import ProbeTable, render
    from rlrag.pipeline import open_library

    named = _measures(arguments.measures, MEASURES)
    settings = ProbeSettings(
        arguments.num_distractors,
        arguments.distractor_counts,
        arguments.copies,
        arguments.contradictions,
        arguments.max_orders,
    )
    bundle = load_bundle(arguments.bundle, arguments.allow_code)
    launcher = arguments.launcher or bundle.config.training.launcher
    config = _configured(bundle.config, arguments)
    settings = replace(settings, seed=config.seed)
    with opened_pipeline(bundle, config, launcher, "rlrag-probe") as pipeline:
        own = _search(pipeline.config, pipeline.library)
        gold = gold_questions(own.candidates, settings.needed_distractors)
        names, left_out = _possible(named or tuple(MEASURES), bool(named), own, gold, settings)
        systems = {"trained": lambda: _trained(own, pipeline)}
        if arguments.baseline:
            original = own
            if bundle.retriever_dir is not None:
                original = _search(config, open_library(config, bundle.index_dir))
            systems["retriever_order"] = lambda: _untrained(original, pipeline)
        results, errors, prompts = _measure(names, systems, own, gold, pipeline, settings)
    table = ProbeTable(results, seed=config.seed)
    record = {
        "num_questions": len(own.candidates),
        "num_selected": config.environment.num_selected,
        "questions_with_gold": {"used": len(gold.rows), "left_out": dict(gold.left_out)},
        "questions_unanswered": errors,
        "prompts": prompts,
        "measures_left_out": left_out,
        "settings": asdict(settings),
        **table.to_json(),
        "hashes": {"corpus": own.candidates.corpus.content_hash, "questions": own.questions_hash},
        "bundle_step": bundle.facts.step,
    }
    title = f"{len(own.candidates)} questions, {config.environment.num_selected} passages picked"
    console = Console()
    try:
        console.print(render(record, title))
        for line in _remarks(gold, errors, left_out, prompts):
            console.print(line, style="dim", markup=False, highlight=False)
    finally:  # also when standard output was closed
        write_output(arguments.output, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _measures(words: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """The names among the words, each once."""
    names = tuple(dict.fromkeys(name for word in words for name in word.split(",") if name))
    for name in names:
        if name not in known:
            hint = nearest_name(name, known, f"there are: {', '.join(known)}")
            raise ConfigError(f"--measures has the unknown name {name!r}; {hint}")
    return names


def _configured(config: RunConfig, arguments: ProbeArguments) -> RunConfig:
    """The bundle's configuration with other data, and answers that nothing is drawn for."""
    config = on_other_data(config, arguments.corpus, arguments.questions, arguments.limit)
    greedy = config.generator.model_copy(update={"temperature": 0.0})
    return config.model_copy(update={"generator": greedy})


def _search(config: RunConfig, library: Library) -> Searched:
    from rlrag.pipeline import open_evaluation_data

    return Searched(config, library, *open_evaluation_data(config, library))


def _possible(
    names: tuple[str, ...],
    insisted: bool,
    own: Searched,
    gold: GoldQuestions,
    settings: ProbeSettings,
) -> tuple[list[str], dict[str, str]]:
    """The measures that can be taken, and why not the others; an error for one insisted on."""
    from rlrag.evaluation.probe.measures import impossible

    refused = impossible(
        own.candidates.questions,
        gold,
        own.config.environment.num_selected,
        settings.needed_distractors,
    )
    for name in names:
        if insisted and name in refused:
            raise refused[name]
    left_out = {name: str(refused[name]) for name in names if name in refused}
    return [name for name in names if name not in refused], left_out


def _trained(own: Searched, pipeline: Pipeline) -> Picked:
    """What the bundle picks, for its own generator."""
    from rlrag.evaluation.picked import policy_picks

    pipeline.tune()
    policy = pipeline.bundle.policy
    picked = policy_picks(own.config.environment, policy, own.candidates)
    return replace(picked, parts=_parts(own, pipeline, picked, policy))


def _untrained(original: Searched, pipeline: Pipeline) -> Picked:
    """What the retriever ranks first, for the generator as training found it."""
    from rlrag.evaluation.picked import first_picks

    picked = first_picks(original.candidates, original.config.environment.num_selected)
    return replace(picked, parts=_parts(original, pipeline, picked))


def _parts(
    searched: Searched,
    pipeline: Pipeline,
    picked: Picked,
    policy: Policy | None = None,
) -> dict[str, Part]:
    """The parts of a system as they work without caches."""
    from rlrag.environment.rollout import play_greedy
    from rlrag.pipeline import sampling_of
    from rlrag.retrieval.tables import retrieve

    candidates, sampling = searched.candidates, sampling_of(searched.config)
    questions, build = candidates.questions, pipeline.prompts.build
    parts: dict[str, Part] = {
        "retrieval": lambda rows: retrieve(
            [questions[row].question for row in rows],
            searched.library.retrievers,
            candidates.num_candidates,
        )
    }
    if policy is not None:
        environment = searched.config.environment
        parts["selection"] = lambda rows: play_greedy(environment, policy, candidates, rows)
    parts["generation"] = lambda rows: pipeline.generator.inner.generate(
        [build(questions[row], picked.selections[row]) for row in rows], sampling
    )
    return parts


def _measure(
    names: Sequence[str],
    systems: dict[str, Callable[[], Picked]],
    own: Searched,
    gold: GoldQuestions,
    pipeline: Pipeline,
    settings: ProbeSettings,
) -> tuple[dict[str, dict[str, Measured]], dict[str, str], dict[str, float]]:
    """Every system's measures, why some questions were not answered, and what prompts left out.

    The untrained system comes first, as the generator is tuned only once.
    """
    from rlrag.evaluation.probe.measures import Probe, measure
    from rlrag.pipeline import open_answering

    answering = open_answering(own.config, pipeline.generator, pipeline.prompts)
    questions = own.candidates.questions
    results: dict[str, dict[str, Measured]] = {}
    errors: dict[str, str] = {}
    for system, pick in reversed(systems.items()):
        probe = Probe(questions, gold, pick(), answering, settings)
        results[system] = measure(names, probe, partial(_say, system))
        errors |= {questions[row].id: str(error) for row, error in probe.errors.items()}
    ordered = {system: results[system] for system in systems}
    return ordered, errors, answering.prompt_counts.shares()


def _say(system: str, name: str) -> None:
    print(f"{system}: {name}", file=sys.stderr, flush=True)


def _remarks(
    gold: GoldQuestions,
    errors: dict[str, str],
    left_out: dict[str, str],
    prompts: dict[str, float],
) -> list[str]:
    """What the table does not say: what is missing from it and from its prompts, and why."""
    from rlrag.generation.prompts import cut_warning

    counts = ", ".join(f"{count} {name}" for name, count in gold.left_out.items())
    lines = [f"left out around gold passages: {counts}"] if gold.rows and counts else []
    lines += [f"not answered: {error}" for error in errors.values()]
    lines += [f"not measured: {reason}" for reason in left_out.values()]
    warning = cut_warning(prompts)
    return lines if warning is None else [*lines, warning]
