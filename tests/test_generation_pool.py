"""The actor pool around an echo engine: balance, killed actors, hangs, and what errors name."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, GeneratorTimeoutError, SetupError
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.pool.client import plan_chunks
from rlrag.generation.pool.start import MAX_RESTARTS, GeneratorPool
from rlrag.generation.protocol import Generator, Sampling, TokenCount
from rlrag.records import Generation, Prompt, Score

HANG, DIE, DIE_ONCE, RAISE = 10_001, 10_002, 10_003, 10_004

pytestmark = pytest.mark.usefixtures("cluster")


class Echo:
    """Answers with its prompt's tokens; some tokens make it hang, die or raise."""

    identity, version = "echo", 0

    def __init__(self, folder: Path, pause_s: float = 0.0) -> None:
        self.tokens = TokenCount()
        self._folder, self._pause_s = folder, pause_s
        (folder / f"started-{os.getpid()}").touch()

    def generate(self, prompts, sampling) -> list[Generation]:
        self._act(prompts)
        pid = os.getpid()
        return [
            Generation(" ".join(map(str, p.token_ids)), float(-pid), 1, len(p.token_ids))
            for p in prompts
        ]

    def score(self, prompts, answers) -> list[Score]:
        self._act(prompts)
        return [
            Score(-float(sum(p.token_ids) + sum(a)), len(a), len(p.token_ids))
            for p, a in zip(prompts, answers, strict=True)
        ]

    def close(self) -> None:
        """Nothing to free."""

    def _act(self, prompts) -> None:
        (self._folder / f"asked-{os.getpid()}-{time.monotonic_ns()}").touch()
        tokens = {token for p in prompts for token in p.token_ids}
        if HANG in tokens:
            time.sleep(600)
        if RAISE in tokens:
            raise KeyError("no such thing")
        if DIE in tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if DIE_ONCE in tokens and not (self._folder / "died").exists():
            (self._folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._pause_s)


def refuse(folder: Path) -> Generator:
    raise SetupError("there is no compiler; install g++")


@pytest.fixture
def open_pool(tmp_path):
    pools = []

    def open_it(make=Echo, max_restarts=MAX_RESTARTS, **changes) -> GeneratorPool:
        settings = {"num_actors": 2, "batch_size": 2, "request_timeout_s": 60, **changes}
        config = GeneratorConfig(**settings)
        engine = partial(make, tmp_path)
        pools.append(
            GeneratorPool(config, engine, "echo", {"ECHO": "1"}, max_restarts=max_restarts)
        )
        return pools[-1]

    yield open_it
    for pool in pools:
        pool.close()


def prompt(*ids: int) -> Prompt:
    return Prompt(token_ids=ids, text=f"text of {ids}", num_passages=0)


def texts(results: list[Generation]) -> list[str]:
    return [g.text for g in results]


def expected(prompts: list[Prompt]) -> list[str]:
    return [" ".join(map(str, p.token_ids)) for p in prompts]


def test_a_plan_holds_each_prompt_once_and_keeps_prefixes_together():
    prompts = [(i % 3, 5, i) for i in range(100)]
    chunks = plan_chunks(prompts, num_workers=2, batch_size=4)
    flat = [i for chunk in chunks for i in chunk]
    assert sorted(flat) == list(range(100))
    assert [prompts[i][0] for i in flat] == sorted(p[0] for p in prompts)
    sizes = [len(chunk) for chunk in chunks]
    assert sizes[:3] == [25, 19, 14]  # a quarter of what is left
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert min(sizes[:-1]) == 4


def test_a_plan_counts_tokens_and_bounds_them():
    prompts = [tuple(range(100))] * 4 + [(1,)] * 40
    chunks = plan_chunks(prompts, num_workers=2, batch_size=1)
    assert max(sum(len(prompts[i]) for i in chunk) for chunk in chunks) <= 200
    long_ones = [(i,) * 1000 for i in range(60)]
    assert [len(c) for c in plan_chunks(long_ones, num_workers=1, batch_size=4)] == [17, 17, 17, 9]
    assert [len(c) for c in plan_chunks(long_ones, num_workers=1, batch_size=40)] == [40, 20]


def test_a_plan_spreads_a_small_call_and_gives_one_worker_all():
    assert plan_chunks([(1,), (2,)], num_workers=2, batch_size=16) == [[0], [1]]
    assert plan_chunks([(1,), (2,)], num_workers=1, batch_size=1) == [[0, 1]]
    assert plan_chunks([], num_workers=2, batch_size=16) == []


