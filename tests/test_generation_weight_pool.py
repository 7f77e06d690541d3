"""Weights pushed to a pool: every result is of the wanted set, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, GeneratorTimeoutError
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.identity import pushed_identity
from rlrag.generation.pool.client import PoolClient
from rlrag.generation.pool.start import GeneratorPool
from rlrag.generation.pool.weight_store import (
    StoredWeights,
    WeightsTag,
    WeightStore,
    fetch_tensors,
    store_weights,
)
from rlrag.generation.protocol import Generator, Sampling, TokenCount
from rlrag.generation.weights import (
    GeneratorWeights,
    adapter_names,
    check_adapter,
    check_shapes,
    pack_weights,
)
from rlrag.records import Generation, Prompt, Score

PROMPTS = [Prompt((i,), f"prompt {i}", 0) for i in range(12)]
HANG = -1.0

pytestmark = pytest.mark.usefixtures("cluster")


class Scaled:
    """Scores with the one number that it holds as weights."""

    def __init__(self, folder: Path) -> None:
        self.identity, self.version = "scaled", 0
        self.tokens = TokenCount()
        self._factor = 0.0
        (folder / f"started-{os.getpid()}").touch()

    def check_weights(self, shapes, adapter=False) -> None:
        if adapter:
            check_adapter({"factor.weight": (1, 1)}, shapes)
        else:
            check_shapes({"factor": (1,)}, shapes, optional={"filler": shapes.get("filler", ())})

    def load_weights(self, weights) -> None:
        if weights.is_adapter:
            down, up = (weights.tensors[name] for name in adapter_names("factor.weight"))
            factor = weights.adapter_scale * float(up @ down)
        else:
            factor = float(weights.tensors["factor"][0])
        if factor == HANG:
            time.sleep(600)
        self._factor = factor
        self.identity = pushed_identity("scaled", weights.digest)
        self.version = weights.version

    def generate(self, prompts, sampling) -> list[Generation]:
        time.sleep(0.01)
        return [Generation(f"{self._factor:g}", -1.0, 1, 1, self.version) for _ in prompts]

    def score(self, prompts, answers) -> list[Score]:
        time.sleep(0.01)
        return [Score(self._factor, 1, 1, self.version) for _ in prompts]

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def open_pool(tmp_path):
    pools = []

    def open_it(make=Scaled, **changes) -> GeneratorPool:
        config = GeneratorConfig(**{"num_actors": 2, "batch_size": 2, **changes})
        pools.append(GeneratorPool(config, partial(make, tmp_path), "scaled", {}))
        return pools[-1]

    yield open_it
    for pool in pools:
        pool.close()


def weights(version: int, factor: float | None = None) -> GeneratorWeights:
    tensor = torch.tensor([float(version) if factor is None else factor])
    return pack_weights({"factor": tensor}, version)


def results(generator: Generator) -> set[tuple[int, str]]:
    """Version and content of everything that a generation and a score of 12 prompts return."""
    answers = generator.generate(PROMPTS, Sampling())
    scores = generator.score(PROMPTS, [(1,)] * len(PROMPTS))
    return {(g.version, g.text) for g in answers} | {(s.version, f"{s.logp:g}") for s in scores}


def pids(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob("started-*")]


def test_after_a_push_every_result_is_of_the_new_set_and_no_actor_restarted(open_pool, tmp_path):
    pool = open_pool()
    assert results(pool) == {(0, "0")}
    assert (pool.version, pool.identity) == (0, "scaled")
    for version in (1, 2, 7):
        pushed = weights(version)
        pool.load_weights(pushed)
        assert results(pool) == {(version, str(version))}
        assert (pool.version, pool.identity) == (version, pushed_identity("scaled", pushed.digest))
    assert len(pids(tmp_path)) == 2


def test_a_restarted_actor_serves_the_newest_set(open_pool, tmp_path):
    pool = open_pool()
    pool.load_weights(weights(1))
    pool.load_weights(weights(2))
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert results(pool) == {(2, "2")}
    pool.wait_until_ready()
    assert len(pids(tmp_path)) == 4
    assert results(pool) == {(2, "2")}


def adapter(version: int, scale: float, num_inputs: int = 1) -> GeneratorWeights:
    """An adapter of rank 2 that makes the factor 11 times the scale."""
    down, up = adapter_names("factor.weight")
    tensors = {
        down: torch.tensor([[1.0], [4.0]]).expand(2, num_inputs),
        up: torch.tensor([[3.0, 2.0]]),
    }
    return pack_weights(tensors, version, scale)


def test_an_adapter_travels_with_its_scale_and_comes_back_after_a_restart(open_pool, tmp_path):
    pool = open_pool()
    pool.load_weights(weights(1))
    for version, scale in ((2, 0.5), (3, 2.0)):
        pushed = adapter(version, scale)
        pool.load_weights(pushed)
        assert results(pool) == {(version, f"{11 * scale:g}")}
        assert pool.identity == pushed_identity("scaled", pushed.digest)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert results(pool) == {(3, "22")}
    with pytest.raises(GenerationError, match=r"'factor\.lora_A\.weight' is \(2, 2\)"):
        pool.load_weights(adapter(4, 1.0, num_inputs=2))
    assert (results(pool), pool.version) == ({(3, "22")}, 3)
    pool.load_weights(weights(5))
    assert results(pool) == {(5, "5")}


def test_the_set_outlives_the_process_that_pushed_it(open_pool, tmp_path):
    pool = open_pool()

    @ray.remote(num_cpus=0.5, max_retries=0)
    def learn(client: PoolClient, pushed: GeneratorWeights) -> None:
        client.load_weights(pushed)
        client.generate(PROMPTS, Sampling())
        os.kill(os.getpid(), signal.SIGKILL)

    pushed = pack_weights({"factor": torch.tensor([3.0]), "filler": torch.ones(500_000)}, 3)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(learn.remote(pool.client(), pushed), timeout=120)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    pool.expect_weights(3, pushed.digest)
    pool.wait_until_ready()
    assert results(pool) == {(3, "3")}
    assert len(pids(tmp_path)) == 3


def test_a_client_never_gets_results_of_another_set_than_it_expects(open_pool):
    pool = open_pool()
    behind, ahead = pool.client(), pool.client()
    pool.load_weights(weights(1))
    behind.expect_weights(1, weights(1).digest)
    assert results(behind) == {(1, "1")}
    ahead.expect_weights(2, weights(2).digest)
    assert ahead.identity == pushed_identity("scaled", weights(2).digest)
    found: list[set] = []
    early = threading.Thread(target=lambda: found.append(results(ahead)))
    early.start()  # waits for the push
    time.sleep(0.5)
    assert not found
    pool.load_weights(weights(2))
    early.join(60)
    assert found == [{(2, "2")}]
    with pytest.raises(
        GenerationError, match=r"already has weights of version 2 .*expects version 1"
    ):
        results(behind)
    behind.expect_weights(2, weights(2).digest)
    assert results(behind) == {(2, "2")}


def test_a_set_that_nobody_pushes_ends_in_a_timeout_that_names_it(open_pool):
    pool = open_pool()
    pool.load_weights(weights(1))
    client = pool.client()
    client._config = client._config.model_copy(update={"start_timeout_s": 5.0})
    client.expect_weights(2, "beef")
    with pytest.raises(
        GeneratorTimeoutError, match=r"holds weights of version 1 .*version 2 \(beef\).* 5 s"
    ):
        results(client)
    assert results(pool) == {(1, "1")}


def test_one_version_with_other_tensors_is_another_set(open_pool):
    pool = open_pool()
    pool.load_weights(weights(4, factor=1.0))
    pool.load_weights(weights(4, factor=2.0))  # a learner that was restarted took step 4 again
    assert results(pool) == {(4, "2")}


def test_tensors_that_do_not_fit_are_refused_and_the_old_set_survives_restarts(open_pool, tmp_path):
    pool = open_pool()
    pool.load_weights(weights(1))
    with pytest.raises(GenerationError, match=r"'factor' is \(2,\), not \(1,\)"):
        pool.load_weights(pack_weights({"factor": torch.ones(2)}, 2))
    assert (results(pool), pool.version) == ({(1, "1")}, 1)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert results(pool) == {(1, "1")}


def test_an_engine_that_cannot_check_weights_is_refused_before_the_old_set_is_lost(open_pool):
    class Unchecked(Scaled):
        check_weights = None

    pool = open_pool(Unchecked)
    with pytest.raises(GenerationError, match="Unchecked has no check_weights"):
        pool.load_weights(weights(1))
    assert results(pool) == {(0, "0")}


def test_an_engine_that_hangs_while_it_loads_is_named_and_the_pool_recovers(open_pool):
    pool = open_pool(num_actors=1)
    pool.wait_until_ready()
    pool._config = pool._config.model_copy(update={"start_timeout_s": 5.0})
    with pytest.raises(GeneratorTimeoutError, match=r"generator-\w+-0 was not ready.* = 5 s"):
        pool.load_weights(weights(1, factor=HANG))
    pool._config = pool._config.model_copy(update={"start_timeout_s": 300.0})
    pool.load_weights(weights(2))
    assert results(pool) == {(2, "2")}


def test_an_engine_that_breaks_while_it_loads_never_answers_with_what_it_has(open_pool, tmp_path):
    class Breaking(Scaled):
        def load_weights(self, pushed):
            self._factor = 99.0
            if not (tmp_path / "broke").exists():
                (tmp_path / "broke").touch()
                raise GenerationError("the engine broke in the middle")
            super().load_weights(pushed)

    pool = open_pool(Breaking, num_actors=1)
    with pytest.raises(GenerationError, match="broke in the middle"):
        pool.load_weights(weights(1))
    assert results(pool) == {(1, "1")}  # from a fresh engine


def test_an_engine_that_does_not_tag_its_results_is_found_out(open_pool):
    class Untagged(Scaled):
        def score(self, prompts, answers):
            return [Score(self._factor, 1, 1) for _ in prompts]

    pool = open_pool(Untagged)
    pool.load_weights(weights(1))
    with pytest.raises(GenerationError, match=r"results of version \[0\] but version 1"):
        results(pool)


@pytest.mark.parametrize("cached", [False, True])
def test_20_pushes_under_load_from_two_threads(open_pool, tmp_path, cached):
    pool = open_pool()
    generator = CachedGenerator(pool, tmp_path / "cache") if cached else pool
    stop = threading.Event()

    def load() -> list[set[tuple[int, str]]]:
        found = []
        while not stop.is_set():
            scores = generator.score(PROMPTS, [(1,)] * len(PROMPTS))
            found.append({(s.version, f"{s.logp:g}") for s in scores})
        return found

    with ThreadPoolExecutor(2) as threads:
        loads = [threads.submit(load) for _ in range(2)]
        try:
            for version in range(1, 21):
                generator.load_weights(weights(version))
                assert results(generator) == {(version, str(version))}
        finally:
            stop.set()
    found = [seen for future in loads for seen in future.result()]
    assert all(len(seen) == 1 for seen in found)  # one call, one set
    assert all(str(version) == text for seen in found for version, text in seen)


@pytest.fixture
def store():
    actor = ray.remote(num_cpus=0)(WeightStore).remote()
    yield actor
    ray.kill(actor)


def test_tensors_come_out_of_the_store_bit_by_bit(store):
    torch.manual_seed(0)
    noise = torch.randn(20, 30)
    formats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {
        **{str(dtype): noise.to(dtype) for dtype in formats},
        "integers": torch.arange(7),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "transposed": noise.T,
    }
    tag = store_weights(store, GeneratorWeights(3, "abc", tensors))
    assert tag == WeightsTag(3, "abc")
    stored = ray.get(store.newest.remote(), timeout=30)
    assert stored.tag == tag
    fetched = fetch_tensors(store, stored, timeout_s=30)
    assert list(fetched) == list(tensors)
    for name, tensor in tensors.items():
        assert fetched[name].dtype == tensor.dtype
        assert torch.equal(fetched[name], tensor)


def test_the_store_serves_what_a_process_put_that_has_ended(store):
    @ray.remote(num_cpus=0.5, max_retries=0)
    def push() -> None:
        store_weights(store, GeneratorWeights(1, "a", {"w": torch.arange(500_000)}))
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(push.remote(), timeout=120)
    stored = ray.get(store.newest.remote(), timeout=30)
    # Whether the dead process's own object can still be read depends on who read it before.
    copied = ray.get(store.copy.remote(stored.tag, 0), timeout=30)
    assert np.array_equal(copied.data.view(np.int64), np.arange(500_000))
    for _ in range(2):
        fetched = fetch_tensors(store, stored, timeout_s=30)
        assert torch.equal(fetched["w"], torch.arange(500_000))


def test_a_set_on_its_way_is_not_handed_out(store):
    first, second = WeightsTag(1, "a"), WeightsTag(2, "b")
    for tag in (first, second):
        ray.get(store.begin.remote(tag))
        assert ray.get(store.newest.remote()) is None
    ray.get(store.finish.remote(StoredWeights(second, ())))
    assert ray.get(store.newest.remote()).tag == second


def test_two_processes_that_push_to_one_store_are_told(store):
    ray.get(store.begin.remote(WeightsTag(1, "a")))
    with pytest.raises(GenerationError, match=r"asked about .*1 \(b\) but has .*1 \(a\)"):
        ray.get(store.finish.remote(StoredWeights(WeightsTag(1, "b"), ())))


def test_a_store_that_died_is_named(store):
    ray.kill(store)
    with pytest.raises(GenerationError, match="weight store could not begin a set"):
        store_weights(store, weights(1))
