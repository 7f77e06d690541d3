"""Launches a training run, in this process or on Ray Train.

`local` runs the loop in this process. `ray` runs it in Ray Train workers, which reach the generator
through its picklable client, and restarts them when one dies.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlrag.config import RunConfig
from rlrag.errors import GenerationError, PreemptedError, RlragError
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.pipeline import Library, TrainingData, open_library, open_training_data
from rlrag.rewards.composite import RewardModel
from rlrag.runs.directory import RunDirectory
from rlrag.runs.log_files import note_step, worker_log
from rlrag.runs.preemption import ended_between_steps, interruptible
from rlrag.runs.profiling import save_ray_timeline
from rlrag.runs.watchdog import Watchdog
from rlrag.training.distributed.engines import check_engines
from rlrag.training.distributed.workers import SingleWorker, TorchWorkers, Workers
from rlrag.training.dro.trainer import DROTrainer
from rlrag.training.feedback.selections import LoggedData, open_logged_data
from rlrag.training.feedback.trainer import LoggedTrainer
from rlrag.training.jsa.trainer import JSATrainer
from rlrag.training.loop import TrainingLoop
from rlrag.training.openrag.trainer import OpenRAGTrainer
from rlrag.training.plugin import PluginTrainer
from rlrag.training.trainer import Metrics, Trainer, TrainerContext

COLLECTIVE_TIMEOUT_S = 1800
"""Of a sum over all workers, of which some may wait for engines; Ray sees a lost one sooner."""
TRAINERS: Mapping[str, Callable[[TrainerContext], Trainer]] = {
    "dro": DROTrainer,
    "sft": DROTrainer,
    "openrag": OpenRAGTrainer,
    "jsa": JSATrainer,
}
"""By `algorithm.name`, the trainers that learn from questions."""


def open_trainer(context: TrainerContext) -> Trainer:
    """What the configured parts are trained by.

    Raises:
        ConfigError: when a trainer of somebody's own cannot be made.
        CheckpointError: when a retriever is to be trained and its pools are missing or damaged.
    """
    return TRAINERS.get(context.config.algorithm.name, PluginTrainer)(context)


def needs_scores(config: RunConfig) -> bool:
    """Whether training asks the generator how probable golden answers are."""
    if config.algorithm.name == "jsa":
        return True
    if config.algorithm.name == "openrag":
        return config.openrag.labels != "gold"
    return RewardModel(config.reward).needs_score


def train_locally(
    config: RunConfig,
    library: Library,
    data: TrainingData,
    generator: Generator,
    prompts: PromptBuilder,
    run_dir: RunDirectory,
) -> None:
    """Run the loop in this process, without Ray.

    Raises:
        ConfigError: when the generator would not answer as the one that is trained.
    """
    workers = SingleWorker()
    trainer = open_trainer(
        TrainerContext(config, workers, run_dir, library, data, generator, prompts)
    )
    check_engines(config, trainer.generator, generator, data.train, prompts, workers)
    with ended_between_steps(run_dir):
        TrainingLoop(config, trainer, run_dir, workers).run()


def train_on_log(config: RunConfig, data: LoggedData, run_dir: RunDirectory) -> None:
    """Train the selector on the log in the run directory, where the configuration says.

    Ray Train workers read that log themselves.
    """
    if config.training.launcher == "ray":
        train_on_ray(config, None, None, run_dir)
    else:
        workers = SingleWorker()
        trainer = LoggedTrainer(config, data, workers)
        with ended_between_steps(run_dir):
            TrainingLoop(config, trainer, run_dir, workers).run()


@dataclass(frozen=True)
class _WorkerTask:
    """What a Ray Train worker needs; everything else it opens from the shared caches."""

    config: str
    run_dir: str
    folder: str
    generator: CachedGenerator | None
    prompts: PromptBuilder | None


def train_on_ray(
    config: RunConfig,
    generator: CachedGenerator | None,
    prompts: PromptBuilder | None,
    run_dir: RunDirectory,
) -> None:
    """Run the loop in Ray Train workers of the initialised Ray cluster.

    Training on a log needs no generator. The run directory and the cache directory must be the same
    storage on every node. A worker that dies is restarted up to `training.max_failures` times and
    continues from the last checkpoint.

    Raises:
        RlragError: what ended the run in a worker.
        PreemptedError: when this process got a SIGTERM.
    """
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    task = _WorkerTask(config.to_json(), str(run_dir.path), os.getcwd(), generator, prompts)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=config.training.num_workers,
            use_gpu=config.training.worker_gpus > 0,
            resources_per_worker=_resources(config),
            placement_strategy=config.training.worker_placement.upper(),
        ),
        torch_config=TorchConfig(
            # Counts and metrics are summed on the CPU, gradients where the model is.
            backend="cpu:gloo,cuda:nccl" if config.training.worker_gpus else "gloo",
            timeout_s=COLLECTIVE_TIMEOUT_S,
        ),
        run_config=RayRunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=str(run_dir.logs / "ray_train"),
            failure_config=FailureConfig(
                max_failures=config.training.max_failures,
                # Without a limit a cluster that never has room for the workers is waited for
                # without end.
                controller_failure_limit=config.training.max_failures,
            ),
            callbacks=[_final_errors()],
        ),
    )
    with ended_between_steps(run_dir) as is_preempted:
        try:
            with interruptible(), _watched(run_dir):
                trainer.fit()
        except TrainingFailedError as error:
            cause = _cause(error)
            if is_preempted() and isinstance(cause, GenerationError):
                # The signal reached Ray's own processes too.
                raise PreemptedError(
                    f"preempted while Ray ended too ({cause}); run the same command to continue "
                    "from the last checkpoint"
                ) from error
            raise cause from error
    if config.training.profiled_steps:
        save_ray_timeline(run_dir)


def _watched(run_dir: RunDirectory) -> Watchdog:
    """A watchdog for this process, which sees no more of the workers than what they record."""

    def recorded() -> int:
        try:
            return run_dir.metrics.stat().st_size
        except OSError:  # before the first record, or for the moment on shared storage
            return 0

    return Watchdog(
        f"a step in the Ray Train workers, which say more in {run_dir.logs}/worker-*.log",
        sign=recorded,
    )


def _resources(config: RunConfig) -> dict[str, float]:
    resources = {"CPU": config.training.worker_cpus}
    if config.training.worker_gpus:
        resources["GPU"] = config.training.worker_gpus
    return resources


def _worker(settings: dict[Any, Any]) -> None:
    """One Ray Train worker."""
    task: _WorkerTask = settings["task"]
    if os.path.isdir(task.folder):  # Ray Train has left it, and paths may be relative to it
        os.chdir(task.folder)
    run_dir, workers = RunDirectory(Path(task.run_dir)), TorchWorkers()
    with worker_log(run_dir, workers.rank):
        _take_part(task, run_dir, workers)


def _take_part(task: _WorkerTask, run_dir: RunDirectory, workers: Workers) -> None:
    """Open the parts and run the loop."""
    config = RunConfig.from_json(task.config)
    torch.set_num_threads(config.training.worker_threads)  # Ray allows one for less than a CPU
    library = open_library(config)
    trainer: Trainer
    if config.feedback is not None:
        logged = open_logged_data(config, library, run_dir.feedback)
        trainer = LoggedTrainer(config, logged, workers)
    else:
        generator, prompts = task.generator, task.prompts
        assert generator is not None  # only training on a log does without
        assert prompts is not None
        data = open_training_data(config, library)
        trainer = open_trainer(
            TrainerContext(config, workers, run_dir, library, data, generator, prompts)
        )
        check_engines(config, trainer.generator, generator, data.train, prompts, workers)
    TrainingLoop(config, trainer, run_dir, workers, on_step=_report).run()


def _report(metrics: Metrics) -> None:
    """Tell the log of every step and Ray Train of a validated one.

    Its controller takes one report every two seconds, and a worker waits until its report was
    taken.
    """
    import ray.train

    note_step(int(metrics["step"]))
    if any(name.startswith("validation/") for name in metrics):
        ray.train.report({k: v for k, v in metrics.items() if isinstance(v, float | int)})


def _final_errors() -> Any:
    """A Ray Train callback that ends the run at an error of ours.

    Ray Train restarts the workers after any error. One that this package raises on purpose would
    come again; an error in a callback is never retried.
    """
    from ray.train import UserCallback

    class FinalErrors(UserCallback):
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            found = [e for e in worker_exceptions.values() if isinstance(e, RlragError)]
            if found:
                raise type(found[0])("; ".join(dict.fromkeys(str(error) for error in found)))

    return FinalErrors()


def _cause(error: Exception) -> RlragError:
    """The error of ours that ended the run, or one that names what else went wrong."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, RlragError):
        return cause
    failures = getattr(error, "worker_failures", None) or {}
    reasons = "; ".join(f"worker {rank}: {failure}" for rank, failure in failures.items())
    return GenerationError(
        f"training failed on Ray: {reasons or error}; the checkpoints stay, and the same command "
        "continues the run"
    )
