"""Slow and lost actors of a pool on a clock that only the simulation moves."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass, field

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError, RayTaskError

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError
from rlrag.generation.pool import actor as engine_actor
from rlrag.generation.pool import calls as pool_calls
from rlrag.generation.pool import dispatch
from rlrag.generation.pool.actor import Actors, EngineActor, Member, Standing
from rlrag.generation.pool.client import PoolClient
from rlrag.generation.pool.weight_store import WeightsTag
from rlrag.generation.protocol import Sampling
from rlrag.generation.waits import current_waits
from rlrag.records import Generation, Prompt

DIE, RAISE, HANG, REFUSE = 9001, 9002, 9003, 9004
S_PER_TOKEN = 0.01
TOKENS = 100


class Died(Exception):
    """The process of an actor ends."""


@dataclass
class Clock:
    """Stands in for the module `time`."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(eq=False)
class Ref:
    """An answer and when it comes."""

    done_at: float
    result: object


class Engine:
    """Echoes, at the speed of its actor."""

    identity, version = "echo", 0

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def generate(self, prompts, sampling) -> list[Generation | GenerationError]:
        tokens = {token for prompt in prompts for token in prompt.token_ids}
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._handle.clock.sleep(num_tokens * S_PER_TOKEN * self._handle.slowdown)
        if HANG in tokens:
            self._handle.clock.sleep(math.inf)
        if DIE in tokens or self._handle.dies:
            raise Died
        if RAISE in tokens:
            raise KeyError("no such thing")
        return [
            GenerationError("refused")
            if REFUSE in p.token_ids
            else Generation(p.text, -1.0, 1, len(p.token_ids), self.version)
            for p in prompts
        ]

    def close(self) -> None:
        """Nothing to free."""


class WithoutStore(EngineActor):
    """Takes any weights at once."""

    def start(self, wanted: WeightsTag) -> Standing:
        self._open().version = wanted.version
        self._held = wanted
        return Standing("echo", wanted, self._process)


class Handle:
    """An actor in this process: what it is asked is done at once, on a clock that runs ahead."""

    def __init__(self, clock: Clock, slowdown: float) -> None:
        self.clock, self.slowdown, self.dies = clock, slowdown, False
        self.last_word: RayError = ActorUnavailableError("restarting", None)
        self.free_at = clock.now
        self.kill_takes_s = 0.0
        self.ends_at = math.inf
        self.sizes: list[int] = []
        self.pushed: list[WeightsTag] = []
        self.num_restarts = 0
        self.pending: list[Ref] = []
        self._renew()

    def _renew(self) -> None:
        self._actor = WithoutStore(lambda: Engine(self), "store", 1.0)

    def ask(self, method: str, *args) -> Ref:
        if self.clock.now >= self.ends_at:
            self._end()
        now, self.clock.now = self.clock.now, max(self.clock.now, self.free_at)
        try:
            result = getattr(self._actor, method)(*args)
        except Died:
            result = self.last_word
            self._renew()
        except Exception as error:  # noqa: BLE001 - as Ray does
            result = RayTaskError(method, "", error)
        ref = Ref(self.clock.now, result)
        if ref.done_at > self.ends_at:
            ref = Ref(self.ends_at, ActorUnavailableError("killed", None))
        self.free_at, self.clock.now = self.clock.now, now
        self.pending.append(ref)
        return ref

    def restart(self) -> None:
        self.num_restarts += 1
        self.ends_at = self.clock.now + self.kill_takes_s
        for ref in self.pending:
            if ref.done_at > self.ends_at:
                ref.done_at, ref.result = self.ends_at, ActorUnavailableError("killed", None)
        if not self.kill_takes_s:
            self._end()

    def _end(self) -> None:
        self.free_at, self.ends_at = self.clock.now, math.inf
        self._renew()

    @property
    def start(self):
        def remote(wanted):
            self.pushed.append(wanted)
            return self.ask("start", wanted)

        return types.SimpleNamespace(remote=remote)

    @property
    def generate(self):
        def remote(wanted, prompts, sampling):
            self.sizes.append(len(prompts))
            return self.ask("generate", wanted, prompts, sampling)

        return types.SimpleNamespace(remote=remote)


