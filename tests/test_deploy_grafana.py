"""Every metric and label that the dashboards in deploy/grafana/ ask for is exported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from loop_runs import changed, co_training
from loop_runs import start as start_joint
from openrag_runs import make_task, openrag_config
from openrag_runs import start as start_retriever
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import save_tiny_encoder

from rlrag.config import RunConfig
from rlrag.runs.directory import RunDirectory
from rlrag.runs.prometheus import PrometheusLog
from rlrag.serving.http.metrics import Metrics
from rlrag.serving.records import Routing

FOLDER = Path(__file__).parents[1] / "deploy" / "grafana"
FUNCTIONS = {"sum", "rate", "deriv", "histogram_quantile"}
BY_PROMETHEUS = {"job", "instance"}

Exported = Mapping[str, set[str]]
"""The labels of each name."""


def dashboard(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def exported(families: Iterable[Metric]) -> Exported:
    return {
        sample.name: set(sample.labels) | BY_PROMETHEUS
        for family in families
        for sample in family.samples
    }


def expressions(board: dict) -> Iterator[str]:
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found is not None, variable["query"]
            yield f"sum by ({found[2]}) ({found[1]})"


def unknown(expression: str, known: Exported) -> list[str]:
    """Names and labels in an expression that nothing exports."""
    text = re.sub(r'"[^"]*"', "", expression)
    metrics = re.findall(r"\b(rlrag_\w+)(?:\{([^}]*)\})?", text)
    labels = set().union(*(known.get(name, set()) for name, _ in metrics))
    problems = [name for name, _ in metrics if name not in known]
    for name, matchers in metrics:
        asked = set(re.findall(r"(\w+)\s*[=!]", matchers))
        problems += [f"{name}{{{label}}}" for label in asked - known.get(name, set())]
    for grouping in re.findall(r"\bby \(([^)]*)\)", text):
        problems += sorted(set(grouping.split(", ")) - labels)
    rest = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)|\brlrag_\w+", " ", text)
    return problems + sorted(set(re.findall(r"[A-Za-z_]\w*", rest)) - FUNCTIONS)


@pytest.mark.parametrize(
    ("expression", "problems"),
    [
        ('sum by (a) (rate(rlrag_x_total{a="b c"}[5m])) / 2', []),
        ("rlrag_y", ["rlrag_y"]),
        ('rlrag_x_total{b=~"1"}', ["rlrag_x_total{b}"]),
        ("sum by (a, b) (rlrag_x_total)", ["b"]),
        ("rate(up[5m])", ["up"]),
    ],
)
def test_what_nothing_exports_is_found(expression, problems):
    assert unknown(expression, {"rlrag_x_total": {"a"}}) == problems


@pytest.fixture
def recorded(small_config, few_data, model_dir, tmp_path) -> Exported:
    """What a run of selector and generator and one of the retriever serve."""
    joint = co_training(small_config, model_dir, batch_size=12, num_epochs=1)
    start_joint(joint, few_data, tmp_path / "joint").run()
    save_tiny_encoder(tmp_path / "encoder")
    one_epoch = {"offline_epochs": 0, "online_epochs": 1}
    retriever = openrag_config(tmp_path / "cache", tmp_path / "encoder", algorithm=one_epoch)
    retriever = changed(retriever, training={"batch_size": 24})
    start_retriever(retriever, make_task(retriever), tmp_path / "retriever").run()
    return {**served(tmp_path / "joint"), **served(tmp_path / "retriever")}


def served(path: Path) -> Exported:
    run_dir = RunDirectory(path)
    config = RunConfig.from_json(run_dir.config.read_text())
    run_dir.config.write_text(changed(config, training={"metrics_port": 0}).to_json())
    log = PrometheusLog(run_dir.logs)
    log.update({"alarms/collapse": 1.0})
    try:
        return exported(log.collect())
    finally:
        log.close()


def test_training_shows_what_runs_record(recorded):
    problems = {e: p for e in expressions(dashboard("training")) if (p := unknown(e, recorded))}
    assert problems == {}


def test_serving_shows_what_the_service_counts():
    metrics = Metrics()
    metrics.finished("answer", 200, 0.1)
    metrics.stage("total", 0.1)
    metrics.lookup("answers", hit=True)
    metrics.computed(3, 1)
    metrics.prompted(num_shown=1, num_picked=2, num_cut_tokens=7)
    metrics.answered("v1")
    metrics.shadowed("equal")
    metrics.fed_back("reward")
    text = metrics.text(Routing(active="v1")).decode()
    known = exported(text_string_to_metric_families(text))
    problems = {e: p for e in expressions(dashboard("serving")) if (p := unknown(e, known))}
    assert problems == {}


@pytest.mark.parametrize("name", ["training", "serving"])
def test_panels_have_their_places_and_variables_are_defined(name):
    board = dashboard(name)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [
        (x, y)
        for panel in board["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(places)) == len(places), "panels overlap"
    assert max(x for x, _ in places) < 24
    asked = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
    defined = {variable["name"] for variable in board["templating"]["list"]}
    assert asked - {"__rate_interval"} == defined
    assert all(panel["description"] for panel in board["panels"] if panel["type"] != "row")