def test_results_keep_the_order_and_both_actors_work(open_pool):
    pool = open_pool(partial(Echo, pause_s=0.05))
    assert isinstance(pool, Generator)
    pool.wait_until_ready()
    prompts = [prompt(*range(i % 7), i) for i in range(60)]
    answers = pool.generate(prompts, Sampling())
    assert texts(answers) == expected(prompts)
    assert len({g.logp for g in answers}) == 2
    scores = pool.score(prompts, [(i, 1) for i in range(60)])
    assert [s.logp for s in scores] == [
        -float(sum(p.token_ids) + i + 1) for i, p in enumerate(prompts)
    ]
    assert pool.generate([], Sampling()) == []
    assert pool.tokens.num_requests == 120
    assert pool.tokens.spent == 2 * sum(len(p.token_ids) for p in prompts) + 60 + 120


def test_a_slow_actor_does_not_hold_the_others(open_pool, tmp_path):
    class OneIsSlow(Echo):
        def __init__(self, folder) -> None:
            super().__init__(folder)
            try:
                (folder / "slow").touch(exist_ok=False)
                self._pause_s = 3.0
            except FileExistsError:
                self._pause_s = 0.02

    pool = open_pool(OneIsSlow)
    pool.wait_until_ready()
    answers = pool.generate([prompt(i) for i in range(64)], Sampling())
    counts = sorted(sum(g.logp == pid for g in answers) for pid in {g.logp for g in answers})
    assert counts[-1] >= 48  # the slow one had its first chunk, at most a second


def test_a_killed_actor_is_replaced_and_its_chunk_sent_again(open_pool, tmp_path):
    pool = open_pool()
    prompts = [prompt(i) for i in range(30)] + [prompt(DIE_ONCE)]
    assert texts(pool.generate(prompts, Sampling())) == expected(prompts)
    assert (tmp_path / "died").exists()
    assert texts(pool.generate(prompts, Sampling())) == expected(prompts)


def test_kill_9_from_outside_in_the_middle_of_a_batch(open_pool, tmp_path):
    import threading

    pool = open_pool(partial(Echo, pause_s=0.3))
    pool.wait_until_ready()
    pids = [int(path.name.split("-")[1]) for path in tmp_path.glob("started-*")]
    timer = threading.Timer(0.5, os.kill, (pids[0], signal.SIGKILL))
    timer.start()
    prompts = [prompt(i, 1) for i in range(40)]
    assert texts(pool.generate(prompts, Sampling())) == expected(prompts)
    timer.join()
    pool.wait_until_ready()
    assert len(list(tmp_path.glob("started-*"))) == 3


def test_a_prompt_that_kills_every_engine_is_given_up_and_the_others_are_answered(open_pool):
    pool = open_pool()
    prompts = [prompt(1), prompt(DIE, 4), prompt(2), prompt(3)]
    results = pool.generate(prompts, Sampling())
    assert texts([results[i] for i in (0, 2, 3)]) == ["1", "2", "3"]
    assert isinstance(results[1], GenerationError)
    assert re.search(r"generator-\w+-\d died on generate of 1 prompt, .*\(10002,", str(results[1]))
    assert pool.tokens.num_requests == 4
    assert pool.tokens.spent == 3 * 2
    started = time.monotonic()
    again = pool.score([prompt(DIE, 4), prompt(5)], [(1,), (1,)])  # refused, not tried
    assert str(again[0]) == str(results[1])
    assert again[1].logp == -6.0
    assert time.monotonic() - started < 60


def test_a_question_that_kills_every_engine_costs_few_of_them(open_pool):
    """Seven prompts of one question and nothing else: no answer shows that the pool works."""
    pool = open_pool(max_restarts=8)
    asked = [replace(prompt(DIE, i), question="which?") for i in range(7)]
    results = pool.generate(asked, Sampling())
    assert all(isinstance(result, GenerationError) for result in results)
    assert sum("2 other prompts of the question 'which?'" in str(r) for r in results) >= 4
    assert texts(pool.generate([prompt(1)], Sampling())) == ["1"]


