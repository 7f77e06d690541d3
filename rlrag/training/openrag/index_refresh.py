"""Rebuilds the passage index during training with the current encoder.

    step 40    the encoder is saved, and all passages are encoded with it beside training
    step 53    the new index is whole: from this step on every search uses it, and none the old one
    step 80    ...

An index is one version: its vectors come from one set of weights, named by their hash and by the
step that saved them. It lies in a directory with that encoder, so that a run which is stopped goes
on with the version that its checkpoint names, and a refresh that was stopped goes on with the
passages that it had not encoded. Its age is the number of steps since.

Training waits for a refresh only where it is told to. Otherwise the step of the swap depends on the
clock, and two runs of one seed may differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from rlrag.config import RunConfig
from rlrag.data.corpus import Corpus
from rlrag.data.load import corpus_of
from rlrag.errors import CheckpointError, SetupError
from rlrag.files.text import apply_umask
from rlrag.pipeline import retrievers_of
from rlrag.retrieval.trainable.late_parametric import VectorSearch
from rlrag.retrieval.trainable.open import searched_index
from rlrag.retrieval.trainable.protocol import TrainableEncoder
from rlrag.retrieval.tuned import tuned_retrieval
from rlrag.training.distributed.workers import Workers

logger = logging.getLogger(__name__)

_WAIT_S = 5.0
_START_S = 60.0


class Build(Protocol):
    """Has a corpus encoded elsewhere."""

    def __call__(self, config_json: str, place: Path) -> Future[None]:
        """Start to encode the corpus of a configuration with the encoder in `place`."""
        ...

    def close(self) -> None:
        """Begin nothing more, and end what is under way; it goes on where it was."""
        ...


@dataclass(frozen=True)
class IndexVersion:
    """One index: the step whose weights made it, and what is searched."""

    step: int
    index: VectorSearch


class RefreshedIndex:
    """A first stage whose index follows the encoder; implements `FirstStage`.

    All workers search the same version and change to the next in the same step.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        first: VectorSearch,
        directory: Path,
        workers: Workers,
        build: Build,
    ) -> None:
        """Begin with the index that was there before training.

        Args:
            config: The run; `algorithm.refresh_every` is set.
            corpus: Its passages.
            first: The index of the untrained encoder.
            directory: Where versions are kept.
            workers: The first of them saves encoders and has them indexed.
            build: Has the corpus encoded elsewhere.
        """
        self._config = config
        self._corpus = corpus
        self._directory = directory
        self._workers = workers
        self._build = build
        self._first = IndexVersion(0, first)
        self._current = self._first
        self._saved = 0
        self._under_way: tuple[int, Future[None] | None] | None = None

    @property
    def version(self) -> int:
        """The step whose weights made the index; 0 before the first refresh."""
        return self._current.step

    def propose(self, questions: Sequence[str], vectors_BD: np.ndarray, m: int) -> np.ndarray:
        """Corpus rows of shape (B, M), all from the present version."""
        return self._current.index.search_vectors(vectors_BD, m).rows_BK

    def before_step(self, step: int, encoder: TrainableEncoder) -> None:
        """Begin a refresh or take over a finished one; all workers call this together.

        Raises:
            RlragError: what the refresh failed of.
            SetupError: when training waits for it and `algorithm.refresh_timeout_s` has passed.
        """
        every = self._config.openrag.refresh_every
        if every and step and step % every == 0 and self._under_way is None:
            self._under_way = step, self._begin(step, encoder)
        if self._under_way is None:
            return
        number, future = self._under_way
        deadline = time.monotonic() + self._config.openrag.refresh_timeout_s
        while not self._is_done(future):
            if not self._config.openrag.refresh_waits:
                return
            if future is not None and time.monotonic() > deadline:
                raise SetupError(
                    "the passages were not encoded within algorithm.refresh_timeout_s "
                    f"{self._config.openrag.refresh_timeout_s:g}; raise it, refresh less often, "
                    "or let training continue meanwhile with refresh_waits False"
                )
        if future is not None:
            self._check(future)
        self._take(number)

    def version_to_save(self) -> int:
        """The version that a checkpoint must name; older ones than the last checkpoint's go."""
        if self._workers.rank == 0:
            for place in self._directory.glob("step-*"):
                if int(place.name.removeprefix("step-")) < self._saved:
                    shutil.rmtree(place, ignore_errors=True)
        self._saved = self.version
        return self._saved

    @property
    def under_way(self) -> int:
        """The step whose weights a refresh that goes on is made from; 0 where there is none."""
        return self._under_way[0] if self._under_way else 0

    def close(self) -> None:
        """Begin no more refreshes."""
        self._build.close()

    def resume(self, version: int, under_way: int = 0) -> None:
        """Search the version that a checkpoint names, and go on with the refresh that it names.

        Where that refresh has left nothing, on another machine, the next one begins in its turn.

        Raises:
            CheckpointError: when the version is gone.
        """
        self._under_way = None
        if version == 0:
            self._current = self._first
        else:
            self._take(version)
        if not under_way:
            return
        place = self._place(under_way)
        is_there = self._workers.rank == 0 and (place / "encoder").is_dir()
        if self._workers.sum(torch.tensor(float(is_there))).item():
            self._under_way = under_way, self._start(place)
        elif self._workers.rank == 0:
            logger.warning(
                "the index refresh of step %d was stopped because %s is gone; the old index is "
                "used until the next refresh",
                under_way,
                place / "encoder",
            )

    def _begin(self, step: int, encoder: TrainableEncoder) -> Future[None] | None:
        if self._workers.rank:
            return None
        place = self._place(step)
        encoder_dir = place / "encoder"
        # A stopped run may have left it half-written; of the same step it holds the same weights.
        shutil.rmtree(encoder_dir, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        encoder.save_pretrained(encoder_dir)
        apply_umask(encoder_dir)
        return self._start(place)

    def _start(self, place: Path) -> Future[None] | None:
        return None if self._workers.rank else self._build(self._config.to_json(), place)

    def _is_done(self, future: Future[None] | None) -> bool:
        """Whether the index is made, or cannot be; all workers ask together.

        Where training waits, the first worker waits here, for less than the others may wait for it.
        """
        if future is not None and self._config.openrag.refresh_waits:
            wait([future], min(_WAIT_S, self._config.openrag.refresh_timeout_s))
        is_done = future is not None and future.done()
        return bool(self._workers.sum(torch.tensor(float(is_done))).item())

    def _check(self, future: Future[None]) -> None:
        try:
            future.result(0.0)
        except BrokenProcessPool as error:
            raise SetupError(
                "the process that encodes the passages died, possibly because memory ran out; "
                "run the same command to continue from the last checkpoint"
            ) from error

    def _take(self, step: int) -> None:
        self._under_way = None
        place = self._place(step)
        if not (place / "done.json").is_file():
            raise CheckpointError(
                f"the index {place} that the checkpoint was trained with is missing or "
                "incomplete; start again in another --run-dir"
            )
        self._current = IndexVersion(step, open_version(self._config, self._corpus, place))

    def _place(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"


def encode_version(config_json: str, place: Path) -> None:
    """Encode the corpus with `place/encoder` into `place/indexes`, as far as it is not yet."""
    config = RunConfig.from_json(config_json)
    corpus = corpus_of(config)
    open_version(config, corpus, place)
    (place / "done.json").write_text(json.dumps({"num_passages": len(corpus)}) + "\n")


def encode_from(folder: str, config_json: str, place: Path) -> None:
    """`encode_version` in the folder that paths may be relative to."""
    if os.path.isdir(folder):
        os.chdir(folder)
    encode_version(config_json, place)


def open_version(config: RunConfig, corpus: Corpus, place: Path) -> VectorSearch:
    """The index of the encoder in `place/encoder`, built where it is not whole."""
    retrieval = tuned_retrieval(config.retrieval, place / "encoder").model_copy(
        update={"bm25_scores": False}
    )
    if retrieval.kind == "semi_parametric":
        retrieval = retrieval.model_copy(update={"encoder": None})
    return searched_index(retrievers_of(corpus, retrieval, place).primary)


class ProcessBuild:
    """Encodes in one other process of this machine, which stays for the next refresh.

    Not in a thread: while transformers loads a model it changes torch's default number format.
    """

    def __init__(self) -> None:
        self._processes: ProcessPoolExecutor | None = None
        self._pid: Future[int] = Future()

    def __call__(self, config_json: str, place: Path) -> Future[None]:
        """Start to encode."""
        if self._processes is None:
            self._processes = ProcessPoolExecutor(1, get_context("spawn"))
            self._pid = self._processes.submit(os.getpid)
        return self._processes.submit(encode_version, config_json, place)

    def close(self) -> None:
        """End the process, also in the middle of its work: the program's end waits for it."""
        if self._processes is None:
            return
        try:
            pid = self._pid.result(_START_S)
        except (BrokenProcessPool, FutureTimeoutError):  # it died, or never began
            pid = None
        self._processes.shutdown(wait=False, cancel_futures=True)
        self._processes = None
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


class RayBuild:
    """Encodes in Ray tasks; one whose worker dies is tried again and goes on where it was."""

    def __call__(self, config_json: str, place: Path) -> Future[None]:
        """Start to encode."""
        import ray

        task = ray.remote(num_cpus=0, max_retries=3)(encode_from)
        return task.remote(os.getcwd(), config_json, place).future()

    def close(self) -> None:
        """Tasks end with the cluster."""
