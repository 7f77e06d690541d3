"""How busy one client keeps many generator actors, and its overhead.

Run `python -m benchmarks.speed.scale`. The pool, its actors and its client are the real ones. The
engines are stand-ins that sleep, so that 256 of them fit on one machine: as long as the tokens of a
chunk take at a given speed, times a factor that is drawn, with the chunk as seed, from what a real
engine needed for one chunk after the other. Without a file of such times the benchmark measures
them first with the built-in model and saves them beside its table.

All turns have equally many prompts an actor. What the actors would compute on machines of their own
here shares the cores with the client, so that its figures are rather too high than too low.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.runs import own_cluster

if TYPE_CHECKING:  # an actor imports what its engine refers to, and 256 of them must fit
    from rlrag.config import GeneratorConfig
    from rlrag.generation.pool.start import GeneratorPool
    from rlrag.generation.prompts import PromptBuilder
    from rlrag.generation.protocol import Sampling
    from rlrag.generation.weights import GeneratorWeights
    from rlrag.records import Generation, Prompt, Score

RESULTS_FILE = Path(__file__).parents[1] / "results" / "scale.md"
LATENCIES_FILE = Path(__file__).parents[1] / "results" / "scale_latencies.json"
BUSY_TARGETS = {64: 0.95, 256: 0.85}
STRAGGLER_TARGET = 0.05
IDENTITY = "simulated"
_BATCH_SIZE = 16
_CPUS_PER_ACTOR = 0.01  # Ray starts as many processes at once as a node has CPUs
_MIB = 2**20


@dataclass(frozen=True)
class Latencies:
    """What a real engine needed for chunks of prompts, one after the other.

    Attributes:
        source: Machine, model and back end.
        prefix_tokens: Tokens that all prompts begin with.
        prompt_tokens: Tokens of each prompt.
        calls: Tokens and seconds of each chunk.
    """

    source: str
    prefix_tokens: int
    prompt_tokens: tuple[int, ...]
    calls: tuple[tuple[int, float], ...]

    @property
    def factors(self) -> tuple[float, ...]:
        """Seconds of each chunk, over what its tokens take at the mean speed of all."""
        s_per_token = sum(s for _, s in self.calls) / sum(tokens for tokens, _ in self.calls)
        return tuple(seconds / tokens / s_per_token for tokens, seconds in self.calls)


class SleepingEngine:
    """Sleeps as long as a real engine would work; implements `Generator`.

    The text of an answer tells which process gave it, and when the call began and ended.
    """

    def __init__(self, factors: tuple[float, ...], tokens_per_s: float) -> None:
        from rlrag.generation.protocol import TokenCount

        self.identity, self.version, self.tokens = IDENTITY, 0, TokenCount()
        self._factors = factors
        self._tokens_per_s = tokens_per_s

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """One answer a prompt, after the time that the whole chunk takes."""
        import os
        import random

        from rlrag.records import Generation

        began = time.monotonic()
        factor = random.Random(prompts[0].text).choice(self._factors)
        time.sleep(sum(len(p.token_ids) for p in prompts) * factor / self._tokens_per_s)
        text = f"{os.getpid()} {began} {time.monotonic()}"
        return [Generation(text, -1.0, 1, len(p.token_ids)) for p in prompts]

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        """Never asked."""
        raise NotImplementedError

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Never asked."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free."""


def open_sleeping(
    factors: tuple[float, ...], tokens_per_s: float, slowdown: float
) -> SleepingEngine:
    """The engine of an actor; that of the first actor of its pool is slower."""
    import ray

    is_first = ray.get_runtime_context().get_actor_name().endswith("-0")
    return SleepingEngine(factors, tokens_per_s / slowdown if is_first else tokens_per_s)


@dataclass(frozen=True)
class Turn:
    """One batch of prompts through the pool; times in seconds, of all actors together."""

    num_prompts: int
    num_chunks: int
    wall_s: float
    busy_s: float
    client_s: float
    gaps_s: tuple[float, ...]
    """From the end of a call to the beginning of the next of the same actor."""


