"""Loads a new bundle on all replicas, checks it and assigns its role.

The check asks the bundle's own golden questions, through the same parts as any request, and
compares answers and picks with those that the run's evaluation recorded. Other software or hardware
may round another way and flip a word here and there, so `golden_share` of them must agree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlrag.bundle_files import GoldenQuestion, read_bundle
from rlrag.errors import CheckpointError, GeneratorTimeoutError, RequestError, RlragError
from rlrag.serving.records import Decoding, Filters, Routing, ServedPipeline
from rlrag.serving.versions.registry import ROLES, Report, VersionRegistry, Wanted

logger = logging.getLogger("rlrag.serve")

_POLL_S = 0.2
_RETRY_S = 10.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of loading a bundle.

    Attributes:
        start_timeout_s: Longest wait for all replicas to load it.
        golden_timeout_s: Longest wait for all its golden answers.
        golden_share: Part of the golden questions that must be answered as recorded.
    """

    start_timeout_s: float
    golden_timeout_s: float = 300.0
    golden_share: float = 0.9


class _GoldenError(CheckpointError):
    """A bundle answers its golden questions otherwise than recorded."""


class Director:
    """Changes which versions serve, one change at a time.

    Args:
        path: Bundle to start with, unless the state file of an earlier start from it says more.
        state_dir: Folder of that file.
        bounds: Of loading.
        pipeline: Asks the parts.

    Raises:
        CheckpointError: when the bundle or the state file is damaged.
    """

    def __init__(
        self,
        path: str,
        state_dir: Path,
        bounds: Bounds,
        pipeline: ServedPipeline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        version = read_bundle(Path(path)).version
        self._registry = VersionRegistry(
            version, path, state_dir / f"serving-{version}.json", clock
        )
        self._bounds = bounds
        self._pipeline = pipeline
        self._clock = clock
        self._changing = asyncio.Lock()

    def hear(self, report: Report) -> Wanted:
        """Take a replica's report and say what it must hold."""
        return self._registry.hear(report)

    async def check_first(self, is_own_corpus: bool) -> None:
        """Ask the version that the service starts with its golden questions.

        Nothing is answered before. Where the answers are other than recorded, that is logged, and
        the service waits for another bundle; one that cannot be asked is asked again.

        Args:
            is_own_corpus: Whether the bundle's own corpus is searched. Of another one nothing was
                recorded.
        """
        while not self._registry.checked:
            version = self._registry.routing.active
            path = self._registry.bundles[version]
            try:
                files = await asyncio.to_thread(read_bundle, Path(path))
                await self._loaded_everywhere(version, path)
                if is_own_corpus:
                    await self._check_golden(version, files.golden)
                else:
                    logger.warning(
                        "the golden questions of version %s are not checked, because the "
                        "service uses another corpus than the bundle",
                        version,
                    )
            except _GoldenError as error:
                logger.error("the service cannot start: %s", error)
                return
            except RlragError as error:
                logger.error("the first bundle cannot be checked, trying again: %s", error)
                await asyncio.sleep(_RETRY_S)
            else:
                self._registry.checked = True

    async def load(self, path: str, role: str, share: float) -> Routing:
        """See `VersionDesk.load`; returns the new routing.

        Raises:
            RequestError: when the role or share is impossible, or another bundle is being loaded.
            CheckpointError: when the bundle is damaged, cannot be loaded everywhere, or answers its
                golden questions otherwise than recorded, or its role cannot be kept on disk. What
                served goes on serving.
        """
        _check_role(role, share)
        if self._changing.locked():
            raise RequestError("another bundle is being loaded; wait until it is finished")
        async with self._changing:
            place = await asyncio.to_thread(_place_of, path)
            files = await asyncio.to_thread(read_bundle, place)
            version, routing = files.version, self._registry.routing
            if role != "active" and version == routing.active:
                raise RequestError(f"version {version} is active already; it cannot be the {role}")
            self._registry.propose(version, str(place))
            try:
                await self._loaded_everywhere(version, str(place))
                await self._check_golden(version, files.golden)
                return self._registry.assign(version, role, share)
            except BaseException:
                self._registry.abandon()
                raise

    def drop(self, role: str) -> Routing:
        """End the canary or the shadow.

        Raises:
            RequestError: when it is another role.
            CheckpointError: when its end cannot be kept on disk; it then goes on.
        """
        if role not in ("canary", "shadow"):
            raise RequestError(f"role {role!r} cannot be ended; it must be canary or shadow")
        return self._registry.drop(role)

    async def _loaded_everywhere(self, version: str, path: str) -> None:
        end = self._clock() + self._bounds.start_timeout_s
        while missing := self._registry.waiting_for(version):
            problem = self._registry.failure(version)
            if problem is not None:
                raise CheckpointError(f"bundle {path} could not be loaded by {problem}")
            if self._clock() > end:
                raise CheckpointError(
                    f"bundle {path} was not loaded within {self._bounds.start_timeout_s:.0f} s "
                    f"by {', '.join(missing)}; raise start_timeout_s or check their logs"
                )
            await asyncio.sleep(_POLL_S)

    async def _check_golden(self, version: str, golden: tuple[GoldenQuestion, ...]) -> None:
        if not golden:
            logger.warning("version %s has no golden questions; it is not checked", version)
            return
        try:
            async with asyncio.timeout(self._bounds.golden_timeout_s):
                found = await asyncio.gather(*(self._agrees(version, one) for one in golden))
        except TimeoutError as error:
            raise GeneratorTimeoutError(
                f"version {version} did not answer its golden questions within "
                f"{self._bounds.golden_timeout_s:.0f} s; the previous version stays active"
            ) from error
        num_right = sum(found)
        if num_right < self._bounds.golden_share * len(golden):
            wrong = golden[found.index(False)]
            raise _GoldenError(
                f"version {version} reproduces only {num_right} of {len(golden)} golden answers; "
                f"first mismatch: {wrong.question!r}; it was trained with another corpus, index or "
                "generator than this service has"
            )

    async def _agrees(self, version: str, golden: GoldenQuestion) -> bool:
        question = golden.question
        retrieved = await self._pipeline.retrieve(version, question, None, Filters())
        picked = await self._pipeline.select(version, question, retrieved, None, False)
        passages = picked.passages(retrieved.passages)
        if tuple(passage.id for passage in passages) != golden.passage_ids:
            return False
        pieces = self._pipeline.generate(version, question, passages, Decoding())
        text = "".join([piece.text async for piece in pieces])
        return text.strip() == golden.answer


def _place_of(path: str) -> Path:
    """Where a bundle lies itself, so that a link which is moved later moves no version.

    Raises:
        CheckpointError: when the path cannot be followed.
    """
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"bundle {path!r} cannot be found ({error}); give the bundle directory of a finished "
            "run"
        ) from error


def _check_role(role: str, share: float) -> None:
    if role not in ROLES:
        raise RequestError(f"role {role!r} is unknown; it must be one of {', '.join(ROLES)}")
    if role == "canary" and not 0 < share <= 1:
        raise RequestError(f"share is {share}; give a canary a share above 0 and at most 1")