@dataclass
class SimulatedRay:
    """The part of Ray that a client uses."""

    clock: Clock
    interrupted: bool = False

    def wait(self, refs, num_returns, timeout, fetch_local=True):
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt
        first = min(ref.done_at for ref in refs)
        self.clock.now = max(self.clock.now, min(first, self.clock.now + timeout))
        ready = [ref for ref in refs if ref.done_at <= self.clock.now][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref, timeout):
        if isinstance(ref.result, RayError):
            raise ref.result
        return ref.result

    def kill(self, handle, no_restart):
        assert not no_restart
        handle.restart()


@dataclass
class Pool:
    """A client and the actors behind it."""

    clock: Clock
    ray: SimulatedRay
    client: PoolClient
    handles: list[Handle] = field(default_factory=list)

    def ask(self, prompts: list[Prompt]) -> tuple[float, list[list[int]]]:
        """Seconds of a call that echoes, and the sizes of the chunks of each actor."""
        began, before = self.clock.now, [len(handle.sizes) for handle in self.handles]
        results = self.client.generate(prompts, Sampling())
        assert [result.text for result in results] == [prompt.text for prompt in prompts]
        new = [h.sizes[n:] for h, n in zip(self.handles, before, strict=True)]
        return self.clock.now - began, new


@pytest.fixture
def open_pool(monkeypatch):
    clock = Clock()
    simulated = SimulatedRay(clock)
    monkeypatch.setattr(dispatch, "ray", simulated)
    for module in (dispatch, engine_actor):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(pool_calls.time, "monotonic", clock.monotonic)

    def open_it(*slowdowns: float, **changes) -> Pool:
        config = GeneratorConfig(num_actors=len(slowdowns), **{"batch_size": 2, **changes})
        handles = [Handle(clock, slowdown) for slowdown in slowdowns]
        members = [Member(f"actor-{n}", handle) for n, handle in enumerate(handles)]
        client = PoolClient(Actors(tuple(members), None, "echo"), config)
        client.wait_until_ready()
        return Pool(clock, simulated, client, handles)

    return open_it


def prompts(number: int, first: int = 0, last: int | None = None) -> list[Prompt]:
    """Prompts that take an actor a second each; the first may have a token that means something."""
    found = [Prompt((i,) * TOKENS, f"prompt {i}", 0) for i in range(first, first + number)]
    if last is not None:
        found[-1] = Prompt((*found[-1].token_ids[1:], last), found[-1].text, 0)
    return found


@pytest.mark.parametrize("num_actors", [2, 4, 8])
@pytest.mark.parametrize("per_actor", [2, 16, 64])
def test_equal_actors_do_nothing_twice(open_pool, num_actors, per_actor):
    pool = open_pool(*[1.0] * num_actors)
    number = num_actors * per_actor
    for call in range(3):
        _, sizes = pool.ask(prompts(number, first=1000 * call))
        assert sum(map(sum, sizes)) == number


@pytest.mark.parametrize("slowdown", [5.0, 1000.0])
@pytest.mark.parametrize(("num_actors", "bound"), [(2, 2.05), (4, 1.75), (8, 1.65)])
def test_one_slow_actor_costs_about_its_own_share(open_pool, slowdown, num_actors, bound):
    pool = open_pool(slowdown, *[1.0] * (num_actors - 1), request_timeout_s=100_000)
    for call in range(4):
        seconds, sizes = pool.ask(prompts(64 * num_actors, first=1000 * call))
        assert seconds < 64 * bound
        assert sum(sizes[0]) < 64
    assert pool.client.tokens.spent == 4 * 64 * num_actors * (TOKENS + 1)
    assert [handle.num_restarts for handle in pool.handles] == [0] * num_actors


