"""Scoring speed of the E-step, compared with plain transformers.

Run `python -m benchmarks.speed.estep`. In each turn a policy draws permutations of fresh questions
of the built-in corpus; the log-probability of the golden answer after each is computed in four
ways, of which each adds one measure to the one before:

    plain        transformers, batches sorted by length, every permutation read whole
    distinct     equal permutations of a question are read once
    prefix       the examples that all prompts begin with are read once; vocabulary logits are
                 computed only where an answer token is predicted
    pool         vLLM actors, a thread each, that also share what permutations begin with

The untrained policy is the recipe's; the trained one learned for some hundred steps from a reward
that needs no language model (the golden answer is in the picks), so that its draws repeat and begin
alike as those of a run in progress do.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runs import own_cluster

if TYPE_CHECKING:
    from rlrag.config import RunConfig
    from rlrag.retrieval.candidates import CandidateTable
    from rlrag.selection.protocol import Policy

RESULTS_FILE = Path(__file__).parents[1] / "results" / "estep.md"
TARGETS = {"untrained": 2.0, "trained": 3.0}
_TIMEOUT_S = 1800
_BATCH_SIZE = 16
_WARM_UP_QUESTIONS = 2

Request = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, answer ids


class PlainScorer:
    """A causal language model of transformers in a process of its own, used as its manual says."""

    def __init__(self, model_dir: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), trust_remote_code=False
        ).eval()

    def run(self, requests: list[Request]) -> tuple[float, list[float]]:
        """Seconds for all requests, and log p(answer | prompt) of each."""
        start = time.perf_counter()
        order = sorted(range(len(requests)), key=lambda i: sum(map(len, requests[i])))
        found: dict[int, float] = {}
        for first in range(0, len(order), _BATCH_SIZE):
            rows = order[first : first + _BATCH_SIZE]
            found.update(zip(rows, self._score([requests[i] for i in rows]), strict=True))
        return time.perf_counter() - start, [found[i] for i in range(len(requests))]

    def _score(self, requests: list[Request]) -> list[float]:
        import torch

        sequences = [[*prompt, *answer] for prompt, answer in requests]
        width = max(map(len, sequences))
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
        with torch.inference_mode():
            logits = self._model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        found = []
        for row, (prompt, answer) in enumerate(requests):
            places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            logp = logits[row, places].float().log_softmax(dim=-1)
            found.append(logp.gather(1, torch.tensor(answer)[:, None]).sum().item())
        return found


class PrefixScorer:
    """The package's own transformers generator in a process of its own."""

    def __init__(self, model_dir: str, dtype: str, prefix: tuple[int, ...]) -> None:
        from rlrag.generation.backends.transformers import TransformersGenerator

        self._generator = TransformersGenerator(
            Path(model_dir), dtype, "cpu", _BATCH_SIZE, shared_prefix=prefix
        )

    def run(self, requests: list[Request]) -> tuple[float, list[float]]:
        """As `PlainScorer.run`."""
        start = time.perf_counter()
        found = self._generator.score(_prompts(requests), [answer for _, answer in requests])
        return time.perf_counter() - start, [score.logp for score in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=2, help="compute threads in total, for each of the two"
    )
    parser.add_argument("--turns", type=int, default=2, help="batches per table row")
    parser.add_argument("--questions", type=int, default=64, help="questions per batch")
    parser.add_argument(
        "--plain-questions",
        type=int,
        default=16,
        help="how many of the questions plain transformers scores",
    )
    parser.add_argument("--samples", type=int, default=8, help="permutations per question (m)")
    parser.add_argument("--num-selected", type=int, default=3, help="passages per permutation (K)")
    parser.add_argument(
        "--num-candidates", type=int, default=10, help="candidates per question (n)"
    )
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--cache-dir", default="~/.cache/rlrag")
    options = parser.parse_args(arguments)

    with own_cluster(options.threads):
        report = measure(options)
    print(report)
    RESULTS_FILE.write_text(report, encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> str:
    """The whole report."""
    from rlrag.pipeline import candidates_of, load_questions, open_library, open_policy
    from rlrag.recipes.selection import factbook

    run = factbook()
    run = run.model_copy(
        update={
            "cache_dir": options.cache_dir,
            "environment": run.environment.model_copy(
                update={"num_selected": options.num_selected}
            ),
            "retrieval": run.retrieval.model_copy(
                update={"num_candidates": options.num_candidates}
            ),
        }
    )
    library = open_library(run)
    found = load_questions(run.data.train_questions, run.cache_path, library.corpus)
    needed = 2 * (_WARM_UP_QUESTIONS + options.questions * options.turns) + 500
    candidates = candidates_of(library, found.sample(needed, seed=0), run)
    untrained, trained = open_policy(run, candidates), open_policy(run, candidates)
    _train(trained, candidates, run, options.training_steps)
    ways = _Ways(run, options.threads)
    try:
        rows = []
        for number, (name, policy) in enumerate(
            {"untrained": untrained, "trained": trained}.items()
        ):
            rows += _measure_policy(name, policy, candidates, ways, options, number)
    finally:
        ways.close()
    return _report(run, rows, options)


def _train(policy: Policy, candidates: CandidateTable, run: RunConfig, num_steps: int) -> None:
    """Teach the policy to pick passages that hold the golden answer; the last 500 questions."""
    import copy

    import numpy as np

    from rlrag.config import DROConfig, TrainingConfig
    from rlrag.rewards.answering import PassageReward
    from rlrag.training.distributed.workers import SingleWorker
    from rlrag.training.dro.batch import importance_weights
    from rlrag.training.dro.e_step import BatchCollector
    from rlrag.training.learners.selector import SelectorLearner

    dro = DROConfig(num_samples=8, reward_temperature=0.3)
    training = TrainingConfig(batch_size=32, learning_rate=5e-3)
    collector = BatchCollector(run.environment, dro, candidates, PassageReward(0.0), 32)
    learner = SelectorLearner(
        policy, copy.deepcopy(policy), dro, training, num_steps, SingleWorker()
    )
    rng = np.random.default_rng(0)
    for step in range(num_steps):
        rows = len(candidates) - 1 - rng.choice(500, size=32, replace=False)
        experience = collector.collect(policy, rows, [[step, int(r)] for r in rows], step, 0)
        learner.update(experience, importance_weights(experience, dro), step)
    collector.close()


class _Ways:
    """The actors that score, and the prompts that they are given."""

    def __init__(self, run: RunConfig, threads: int) -> None:
        import ray

        from rlrag.generation.build import open_generator, resolve_config
        from rlrag.models.directories import resolve_model

        self.config = resolve_config(run.generator, "ray")
        shape = {"num_actors": threads, "threads_per_actor": 1, "backend": "vllm"}
        self._pool, self.prompts = open_generator(
            run.generator.model_copy(update=shape), "ray", run.cache_path
        )
        model_dir = str(resolve_model(self.config.model, run.cache_path))
        variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        options = {"num_cpus": 0, "runtime_env": {"env_vars": variables}}
        self._plain = ray.remote(**options)(PlainScorer).remote(model_dir, self.config.dtype)
        self._prefix = ray.remote(**options)(PrefixScorer).remote(
            model_dir, self.config.dtype, self.prompts.prefix_ids
        )

    def score(self, way: str, requests: list[Request]) -> tuple[float, list[float]]:
        """Seconds, and log-probabilities, by one way."""
        import ray

        if way in ("plain", "distinct", "prefix"):
            actor = self._prefix if way == "prefix" else self._plain
            asked = requests if way == "plain" else list(dict.fromkeys(requests))
            seconds, logps = ray.get(actor.run.remote(asked), timeout=_TIMEOUT_S)
            known = dict(zip(asked, logps, strict=True))
            return seconds, [known[request] for request in requests]
        from rlrag.generation.cache import CachedGenerator

        with tempfile.TemporaryDirectory() as folder:  # an empty cache: every turn is new
            cached = CachedGenerator(self._pool.inner, Path(folder), chunk_size=len(requests))
            start = time.perf_counter()
            found = cached.score(_prompts(requests), [answer for _, answer in requests])
            return time.perf_counter() - start, [score.logp for score in found]

    def close(self) -> None:
        """End the pool's actors; the others end with Ray."""
        self._pool.close()


def _prompts(requests: Sequence[Request]) -> list[Any]:
    from rlrag.records import Prompt

    return [Prompt(ids, "", 0) for ids, _ in requests]


def _measure_policy(
    name: str,
    policy: Policy,
    candidates: CandidateTable,
    ways: _Ways,
    options: argparse.Namespace,
    number: int,
) -> list[str]:
    names = ("plain", "distinct", "prefix", "pool")
    speeds: dict[str, list[float]] = {way: [] for way in names}
    differences: dict[str, float] = dict.fromkeys(names, 0.0)
    distinct = []
    # The first questions pay for starting engines and for the shared prefix; they are not counted.
    first = number * (_WARM_UP_QUESTIONS + options.questions * options.turns)
    warm_up = _draw(policy, candidates, ways, options.samples, first, _WARM_UP_QUESTIONS)
    for way in names:
        ways.score(way, warm_up)
    first += _WARM_UP_QUESTIONS
    for _ in range(options.turns):
        requests = _draw(policy, candidates, ways, options.samples, first, options.questions)
        first += options.questions
        num_alone = options.plain_questions * options.samples
        reference: list[float] = []
        for way in names:
            asked = requests[:num_alone] if way in ("plain", "distinct") else requests
            took, logps = ways.score(way, asked)
            speeds[way].append(len(asked) / took)
            reference = reference or logps
            gap = max(abs(a - b) for a, b in zip(logps, reference, strict=False))
            differences[way] = max(differences[way], gap)
            print(
                f"{name} {way}: {speeds[way][-1]:.1f} permutations/s", file=sys.stderr, flush=True
            )
        distinct.append(len(set(requests)) / len(requests))
    rows = []
    for way in names:
        pairs = zip(speeds[way], speeds["plain"], strict=True)
        ratio = statistics.median(ours / plain for ours, plain in pairs)
        rows.append(
            f"| {name} | {way} | {statistics.mean(distinct):.2f} | "
            f"{statistics.median(speeds[way]):.1f} | **{ratio:.2f}** | {differences[way]:.3f} |"
        )
    return rows


def _draw(
    policy: Any,
    candidates: CandidateTable,
    ways: _Ways,
    num_samples: int,
    first: int,
    num_questions: int,
) -> list[Request]:
    import numpy as np

    from rlrag.config import EnvironmentConfig
    from rlrag.environment.episodes import open_episodes
    from rlrag.environment.rollout import Unrewarded, play
    from rlrag.selection.protocol import Draws

    rows = np.arange(first, first + num_questions)
    environment = EnvironmentConfig(num_selected=policy.num_selected)
    episodes = open_episodes(environment, num_questions * num_samples, candidates, Unrewarded())
    drawn = play(episodes, policy, rows, Draws([[1, row] for row in rows.tolist()], num_samples))
    requests = []
    for row, evidence in zip(drawn.question_rows_E.tolist(), drawn.evidence, strict=True):
        question = candidates.questions[row]
        answer = ways.prompts.encode_answer(question.golden_answers[0])
        requests.append((ways.prompts.build(question, evidence).token_ids, answer))
    return requests


def _report(run: RunConfig, rows: Sequence[str], options: argparse.Namespace) -> str:
    from rlrag.generation.build import resolve_config

    targets = " and ".join(f"{value:g} {name}" for name, value in TARGETS.items())
    lines = [
        "# E-step: scoring permutations against plain transformers",
        "",
        f"{platform.machine()}, Python {platform.python_version()}, {run.generator.model} in "
        f"{resolve_config(run.generator, 'ray').dtype}; made by `python -m "
        "benchmarks.speed.estep`.",
        "",
        f"{options.samples} permutations of {options.num_selected} of {options.num_candidates} "
        f"candidates for {options.questions} questions a turn, {options.threads} threads on each "
        f"side; plain and distinct score the first {options.plain_questions} of these questions "
        "alone, for they take as long for each. Each way adds a measure to the one above it, see "
        f"the module. Medians of {options.turns} turns; the ratio is that of each turn, then the "
        f"median (targets for the pool: {targets}). The last column is the largest difference from "
        "plain in nats; all ways compute in the same number format, which they round in other "
        "places.",
        "",
        "| policy | way | distinct share | permutations/s | ratio to plain | difference, nats |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