@dataclass(frozen=True)
class Row:
    """What was measured of one pool."""

    num_actors: int
    start_s: float
    pss_mib: float
    turns: tuple[Turn, ...]

    @property
    def busy_share(self) -> float:
        """Time in engine calls over the time of all actors."""
        return self._sum("busy_s") / self._sum("wall_s") / self.num_actors

    @property
    def prompts_per_s(self) -> float:
        """Throughput of the turns, one after the other."""
        return self._sum("num_prompts") / self._sum("wall_s")

    @property
    def client_ms(self) -> float:
        """Processor time of the client a rollout."""
        return 1e3 * self._sum("client_s") / self._sum("num_prompts")

    @property
    def idle_ms(self) -> float:
        """Time of an actor outside engine calls a rollout."""
        idle_s = self.num_actors * self._sum("wall_s") - self._sum("busy_s")
        return 1e3 * idle_s / self._sum("num_prompts")

    def __str__(self) -> str:
        gaps = sorted(gap for turn in self.turns for gap in turn.gaps_s) or [0.0]
        median, late = (1e3 * gaps[int(q * (len(gaps) - 1))] for q in (0.5, 0.99))
        wall_s, chunks = self._sum("wall_s"), self._sum("num_chunks")
        cells = (
            f"{self.num_actors}",
            f"{self.turns[0].num_prompts:,}",
            f"{self._sum('busy_s') / chunks:.2f}",
            f"{chunks / wall_s:.0f}",
            f"**{self.busy_share:.3f}**",
            f"{self.prompts_per_s:,.0f}",
            f"{self.client_ms:.2f}",
            f"{self._sum('client_s') / wall_s:.2f}",
            f"{median:.1f}",
            f"{late:.1f}",
            f"{self.idle_ms:.1f}",
            f"{self.pss_mib:.0f}",
            f"{self.start_s:.0f}",
        )
        return f"| {' | '.join(cells)} |"

    def _sum(self, name: str) -> float:
        return float(sum(getattr(turn, name) for turn in self.turns))


def measure_latencies(num_calls: int, cache_dir: Path | None) -> Latencies:
    """Time calls of the built-in model in a pool of one actor, each with one chunk of prompts."""
    from rlrag.generation.build import open_generator, resolve_config
    from rlrag.generation.protocol import Sampling
    from rlrag.recipes.selection import factbook

    run = factbook()
    cache_dir = cache_dir or run.cache_path
    config = run.generator.model_copy(update={"num_actors": 1, "cpus_per_actor": 0.5})
    config = resolve_config(config, "ray")
    opened, builder = open_generator(config, "ray", cache_dir)
    sampling = Sampling(max_new_tokens=config.max_new_tokens, stop=config.stop)
    prompts = _real_prompts(builder, (num_calls + 1) * _BATCH_SIZE, cache_dir)
    calls = []
    try:
        for start in range(0, len(prompts), _BATCH_SIZE):
            chunk = prompts[start : start + _BATCH_SIZE]
            began = time.perf_counter()
            opened.inner.generate(chunk, sampling)
            tokens = sum(len(prompt.token_ids) for prompt in chunk)
            calls.append((tokens, time.perf_counter() - began))
    finally:
        opened.close()
    return Latencies(
        f"{platform.machine()}, {config.model} in {config.dtype}, {config.backend} on a "
        f"{config.device} with {config.threads_per_actor} thread",
        len(builder.prefix_ids),
        tuple(len(prompt.token_ids) for prompt in prompts),
        tuple(calls[1:]),  # the first pays for the start of the engine
    )


def _real_prompts(builder: PromptBuilder, num_prompts: int, cache_dir: Path) -> list[Prompt]:
    """Questions of the built-in corpus, each with two of its passages."""
    import random

    from rlrag.data.load import load_corpus, load_questions
    from rlrag.recipes.selection import factbook

    data = factbook().data
    corpus = load_corpus(data.corpus, cache_dir, data.passage_words)
    questions = load_questions(data.train_questions, cache_dir, corpus).questions
    draw = random.Random(0)
    return [
        builder.build(
            questions[draw.randrange(len(questions))],
            [corpus[row] for row in draw.sample(range(len(corpus)), 2)],
        )
        for _ in range(num_prompts)
    ]


