"""Exports a run's newest metrics to Prometheus.

A metric is called `rlrag_` and its name in `metrics.jsonl`, `validation/em` for example
`rlrag_validation_em`, and has the labels `run` and `recipe`. It keeps its last value while steps
come without it. What adds up over a run, ending in `_total`, is a counter and the rest are gauges;
alarms are counted by name in `rlrag_alarms_total`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrag.errors import SetupError
from rlrag.runs.directory import RunDirectory
from rlrag.runs.log_files import run_name

if TYPE_CHECKING:
    from prometheus_client import Metric

_ALARM = "alarms/"
_JOIN_TIMEOUT_S = 10.0


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of `metrics.jsonl` without texts; an alarm that it raises is the number 1.

    Example:
        >>> numbers_of({"step": 7, "alarms": {"collapse": "one selection has all the weight"}})
        {'step': 7, 'alarms/collapse': 1.0}
    """
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return numbers | {f"{_ALARM}{name}": 1.0 for name in record.get("alarms", {})}


class PrometheusLog:
    """Serves the newest metrics of a run while it trains."""

    def __init__(self, directory: Path) -> None:
        """Start to serve what is recorded so far.

        Args:
            directory: The run's `logs/`.

        Raises:
            SetupError: when the client library is missing, or the address cannot be listened on.
        """
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise SetupError(
                "training.loggers names prometheus; install the extra 'prometheus'"
            ) from error
        run_dir = RunDirectory(directory.parent)
        config = run_dir.read_config()
        self._labels = {"run": run_name(run_dir.path), "recipe": config.recipe}
        self._metrics: dict[str, tuple[str, float]] = {}
        self._alarms: Counter[str] = Counter()
        for record in run_dir.read_metrics():
            self.update(numbers_of(record))
        registry = CollectorRegistry()
        registry.register(self)
        host, port = config.training.metrics_host, config.training.metrics_port
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise SetupError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}; choose "
                "another training.metrics_port (0 uses any free one), or another "
                "training.metrics_host"
            ) from error
        self.port = self._server.server_port
        place = f"[{host}]" if ":" in host else host
        print(f"metrics at http://{place}:{self.port}/metrics", file=sys.stderr, flush=True)

    def update(self, metrics: Mapping[str, float]) -> None:
        """Serve these values from now on.

        Raises:
            ValueError: when two metrics have the same name for Prometheus.
        """
        newest = dict(self._metrics)
        alarms = self._alarms.copy()
        for metric, value in metrics.items():
            if metric.startswith(_ALARM):
                alarms[metric.removeprefix(_ALARM)] += 1
                continue
            name = "rlrag_" + re.sub(r"\W", "_", metric, flags=re.ASCII)
            known, _ = newest.get(name, (metric, value))
            if known != metric:
                raise ValueError(
                    f"the metrics {known} and {metric} would both be exported as {name}; rename one"
                )
            newest[name] = metric, value
        self._metrics, self._alarms = newest, alarms  # a reader gets a whole step or none of it

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for when it is read."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels, values = list(self._labels), list(self._labels.values())
        for name, (metric, value) in self._metrics.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, f"{metric} of the newest step that has it.", labels=labels)
            family.add_metric(values, value)
            yield family
        alarms = CounterMetricFamily(
            "rlrag_alarms", "Alarms that were raised.", labels=[*labels, "alarm"]
        )
        for alarm, count in self._alarms.items():
            alarms.add_metric([*values, alarm], count)
        yield alarms

    def close(self) -> None:
        """Stop to listen."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_JOIN_TIMEOUT_S)
