"""Reports metrics to the terminal, log files and experiment trackers.

On a terminal one line is redrawn; elsewhere each step is one short line. What libraries have to say
goes to a file, `json_logs`, so that neither is disturbed. A tracker that fails is dropped with one
line and never ends a run: the metrics are in their file whatever happens to it.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from rlrag import json_logs
from rlrag.errors import SetupError
from rlrag.evaluation.table import in_short
from rlrag.runs import log_files as run_logs
from rlrag.runs.prometheus import PrometheusLog, numbers_of

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_JOIN_TIMEOUT_S = 10.0


class MetricsConsumer(Protocol):
    """Something that wants the metrics of every step."""

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step, in order."""
        ...

    def close(self) -> None:
        """Flush what is pending."""
        ...


LEGEND = (
    "EM and F1: exact answers and word overlap in the last validation, 0 to 1; reward: mean over "
    "the selections drawn; ESS: how many selections of a question carry weight in the update; "
    "same: share of questions whose selections all got the same reward, which teach nothing; "
    "/s: selections rewarded a second; left: time to the last step, without the final evaluation"
)
"""What the columns of a `ProgressLine` mean."""


class ProgressLine:
    """Step, EM and F1, reward, ESS, selections a second and the time left, below their legend.

    Where the number of steps is not known there is no time left.
    """

    def __init__(self, num_steps: int | None, stream: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._validated: dict[str, float] = {}
        self._first: tuple[float, float] | None = None

    def update(self, metrics: Mapping[str, float]) -> None:
        """Draw or print one line."""
        if self._first is None:
            self._stream.write(f"{LEGEND}\n")
        text = self._line(metrics, time.monotonic())
        self._stream.write(f"\r\x1b[2K{text}" if self._live else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the cursor on a new line."""
        if self._live:
            self._stream.write("\n")
            self._stream.flush()

    def _line(self, metrics: Mapping[str, float], now: float) -> str:
        step = metrics["step"]
        parts = [f"step {step:.0f}" + (f"/{self._num_steps}" if self._num_steps else "")]
        for label, key in (("EM", "validation/em"), ("F1", "validation/f1")):
            if key in metrics:
                self._validated[label] = metrics[key]
        parts += [f"{label} {in_short(value)}" for label, value in self._validated.items()]
        for label, key in (("reward", "reward"), ("ESS", "ess")):
            if key in metrics:
                parts.append(f"{label} {metrics[key]:.2f}")
        if "zero_signal_share" in metrics:
            parts.append(f"same {in_short(metrics['zero_signal_share'])}")
        if "rollouts_per_s" in metrics:
            parts.append(f"{metrics['rollouts_per_s']:.1f}/s")
        if self._first is None:
            self._first = (step, now)
        elif self._num_steps and step > self._first[0]:
            pace = (now - self._first[1]) / (step - self._first[0])
            minutes, seconds = divmod(round(pace * (self._num_steps - step)), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)


class TensorBoardLog:
    """Scalars for TensorBoard below the run's `logs/`."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Write one point a metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        """Flush to disk."""
        self._writer.close()


class WandbLog:
    """Metrics for Weights & Biases."""

    def __init__(self, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SetupError("training.loggers names wandb; install the extra 'wandb'") from error
        self._run = wandb.init(project="rlrag", dir=str(directory))

    def update(self, metrics: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        """End the tracked run."""
        self._run.finish()


class MlflowLog:
    """Metrics for MLflow."""

    def __init__(self, directory: Path) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise SetupError("training.loggers names mlflow; install the extra 'mlflow'") from error
        self._mlflow = mlflow
        mlflow.start_run(run_name=directory.parent.name)

    def update(self, metrics: Mapping[str, float]) -> None:
        """Log one step."""
        self._mlflow.log_metrics(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        """End the tracked run."""
        self._mlflow.end_run()


_LOGS: dict[str, Callable[[Path], MetricsConsumer]] = {
    "tensorboard": TensorBoardLog,
    "wandb": WandbLog,
    "mlflow": MlflowLog,
    "prometheus": PrometheusLog,
}


@contextmanager
def consumers(
    names: Sequence[str], directory: Path, num_steps: int | None
) -> Iterator[list[MetricsConsumer]]:
    """The progress line and the named trackers, closed at the end of the block.

    One that cannot be closed is named on stderr.

    Raises:
        SetupError: before the block, when the library of a tracker is not installed, or the address
            for Prometheus cannot be listened on.
    """
    with ExitStack() as stack:
        found: list[MetricsConsumer] = [ProgressLine(num_steps)]
        found += [_LOGS[name](directory) for name in names]
        for consumer in found:
            stack.callback(_close, consumer)
        yield found


def _close(consumer: MetricsConsumer) -> None:
    try:
        consumer.close()
    except Exception as error:  # noqa: BLE001 - a tracker raises what its library does
        _say_failed(consumer, error, "could not be closed and may lack the last steps")


def _update(consumer: MetricsConsumer, metrics: Mapping[str, float]) -> bool:
    """False when the consumer failed and gets no more."""
    try:
        consumer.update(metrics)
    except Exception as error:  # noqa: BLE001 - a tracker raises what its library does
        _say_failed(consumer, error, f"is dropped from step {metrics['step']:.0f} on")
        return False
    return True


def _say_failed(consumer: MetricsConsumer, error: Exception, consequence: str) -> None:
    name = type(consumer).__name__
    reason = " ".join(str(error).split())
    logger.info("%s %s", name, consequence, exc_info=error)
    _say(f"{name} {consequence}: {type(error).__name__}: {reason}; metrics.jsonl has every step")


def _say(text: str) -> None:
    """One line on stderr, in the place of a live line."""
    with suppress(OSError):  # stderr may be what failed; then there is nobody left to tell
        sys.stderr.write(f"\r\x1b[2K{text}\n" if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()


@contextmanager
def following(path: Path, found: Sequence[MetricsConsumer]) -> Iterator[None]:
    """Feed every line that is appended to a metrics file, from now to the end of the block.

    The learner may run in another process; the file is all that the two share. A restart of the
    learner truncates the file and repeats some steps: those are not fed twice. A consumer that
    raises is named on stderr and gets no more; the others do. The texts of alarms go to stderr
    alone, also those that a repeated step raises anew; consumers get the number 1 for each.
    """
    stop = threading.Event()
    before = _whole_lines(path)
    seen = max((int(line["step"]) for line in before), default=-1)
    told = {alarm for line in before for alarm in line.get("alarms", {}).items()}
    run_logs.note_step(seen if before else None)

    def feed() -> None:
        last, working = seen, list(found)
        while True:
            ending = stop.is_set()
            for record in _whole_lines(path):
                for name, text in record.get("alarms", {}).items():
                    if (name, text) not in told:
                        told.add((name, text))
                        _say(f"step {record['step']:.0f}: alarm {name}: {text}")
                if record["step"] > last:
                    last = int(record["step"])
                    run_logs.note_step(last)
                    metrics = numbers_of(record)
                    working = [consumer for consumer in working if _update(consumer, metrics)]
            if ending:
                return
            stop.wait(_POLL_S)

    thread = threading.Thread(target=feed, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_JOIN_TIMEOUT_S)
        if thread.is_alive():
            _say(
                f"a tracker did not take the last steps within {_JOIN_TIMEOUT_S:g} s; "
                "metrics.jsonl has every step"
            )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except FileNotFoundError:  # before the first step
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


@contextmanager
def library_chatter_in(path: Path) -> Iterator[None]:
    """Send what libraries log and warn of to a file, and draw none of their progress bars.

    Of this package, warnings also go to the terminal. The file's lines name the run whose `logs/`
    it lies in; elsewhere the name of the file stands for the run.
    """
    import torch  # noqa: F401  attaches handlers of its own, as transformers does
    from transformers.utils import logging as transformers_logging

    inside = path.absolute().parent
    run = run_logs.run_name(inside.parent) if inside.name == "logs" else path.stem
    to_terminal = logging.StreamHandler()
    to_terminal.setLevel(logging.WARNING)
    to_terminal.addFilter(_is_for_people)
    with (
        json_logs.logging_to([json_logs.log_file(path, run, "driver"), to_terminal]),
        ExitStack() as stack,
    ):
        if transformers_logging.is_progress_bar_enabled():
            stack.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
        yield


@contextmanager
def private_library_chatter(program: str) -> Iterator[None]:
    """`library_chatter_in` a file that no other user can read, foresee or put a link at.

    For programs that have no directory of their own. The file is deleted when the block ends well;
    otherwise it stays, and a line on stderr says where.

    Raises:
        SetupError: when no temporary directory can be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{program}-"))
    except OSError as error:
        raise SetupError(
            f"cannot create a temporary directory for the log: {error.strerror or error}; free "
            "space, or choose another directory with the environment variable TMPDIR"
        ) from error
    path = folder / f"{program}.log"
    try:
        with library_chatter_in(path):
            yield
    except BaseException:
        _say(f"what libraries said is in {path}")
        raise
    shutil.rmtree(folder, ignore_errors=True)  # the work is done, whatever became of its log


def _is_for_people(record: logging.LogRecord) -> bool:
    """Ours, save the traceback of what ends the program, which says so itself."""
    ours = record.name.split(".")[0] in {"rlrag", "envs", "jobs"}
    return ours and record.name != json_logs.__name__
