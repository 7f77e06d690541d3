"""The loop around an engine: who is answered when, who leaves, what fails, and with which text."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlrag.errors import GenerationError, GeneratorTimeoutError
from rlrag.generation.backends.engine_loop import EngineLoop
from rlrag.generation.backends.stepping import BatchStepper, Stepper, Update
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt

PATIENCE_S = 20.0


class Speller:
    """Spells each prompt's text, a letter a step, for as many requests as it has slots.

    A letter costs one nat. Steps wait for `allow`. A prompt with "?" is refused; "!" breaks it.
    """

    def __init__(self, num_slots: int = 2, num_steps: int = 10**6) -> None:
        self.rounds: list[str] = []  # the letters of each step
        self.begun: list[str] = []
        self._num_slots = num_slots
        self._texts: dict[str, str] = {}
        self._done: dict[str, int] = {}
        self._allowed = threading.Semaphore(num_steps)

    def allow(self, num_steps: int = 10**6) -> None:
        self._allowed.release(num_steps)

    def unfinished(self) -> list[str]:
        return list(self._texts.values())

    def begin(self, request_id: str, prompt: Prompt, sampling: Sampling) -> None:
        if "?" in prompt.text:
            raise GenerationError("no questions")
        self.begun.append(prompt.text)
        self._texts[request_id] = prompt.text[: sampling.max_new_tokens]
        self._done[request_id] = 0

    def step(self) -> list[tuple[str, Update]]:
        if not self._allowed.acquire(timeout=PATIENCE_S):
            raise GenerationError("nobody allowed a step")
        updates, letters = [], ""
        for name in list(self._texts)[: self._num_slots]:
            text = self._texts[name]
            self._done[name] += 1
            count = self._done[name]
            letter = text[count - 1]
            if letter == "!":
                raise ValueError("a broken letter")
            letters += letter
            if count == len(text):
                self.abort(name)
            updates.append((name, Update(letter, -float(count), count, count == len(text))))
        self.rounds.append(letters)
        return updates

    def abort(self, request_id: str) -> None:
        del self._texts[request_id]


def spell(text: str) -> Prompt:
    return Prompt((1,), text, 0)


async def read(loop: EngineLoop, prompt: Prompt, sampling: Sampling | None = None) -> list[Update]:
    return [u async for u in loop.stream(prompt, sampling or Sampling(max_new_tokens=1000))]


def text_of(updates: list[Update]) -> str:
    return "".join(update.text for update in updates)


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.002)
    return holds()


@pytest.fixture
def opened():
    """Opens loops that end with the test."""
    loops = []

    def open_it(stepper: Stepper, timeout_s: float = PATIENCE_S) -> EngineLoop:
        loops.append(EngineLoop(stepper, timeout_s))
        return loops[-1]

    yield open_it
    for loop in loops:
        loop.close()


def test_the_pieces_make_up_the_answer(opened):
    updates = asyncio.run(read(opened(Speller()), spell("abcd")))
    assert text_of(updates) == "abcd"
    assert (updates[-1].logp, updates[-1].num_tokens) == (-4.0, 4)
    assert [u.finished for u in updates] == [False] * (len(updates) - 1) + [True]
    assert all(u.num_tokens == -u.logp for u in updates)


def test_a_request_joins_between_two_steps_of_others(opened):
    speller = Speller(num_slots=2, num_steps=1)

    async def run() -> list[str]:
        loop = opened(speller)
        first = loop.stream(spell("abcd"), Sampling())
        opening = await anext(first)  # needs the one step that is allowed
        assert opening.text == "a"
        others = [asyncio.create_task(read(loop, spell(t))) for t in ("xy", "uv")]
        await asyncio.sleep(0)
        assert await asyncio.to_thread(eventually, lambda: loop.num_unfinished() == 3)
        speller.allow()
        rest = [u async for u in first]
        assert text_of(rest) == "bcd"
        return [text_of(await other) for other in others]

    assert asyncio.run(run()) == ["xy", "uv"]
    # The loop was inside its second step, or before it, when the others came.
    assert "".join(speller.rounds[:2]) in ("abx", "ab")
    assert sorted("".join(speller.rounds)) == sorted("abcdxyuv")
    assert all(len(letters) <= 2 for letters in speller.rounds)
    assert any("c" in letters and len(letters) == 2 for letters in speller.rounds)


def test_many_requests_are_all_answered_in_slots_for_few(opened):
    texts = [f"answer {i} " * (1 + i % 3) for i in range(40)]

    async def run() -> list[list[Update]]:
        loop = opened(Speller(num_slots=3))
        return await asyncio.gather(*(read(loop, spell(text)) for text in texts))

    assert [text_of(updates) for updates in asyncio.run(run())] == texts


def test_requests_of_several_event_loops_are_answered(opened):
    loop, found = opened(Speller()), {}

    def ask(text: str) -> None:
        found[text] = text_of(asyncio.run(read(loop, spell(text))))

    threads = [threading.Thread(target=ask, args=(text,)) for text in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == {"one": "one", "two": "two", "three": "three"}


def test_closing_the_iterator_frees_the_slot(opened):
    speller = Speller(num_slots=1, num_steps=1)

    async def run() -> str:
        loop = opened(speller)
        first = loop.stream(spell("a" * 900), Sampling(max_new_tokens=1000))
        await anext(first)
        second = asyncio.create_task(read(loop, spell("xy")))
        await asyncio.sleep(0)
        await first.aclose()
        speller.allow()
        answer = text_of(await second)
        assert loop.num_unfinished() == 0
        return answer

    assert asyncio.run(run()) == "xy"
    assert "".join(speller.rounds).count("a") <= 3
    assert speller.unfinished() == []


def test_cancelling_who_waits_frees_the_slot(opened):
    speller = Speller(num_slots=1, num_steps=0)
    loop = opened(speller)

    async def run() -> None:
        waiting = asyncio.create_task(read(loop, spell("a" * 900)))
        assert await asyncio.to_thread(eventually, lambda: speller.begun == ["a" * 900])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
    assert loop.num_unfinished() == 0
    speller.allow(2)
    assert eventually(lambda: speller.unfinished() == [])


def test_who_leaves_before_the_engine_has_heard_of_it_is_never_begun(opened):
    speller = Speller(num_steps=0)
    loop = opened(speller)

    async def run() -> None:
        first = asyncio.create_task(read(loop, spell("ab")))
        assert await asyncio.to_thread(eventually, lambda: speller.begun == ["ab"])
        second = asyncio.create_task(read(loop, spell("xy")))
        await asyncio.sleep(0)
        assert loop.num_unfinished() == 2
        second.cancel()
        await asyncio.sleep(0)
        assert loop.num_unfinished() == 1
        speller.allow()
        assert text_of(await first) == "ab"

    asyncio.run(run())
    assert speller.begun == ["ab"]


def test_who_left_with_its_event_loop_is_forgotten(opened):
    speller = Speller(num_steps=1)
    loop = opened(speller)
    event_loop = asyncio.new_event_loop()
    stream = loop.stream(spell("abc" * 100), Sampling(max_new_tokens=1000))
    assert event_loop.run_until_complete(anext(stream)).text == "a"
    event_loop.close()
    speller.allow()
    assert eventually(lambda: loop.num_unfinished() == 0 and speller.unfinished() == [])
    assert loop.failure() is None
    assert text_of(asyncio.run(read(loop, spell("xy")))) == "xy"


def test_a_slow_consumer_holds_nobody_up_and_misses_nothing(opened):
    speller = Speller()

    async def run() -> list[Update]:
        loop = opened(speller)
        slow = loop.stream(spell("slowly"), Sampling())
        updates = [await anext(slow)]
        await read(loop, spell("quickly done"))
        updates += [u async for u in slow]
        return updates

    updates = asyncio.run(run())
    assert text_of(updates) == "slowly"
    assert len(updates) <= 3  # what was spelled meanwhile came in one
    assert (updates[-1].logp, updates[-1].num_tokens, updates[-1].finished) == (-6.0, 6, True)


def test_a_refused_prompt_harms_no_other(opened):
    async def run() -> list[object]:
        loop = opened(Speller())
        answers = (read(loop, spell(text)) for text in ("ab", "why?", "xy"))
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert loop.failure() is None
        assert loop.num_unfinished() == 0
        return found

    first, refused, last = asyncio.run(run())
    assert (text_of(first), text_of(last)) == ("ab", "xy")
    with pytest.raises(GenerationError, match="no questions"):
        raise refused


def test_after_a_failed_step_everybody_is_told(opened):
    async def run() -> None:
        loop = opened(Speller())
        answers = (read(loop, spell(text)) for text in ("a" * 500, "x!", "b" * 500))
        for found in await asyncio.gather(*answers, return_exceptions=True):
            with pytest.raises(GenerationError, match="ValueError: a broken letter"):
                raise found
        assert "a broken letter" in loop.failure()
        with pytest.raises(GenerationError, match="no longer answers requests"):
            await read(loop, spell("ab"))
        assert loop.num_unfinished() == 0

    asyncio.run(run())


def test_closing_the_loop_ends_its_thread_and_tells_who_waits():
    speller = Speller(num_steps=1)

    async def run() -> None:
        loop = EngineLoop(speller)
        waiting = asyncio.create_task(read(loop, spell("abc")))
        assert await asyncio.to_thread(eventually, lambda: speller.rounds == ["a"])
        speller.allow(1)
        loop.close()
        with pytest.raises(GenerationError, match="it was closed"):
            await waiting
        with pytest.raises(GenerationError, match="it was closed"):
            await read(loop, spell("ab"))
        assert loop.failure() == "it was closed"

    before = threading.active_count()
    asyncio.run(run())
    assert eventually(lambda: threading.active_count() <= before)


def test_a_step_that_hangs_is_named_and_bounded():
    speller = Speller(num_steps=0)
    loop = EngineLoop(speller, update_timeout_s=0.05)
    with pytest.raises(GeneratorTimeoutError, match=r"no piece of the answer came within 0\.05 s"):
        asyncio.run(read(loop, spell("ab")))
    assert eventually(lambda: loop.failure() is not None)
    assert "has not come back from a step" in loop.failure()
    with pytest.raises(GeneratorTimeoutError, match="did not end its step"):
        loop.close(timeout_s=0.05)
    speller.allow()


def test_an_idle_loop_works_again_when_asked(opened):
    speller = Speller()
    loop = opened(speller)
    for text in ("ab", "xyz"):
        assert text_of(asyncio.run(read(loop, spell(text)))) == text
    assert loop.failure() is None
    num_rounds = len(speller.rounds)
    time.sleep(0.05)
    assert len(speller.rounds) == num_rounds == 5  # no step without a request


def real_prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    return [Prompt(tuple(range(30, 30 + n)), f"prompt of {n}", 0) for n in lengths]


@pytest.fixture(scope="module")
def generator(model_dir: Path) -> TransformersGenerator:
    return TransformersGenerator(model_dir, "float32", "cpu", batch_size=3)


def test_a_generator_without_a_scheduler_answers_as_it_does_alone(opened, generator):
    prompts = real_prompts((5, 9, 12, 7, 20))
    greedy, drawn = Sampling(max_new_tokens=6), Sampling(max_new_tokens=4, temperature=1.0, seed=3)

    async def run() -> list[list[Update]]:
        loop = opened(BatchStepper(generator, batch_size=3))
        asked = [(p, sampling) for sampling in (greedy, drawn) for p in prompts]
        return await asyncio.gather(*(read(loop, p, sampling) for p, sampling in asked))

    found = asyncio.run(run())
    expected = generator.generate(prompts, greedy) + generator.generate(prompts, drawn)
    for (update,), answer in zip(found, expected, strict=True):
        assert update.text == answer.text
        assert update.logp == pytest.approx(answer.logp, abs=1e-4)
        assert (update.num_tokens, update.finished) == (answer.num_tokens, True)


def test_batches_take_the_longest_waiting_and_what_is_decoded_alike(generator):
    stepper = BatchStepper(generator, batch_size=2)
    short, long = Sampling(max_new_tokens=1), Sampling(max_new_tokens=2)
    a, b, c, d, e = real_prompts((4, 5, 6, 7, 8))
    for name, prompt, sampling in (
        ("a", a, short),
        ("b", b, long),
        ("c", c, short),
        ("d", d, short),
        ("e", e, short),
    ):
        stepper.begin(name, prompt, sampling)
    stepper.abort("d")
    steps = [[name for name, _ in stepper.step()] for _ in range(4)]
    assert steps == [["a", "c"], ["b"], ["e"], []]


def test_a_prompt_that_is_too_long_is_refused_before_its_batch(generator):
    stepper = BatchStepper(generator, batch_size=2)
    (prompt,) = real_prompts((4,))
    with pytest.raises(GenerationError, match="at most 2048"):
        stepper.begin("a", prompt, Sampling(max_new_tokens=2045))
    assert stepper.step() == []