def test_a_late_chunk_is_repeated_once_and_the_first_answer_counts(open_pool, caplog):
    pool = open_pool(1.0, 1.0, 50.0)
    seconds, sizes = pool.ask(prompts(30))
    (slow_size,) = sizes[2]
    assert sum(map(sum, sizes)) == 30 + slow_size
    assert seconds < slow_size * 50
    assert caplog.text.count("is late with") == 1
    assert current_waits() == []
    _, sizes = pool.ask(prompts(30, first=100))  # it is behind, and not asked
    assert sizes[2] == []
    pool.clock.sleep(1000)
    _, sizes = pool.ask(prompts(30, first=200))
    assert sizes[2], "it is free again"


def test_a_free_actor_waits_until_a_chunk_is_late(open_pool):
    pool = open_pool(5.0, 1.0, 1.0, 1.0)
    seconds, sizes = pool.ask(prompts(8))  # chunks of two prompts, two seconds each
    assert seconds == pytest.approx(2 * 2.0 + 2.0)
    assert sorted(sizes) == [[2], [2], [2], [2, 2]]


def test_a_late_chunk_waits_while_others_have_not_been_given_out(open_pool):
    pool = open_pool(1.0, 1.0, 50.0)
    _, sizes = pool.ask(prompts(90))
    (slow_size,) = sizes[2]
    repeated = max(sizes[:2], key=lambda given: slow_size in given[1:])
    assert repeated[-1] == slow_size, "the last of all"


def test_an_actor_at_two_thirds_of_the_speed_shares_everything(open_pool):
    pool = open_pool(1.5, 1.0, 1.0)
    for call in range(3):
        _, sizes = pool.ask(prompts(60, first=100 * call))
        assert sum(map(sum, sizes)) == 60
        assert sizes[0]


def test_what_waits_behind_another_client_is_repeated(open_pool):
    pool = open_pool(1.0, 1.0, 1.0)
    pool.ask(prompts(30))
    other = pool.client.client()
    pool.handles[0].ask("generate", WeightsTag(), prompts(80, first=500), Sampling())
    _, sizes = pool.ask(prompts(30, first=100))
    assert sum(map(sum, sizes)) == 30 + sum(sizes[0])
    assert [g.text for g in other.generate(prompts(2), Sampling())] == ["prompt 0", "prompt 1"]


def test_a_pool_of_one_asks_for_nothing_twice(open_pool):
    pool = open_pool(1.0, request_timeout_s=10_000)
    pool.ask(prompts(400))
    pool.handles[0].slowdown = 8.0
    _, (sizes,) = pool.ask(prompts(400, first=1000))
    assert sum(sizes) == 400
    assert pool.handles[0].num_restarts == 0


def test_what_an_actor_loses_after_another_answered_is_not_charged(open_pool, caplog):
    pool = open_pool(1.0, 1.0, 30.0)
    pool.handles[2].dies = True
    pool.ask(prompts(30))
    pool.handles[2].dies, pool.handles[2].slowdown = False, 1.0
    for call in range(1, 4):
        pool.clock.sleep(1000)
        _, sizes = pool.ask(prompts(30, first=100 * call))
    assert "sent again" not in caplog.text
    assert sizes[2], "it was started anew and is used"
    assert pool.handles[2].num_restarts == 0


def test_what_a_late_actor_loses_is_sent_once_and_not_charged(open_pool, caplog):
    pool = open_pool(1.0, 1.0, 3.5)
    pool.handles[2].dies = True  # while another actor works on its late chunk
    _, sizes = pool.ask(prompts(30))
    assert sum(map(sum, sizes)) == 30 + sizes[2][0]
    assert "another actor has the same prompts" in caplog.text
    assert "sent again" not in caplog.text


def test_an_actor_that_is_to_end_is_given_nothing_before_it_has_ended(open_pool, caplog):
    pool = open_pool(1.0, request_timeout_s=10_000)
    pool.handles[0].kill_takes_s = 0.5  # half of what a prompt takes
    results = pool.client.generate(prompts(8, last=RAISE), Sampling())
    assert [isinstance(r, GenerationError) for r in results] == [False] * 7 + [True]
    assert pool.handles[0].num_restarts == 2, "with the others and alone"
    assert "died" not in caplog.text


