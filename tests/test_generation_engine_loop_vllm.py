"""The loop around a vLLM engine: what it streams is what the engine generates."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rlrag.generation.backends.engine_loop import EngineLoop
from rlrag.generation.backends.stepping import Stepper, Update
from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt


def real_prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    return [Prompt(tuple(range(30, 30 + n)), f"prompt of {n}", 0) for n in lengths]


async def read(loop: EngineLoop, prompt: Prompt, sampling: Sampling | None = None) -> list[Update]:
    return [u async for u in loop.stream(prompt, sampling or Sampling(max_new_tokens=1000))]


def text_of(updates: list[Update]) -> str:
    return "".join(update.text for update in updates)


class CountedSteps:
    """A stepper that counts its steps."""

    def __init__(self, stepper: Stepper) -> None:
        self.begin, self.abort = stepper.begin, stepper.abort
        self._stepper, self.num_steps = stepper, 0

    def step(self) -> list[tuple[str, Update]]:
        self.num_steps += 1
        return self._stepper.step()


class VllmTrial:
    """An engine with two slots in an actor, asked in both ways."""

    def __init__(self, model_dir: Path) -> None:
        from rlrag.config import GeneratorConfig
        from rlrag.generation.backends.vllm import VllmGenerator

        config = GeneratorConfig(dtype="float32", batch_size=2, max_model_len=512)
        self._generator = VllmGenerator(model_dir, config)
        self._steps = CountedSteps(self._generator)

    def generated(self, prompts: list[Prompt], sampling: Sampling) -> list[tuple[str, float, int]]:
        answers = self._generator.generate(prompts, sampling)
        return [(a.text, a.logp, a.num_tokens) for a in answers]

    def streamed(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Update]]:
        async def run(loop: EngineLoop) -> list[list[Update]]:
            return await asyncio.gather(*(read(loop, prompt, sampling) for prompt in prompts))

        return self._in_loop(run)

    def left_alone(self, prompts: list[Prompt], sampling: Sampling) -> tuple[str, int, int]:
        """Two readers leave after the first piece; the answer to a third, and its steps."""

        async def run(loop: EngineLoop) -> tuple[str, int]:
            streams = [loop.stream(prompt, sampling) for prompt in prompts[:2]]
            for stream in streams:
                await anext(stream)
            for stream in streams:
                await stream.aclose()
            before = self._steps.num_steps
            answer = text_of(await read(loop, prompts[2], Sampling(max_new_tokens=4, stop=())))
            return answer, self._steps.num_steps - before

        answer, num_steps = self._in_loop(run)
        return answer, num_steps, self._generator._engine.llm_engine.get_num_unfinished_requests()

    def _in_loop(self, run):
        loop = EngineLoop(self._steps)
        try:
            return asyncio.run(run(loop))
        finally:
            loop.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_vllm_engine_streams_what_it_generates_and_frees_the_slots_of_who_leaves(
    tmp_path, cluster
):
    import ray
    from tiny_models import save_vllm_llama

    from rlrag.config import GeneratorConfig
    from rlrag.generation.backends.vllm import vllm_environment

    environment = {**vllm_environment(GeneratorConfig()), "OMP_NUM_THREADS": "1"}
    make = ray.remote(num_cpus=0.5, runtime_env={"env_vars": environment})(VllmTrial)
    trial = make.remote(save_vllm_llama(tmp_path))

    def ask(method, *arguments):
        return ray.get(method.remote(*arguments), timeout=300)

    prompts = real_prompts((40, 41, 50, 6, 7))
    endless = Sampling(max_new_tokens=24, stop=())
    plain = ask(trial.generated, prompts, endless)
    # Stop strings of several letters, each from the middle of an answer.
    stops = tuple(text[len(text) // 2 :][:3] for text, _, _ in plain[:3] if len(text) > 8)
    assert len(stops) >= 2
    for sampling in (endless, Sampling(max_new_tokens=24, stop=stops)):
        expected = ask(trial.generated, prompts, sampling)
        for updates, (text, logp, num_tokens) in zip(
            ask(trial.streamed, prompts, sampling), expected, strict=True
        ):
            assert text_of(updates).strip() == text
            assert updates[-1].logp == pytest.approx(logp, abs=1e-4)
            assert updates[-1].num_tokens == num_tokens
            assert [u.finished for u in updates[:-1]] == [False] * (len(updates) - 1)
    assert any(text != before for (text, _, _), (before, _, _) in zip(expected, plain, strict=True))

    whole = ask(trial.generated, prompts, Sampling(max_new_tokens=4, stop=()))
    long = Sampling(max_new_tokens=400, stop=())
    assert min(n for _, _, n in ask(trial.generated, prompts[:2], long)) > 100
    answer, num_steps, num_unfinished = ask(trial.left_alone, prompts, long)
    assert answer.strip() == whole[2][0]
    assert num_steps <= 20  # it did not wait for the hundreds of tokens of the others
    assert num_unfinished == 0
    ray.kill(trial)
