"""Adapts a trainer of your own and checks that it keeps the contract of `Trainer`.

It is a class or function `package.module:name` with whichever it wants of `context`, a
`TrainerContext`, and options of its own, and is or makes a `rlrag.training.trainer.Trainer`.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from rlrag import plugins
from rlrag.config import OwnTrainerConfig
from rlrag.errors import ConfigError, RlragError, TrainerError
from rlrag.runs.checkpoints import WEIGHTS
from rlrag.training.distributed import workers
from rlrag.training.trainer import Files, Metrics, Trainer, TrainerContext

logger = logging.getLogger(__name__)


class PluginTrainer(Trainer):
    """Passes every call on to the trainer that `algorithm.name` names.

    What that one gives back is checked, what it raises is named, and the tokens of its steps are
    counted.

    Args:
        context: What it is built from.

    Raises:
        ConfigError: when it cannot be made, or is no `Trainer`.
    """

    def __init__(self, context: TrainerContext) -> None:
        algorithm = context.config.algorithm
        assert isinstance(algorithm, OwnTrainerConfig)
        self._context = context
        self._who = f"trainer {algorithm.name!r}"
        with torch.random.fork_rng(devices=[]):  # equal weights on all workers, whatever it draws
            torch.manual_seed(context.config.seed)
            part = plugins.make("trainer", algorithm.name, algorithm.options, context=context)
        if not isinstance(part, Trainer):
            raise ConfigError(
                f"{self._who} returned a {type(part).__name__}, which is not a Trainer; make it "
                "a subclass of rlrag.training.trainer.Trainer"
            )
        if not isinstance(getattr(part, "num_steps", None), int):
            raise ConfigError(
                f"{self._who} has no integer num_steps, the number of steps of the run; set it"
            )
        self.part = part
        self.num_steps, self.before, self.generator = part.num_steps, part.before, part.generator

    def may_pause(self, step: int) -> bool:
        """Pass it on."""
        with self._blamed("may_pause"):
            return self.part.may_pause(step)

    def asks_generator(self, step: int) -> bool:
        """Pass it on."""
        with self._blamed("asks_generator"):
            return self.part.asks_generator(step)

    def warm_start(self) -> None:
        """Pass it on."""
        with self._blamed("warm_start"):
            self.part.warm_start()

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Pass it on and count the tokens.

        Raises:
            TrainerError: when it failed, or a metric is no finite number.
        """
        before = self._context.num_tokens()
        with self._blamed(f"step {step + 1}"):
            metrics = self.part.step(step, pauses_after)
        self._check_numbers(f"step {step + 1}", metrics)
        spent = torch.from_numpy(self._context.num_tokens() - before)
        names = ("generator_tokens_spent", "generator_tokens_saved")
        counted = dict(zip(names, self._context.workers.sum(spent).tolist(), strict=True))
        return {**counted, **metrics}

    def validate(self, step: int) -> Metrics:
        """Pass it on.

        Raises:
            TrainerError: when it failed, a metric is no finite number, or `best_by` is missing.
        """
        with self._blamed("validate"):
            metrics = self.part.validate(step)
            if metrics:
                self.best_by = self.part.best_by
        self._check_numbers("validate", metrics)
        if metrics and self.best_by not in metrics:
            raise self._broken("validate", f"gave no {self.best_by!r}, which best_by names")
        return metrics

    def tensors(self) -> Files:
        """Pass it on.

        Raises:
            TrainerError: when it failed, gave something else, or lacks the weights of a part.
        """
        with self._blamed("tensors"):
            files = self.part.tensors()
        if not isinstance(files, Mapping) or not all(
            isinstance(tensors, Mapping)
            and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
            for tensors in files.values()
        ):
            raise self._broken("tensors", "gave something else than tensors by file and name")
        for part in self._context.config.algorithm.parts:
            if WEIGHTS[part] not in files:
                raise self._broken(
                    "tensors", f"gave no file {WEIGHTS[part]!r}, the weights of the {part}"
                )
        return files

    def load(self, files: Files) -> None:
        """Pass it on."""
        with self._blamed("load"):
            self.part.load(files)

    def resume(self, step: int, files: Files, first: Files) -> None:
        """Pass it on."""
        with self._blamed("resume"):
            self.part.resume(step, files, first)

    def close(self) -> None:
        """Pass it on."""
        with self._blamed("close"):
            self.part.close()

    def _check_numbers(self, method: str, metrics: Any) -> None:
        """Refuse what `metrics.jsonl` and trackers cannot take; `failures` are texts."""
        if not isinstance(metrics, dict):
            raise self._broken(method, f"gave a {type(metrics).__name__}, no dict of numbers")
        for name, value in metrics.items():
            if name == "failures":
                continue
            if not isinstance(name, str) or not isinstance(value, int | float):
                kind = type(value).__name__
                raise self._broken(
                    method, f"gave {name!r} as a {kind}, no number; use float(...) or .item()"
                )
            if not math.isfinite(value):
                raise self._broken(method, f"gave {name!r} as {value}, which is not finite")

    @contextmanager
    def _blamed(self, method: str) -> Iterator[None]:
        """Name the trainer in what it raises.

        A sum over the workers fails where another one died, which Ray Train mends.
        """
        try:
            yield
        except RlragError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if any(frame.filename == workers.__file__ for frame in frames):
                raise
            logger.info("%s failed in %s", self._who, method, exc_info=error)
            raise self._broken(method, f"failed with {type(error).__name__}: {error}") from error

    def _broken(self, method: str, what: str) -> TrainerError:
        return TrainerError(
            f"{self._who}: {method} {what}; fix it and run the same command, which continues "
            "from the last checkpoint (rlrag.testing.check_trainer checks what a trainer must "
            "do)"
        )
