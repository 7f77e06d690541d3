"""Checks that the service gives the answers of the evaluation.

Run `python -m benchmarks.quality.served_answers --bundle runs/factbook/bundle`. The bundle's test
questions are answered first as `jobs.evaluate` answers them, by the same code and back end, then
over HTTP by a service of one replica of each part; nothing is cached. Compared are the answers, the
passages with their order, and the answers' log-probabilities.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.runs import own_cluster
from benchmarks.speed.serve import URL, ready, service
from rlrag.records import Question

RESULTS_FILE = Path(__file__).parents[1] / "results" / "served_answers.md"

Row = tuple[str, tuple[str, ...], float]
"""Answer, ids of the passages in the order picked, log-probability of the answer in nats."""


def evaluated(bundle_dir: Path, num_questions: int) -> tuple[list[Question], list[Row]]:
    """The questions, and what evaluation finds for the trained system."""
    from rlrag.bundle import load_bundle
    from rlrag.evaluation.systems import Answered, evaluate
    from rlrag.generation.build import open_generator, resolve_config
    from rlrag.pipeline import open_evaluation_data, open_library, open_reward, other_retrievers

    bundle = load_bundle(bundle_dir)
    bundle.check_code("reward.functions", ())
    values = bundle.config.model_dump()
    values["data"]["max_eval_questions"] = num_questions
    values["evaluation"]["systems"] = ("trained",)
    config = type(bundle.config).model_validate(values)
    kept: dict[str, Answered] = {}
    with tempfile.TemporaryDirectory() as empty, own_cluster(2):
        # What is evaluated comes from the engine here, not from an earlier run's cache.
        cache = Path(empty)
        generator, prompts = open_generator(config.generator, "ray", cache)
        try:
            library = open_library(config, bundle.index_dir)
            candidates, _ = open_evaluation_data(config, library)
            weights = bundle.generator_weights(resolve_config(config.generator, "ray").dtype)
            evaluate(
                config,
                bundle.policy,
                candidates,
                open_reward(config, generator, prompts),
                tune_generator=lambda: generator.load_weights(weights) if weights else None,
                retrievers=other_retrievers(config, library, bundle.retriever_dir),
                keep=kept.__setitem__,
            )
        finally:
            generator.close()
    found = kept["trained"]
    rows = [
        (answer.text.strip(), tuple(passage.id for passage in selection), answer.logp)
        for selection, answer in zip(found.selections, found.answers, strict=True)
    ]
    return list(found.questions), rows


async def served(questions: Sequence[Question]) -> list[Row]:
    """What the service answers, some questions at a time."""
    places = asyncio.Semaphore(8)

    async def ask(client: httpx.AsyncClient, question: Question) -> Row:
        async with places:
            response = await client.post("/v1/answer", json={"question": question.question})
        response.raise_for_status()
        found: dict[str, Any] = response.json()
        ids = tuple(passage["id"] for passage in found["passages"])
        return found["answer"], ids, found["answer_logp"]

    async with httpx.AsyncClient(base_url=URL, timeout=120) as client:
        await ready(client)
        return await asyncio.gather(*(ask(client, question) for question in questions))


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer both ways, compare, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args(arguments)
    questions, expected = evaluated(options.bundle, options.questions)
    with service(options.bundle):
        found = asyncio.run(served(questions))
    pairs = list(zip(expected, found, strict=True))
    answers = sum(ours[0] == theirs[0] for ours, theirs in pairs)
    passages = sum(ours[1] == theirs[1] for ours, theirs in pairs)
    gaps = sorted(abs(a[2] - b[2]) for a, b in pairs if a[:2] == b[:2])
    report = "\n".join(
        [
            "# The service against evaluation",
            "",
            f"`python -m benchmarks.quality.served_answers --bundle BUNDLE`; {len(pairs)} test "
            "questions.",
            "",
            "| compared | result |",
            "|---|---|",
            f"| equal answers | {answers} of {len(pairs)} |",
            f"| equal passages in equal order | {passages} of {len(pairs)} |",
            f"| log-probability of equal answers, largest difference | {gaps[-1]:.2g} nats |",
            f"| the same, median | {gaps[len(gaps) // 2]:.2g} nats |",
            "",
        ]
    )
    print(report)
    RESULTS_FILE.write_text(report, encoding="utf-8")
    for question, (ours, theirs) in zip(questions, pairs, strict=True):
        if ours[:2] != theirs[:2]:
            print(f"{question.question!r}: {ours} evaluated, {theirs} served", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
