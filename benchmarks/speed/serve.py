"""Throughput, latency and overload of the service, compared with the bare engine.

Run `python -m benchmarks.speed.serve --bundle runs/factbook/bundle`. Everything runs on this
machine and on loopback, each phase for a bounded time:

    throughput   16 clients, each asking one question after the other, against a vLLM engine that is
                 given the same prompts at once; in turns, the ratio is that of each turn
    overhead     one client; the client's time less that of the generate stage
    latency      requests begin at half the rate of the first phase, whatever is under way
    overload     200 requests a second more than that for 30 s, then half of it again; which
                 statuses come, what memory the service takes, how soon all requests of a second
                 are answered, and how soon they are without waiting for room

Answer and candidate caches are off, so that every request is worked on. As many requests are under
way as the engine decodes at once, and as many may wait.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

RESULTS_FILE = Path(__file__).parents[1] / "results" / "serve.md"
URL = "http://127.0.0.1:8000"
_CLIENTS = 16
_EXTRA_RATE = 200.0
_OVERLOAD_S = 30.0
_LATENCY_S = 30.0
_RECOVERY_S = 20.0
_AT_ONCE_MS = 5.0
"""A request that waits no longer for room counts as not waiting."""
_OURS = ("ray::ServeReplica", "ray::ProxyActor", "ray::EngineProcess")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its status, when it began, seconds, and what the service says of its stages."""

    status: int
    began: float
    seconds: float
    timings_ms: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the report and write it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=128, help="questions per repetition")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    questions = _questions(options.bundle, options.questions * options.turns)
    with service(options.bundle):
        report = asyncio.run(_measure(options, questions))
    print(report)
    RESULTS_FILE.write_text(report, encoding="utf-8")
    return 0


@contextmanager
def service(bundle: Path) -> Iterator[None]:
    """The service with one replica of each part, on a cluster that ends with the block."""
    from ray import serve as ray_serve

    from benchmarks.runs import own_cluster
    from rlrag.serving.app import build
    from rlrag.serving.http.proxy import PROXY_VARIABLES

    for name, value in PROXY_VARIABLES.items():  # as `serve run` does where it starts the cluster
        os.environ.setdefault(name, value)
    with own_cluster(2), tempfile.TemporaryDirectory() as state:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": 8000})
        settings = {
            "bundle": str(bundle),
            "state_dir": state,
            "caches": {"answers": 0, "candidates": 0},
            "limits": {"max_in_flight": _CLIENTS, "max_waiting": _CLIENTS},
        }
        try:
            ray_serve.run(build(settings), name="rlrag", route_prefix="/")
            yield
        finally:
            ray_serve.shutdown()


def _questions(bundle: Path, wanted: int) -> list[str]:
    from rlrag.bundle_files import read_bundle
    from rlrag.pipeline import load_questions, open_library

    config = read_bundle(bundle).config
    corpus = open_library(config).corpus
    found = load_questions(config.data.eval_questions, config.cache_path, corpus)
    texts = [question.question for question in found.sample(wanted, seed=0).questions]
    return list(itertools.islice(itertools.cycle(texts), wanted))


async def _measure(options: argparse.Namespace, questions: list[str]) -> str:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=URL, limits=limits, timeout=120) as client:
        await ready(client)
        await asyncio.gather(*(_ask(client, question) for question in questions[:_CLIENTS]))
        ratios, rates = [], []
        bare = BareEngine(options.bundle)
        try:
            for turn in range(options.turns):
                part = questions[turn * options.questions : (turn + 1) * options.questions]
                served = await _closed_loop(client, part)
                alone = await asyncio.to_thread(bare.rate, part)
                rates.append(served)
                ratios.append(served / alone)
                print(f"served {served:.2f}/s, engine {alone:.2f}/s", file=sys.stderr, flush=True)
        finally:
            bare.close()
        single = [await _ask(client, question) for question in questions[:48]]
        capacity = statistics.median(rates)
        half = await _open_loop(client, questions, capacity / 2, _LATENCY_S)
        flood = await _overload(client, questions, capacity)
    return _report(ratios, rates, single, half, flood)


