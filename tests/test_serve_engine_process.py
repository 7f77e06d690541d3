"""An engine in a Ray actor: what it streams, who leaves, and what its death looks like."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, OverloadedError
from rlrag.generation.backends.engine_loop import EngineLoop
from rlrag.generation.backends.stepping import Update
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt
from rlrag.serving import engine_process
from rlrag.serving.engine_process import EngineClient, EngineProcess, open_engine_process

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

PATIENCE_S = 60.0
CONFIG = GeneratorConfig(
    backend="transformers",
    dtype="float32",
    batch_size=2,
    cpus_per_actor=0.5,
    start_timeout_s=240,
    request_timeout_s=120,
)
ENDLESS = Sampling(max_new_tokens=10**9)
PROMPTS = [Prompt(tuple(range(30, 30 + n)), f"prompt of {n}", 0) for n in (4, 9, 6)]


class Typist:
    """Writes one x a step to every request, as many as it may have."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._most: dict[str, int] = {}

    def begin(self, request_id: str, prompt: Prompt, sampling: Sampling) -> None:
        self._counts[request_id] = 0
        self._most[request_id] = sampling.max_new_tokens

    def step(self) -> list[tuple[str, Update]]:
        time.sleep(0.02)
        for name in self._counts:
            self._counts[name] += 1
        updates = [
            (name, Update("x", -0.5 * n, n, n == self._most[name]))
            for name, n in self._counts.items()
        ]
        for name, update in updates:
            if update.finished:
                self.abort(name)
        return updates

    def abort(self, request_id: str) -> None:
        self._counts.pop(request_id, None)


class TypistProcess(EngineProcess):
    """The actor around an engine whose answers are as long as one likes."""

    def _open(self) -> EngineLoop:
        return EngineLoop(Typist())


class OutOfMemory:
    """What an actor answers to anything once Ray has ended it for its node's memory."""

    def remote(self, *arguments: object) -> OutOfMemory:
        return self

    def future(self) -> Future[None]:
        answer: Future[None] = Future()
        answer.set_exception(OutOfMemoryError("the node runs low on memory"))
        return answer

    async def __anext__(self) -> object:
        raise OutOfMemoryError("the node runs low on memory")


@pytest.fixture(scope="module")
def typist(cluster, tmp_path_factory):
    """The last test ends its process."""
    import ray

    folder = tmp_path_factory.mktemp("typist")
    actor = ray.remote(TypistProcess).options(num_cpus=0.1).remote(CONFIG, folder, ())
    ray.get(actor.start.remote(), timeout=CONFIG.start_timeout_s)
    client = EngineClient(actor, "the typing engine", CONFIG.request_timeout_s)
    yield client
    client.close()


@pytest.fixture(scope="module")
def engine(cluster, model_dir: Path):
    client = open_engine_process(CONFIG, model_dir, ())
    yield client
    client.close()


async def read(
    engine: EngineClient, prompt: Prompt, sampling: Sampling, streamed: bool = False
) -> list[Update]:
    return [update async for update in engine.stream(prompt, sampling, streamed)]


async def unfinished_becomes(engine: EngineClient, wanted: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while await engine.num_unfinished() != wanted and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return await engine.num_unfinished() == wanted


def test_it_streams_what_the_generator_answers_here(engine, model_dir):
    sampling = Sampling(max_new_tokens=8)

    async def run() -> list[list[Update]]:
        return await asyncio.gather(*(read(engine, prompt, sampling, True) for prompt in PROMPTS))

    expected = TransformersGenerator(model_dir, "float32", "cpu").generate(PROMPTS, sampling)
    for (update,), answer in zip(asyncio.run(run()), expected, strict=True):
        assert (update.text, update.num_tokens) == (answer.text, answer.num_tokens)
        assert update.logp == pytest.approx(answer.logp, abs=1e-4)
        assert update.finished
    assert engine.failure() is None


def test_an_error_arrives_as_itself_and_the_engine_goes_on(engine):
    with pytest.raises(GenerationError, match="at most 2048"):
        asyncio.run(read(engine, PROMPTS[0], Sampling(max_new_tokens=2045)))
    assert engine.failure() is None
    assert len(asyncio.run(read(engine, PROMPTS[0], Sampling(max_new_tokens=2)))) == 1


def test_an_answer_that_is_not_streamed_comes_in_one_update(typist):
    async def run() -> tuple[list[Update], list[Update]]:
        sampling = Sampling(max_new_tokens=40)
        both = [read(typist, PROMPTS[0], sampling, streamed) for streamed in (True, False)]
        streamed, joined = await asyncio.gather(*both)
        assert await typist.num_unfinished() == 0
        return streamed, joined

    streamed, joined = asyncio.run(run())
    assert joined == [Update("x" * 40, -20.0, 40, finished=True)]
    assert len(streamed) > 1
    assert "".join(update.text for update in streamed) == joined[0].text
    last = streamed[-1]
    assert (last.logp, last.num_tokens, last.finished) == (-20.0, 40, True)


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_frees_the_engine(typist, streamed):
    async def run() -> None:
        streams = [typist.stream(prompt, ENDLESS, True) for prompt in PROMPTS]
        for stream in streams:
            assert (await anext(stream)).text.strip("x") == ""
        reading = asyncio.create_task(read(typist, PROMPTS[0], ENDLESS, streamed))
        assert await unfinished_becomes(typist, 4)
        await streams[0].aclose()
        assert await unfinished_becomes(typist, 3)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await unfinished_becomes(typist, 2)
        del stream, streams[1:]  # forgotten, without a word
        assert await unfinished_becomes(typist, 0)
        assert typist.failure() is None

    asyncio.run(run())


def test_an_engine_that_cannot_start_says_why(cluster, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors weights"):
        open_engine_process(CONFIG, tmp_path, ())


def test_an_engine_that_ray_ended_for_its_memory_is_gone_as_any_other(tmp_path, monkeypatch):
    answer = OutOfMemory()
    actor = SimpleNamespace(start=answer, watch=answer, stream=answer)
    options = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: actor))
    ray = SimpleNamespace(remote=lambda _: options, cancel=lambda _: None)
    monkeypatch.setattr(engine_process, "ray", ray)
    client = EngineClient(actor, "the engine", CONFIG.request_timeout_s)
    with pytest.raises(OverloadedError, match="is being replaced; try again"):
        asyncio.run(read(client, PROMPTS[0], ENDLESS))
    assert client.failure() == "its process has ended: the node runs low on memory"
    with pytest.raises(GenerationError, match=r"ended while it loaded .*runs low on memory"):
        open_engine_process(CONFIG, tmp_path, ())


def test_the_death_of_its_process_is_seen(typist):
    import ray

    pid = ray.get(typist._actor.__ray_call__.remote(lambda _: os.getpid()), timeout=PATIENCE_S)

    async def run() -> None:
        reading = asyncio.create_task(read(typist, PROMPTS[0], ENDLESS))
        assert await unfinished_becomes(typist, 1)
        assert typist.failure() is None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(OverloadedError, match="is being replaced; try again"):
            await reading
        deadline = time.monotonic() + PATIENCE_S
        while typist.failure() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert "its process has ended" in typist.failure()
        with pytest.raises(OverloadedError):
            await read(typist, PROMPTS[1], ENDLESS)
        with pytest.raises(OverloadedError):
            await typist.num_unfinished()

    asyncio.run(run())
