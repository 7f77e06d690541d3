"""An on-disk cache of generation results.

One SQLite file holds the results of all runs that share a cache folder. A result's key hashes all
that decides it: the generator's identity (weights, number format, device, back end), the prompt's
token ids, and the answer's ids or the sampling parameters. The seed counts only where something is
drawn, so greedy answers serve every seed. The version of published weights does not count: equal
weights serve every run, and a stored result comes back with the version that this run gave them.
Each chunk is one transaction: a process that is killed loses at most the chunk in flight. Errors
are not stored. A folder on a network file system, whose locks must work, serves all nodes of a
cluster (`rlrag.files.sqlite.Journal`).
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlrag.errors import GenerationError, SetupError
from rlrag.files.sqlite import BUSY_TIMEOUT_S, KeyedTable
from rlrag.generation.call_lock import CallLock
from rlrag.generation.checks import check_answers
from rlrag.generation.protocol import Generator, Sampling, TokenCount
from rlrag.generation.weights import FollowsWeights
from rlrag.records import Generation, Prompt, Score

if TYPE_CHECKING:
    from rlrag.generation.weights import GeneratorWeights

_FILE_NAME = "generations.sqlite"
_NO_LOGP = math.inf
"""Stands in the file for a log-probability that the generator does not give."""
_COLUMNS = {
    "text": "TEXT",
    "logp": "REAL",
    "num_tokens": "INTEGER",
    "num_prompt_tokens": "INTEGER",
    "version": "INTEGER",
}

Result = TypeVar("Result", Generation, Score)
Request = tuple[str, tuple[int, ...], object]  # kind, prompt, answer or sampling
Row = tuple[str, float, int, int, int]  # text, logp, num_tokens, num_prompt_tokens, version


class ResultStore:
    """Results by key in one SQLite file; safe for many processes and threads at once."""

    def __init__(self, path: Path) -> None:
        """Create the file when it is missing.

        Raises:
            SetupError: when the file cannot be opened or is no SQLite file.
        """
        self._path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = KeyedTable(path, "results", _COLUMNS)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Row]:
        """The stored results among `keys`."""
        with self._explained():
            return self._table.get(keys)

    def put(self, rows: Sequence[tuple[bytes, Row]]) -> None:
        """Store all rows in one transaction; a key that is there already keeps its result."""
        with self._explained():
            self._table.put(rows)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise SetupError(
                f"the generation cache {self._path} cannot be used: {error}; {_way_out(str(error))}"
            ) from error


class CachedGenerator:
    """A generator whose results are kept on disk; implements `Generator`.

    Can be pickled whenever the inner generator can; each copy counts its own tokens.
    """

    def __init__(self, inner: Generator, cache_dir: Path, chunk_size: int = 256) -> None:
        """Wrap `inner`.

        Args:
            inner: Computes what is not stored.
            cache_dir: Folder of the cache file; created when missing.
            chunk_size: Requests given to `inner` at once; each chunk is stored when it returns,
                so that a failure loses no more than one.

        Raises:
            SetupError: when the cache file cannot be opened.
        """
        self._inner = inner
        self._store = ResultStore(cache_dir.expanduser() / _FILE_NAME)
        self._chunk_size = chunk_size
        self._tokens = TokenCount()
        self._lock = CallLock()

    @property
    def identity(self) -> str:
        """The inner generator's identity."""
        return self._inner.identity

    @property
    def version(self) -> int:
        """The inner generator's version, which every result carries."""
        return self._inner.version

    @property
    def inner(self) -> Generator:
        """The generator that computes what is not stored."""
        return self._inner

    @property
    def tokens(self) -> TokenCount:
        """Tokens computed (`spent`) and tokens that the cache saved."""
        return self._tokens

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Have the inner generator take the weights; waits for calls in other threads.

        Raises:
            GenerationError: from the inner generator.
        """
        with self._lock.change():
            self._inner.load_weights(weights)

    def expect_weights(self, version: int, digest: str | None) -> None:
        """Follow a set that another process pushed to the engines behind the inner generator.

        Raises:
            GenerationError: when the inner generator has its engine to itself.
        """
        if not isinstance(self._inner, FollowsWeights):
            raise GenerationError(
                f"{type(self._inner).__name__} does not share its engine, so no other client can "
                "push weights to it; call load_weights"
            )
        with self._lock.change():
            self._inner.expect_weights(version, digest)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        """Decode one answer a prompt, as the inner generator does.

        Raises:
            GenerationError: from the inner generator.
            SetupError: when the cache file cannot be used.
        """
        asked = _sampling_key(sampling)
        return self._answer(
            [("generate", prompt.token_ids, asked) for prompt in prompts],
            lambda chunk: self._inner.generate([prompts[i] for i in chunk], sampling),
            _generation,
        )

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        """Teacher-forced log p(answer | prompt), as the inner generator gives it.

        Raises:
            GenerationError: from the inner generator.
            SetupError: when the cache file cannot be used.
        """
        check_answers(prompts, answers)
        return self._answer(
            [("score", p.token_ids, list(a)) for p, a in zip(prompts, answers, strict=True)],
            lambda chunk: self._inner.score(
                [prompts[i] for i in chunk], [answers[i] for i in chunk]
            ),
            lambda row, version: Score(*row[1:-1], version),
        )

    def close(self) -> None:
        """Close the inner generator; what is stored stays."""
        self._inner.close()

    def _answer(
        self,
        requests: list[Request],
        compute: Callable[[list[int]], Sequence[Result | GenerationError]],
        restore: Callable[[Row, int], Result],
    ) -> list[Result | GenerationError]:
        with self._lock.call():
            identity, version = self._inner.identity, self._inner.version
            keys = [_key(identity, request) for request in requests]
            rows, errors = self._rows(keys, version, compute)
        return [errors[k] if k in errors else restore(rows[k], version) for k in keys]

    def _rows(
        self,
        keys: list[bytes],
        version: int,
        compute: Callable[[list[int]], Sequence[Result | GenerationError]],
    ) -> tuple[dict[bytes, Row], dict[bytes, GenerationError]]:
        """Stored and computed results of all keys, and errors; counts tokens of the results."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        rows = self._store.get(list(first))
        errors: dict[bytes, GenerationError] = {}
        computed: set[int] = set()
        missing = [i for i, key in enumerate(keys) if first[key] == i and key not in rows]
        for start in range(0, len(missing), self._chunk_size):
            chunk = missing[start : start + self._chunk_size]
            results = compute(chunk)
            new = []
            for i, result in zip(chunk, results, strict=True):
                if isinstance(result, GenerationError):
                    errors[keys[i]] = result
                else:
                    new.append((keys[i], _row(result, version)))
            self._tokens.num_requests += len(new)
            self._tokens.spent += sum(_num_tokens(row) for _, row in new)
            self._store.put(new)
            rows.update(new)
            computed.update(chunk)
        for i, key in enumerate(keys):
            if i not in computed and keys[i] not in errors:
                self._tokens.saved += _num_tokens(rows[key])
                self._tokens.num_requests += 1
                self._tokens.num_cached += 1
        return rows, errors