@dataclass(frozen=True, slots=True)
class Flood:
    """Requests during the overload and after it, and what the service's processes take."""

    during: list[Asked]
    after: list[Asked]
    mib_before: float
    mib_after: float

    def normal_after_s(self, waiting: bool) -> float:
        """Seconds from the end of the overload to the first second all of whose requests succeed.

        Args:
            waiting: Whether requests of that second may wait for room.
        """
        end = max(one.began for one in self.during)
        bad = [
            one.began - end
            for one in self.after
            if one.status != 200 or (not waiting and one.timings_ms["wait"] > _AT_ONCE_MS)
        ]
        return float(int(max(bad)) + 1) if bad else 0.0


async def _overload(client: httpx.AsyncClient, questions: Sequence[str], capacity: float) -> Flood:
    before = _memory_mib()
    # Half of what the service can do goes on afterwards, while the last of the flood are answered.
    flood = asyncio.create_task(_open_loop(client, questions, capacity + _EXTRA_RATE, _OVERLOAD_S))
    await asyncio.sleep(_OVERLOAD_S)
    after = await _open_loop(client, questions, capacity / 2, _RECOVERY_S)
    return Flood(await flood, after, before, _memory_mib())


class BareEngine:
    """A vLLM engine in a process of its own, given the prompts that the service builds."""

    def __init__(self, bundle: Path) -> None:
        import ray

        from rlrag.generation.backends.vllm import vllm_environment
        from rlrag.serving.generating import engine_config
        from rlrag.serving.settings import parse_settings

        self._settings = parse_settings({"bundle": str(bundle)})
        config = engine_config(_config(bundle).generator, self._settings)
        variables = {**vllm_environment(config), "OMP_NUM_THREADS": "1"}
        options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": variables}}
        self._actor: Any = ray.remote(**options)(_Bare).remote(str(bundle))

    def rate(self, questions: list[str]) -> float:
        """Answers a second, the picks given."""
        import ray

        rate: float = ray.get(self._actor.rate.remote(questions), timeout=1800)
        return rate

    def close(self) -> None:
        """End the engine."""
        import ray

        ray.kill(self._actor)


class _Bare:
    def __init__(self, bundle: str) -> None:
        from rlrag.bundle import load_bundle
        from rlrag.bundle_files import read_bundle
        from rlrag.generation.build import open_engine, resolve_config
        from rlrag.generation.prompts import PromptBuilder, load_tokenizer
        from rlrag.models.directories import resolve_model
        from rlrag.pipeline import sampling_of
        from rlrag.serving.generating import engine_config
        from rlrag.serving.retrieving import RetrieverPart
        from rlrag.serving.selecting import SelectorPart
        from rlrag.serving.settings import parse_settings

        self._bundle = load_bundle(Path(bundle))
        config = engine_config(self._bundle.config.generator, parse_settings({"bundle": bundle}))
        config = resolve_config(config, "ray")
        model_dir = self._bundle.generator_dir or resolve_model(
            config.model, self._bundle.config.cache_path
        )
        self._prompts = PromptBuilder(config.prompt, load_tokenizer(model_dir), config.stop)
        self._engine = open_engine(config, model_dir, self._prompts.prefix_ids)
        # After the engine: vLLM (0.32) looks through all modules at its start, and those that BM25
        # brings do not let it.
        self._retriever, self._selector = RetrieverPart(), SelectorPart()
        self._version = read_bundle(Path(bundle)).version
        self._retriever.load(self._version, Path(bundle))
        self._selector.load(self._version, Path(bundle))
        self._sampling = sampling_of(self._bundle.config)

    def rate(self, questions: list[str]) -> float:
        from rlrag.records import Question
        from rlrag.serving.retrieving import Ask
        from rlrag.serving.selecting import Choice

        prompts = []
        for question in questions:
            (found,) = self._retriever.retrieve(self._version, [Ask(question)])
            choice = Choice(question, found)  # type: ignore[arg-type]
            (picked,) = self._selector.select(self._version, [choice])
            passages = [found.passages[n] for n in picked.positions]  # type: ignore[union-attr]
            prompts.append(self._prompts.build(Question("asked", question, ()), passages))
        start = time.perf_counter()
        self._engine.generate(prompts, self._sampling)
        return len(prompts) / (time.perf_counter() - start)


def _config(bundle: Path) -> Any:
    from rlrag.bundle_files import read_bundle

    return read_bundle(bundle).config


