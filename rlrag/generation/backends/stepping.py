"""The protocol of engines that an `EngineLoop` runs: add prompts at any time, get text in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rlrag.errors import GenerationError
from rlrag.generation.protocol import Generator, Sampling
from rlrag.records import Generation, Prompt


@dataclass(frozen=True, slots=True)
class Update:
    """What an answer has gained.

    `text` is new since the last update; white space at either end of the whole is not removed.
    `logp` (nats) and `num_tokens` count the answer so far, as in a `Generation`.
    """

    text: str
    logp: float | None
    num_tokens: int
    finished: bool


@runtime_checkable
class Stepper(Protocol):
    """A generator whose caller decides when it computes. All calls come from one thread."""

    def begin(self, request_id: str, prompt: Prompt, sampling: Sampling) -> None:
        """Take a request in; the next steps answer it.

        Raises:
            GenerationError: when this request cannot be answered; others go on.
        """
        ...

    def step(self) -> Sequence[tuple[str, Update | GenerationError]]:
        """Compute once; what requests gained by it, by their ids.

        An update without text is left out unless it is the last one of its answer. A request that
        ends without an answer has the error in its place, and others go on.

        Raises:
            GenerationError: when the engine failed and can answer nobody any more.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request, finished or not, and free what it holds."""
        ...


class ChecksPrompts(Generator, Protocol):
    """A generator that can tell whether it would refuse a prompt."""

    def check_prompt(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Refuse a prompt that is empty or too long.

        Raises:
            GenerationError: with both lengths.
        """
        ...


class BatchStepper:
    """Makes a stepper of a generator that has no scheduler.

    A step answers up to `batch_size` waiting requests from beginning to end, so each answer is one
    update, requests that come meanwhile wait, and `abort` helps only those that wait.
    """

    def __init__(self, generator: ChecksPrompts, batch_size: int) -> None:
        self._generator = generator
        self._batch_size = batch_size
        self._waiting: dict[str, tuple[Prompt, Sampling]] = {}

    def begin(self, request_id: str, prompt: Prompt, sampling: Sampling) -> None:
        """Let a request wait for the next step.

        Raises:
            GenerationError: when the prompt is empty or too long.
        """
        self._generator.check_prompt(prompt, sampling.max_new_tokens)
        self._waiting[request_id] = (prompt, sampling)

    def step(self) -> list[tuple[str, Update | GenerationError]]:
        """Answer the requests that are decoded as the longest waiting one is.

        Raises:
            GenerationError: when the generator failed.
        """
        if not self._waiting:
            return []
        _, sampling = next(iter(self._waiting.values()))
        alike = [name for name, (_, wanted) in self._waiting.items() if wanted == sampling]
        chosen = alike[: self._batch_size]
        prompts = [self._waiting.pop(name)[0] for name in chosen]
        answers = self._generator.generate(prompts, sampling)
        return [(name, _whole(answer)) for name, answer in zip(chosen, answers, strict=True)]

    def abort(self, request_id: str) -> None:
        """Forget a request that waits."""
        self._waiting.pop(request_id, None)


def _whole(answer: Generation | GenerationError) -> Update | GenerationError:
    if isinstance(answer, GenerationError):
        return answer
    return Update(answer.text, answer.logp, answer.num_tokens, finished=True)
