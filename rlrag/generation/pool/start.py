"""Starts and restarts the engine actors of a pool."""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlrag.config import GeneratorConfig
from rlrag.generation.pool.actor import Engine, EngineActor
from rlrag.generation.pool.client import Actors, Member, PoolClient
from rlrag.generation.pool.weight_store import WeightsTag, WeightStore
from rlrag.json_logs import log_file

logger = logging.getLogger(__name__)

MAX_RESTARTS = 10
"""Of a dead actor: some for prompts that kill it, few enough that a broken model ends the run."""


class GeneratorPool(PoolClient):
    """Makes the actors and owns them: they end with `close` or with this process.

    A pickled pool arrives as a client.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        engine: Engine,
        identity: str,
        environment: dict[str, str],
        logs: tuple[Path, str] | None = None,
        max_restarts: int = MAX_RESTARTS,
    ) -> None:
        """Ask Ray for the actors and return at once; engines load while the caller goes on.

        Args:
            config: Numbers of actors, their resources and waits.
            engine: Makes the generator inside an actor; must be picklable.
            identity: What that generator's `identity` will be.
            environment: Variables set before an actor's process starts, besides the thread count.
            logs: Directory for `generator-NUMBER.log`, and the name of the run that the lines
                bear; unset leaves what actors say to Ray's own logs.
            max_restarts: How often a dead actor is restarted; then the others go on without it.
        """
        variables = {
            "OMP_NUM_THREADS": str(config.threads_per_actor),
            # Threads that spin while they wait starve the other processes of the machine.
            "OMP_WAIT_POLICY": "PASSIVE",
            **environment,
        }
        make = ray.remote(
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor,
            max_restarts=max_restarts,
            max_task_retries=0,  # the pool sends again itself, and counts
            runtime_env={"env_vars": variables},
        )(EngineActor)
        pool = uuid.uuid4().hex[:6]
        store_name = f"weights-{pool}"
        make_store = ray.remote(num_cpus=0, max_restarts=max_restarts)(WeightStore)
        store = make_store.options(name=store_name).remote()
        self._group = _placement_group(config)
        members = []
        for number in range(config.num_actors):
            name = f"generator-{pool}-{number}"
            log = None
            if logs is not None:
                actor = f"generator-{number}"
                log = partial(log_file, logs[0] / f"{actor}.log", logs[1], actor)
            actor_class = make.options(name=name, scheduling_strategy=self._place(number))
            handle = actor_class.remote(engine, store_name, config.start_timeout_s, log)
            members.append(Member(name, handle))
        super().__init__(Actors(tuple(members), store, identity), config)
        for member in members:
            member.handle.start.remote(WeightsTag())

    def _place(self, number: int) -> PlacementGroupSchedulingStrategy | None:
        if self._group is None:
            return None
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)

    def close(self) -> None:
        """Kill the actors that this pool made, and give back what it reserved for them."""
        store = Member("the weight store", self._actors.store)
        for member in (*self._actors.members, store):
            try:
                ray.kill(member.handle)
            except RayError as error:
                logger.warning("%s could not be ended: %s", member.name, error)
        self._actors = replace(self._actors, members=())
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _placement_group(config: GeneratorConfig) -> PlacementGroup | None:
    """Reserve what the actors need together; Ray ends it with this process at the latest."""
    if config.placement is None:
        return None
    resources = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    bundle = {name: amount for name, amount in resources.items() if amount}
    return placement_group([bundle] * config.num_actors, strategy=config.placement.upper())