async def ready(client: httpx.AsyncClient) -> None:
    """Wait until every part of the service can answer."""
    end = time.monotonic() + 300
    while (await client.get("/readyz")).status_code != 200:
        if time.monotonic() > end:
            raise SystemExit("error: the service was not ready within 300 s")
        await asyncio.sleep(0.5)


async def _ask(client: httpx.AsyncClient, question: str) -> Asked:
    start = time.perf_counter()
    try:
        response = await client.post("/v1/answer", json={"question": question})
    except httpx.TransportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return Asked(0, start, time.perf_counter() - start, {})
    seconds = time.perf_counter() - start
    timings = response.json()["timings_ms"] if response.status_code == 200 else {}
    return Asked(response.status_code, start, seconds, timings)


async def _closed_loop(client: httpx.AsyncClient, questions: Sequence[str]) -> float:
    """Answers a second that all clients together get."""
    waiting = list(questions)

    async def work() -> None:
        while waiting:
            asked = await _ask(client, waiting.pop())
            if asked.status != 200:
                raise SystemExit(f"error: status {asked.status} without overload")

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(_CLIENTS)))
    return len(questions) / (time.perf_counter() - start)


async def _open_loop(
    client: httpx.AsyncClient, questions: Sequence[str], rate: float, seconds: float
) -> list[Asked]:
    """Requests that begin at a rate, whether earlier ones have ended or not.

    Fewer where this process cannot begin so many: none begins after the time.
    """
    start, tasks = time.perf_counter(), []
    for number in range(int(rate * seconds)):
        now = time.perf_counter()
        if now > start + seconds:
            break
        await asyncio.sleep(max(0.0, start + number / rate - now))
        question = questions[number % len(questions)]
        tasks.append(asyncio.create_task(_ask(client, question)))
    return list(await asyncio.gather(*tasks))


def _memory_mib() -> float:
    """Memory of the proxy, the replicas and the engine, without what they share with others."""
    import psutil

    found = [
        process.memory_full_info().uss
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith(_OURS)
    ]
    if not found:
        raise SystemExit("error: no process of the service is among the child processes")
    return float(sum(found)) / 2**20


def _report(
    ratios: Sequence[float],
    rates: Sequence[float],
    single: Sequence[Asked],
    half: Sequence[Asked],
    flood: Flood,
) -> str:
    rest_ms = [1000 * one.seconds - one.timings_ms["generate"] for one in single]
    seconds = sorted(one.seconds for one in half if one.status == 200)
    median, last = statistics.median(seconds), seconds[int(0.99 * (len(seconds) - 1))]
    statuses = Counter(one.status for one in flood.during)
    refused = statuses[503] / len(flood.during)
    stages = {
        stage: statistics.median(one.timings_ms[stage] for one in single)
        for stage in ("retrieve", "select", "generate")
    }
    lines = [
        "# The service on one machine",
        "",
        "`python -m benchmarks.speed.serve --bundle BUNDLE`; two cores, clients included, one "
        "replica of "
        "each part, an engine of one thread, no caches. What is measured is described in the "
        "module.",
        "",
        "| measure | found | target |",
        "|---|---|---|",
        f"| answers a second, {_CLIENTS} clients | {statistics.median(rates):.2f} | - |",
        f"| of the bare engine | {statistics.median(ratios):.2f} | 0.9 |",
        f"| all but the engine, median of {len(single)}, ms | {statistics.median(rest_ms):.1f} | "
        "15 |",
        f"| p99 / median at half the rate | {last / median:.2f} ({1000 * last:.0f} / "
        f"{1000 * median:.0f} ms) | 3 |",
        f"| requests a second in overload | {len(flood.during) / _OVERLOAD_S:.0f} | "
        f"{_EXTRA_RATE + statistics.median(rates):.0f} |",
        f"| statuses of these {len(flood.during):,} requests | "
        f"{json.dumps(dict(statuses))}, {refused:.0%} refused | 200 and 503 |",
        "| memory of all processes before and after, MiB | "
        f"{flood.mib_before:.0f}, {flood.mib_after:.0f} | flat |",
        f"| all answered again after, s | {flood.normal_after_s(waiting=True):.0f} | 5 |",
        f"| and none waits for room after, s | {flood.normal_after_s(waiting=False):.0f} | - |",
        "",
        "Median stages of the single client, ms: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in stages.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