@pytest.mark.parametrize("end", [DIE, RAISE, HANG])
def test_a_prompt_that_ends_every_engine_is_given_up_all_the_same(open_pool, end):
    pool = open_pool(1.0, 1.0, 1.0, request_timeout_s=200)
    asked = prompts(30, last=end)
    results = pool.client.generate(asked, Sampling())
    assert [r.text for r in results[:-1]] == [p.text for p in asked[:-1]]
    assert isinstance(results[-1], GenerationError)
    pool.clock.sleep(1000)
    seconds, _ = pool.ask(prompts(30, first=100))
    assert seconds < 30


def test_an_actor_that_ray_ended_for_its_memory_is_gone_as_any_other(open_pool, caplog):
    pool = open_pool(1.0, 1.0)
    for handle in pool.handles:
        handle.last_word = OutOfMemoryError("the node runs low on memory")
    pool.handles[1].dies = True
    _, sizes = pool.ask(prompts(30))
    assert sum(sizes[0]) == 30
    assert "runs low on memory; continuing with the other actors" in caplog.text
    pool.handles[0].dies = True
    with pytest.raises(GenerationError, match=r"actor-0 died on .*too often.*low on memory"):
        pool.client.generate(prompts(30, first=100), Sampling())


def test_an_actor_that_is_behind_is_restarted_at_its_deadline(open_pool, caplog):
    pool = open_pool(1.0, 1.0, 1e6, request_timeout_s=100)
    pool.ask(prompts(30))
    pool.clock.sleep(1000)
    pool.handles[2].slowdown = 1.0
    _, sizes = pool.ask(prompts(30, first=100))
    assert [handle.num_restarts for handle in pool.handles] == [0, 0, 1]
    assert sizes[2], "it is asked again"
    assert "prompts of an earlier call" in caplog.text
    assert "sent again" not in caplog.text
    _, sizes = pool.ask(prompts(30, first=200))
    assert sizes[2]


def test_answers_that_came_between_two_calls_are_not_late(open_pool):
    pool = open_pool(1.0, 1.0, 1.0, 20.0, 30.0, request_timeout_s=500)
    pool.ask(prompts(40))
    pool.clock.sleep(10_000)  # both answered long before their deadlines
    pool.ask(prompts(40, first=100))
    assert [handle.num_restarts for handle in pool.handles] == [0] * 5


def test_new_weights_do_not_wait_for_an_actor_that_is_behind(open_pool):
    pool = open_pool(1.0, 1.0, 100.0)
    pool.ask(prompts(30))
    began, tag = pool.clock.now, WeightsTag(1, "a")
    pool.client.expect_weights(1, "a")
    pool.client.wait_until_ready()
    assert pool.clock.now == began
    assert [tag in handle.pushed for handle in pool.handles] == [True, True, False]
    pool.clock.sleep(1000)
    pool.handles[2].slowdown = 1.0
    results = pool.client.generate(prompts(30, first=100), Sampling())
    assert {result.version for result in results} == {1}
    assert tag in pool.handles[2].pushed
    _, sizes = pool.ask(prompts(30, first=200))
    assert sizes[2]


def test_weights_wait_where_every_actor_is_behind(open_pool):
    pool = open_pool(1.0)
    pool.ray.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        pool.client.generate(prompts(4), Sampling())
    began = pool.clock.now
    pool.client.wait_until_ready()
    assert pool.clock.now == began + 4
    pool.ask(prompts(4))


def test_a_refused_prompt_gets_its_error_and_no_actor_is_restarted(open_pool):
    pool = open_pool(1.0, 1.0)
    results = pool.client.generate(prompts(10, last=REFUSE), Sampling())
    assert [isinstance(result, GenerationError) for result in results] == [False] * 9 + [True]
    assert [handle.num_restarts for handle in pool.handles] == [0, 0]
    assert sum(map(sum, (handle.sizes for handle in pool.handles))) == 10