def measure_pool(
    num_actors: int, latencies: Latencies, options: argparse.Namespace, slowdown: float = 1.0
) -> Row:
    """Start a pool, send it some turns of prompts, and end it."""
    from rlrag.generation.pool.start import GeneratorPool

    engine = partial(open_sleeping, latencies.factors, options.tokens_per_s, slowdown)
    began = time.perf_counter()
    pool = GeneratorPool(_config(num_actors), engine, IDENTITY, {}, max_restarts=0)
    try:
        pool.wait_until_ready()
        start_s = time.perf_counter() - began
        turns = []
        pids: set[int] = set()
        for number in range(options.turns):
            prompts = _prompts(latencies, num_actors * options.prompts_per_actor, number)
            turn, found = _run_turn(pool, prompts)
            turns.append(turn)
            pids |= found
        pss_mib = statistics.mean(map(_pss_mib, pids))
    finally:
        pool.close()
    time.sleep(2)  # Ray ends the processes in the background
    print(f"{num_actors} actors: busy {turns[-1].busy_s / turns[-1].wall_s / num_actors:.3f}")
    return Row(num_actors, start_s, pss_mib, tuple(turns))


def _config(num_actors: int) -> GeneratorConfig:
    from rlrag.config import GeneratorConfig

    return GeneratorConfig(
        num_actors=num_actors,
        cpus_per_actor=_CPUS_PER_ACTOR,
        batch_size=_BATCH_SIZE,
        start_timeout_s=1800,
    )


def _prompts(latencies: Latencies, num_prompts: int, seed: int) -> list[Prompt]:
    """Prompts with the measured lengths that begin alike, as those with few-shot examples do."""
    import random

    from rlrag.records import Prompt

    draw = random.Random(seed)
    vocabulary = list(range(10_000))  # of one object a token, since there are millions
    prefix = tuple(vocabulary[: latencies.prefix_tokens])
    prompts = []
    for number in range(num_prompts):
        length = draw.choice(latencies.prompt_tokens)
        own = draw.choices(vocabulary, k=length - len(prefix))
        # About four characters a token, and no text shares its memory with another.
        prompts.append(Prompt((*prefix, *own), f"{seed}-{number}".ljust(4 * length), 2))
    return prompts


def _run_turn(pool: GeneratorPool, prompts: list[Prompt]) -> tuple[Turn, set[int]]:
    """One call of the client, and the processes that answered."""
    from rlrag.generation.protocol import Sampling

    cpu_before, began = time.process_time(), time.monotonic()
    answers = pool.generate(prompts, Sampling())
    wall_s, client_s = time.monotonic() - began, time.process_time() - cpu_before
    calls: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for text in {answer.text for answer in answers}:
        pid, start, end = text.split()
        calls[int(pid)].append((float(start), float(end)))
    gaps = [
        later[0] - earlier[1] for own in calls.values() for earlier, later in pairwise(sorted(own))
    ]
    spans = [end - start for own in calls.values() for start, end in own]
    turn = Turn(len(prompts), len(spans), wall_s, sum(spans), client_s, tuple(gaps))
    return turn, set(calls)


