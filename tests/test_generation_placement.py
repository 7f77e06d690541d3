"""Which nodes of a Ray cluster the actors of a pool get, and what becomes of what they reserve."""

from __future__ import annotations

import time
from collections.abc import Iterator

import cloudpickle
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from rlrag.config import GeneratorConfig
from rlrag.errors import GeneratorTimeoutError
from rlrag.generation.pool.start import GeneratorPool
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.records import Generation, Prompt

NUM_CPUS = 4


class Where:
    """Answers with the node that it is on."""

    identity, version = "where", 0

    def __init__(self) -> None:
        self.tokens = TokenCount()

    def generate(self, prompts, sampling) -> list[Generation]:
        node = ray.get_runtime_context().get_node_id()
        return [Generation(node, 0.0, 1, len(p.token_ids)) for p in prompts]

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture(scope="module", autouse=True)
def two_nodes(request) -> Iterator[None]:
    cloudpickle.register_pickle_by_value(request.module)
    nodes = {"num_cpus": NUM_CPUS // 2, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args={**nodes, "include_dashboard": False})
    cluster.add_node(**nodes)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def wait_until_free() -> None:
    """Ray takes back what a pool held some time after it is told to."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != NUM_CPUS:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


@pytest.fixture
def open_pool():
    pools = []

    def open_it(**changes) -> GeneratorPool:
        wait_until_free()
        config = GeneratorConfig(cpus_per_actor=1, batch_size=1, **changes)
        pools.append(GeneratorPool(config, Where, "where", {}))
        return pools[-1]

    yield open_it
    for pool in pools:
        pool.close()


def groups(state: str) -> list[dict]:
    return [group for group in placement_group_table().values() if group["state"] == state]


@pytest.mark.parametrize(
    ("placement", "num_nodes"),
    [("spread", 2), ("strict_spread", 2), ("pack", 1), ("strict_pack", 1)],
)
def test_actors_are_placed_together(open_pool, placement, num_nodes):
    pool = open_pool(placement=placement, num_actors=2)
    pool.wait_until_ready()
    (group,) = groups("CREATED")
    assert group["strategy"] == placement.upper()
    assert list(group["bundles"].values()) == [{"CPU": 1.0}] * 2
    nodes = {group["bundles_to_node_id"][bundle] for bundle in group["bundles"]}
    assert len(nodes) == num_nodes
    answers = pool.generate([Prompt((i,), str(i), 0) for i in range(8)], Sampling())
    assert {answer.text for answer in answers} <= nodes
    pool.close()
    assert groups("CREATED") == []


def test_unset_nothing_is_reserved(open_pool):
    open_pool().wait_until_ready()
    assert groups("CREATED") == []


def test_more_nodes_than_there_are_end_in_an_error_that_says_so(open_pool):
    pool = open_pool(placement="strict_spread", num_actors=3, start_timeout_s=3)
    message = r"1 CPUs and 0 GPUs \(with 2 more, generator.placement = strict_spread\), and of the"
    with pytest.raises(GeneratorTimeoutError, match=message):
        pool.wait_until_ready()
