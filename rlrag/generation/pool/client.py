"""The client of a generator pool: sends batches of prompts and new weights to the actors.

A call is cut into chunks (`plan_chunks`), which `dispatch` gives to the actors. A prompt that no
engine survives gets an error in the place of its result. Every wait has a bound and its error names
the actor.

Each chunk names the weights that must answer it. An actor that holds others refuses, is told to
take the wanted set from the pool's `WeightStore`, and gets the chunk again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError
from rlrag.generation.call_lock import CallLock
from rlrag.generation.checks import check_answers
from rlrag.generation.identity import pushed_identity
from rlrag.generation.pool.actor import Actors, Member
from rlrag.generation.pool.calls import Chunk, Work, describe_prompts
from rlrag.generation.pool.dispatch import Dispatcher
from rlrag.generation.pool.weight_store import WeightsTag, store_weights
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.records import Generation, Prompt, Score

if TYPE_CHECKING:
    from rlrag.generation.weights import GeneratorWeights

# Even at 150 tokens a second, a slow core, a chunk takes under two minutes.
_LARGEST_TOKENS = 16_384


class PoolClient:
    """Talks to the actors of a pool that somebody else owns; implements `Generator`.

    Light and picklable: give it to Ray tasks, actors and Ray Train workers. Several clients may
    use the same actors at once; each actor then takes their chunks in turn, so that
    `request_timeout_s` must allow for one chunk of every client.
    """

    def __init__(
        self, actors: Actors, config: GeneratorConfig, expected: WeightsTag | None = None
    ) -> None:
        self._actors = actors
        self._config = config
        self._expected = expected or WeightsTag()
        self._dispatcher = Dispatcher(actors.identity)
        self._tokens = TokenCount()
        self._lock = CallLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolClient, (self._actors, self._config, self._expected)

    @property
    def identity(self) -> str:
        """Hash of weights, dtype, device and back end; known before any engine has started."""
        return pushed_identity(self._actors.identity, self._expected.digest)

    @property
    def version(self) -> int:
        """Version of the weights that answer this client."""
        return self._expected.version

    @property
    def tokens(self) -> TokenCount:
        """Tokens that this client asked for."""
        return self._tokens

    def client(self) -> PoolClient:
        """Another client of the same actors, with its own token count."""
        return PoolClient(self._actors, self._config, self._expected)

    def wait_until_ready(self) -> None:
        """Wait until every engine has started and holds the weights that this client expects.

        Otherwise the first request does. An actor that still works on what an earlier call did not
        wait for is not waited for here either: it takes the weights before it answers again.

        Raises:
            GeneratorTimeoutError: naming the first actor that was not ready in `start_timeout_s`.
            SetupError, GenerationError: what kept an engine from starting.
        """
        wanted = self._expected
        self._ask_all("the start", wanted, lambda handle: handle.start.remote(wanted))

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Have all actors answer with these weights; returns when the last one holds them.

        Waits for calls of this client that run in other threads. Clients in other processes need
        `expect_weights`, or their next call fails rather than get results of other weights. Once
        the set is accepted, an actor that fails or restarts takes it as soon as it is back, and one
        that is behind (see `wait_until_ready`) before it answers again.

        Raises:
            GenerationError: when the tensors do not fit the model, and the old set goes on; or
                when an actor cannot take them.
            GeneratorTimeoutError: naming the actor that did not take them in `start_timeout_s`.
        """
        shapes, adapter = weights.shapes, weights.is_adapter
        with self._lock.change():
            self._ask_all(
                f"the check of weights of version {weights.version}",
                self._expected,
                lambda handle: handle.check_weights.remote(shapes, adapter),
            )
            self._expected = store_weights(self._actors.store, weights)
            self.wait_until_ready()

    def expect_weights(self, version: int, digest: str | None) -> None:
        """From now on take results of this set alone, which another client pushes.

        Call it after that client has pushed; calls that come sooner wait up to `start_timeout_s`.
        """
        with self._lock.change():
            self._expected = WeightsTag(version, digest)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        """Decode one answer a prompt.

        A prompt that makes engines die, hang or fail even when it is sent alone gets the error as
        its result; when it comes again, it is not sent.

        Raises:
            GeneratorTimeoutError, GenerationError: when no actor can be restarted any more, or
                chunk after chunk is lost.
        """
        return self._run(
            "generate",
            prompts,
            lambda handle, wanted, chunk: handle.generate.remote(
                wanted, [prompts[i] for i in chunk], sampling
            ),
        )

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        """Teacher-forced log p(answer | prompt); gives and raises errors as `generate` does."""
        check_answers(prompts, answers)
        return self._run(
            "score",
            prompts,
            lambda handle, wanted, chunk: handle.score.remote(
                wanted, [prompts[i] for i in chunk], [tuple(answers[i]) for i in chunk]
            ),
        )

    def close(self) -> None:
        """Nothing: the actors belong to the pool."""

    def _run(
        self,
        what: str,
        prompts: Sequence[Prompt],
        send: Callable[[Any, WeightsTag, list[int]], Any],
    ) -> list[Any]:
        results: dict[int, Any] = {}
        for place, prompt in enumerate(prompts):
            refusal = self._dispatcher.losses.refusal(prompt)
            if refusal is not None:
                results[place] = refusal
        asked = [place for place in range(len(prompts)) if place not in results]
        ids = [prompts[place].token_ids for place in asked]
        chunks = plan_chunks(ids, len(self._members()), self._config.batch_size)
        with self._lock.call():
            wanted = self._expected
            self._dispatcher.answer(
                Work(
                    self._config,
                    self._members(),
                    wanted,
                    lambda handle: handle.start.remote(wanted),
                    lambda handle, places: send(handle, wanted, places),
                    lambda places: (
                        "the start" if places is None else describe_prompts(what, prompts, places)
                    ),
                    prompts,
                    deque(Chunk([asked[i] for i in chunk]) for chunk in chunks),
                    results,
                )
            )
        found = [results[place] for place in range(len(prompts))]
        self._tokens.num_requests += len(asked)
        self._tokens.spent += sum(
            r.num_prompt_tokens + r.num_tokens for r in found if not isinstance(r, GenerationError)
        )
        return found

    def _ask_all(self, what: str, wanted: WeightsTag, prepare: Callable[[Any], Any]) -> None:
        """Ask every actor once, until each has answered."""
        self._dispatcher.ask_all(
            Work(
                self._config,
                self._members(),
                wanted,
                prepare,
                lambda handle, places: None,
                lambda places: what,
            )
        )

    def _members(self) -> tuple[Member, ...]:
        if not self._actors.members:
            raise GenerationError("this generator pool is closed; create a new one")
        return self._actors.members


