"""Ray actors that search shards of the passage vectors in parallel.

The vectors lie in one file that every node can read. An actor maps its part of it, so that its
pages fill the memory of the node that searches them and of no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from rlrag.errors import RetrievalError, RlragError
from rlrag.generation.pool.dispatch import ACTOR_ENDED
from rlrag.retrieval.dense.shards import ShardSource, VectorShard
from rlrag.retrieval.protocol import Hits

# An actor that dies more often than this does so for a reason that starting it again does not mend.
MAX_RESTARTS = 3
# One thread of FAISS; more shards use more cores.
CPUS = 1
# Of a search by all shards, the first of which builds their indexes.
TIMEOUT_S = 600
_TASK_RETRIES = 2


class ShardActor:
    """Holds one part; opens it when it is first asked, and again after a restart."""

    def __init__(self, source: ShardSource) -> None:
        self._source = source
        self._shard: VectorShard | None = None

    def search(self, vectors_BD: np.ndarray, k: int) -> Hits:
        """See `VectorShard.search`."""
        if self._shard is None:
            self._shard = VectorShard(self._source)
        return self._shard.search(vectors_BD, k)


class ShardActors:
    """Implements `Shards`. The actors are made by the first search and end with this object.

    Args:
        sources: One part an actor.
        cpus: Ray's reservation of an actor.
        timeout_s: Longest wait for the results of all parts.
    """

    def __init__(
        self, sources: Sequence[ShardSource], cpus: float = CPUS, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._sources = tuple(sources)
        self._cpus = cpus
        self._timeout_s = timeout_s
        self._actors: tuple[Any, ...] = ()

    def search(self, vectors_BD: np.ndarray, k: int) -> list[Hits]:
        """Each part's best rows; an actor that died is made anew and asked again.

        Raises:
            RetrievalError: naming the parts that failed for good, or that did not answer in time.
            IndexMismatchError, ConfigError: what keeps a part from being opened.
        """
        if not self._actors:
            self._actors = tuple(map(self._make, self._sources))
        shared = ray.put(vectors_BD)
        answers = [actor.search.remote(shared, k) for actor in self._actors]
        _, late = ray.wait(answers, num_returns=len(answers), timeout=self._timeout_s)
        if late:
            names = ", ".join(self._name(answers.index(answer)) for answer in late)
            raise RetrievalError(
                f"{names} did not answer within {self._timeout_s:g} s; each asks for "
                f"{self._cpus:g} CPUs of the cluster and may have to build its index first; free "
                "CPUs, or use more retrieval.num_shards, whose indexes are smaller"
            )
        return [self._result(number, answer) for number, answer in enumerate(answers)]

    def _make(self, source: ShardSource) -> Any:
        make = ray.remote(ShardActor).options(
            num_cpus=self._cpus,
            max_restarts=MAX_RESTARTS,
            max_task_retries=_TASK_RETRIES,
            # FAISS takes as many threads as this says; Ray would say 1 for less than two CPUs.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(self._cpus)))}},
        )
        return make.remote(source)

    def _result(self, number: int, answer: Any) -> Hits:
        try:
            hits: Hits = ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, RlragError):
                raise error.cause from error
            raise RetrievalError(f"{self._name(number)} failed: {error.cause!r}") from error
        except ACTOR_ENDED as error:
            raise RetrievalError(
                f"{self._name(number)} has ended {MAX_RESTARTS + 1} times (memory is the usual "
                f"cause); use more retrieval.num_shards, or look in Ray's logs: {error}"
            ) from error
        return hits

    def _name(self, number: int) -> str:
        source = self._sources[number]
        return f"the index of passages {source.first} to {source.end}"