def test_a_prompt_that_hangs_is_given_up_and_its_actor_comes_back(open_pool):
    pool = open_pool(num_actors=1, request_timeout_s=2)
    pool.wait_until_ready()
    hung, fine = pool.generate([prompt(HANG), prompt(4)], Sampling())
    assert isinstance(hung, GeneratorTimeoutError)
    assert re.search(r"generator-\w+-0 did not answer.*request_timeout_s = 2 s", str(hung))
    assert fine.text == "4"
    assert texts(pool.generate([prompt(5)], Sampling())) == ["5"]


def test_a_prompt_that_an_engine_fails_on_is_given_up(open_pool):
    failed, fine = open_pool().generate([prompt(RAISE), prompt(6)], Sampling())
    assert isinstance(failed, GenerationError)
    assert re.search(r"failed on generate of .*KeyError: 'no such thing'", str(failed))
    assert fine.text == "6"


def test_engines_that_answer_nothing_end_the_call(open_pool):
    prompts = [prompt(RAISE, i) for i in range(20)]
    with pytest.raises(GenerationError, match=r"KeyError.*the engines, not a prompt, are at fault"):
        open_pool().generate(prompts, Sampling())


def test_exhausted_restarts_name_the_actor_and_what_was_asked(open_pool):
    pool = open_pool(num_actors=1, max_restarts=0)
    with pytest.raises(
        GenerationError, match=r"generator-\w+-0 died on score of 1 prompt, .*restarted too often"
    ):
        pool.score([prompt(DIE)], [(1,)])


def test_the_others_go_on_without_an_actor_that_does_not_come_back(open_pool, caplog):
    pool = open_pool(partial(Echo, pause_s=0.1), max_restarts=0)
    pool.wait_until_ready()
    prompts = [prompt(i) for i in range(30)] + [prompt(DIE_ONCE)]
    assert texts(pool.generate(prompts, Sampling())) == expected(prompts)
    assert "continuing with the other actors" in caplog.text
    answers = pool.generate(prompts, Sampling())
    assert len({g.logp for g in answers}) == 1  # one process


def test_an_actor_without_resources_ends_in_a_timeout_that_names_them(open_pool):
    pool = open_pool(num_actors=1, cpus_per_actor=64, start_timeout_s=2)
    with pytest.raises(GeneratorTimeoutError, match=r"asks for 64 CPUs.*2 CPUs"):
        pool.wait_until_ready()


def test_what_keeps_an_engine_from_starting_reaches_the_caller_unchanged(open_pool):
    pool = open_pool(refuse)
    with pytest.raises(SetupError, match=r"^there is no compiler; install g"):
        pool.generate([prompt(1)], Sampling())


def test_another_model_on_a_node_is_refused(open_pool):
    class Other(Echo):
        identity = "something else"

    with pytest.raises(GenerationError, match="something else where echo was expected"):
        open_pool(Other).wait_until_ready()


def test_clients_in_other_processes_use_the_same_actors(open_pool, tmp_path):
    pool = open_pool()
    pool.wait_until_ready()
    cached = CachedGenerator(pool, tmp_path / "cache")

    @ray.remote(num_cpus=0.5)
    def ask(generator: Generator, number: int) -> list[str]:
        found = generator.generate([prompt(number), prompt(7)], Sampling())
        generator.close()
        return [g.text for g in found]

    refs = [ask.remote(pool.client(), 1), ask.remote(pool, 2), ask.remote(cached, 3)]
    assert ray.get(refs, timeout=120) == [["1", "7"], ["2", "7"], ["3", "7"]]
    assert len(list(tmp_path.glob("started-*"))) == 2
    assert texts(pool.generate([prompt(4)], Sampling())) == ["4"]


def test_actors_see_their_environment(open_pool):
    class Telling(Echo):
        def generate(self, prompts, sampling):
            names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ECHO")
            return [Generation(",".join(os.environ[n] for n in names), 0.0, 1, 1) for _ in prompts]

    pool = open_pool(Telling, threads_per_actor=3, cpus_per_actor=0.5)
    assert texts(pool.generate([prompt(1)], Sampling())) == ["3,PASSIVE,1"]


def test_a_closed_pool_says_so_and_frees_its_actors(open_pool):
    pool = open_pool(cpus_per_actor=1)
    pool.wait_until_ready()
    pool.close()
    with pytest.raises(GenerationError, match="closed"):
        pool.generate([prompt(1)], Sampling())
    second = open_pool(cpus_per_actor=1)
    assert texts(second.generate([prompt(1)], Sampling())) == ["1"]


def test_a_client_pickles_small(open_pool):
    client = open_pool().client()
    assert len(cloudpickle.dumps(client)) < 20_000
