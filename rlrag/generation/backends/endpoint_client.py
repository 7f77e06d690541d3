"""Sends concurrent requests to an OpenAI-compatible server, with retries.

A request that is refused for now (408, 409, 429, 5xx) or lost with its connection is sent again,
after pauses that double or as long as `Retry-After` says. What stays without a reply is an error in
the place of its reply. What no repetition mends, such as a wrong key, ends the call.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

from rlrag.config import GeneratorConfig
from rlrag.errors import ConfigError, GenerationError, GeneratorTimeoutError, SetupError
from rlrag.generation.waits import awaiting, note_answer
from rlrag.openai_api import describe_error

logger = logging.getLogger(__name__)

Reply = dict[str, Any]
"""The JSON object of a reply."""

_NUM_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 30.0
_CLOSING_S = 10.0
_FOR_NOW = frozenset({408, 409, 429})
"""Statuses below 500 with which a server refuses a request for now."""
_NO_QUOTA = "insufficient_quota"
_CLOSED = "this generator is closed; create a new one"


class RefusedError(GenerationError):
    """A server that works refuses one request: too long, malformed, or with an unknown field."""


class EndpointClient:
    """Asks one server, from any thread; at most `batch_size` requests are under way at once."""

    def __init__(self, config: GeneratorConfig, key: str | None) -> None:
        """Start the thread that waits for replies; nothing is sent yet.

        Args:
            config: Address, key variable, concurrency and time limit.
            key: Sent with every request and written nowhere; None for a server that wants none.

        Raises:
            SetupError: when the package openai is not installed.
        """
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise SetupError(
                "generator.backend 'endpoint' needs the package openai; install the extra "
                "'endpoint'"
            ) from error
        self._config = config
        self._key = key
        self._client = AsyncOpenAI(
            base_url=config.url,
            api_key=key or "none",
            timeout=config.request_timeout_s,
            max_retries=0,  # it would also repeat what no repetition mends
        )
        self._slots = asyncio.Semaphore(config.batch_size)
        self._jitter = random.Random()  # training draws from the generators that have a seed
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="endpoint-client", daemon=True
        )
        self._thread.start()

    def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply | GenerationError]:
        """The replies, or why there is none, in order.

        Raises:
            ConfigError: when the server refuses the key, or does not know the model or the path.
            SetupError: when the account has no quota left.
        """
        replies = [self.ask(body) for body in bodies]
        try:
            with awaiting(lambda: _describe(replies, self._config)):
                wait(replies, return_when=FIRST_EXCEPTION)
            for reply in replies:
                if reply.done():
                    reply.result()  # raises what ended the call
            return [reply.result() for reply in replies]
        finally:
            for reply in replies:
                reply.cancel()

    def ask(self, body: Mapping[str, Any]) -> Future[Reply | GenerationError]:
        """Send one request; the result and what it raises are those of `ask_all`."""
        if self._closing:
            raise GenerationError(_CLOSED)
        return asyncio.run_coroutine_threadsafe(self._ask(dict(body)), self._loop)

    def close(self) -> None:
        """End the requests that are under way, the connections and the thread."""
        if self._closing:
            return
        self._closing = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_CLOSING_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSING_S)
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _ask(self, body: dict[str, Any]) -> Reply | GenerationError:
        try:
            async with self._slots, asyncio.timeout(self._config.request_timeout_s):
                return await self._repeat(body)
        except GenerationError as error:
            return error
        except TimeoutError:
            return GeneratorTimeoutError(self._late())
        except asyncio.CancelledError:
            if not self._closing:
                raise
            return GenerationError(_CLOSED)
        finally:
            note_answer()

    async def _repeat(self, body: dict[str, Any]) -> Reply:
        """Send a request until there is a reply.

        Raises:
            GenerationError: why there is none.
            ConfigError, SetupError: what concerns all requests.
        """
        import openai

        end = time.monotonic() + self._config.request_timeout_s
        for attempt in range(1, _NUM_ATTEMPTS + 1):
            pause_s = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _MAX_PAUSE_S)
            pause_s *= self._jitter.uniform(0.75, 1)
            try:
                return _read(await self._client.post("/completions", body=body, cast_to=object))
            except openai.APITimeoutError:
                raise GeneratorTimeoutError(self._late()) from None
            except openai.APIConnectionError as error:
                why = self._told(error.__cause__ or error)
            except openai.APIStatusError as error:
                self._give_up_on(error)
                asked_s = _retry_after_s(error.response.headers)
                pause_s = pause_s if asked_s is None else asked_s
                why = self._told(error)
            except (openai.OpenAIError, ValueError) as error:
                raise GenerationError(
                    f"the reply of {self._config.url} cannot be read ({self._told(error)}); "
                    "check that the address is that of an API, usually ending in /v1"
                ) from None
            if attempt == _NUM_ATTEMPTS or time.monotonic() + pause_s > end:
                break
            logger.info("asking %s again in %.1f s: %s", self._config.url, pause_s, why)
            await asyncio.sleep(pause_s)
        wanted = f", and it wants a pause of {pause_s:.0f} s" if attempt < _NUM_ATTEMPTS else ""
        raise GenerationError(
            f"{self._config.url} gave no answer in {attempt} attempt(s); the last failed "
            f"because: {why}{wanted}; check that the server works, lower generator.batch_size if "
            "it is overloaded, or raise generator.request_timeout_s"
        )

    def _give_up_on(self, error: Any) -> None:
        """Raise what sending the same again would not mend."""
        status, config = error.status_code, self._config
        said = f"{config.url} refuses model {config.answering_model!r} with {status}"
        said = f"{said} ({self._told(error)})"
        if status == 402 or _NO_QUOTA in (error.code, error.type):
            raise SetupError(
                f"{said}: the account has no quota left; add some, then run the same command "
                "again: answers so far are cached"
            ) from None
        ways = {
            401: f"set the right key in the environment variable {config.key_variable}",
            403: f"set a key that may use it in the environment variable {config.key_variable}",
            404: "check generator.served_model, that generator.url ends as the API wants it, "
            "mostly in /v1, and that the server has /completions",
        }
        if status in ways:
            raise ConfigError(f"{said}; {ways[status]}") from None
        if status < 500 and status not in _FOR_NOW:
            raise RefusedError(f"{config.url} refuses a request ({self._told(error)})") from None

    def _late(self) -> str:
        return (
            f"{self._config.url} gave no answer within {self._config.request_timeout_s:g} s; lower "
            "generator.batch_size where the server is busy, or raise generator.request_timeout_s"
        )

    def _told(self, error: BaseException) -> str:
        return describe_error(error, self._key)


def _read(reply: object) -> Reply:
    if not isinstance(reply, dict):
        raise ValueError(f"it is not a JSON object but {str(reply)[:80]!r}")
    return reply


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server wants to be left alone for; None where it does not say.

    Example:
        >>> _retry_after_s({"retry-after": "1.5"}), _retry_after_s({"retry-after": "soon"})
        (1.5, None)
    """
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _describe(replies: Sequence[Future[Any]], config: GeneratorConfig) -> list[str]:
    missing = sum(not reply.done() for reply in replies)
    return [f"{missing} of {len(replies)} answers of {config.url}"] if missing else []