def plan_chunks(
    prompts: Sequence[Sequence[int]], num_workers: int, batch_size: int
) -> list[list[int]]:
    """Split prompts into chunks for workers that pull the next one when they are free.

    Prompts are sorted by their token ids, so that those with equal beginnings stay together and an
    engine computes the common part once. Chunks hold about as many tokens as half of each worker's
    fair share of what is left: large ones first, so that an engine has many sequences to
    interleave, small ones at the end, so that all workers finish together. One worker alone has
    nothing to balance and gets the largest chunks. A chunk has at least `batch_size` prompts while
    there are that many; beyond that it ends at 16,384 tokens, which bounds what is lost with a dead
    worker.

    Returns:
        Indices into `prompts`; each index occurs once. The plan depends on the arguments alone.

    Example:
        >>> plan_chunks([(7, 7), (1, 2), (7, 8), (1, 3)], num_workers=2, batch_size=1)
        [[1], [3], [0], [2]]
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    remaining = sum(len(prompt) for prompt in prompts)
    smallest = max(1, min(batch_size, -(-len(prompts) // num_workers)))
    parts = 1 if num_workers == 1 else 2 * num_workers
    chunks: list[list[int]] = []
    start = 0
    while start < len(order):
        target = min(remaining / parts, _LARGEST_TOKENS)
        size, tokens = 0, 0
        while start + size < len(order) and (size < smallest or tokens < target):
            tokens += len(prompts[order[start + size]])
            size += 1
        chunks.append(order[start : start + size])
        start += size
        remaining -= tokens
    return chunks
