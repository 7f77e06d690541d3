"""Have a language model judge the answers of an evaluation, and compare it with exact match.

    rlrag judge --evaluation runs/nq --url http://127.0.0.1:8000/v1 --model NAME
    rlrag judge --evaluation runs/nq --url https://api.openai.com/v1 --model NAME \
        --human labels.jsonl

The judge is any address that speaks OpenAI's chat completions. Verdicts are kept as they come: the
same command continues what was stopped, and asks nothing that was judged before. The extra `judge`
brings the client.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlrag.cli.command_line import parse, program_name
from rlrag.cli.opened_bundle import only_writer, write_output
from rlrag.errors import ConfigError
from rlrag.evaluation.question_records import EvaluatedQuestions, questions_path, read_questions
from rlrag.openai_api import DEFAULT_KEY_VARIABLE, read_key


@dataclass(frozen=True)
class JudgeArguments:
    """Flags of `rlrag judge`."""

    evaluation: Path
    """Directory of a finished run, or a JSON file that `rlrag evaluate` wrote."""
    url: str
    """Base URL of the judge's API, usually ending in /v1."""
    model: str
    """Model name that the API expects."""
    api_key_env: str = DEFAULT_KEY_VARIABLE
    """Environment variable with the API key; it may be unset if the server needs no key."""
    cache: Path | None = None
    """SQLite file that stores the verdicts; `judge.sqlite` next to the evaluation when unset."""
    output: Path | None = None
    """JSON file to write; `judge.json` next to the evaluation when unset."""
    human: Path | None = None
    """File of human labels to compare with, one JSON object per line: `id` of the question,
    `system`, `correct`."""
    systems: tuple[str, ...] = ()
    """Systems to judge; all evaluated ones when unset."""
    limit: int | None = None
    """Judge a seeded sample of this many questions."""
    concurrency: int = 8
    """Maximum number of concurrent requests."""
    timeout_s: float = 60.0
    """Timeout of a request in seconds."""
    retries: int = 4
    """Maximum number of retries after a timeout or a temporary error (429, 5xx)."""
    attempts: int = 3
    """Maximum number of replies to request until one contains a verdict."""
    max_tokens: int = 256
    """Maximum number of tokens in a reply."""
    max_failed_share: float = 0.05
    """Stop with an error if a larger share of the answers gets no reply."""
    seed: int = 0
    """Random seed of the sample and of the bootstrap intervals."""


def main(argv: Sequence[str]) -> None:
    """Read, ask, compare, write."""
    arguments = parse(JudgeArguments, None, argv, program_name("judge"))
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; give at least 1")
    path = _questions(arguments.evaluation)
    output = arguments.output or path.with_name("judge.json")
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output {output}: give the name of a file in a directory that exists")
    with only_writer(output):
        _judge(arguments, path, output)


def _judge(arguments: JudgeArguments, path: Path, output: Path) -> None:
    from rlrag.evaluation.baselines import baselines_for, baselines_from_json
    from rlrag.evaluation.judge.table import (
        JudgeTable,
        answered_by_all,
        case_of,
        read_labels,
        render,
    )
    from rlrag.rewards.llm_judge import (
        PROMPT_DIGEST,
        TEMPERATURE,
        JudgeSettings,
        judge_answers,
    )
    from rlrag.rewards.verdict_store import VerdictStore

    settings = JudgeSettings(
        arguments.url,
        arguments.model,
        arguments.concurrency,
        arguments.timeout_s,
        arguments.retries,
        arguments.attempts,
        arguments.max_tokens,
        arguments.max_failed_share,
    )
    settings.check()
    found = read_questions(path)
    systems = _systems(arguments.systems, found)
    labels = {} if arguments.human is None else read_labels(arguments.human, found)
    questions = answered_by_all(found, systems)
    num_left_out = len(found.questions) - len(questions)
    if arguments.limit is not None and arguments.limit < len(questions):
        rows = random.Random(arguments.seed).sample(range(len(questions)), arguments.limit)
        questions = tuple(questions[row] for row in sorted(rows))
    if not questions:
        raise ConfigError(
            f"{path} has no question that was answered by all of {', '.join(systems)} answered"
        )
    judged = judge_answers(
        [case_of(question, name) for question in questions for name in systems],
        settings,
        read_key(arguments.api_key_env, "--api-key-env"),
        VerdictStore(arguments.cache or path.with_name("judge.sqlite")),
        _say,
    )
    compared = baselines_for(systems, baselines_from_json(found.facts))
    table = JudgeTable.of(questions, systems, judged, labels, arguments.seed, compared)
    record: dict[str, Any] = {
        "num_questions": len(questions),
        "num_left_out": num_left_out,
        **table.to_json(),
        "judge": asdict(settings) | {"prompt_digest": PROMPT_DIGEST, "temperature": TEMPERATURE},
        "num_verdicts": len(judged.verdicts),
        "num_from_cache": judged.num_stored,
        "evaluation": dict(found.facts),
    }
    if judged.failed:
        record["failures"] = sorted(set(judged.failed.values()))
    try:
        Console().print(render(record, f"{len(questions)} questions, judged by {arguments.model}"))
    finally:  # also when standard output was closed
        write_output(output, json.dumps(record, indent=2, allow_nan=False) + "\n")
    print(f"written to {output}", file=sys.stderr)


def _questions(evaluation: Path) -> Path:
    """The file of questions that an evaluation left."""
    path = evaluation.expanduser()
    path = questions_path(path / "evaluation.json" if path.is_dir() else path)
    if not path.is_file():
        raise ConfigError(
            f"--evaluation {evaluation} has no answers to judge: {path} does not exist; give the "
            "directory of a finished run, or evaluate its bundle again with rlrag evaluate"
        )
    return path


def _systems(asked: Sequence[str], found: EvaluatedQuestions) -> list[str]:
    for name in asked:
        if name not in found.systems:
            raise ConfigError(
                f"--systems has {name!r}, which was not evaluated; choose from: "
                f"{', '.join(found.systems)}"
            )
    return list(dict.fromkeys(asked)) or found.systems


def _say(done: int, total: int) -> None:
    step = max(1, total // 20)
    if done % step == 0 or done == total:
        print(f"  judged {done:,} of {total:,} answers", file=sys.stderr, flush=True)