def _pss_mib(pid: int) -> float:
    """Memory of a process, in which pages that several share count in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / _MIB
    raise RuntimeError(f"process {pid} does not report its memory")


def report(
    rows: Sequence[Row], straggler: Row, latencies: Latencies, options: argparse.Namespace
) -> str:
    """The measured numbers as Markdown."""
    factors = sorted(latencies.factors)
    low, high = (factors[int(q * (len(factors) - 1))] for q in (0.05, 0.95))
    lines = [
        "# Scale: one client and many actors",
        "",
        f"{platform.machine()}, Python {platform.python_version()}; made by "
        "`python -m benchmarks.speed.scale`.",
        "",
        "The pool, its actors (a process each) and its client are real; the engines sleep. A chunk "
        f"takes its tokens at {options.tokens_per_s:,.0f} a second, so that the smallest, "
        f"{_BATCH_SIZE} prompts, takes about a second, times a factor drawn from "
        f"{len(factors)} measured calls ({latencies.source}): 5 % are below {low:.2f}, 5 % above "
        f"{high:.2f}. A GPU engine with many sequences takes as long or longer. Prompts have the "
        f"measured lengths, {statistics.mean(latencies.prompt_tokens):.0f} tokens on average. Each "
        f"row has {options.turns} calls of the client, one after the other, each with "
        f"{options.prompts_per_actor} prompts an actor; a rollout is one prompt.",
        "",
        "`busy` is the time in engine calls over that of all actors, the end of a call included, "
        "when there is nothing left to give out. `gap` is the time from the end of an engine call "
        "to the beginning of the same actor's next. Memory is the proportional set size of an "
        "actor's process, all its imports and no model.",
        "",
        "| actors | rollouts a call | chunk, s | chunks/s | busy | rollouts/s "
        "| client CPU a rollout, ms | client, cores | gap, median ms | gap, 99 % ms "
        "| idle actor a rollout, ms | MiB an actor | start, s |",
        "|---" * 13 + "|",
        *map(str, rows),
        "",
    ]
    lines += [
        f"- busy at {row.num_actors} actors: {row.busy_share:.3f} (target: at least "
        f"{BUSY_TARGETS[row.num_actors]})."
        for row in rows
        if row.num_actors in BUSY_TARGETS
    ]
    first, last = rows[0], rows[-1]
    if len(rows) > 1:
        lines.append(
            f"- from {first.num_actors} to {last.num_actors} actors the client's processor time a "
            f"rollout goes from {first.client_ms:.2f} to {last.client_ms:.2f} ms."
        )
    lines.append(
        f"- one of {straggler.num_actors} actors at a tenth of the speed: "
        f"{straggler.prompts_per_s:,.0f} rollouts/s, {_cost(straggler, rows):.1%} fewer (target: "
        f"at most {STRAGGLER_TARGET:.0%}; the actor's own share is "
        f"{0.9 / straggler.num_actors:.1%})."
    )
    return "\n".join(lines) + "\n"


def _cost(straggler: Row, rows: Sequence[Row]) -> float:
    """Share of the throughput that is lost against the same pool without a straggler."""
    even = next(row for row in rows if row.num_actors == straggler.num_actors)
    return 1 - straggler.prompts_per_s / even.prompts_per_s


def _meets_targets(rows: Sequence[Row], straggler: Row) -> bool:
    return _cost(straggler, rows) <= STRAGGLER_TARGET and all(
        row.busy_share >= BUSY_TARGETS.get(row.num_actors, 0.0) for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save; exit code 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--actors", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument(
        "--straggler-actors",
        type=int,
        default=64,
        help="number of actors, one of --actors, to measure again with one slow actor",
    )
    parser.add_argument("--turns", type=int, default=3, help="client calls per table row")
    parser.add_argument("--prompts-per-actor", type=int, default=512)
    parser.add_argument(
        "--tokens-per-s",
        type=float,
        default=4096.0,
        help="speed of one engine in tokens per second",
    )
    parser.add_argument(
        "--calls", type=int, default=60, help="calls of the real engine, where it is measured"
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=None, help="cache of models for the real engine"
    )
    parser.add_argument("--latencies", type=Path, default=LATENCIES_FILE)
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    options = parser.parse_args(arguments)
    if options.straggler_actors not in options.actors:
        parser.error(
            "--straggler-actors must be one of --actors, since it is compared with that row"
        )
    if not options.latencies.exists():
        with own_cluster(2):
            measured = measure_latencies(options.calls, options.cache_dir)
        options.latencies.write_text(json.dumps(asdict(measured)) + "\n", encoding="utf-8")
    latencies = Latencies(**json.loads(options.latencies.read_text(encoding="utf-8")))
    with own_cluster(1 + round(_CPUS_PER_ACTOR * max(options.actors)), 10**9):
        rows = [measure_pool(number, latencies, options) for number in options.actors]
        straggler = measure_pool(options.straggler_actors, latencies, options, slowdown=10.0)
    text = report(rows, straggler, latencies, options)
    print(text)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    return 0 if _meets_targets(rows, straggler) else 1


if __name__ == "__main__":
    sys.exit(main())