def _key(identity: str, request: Request) -> bytes:
    return hashlib.sha256(json.dumps([identity, *request]).encode()).digest()


def _row(result: Generation | Score, version: int) -> Row:
    if result.version != version:
        raise GenerationError(
            f"the generator returned a result of version {result.version} but version {version} "
            "was requested; its weights changed during the call, or it does not tag its results "
            "with the version"
        )
    if result.logp is not None and math.isnan(result.logp):
        raise GenerationError(
            f"the generator returned NaN as the log-probability of {result.num_tokens} tokens; "
            "its weights or number format are broken (try generator.dtype float32)"
        )
    text = result.text if isinstance(result, Generation) else ""
    logp = _NO_LOGP if result.logp is None else result.logp
    return (text, logp, result.num_tokens, result.num_prompt_tokens, result.version)


def _generation(row: Row, version: int) -> Generation:
    text, logp, num_tokens, num_prompt_tokens, _ = row
    found = None if logp == _NO_LOGP else logp
    return Generation(text, found, num_tokens, num_prompt_tokens, version)


def _num_tokens(row: Row) -> int:
    return row[2] + row[3]


def _sampling_key(sampling: Sampling) -> list[Any]:
    seed = sampling.seed if sampling.temperature else None
    return [sampling.max_new_tokens, sampling.temperature, sorted(set(sampling.stop)), seed]


def _way_out(message: str) -> str:
    if any(sign in message for sign in ("full", "No space", "disk I/O", "File too large")):
        return "free space on its disk, then run the same command again: what is stored stays"
    if "locked" in message:
        return f"another process locked it for more than {BUSY_TIMEOUT_S:.0f} s; try again"
    if "not a database" in message or "malformed" in message:
        return "the file is damaged; delete it and it will be filled anew"
    return "check that its folder exists and can be written"
