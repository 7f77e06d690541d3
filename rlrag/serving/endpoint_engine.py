"""A service engine that answers through an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

from rlrag.config import GeneratorConfig
from rlrag.generation.backends.endpoint import EndpointGenerator
from rlrag.generation.backends.stepping import Update
from rlrag.generation.identity import endpoint_identity
from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt


class EndpointEngine:
    """Lives in the process that asks; each answer is one update."""

    def __init__(self, generator: EndpointGenerator) -> None:
        self._generator = generator

    async def stream(
        self, prompt: Prompt, sampling: Sampling, streamed: bool
    ) -> AsyncGenerator[Update, None]:
        """The whole answer; cancelling who waits for it ends the request.

        Raises:
            RlragError: why there is none.
        """
        answer = await self._generator.answer(prompt, sampling)
        yield Update(answer.text, answer.logp, answer.num_tokens, finished=True)

    def failure(self) -> str | None:
        """None: a server that is down now may be back for the next request."""
        return None

    def close(self) -> None:
        """End what is under way."""
        self._generator.close()


def open_endpoint_engine(
    config: GeneratorConfig, model_dir: Path, prefix_ids: tuple[int, ...]
) -> EndpointEngine:
    """Open a client of the server that `config` names; see `EngineOpener`.

    Raises:
        ConfigError: when the environment lacks the key.
        SetupError: when the package openai is not installed.
    """
    return EndpointEngine(EndpointGenerator(config, endpoint_identity(config, model_dir)))
