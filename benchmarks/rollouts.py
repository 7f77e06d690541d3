"""Rollouts a second through environment, policy, cache, pool and vLLM, against vLLM alone.

Run `python -m benchmarks.rollouts`. In each turn the collector that training uses plays one batch
of episodes of fresh questions; the prompts that reached the engines are written down, and a bare
vLLM engine with the same number of threads in all gets exactly these prompts in one call. The ratio
is that of each turn, then the median. Both sides have the built-in passages, questions and model,
and both find only the few-shot prefix in their prefix cache.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runs import own_cluster

if TYPE_CHECKING:
    from rlrag.config import RunConfig
    from rlrag.generation.protocol import Generator, Sampling, TokenCount
    from rlrag.generation.weights import GeneratorWeights
    from rlrag.records import Generation, Prompt, Score
    from rlrag.retrieval.candidates import CandidateTable

RESULTS_FILE = Path(__file__).parent / "results" / "rollouts.md"
TARGET_RATIO = 0.9
_TIMEOUT_S = 600
_REWARDS = {"generate": "token_f1", "score": "answer_logp"}

Request = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, answer ids (none: generate)


class BareEngine:
    """A vLLM engine and nothing else, in a process of its own."""

    def __init__(self, model_dir: str, dtype: str, max_model_len: int, max_num_seqs: int) -> None:
        from vllm import LLM

        self._engine = LLM(
            model_dir,
            dtype=dtype,  # type: ignore[arg-type]
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            block_size=32,
            seed=0,
            trust_remote_code=False,
        )

    def run(
        self, requests: list[Request], prefix: tuple[int, ...], max_tokens: int, stop: list[str]
    ) -> float:
        """Seconds that the engine takes for all requests in one call."""
        from vllm import SamplingParams

        generate = SamplingParams(max_tokens=max_tokens, temperature=0, stop=stop, logprobs=0)
        score = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=False,
        )
        params = [score if answer else generate for _, answer in requests]
        inputs: list[Any] = [{"prompt_token_ids": [*ids, *answer]} for ids, answer in requests]
        # As in the pool: nothing of these prompts is cached but the prefix that all of them share.
        self._engine.reset_prefix_cache()
        shared: list[Any] = [{"prompt_token_ids": list(prefix)}]
        self._engine.generate(shared, generate, use_tqdm=False)
        start = time.perf_counter()
        self._engine.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start


class Recorder:
    """Passes every call on and writes down what was asked; implements `Generator`."""

    def __init__(self, inner: Generator) -> None:
        self._inner = inner
        self.requests: list[Request] = []

    @property
    def identity(self) -> str:
        """The inner generator's."""
        return self._inner.identity

    @property
    def tokens(self) -> TokenCount:
        """The inner generator's."""
        return self._inner.tokens

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """Note the prompts and pass them on."""
        self.requests += [(p.token_ids, ()) for p in prompts]
        return self._inner.generate(prompts, sampling)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        """Note prompts and answers and pass them on."""
        self.requests += [(p.token_ids, a) for p, a in zip(prompts, answers, strict=True)]
        return self._inner.score(prompts, answers)

    @property
    def version(self) -> int:
        """The inner generator's."""
        return self._inner.version

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Pass them on."""
        self._inner.load_weights(weights)

    def close(self) -> None:
        """Close the inner generator."""
        self._inner.close()


@dataclass(frozen=True)
class Turn:
    """One batch of episodes, through everything and through the engine alone."""

    rollouts: int
    requests: int
    prompt_tokens: int
    ours_s: float
    bare_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of each side, in all")
    parser.add_argument("--turns", type=int, default=5, help="batches a row of the table")
    parser.add_argument("--questions", type=int, default=16, help="questions a batch")
    parser.add_argument("--samples", type=int, default=8, help="episodes a question")
    parser.add_argument("--num-selected", type=int, default=2, help="passages an episode picks")
    options = parser.parse_args(arguments)

    with own_cluster(options.threads):
        report = measure(options)
    print(report)
    RESULTS_FILE.parent.mkdir(exist_ok=True)
    RESULTS_FILE.write_text(report, encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> str:
    """The whole report, for one actor with all threads and for one actor a thread."""
    from rlrag.pipeline import candidates_of, load_questions, open_library
    from rlrag.recipes.selection import quickstart

    run = quickstart()
    environment = run.environment.model_copy(update={"num_selected": options.num_selected})
    run = run.model_copy(update={"environment": environment})
    library = open_library(run)
    found = load_questions(run.data.train_questions, run.cache_path, library.corpus)
    needed = options.questions * (options.turns + 1)
    candidates = candidates_of(library, found.sample(needed, seed=0), run)
    shapes = dict.fromkeys([(1, options.threads), (options.threads, 1)])
    rows = []
    bare = _open_bare(run, options.threads)
    for num_actors, threads in shapes:
        shape = {
            "num_actors": num_actors,
            "threads_per_actor": threads,
            "backend": "vllm",
            "cpus_per_actor": 0.5,
        }
        shaped = run.model_copy(update={"generator": run.generator.model_copy(update=shape)})
        for kind, turns in _measure_shape(shaped, candidates, bare, options).items():
            rows.append(_row(kind, num_actors, threads, turns))
    return _report(run, rows, options)


def _open_bare(run: RunConfig, threads: int) -> Any:
    import ray

    from rlrag.generation.backends.vllm import vllm_environment
    from rlrag.generation.build import resolve_config
    from rlrag.models.directories import resolve_model

    config = resolve_config(run.generator, "ray")
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        **vllm_environment(config),
    }
    make = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(BareEngine)
    model_dir = resolve_model(config.model, run.cache_path)
    return make.remote(str(model_dir), config.dtype, config.max_model_len, config.batch_size)


def _measure_shape(
    run: RunConfig, candidates: CandidateTable, bare: Any, options: argparse.Namespace
) -> dict[str, list[Turn]]:
    from rlrag.generation.build import open_generator
    from rlrag.generation.cache import CachedGenerator

    turns = {}
    for kind, reward in _REWARDS.items():
        rewarded = run.model_copy(
            update={"reward": run.reward.model_copy(update={"functions": (reward,)})}
        )
        opened, prompts = open_generator(run.generator, "ray", run.cache_path)
        try:
            recorder = Recorder(opened.inner)
            with tempfile.TemporaryDirectory() as folder:
                cached = CachedGenerator(recorder, Path(folder))  # empty: every prompt is new
                turns[kind] = _turns(
                    rewarded, candidates, bare, options, (recorder, cached, prompts)
                )
        finally:
            opened.close()
    return turns


def _turns(
    run: RunConfig,
    candidates: CandidateTable,
    bare: Any,
    options: argparse.Namespace,
    opened: tuple[Recorder, Any, Any],
) -> list[Turn]:
    import numpy as np
    import ray

    from rlrag.pipeline import open_policy, open_reward
    from rlrag.training.experience import ExperienceCollector

    recorder, cached, prompts = opened
    policy = open_policy(run, candidates)
    reward = open_reward(run, cached, prompts)
    dro = run.dro.model_copy(update={"num_samples": options.samples})
    collector = ExperienceCollector(run.environment, dro, candidates, reward, options.questions)
    turns = []
    for number in range(options.turns + 1):
        rows = np.arange(options.questions) + number * options.questions
        recorder.requests = []
        start = time.perf_counter()
        seeds = [(number, int(r)) for r in rows]
        experience = collector.collect(policy, rows, seeds, policy_version=0, generator_version=0)
        ours_s = time.perf_counter() - start
        answer = bare.run.remote(
            recorder.requests,
            prompts.prefix_ids,
            run.generator.max_new_tokens,
            list(run.generator.stop),
        )
        bare_s = ray.get(answer, timeout=_TIMEOUT_S)
        tokens = sum(len(ids) for ids, _ in recorder.requests)
        num_requests, rollouts = len(recorder.requests), experience.rewards_BM.size
        turns.append(Turn(rollouts, num_requests, tokens, ours_s, bare_s))
    collector.close()
    return turns[1:]  # the first pays for the start of the engines and for the prefix


def _row(kind: str, num_actors: int, threads: int, turns: Sequence[Turn]) -> str:
    ours = statistics.median(turn.rollouts / turn.ours_s for turn in turns)
    bare = statistics.median(turn.rollouts / turn.bare_s for turn in turns)
    speed = statistics.median(turn.prompt_tokens / turn.ours_s for turn in turns)
    ratio = statistics.median(turn.bare_s / turn.ours_s for turn in turns)
    requests = round(statistics.mean(turn.requests for turn in turns))
    return (
        f"| {kind} | {num_actors} x {threads} | {turns[0].rollouts} | {requests} | {ours:.1f} | "
        f"{bare:.1f} | {speed:,.0f} | **{ratio:.2f}** |"
    )


def _report(run: RunConfig, rows: Sequence[str], options: argparse.Namespace) -> str:
    from rlrag.generation.build import resolve_config

    dtype = resolve_config(run.generator, "ray").dtype
    lines = [
        "# Rollouts: the whole pipeline against the bare engine",
        "",
        f"{platform.machine()}, Python {platform.python_version()}, {run.generator.model} in "
        f"{dtype}; made by `python -m benchmarks.rollouts`.",
        "",
        "A rollout is one episode: retrieved candidates, an ordered pick, its prompt, the answer "
        "(`generate`) or the log-probability of the golden answers (`score`), the reward. The bare "
        f"engine has {options.threads} threads in one process; ours has them as shown. Medians of "
        f"{options.turns} turns; the ratio is that of each turn, then the median (target: at least "
        f"{TARGET_RATIO}).",
        "",
        "| asked | actors x threads | rollouts a turn | engine requests a turn | "
        "ours, rollouts/s | bare, rollouts/s | ours, prompt tokens/s | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
