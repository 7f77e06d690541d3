"""A run's newest metrics over HTTP, and refusals before anything is trained."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from loop_runs import changed
from prometheus_client.parser import text_string_to_metric_families

from rlrag.config import RunConfig
from rlrag.errors import SetupError
from rlrag.runs.directory import RunDirectory
from rlrag.runs.prometheus import PrometheusLog
from rlrag.runs.reporting import consumers, following

CONFIG = changed(RunConfig(recipe="small"), training={"metrics_port": 0})


@pytest.fixture
def run_dir(tmp_path) -> RunDirectory:
    return claimed(tmp_path / "nq")


def claimed(path, config: RunConfig = CONFIG) -> RunDirectory:
    directory = RunDirectory(path)
    directory.claim(config)
    return directory


def scraped(port: int) -> dict[str, tuple[str, dict[str, str], float]]:
    """Kind, labels and value of each sample."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    samples = [
        (family.type, sample)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    found = {sample.name: (kind, sample.labels, sample.value) for kind, sample in samples}
    assert len(found) == len(samples)
    return found


def test_the_newest_value_of_each_metric_is_served_until_the_end(run_dir, capsys):
    with consumers(["prometheus"], run_dir.logs, 10) as (_, log):
        assert isinstance(log, PrometheusLog)
        assert capsys.readouterr().err == f"metrics at http://127.0.0.1:{log.port}/metrics\n"
        assert scraped(log.port) == {}
        with following(run_dir.metrics, [log]):
            run_dir.append_metrics(
                {"step": 0, "validation/em": 0.25, "generator_tokens_total": 70.0}
            )
            run_dir.append_metrics({"step": 1, "generator_tokens_total": 90.0, "ess": 1.5})
        labels = {"run": "nq", "recipe": "small"}
        assert scraped(log.port) == {
            "rlrag_step": ("gauge", labels, 1.0),
            "rlrag_validation_em": ("gauge", labels, 0.25),
            "rlrag_generator_tokens_total": ("counter", labels, 90.0),
            "rlrag_ess": ("gauge", labels, 1.5),
        }
    with pytest.raises(urllib.error.URLError):
        scraped(log.port)


def test_a_continued_run_serves_what_was_recorded_and_counts_its_alarms(run_dir):
    run_dir.append_metrics({"step": 0, "ess": 2.0})
    run_dir.append_metrics({"step": 1, "alarms": {"collapse": "one selection"}})
    with (
        consumers(["prometheus"], run_dir.logs, 10) as (_, log),
        following(run_dir.metrics, [log]),
    ):
        assert isinstance(log, PrometheusLog)
        found = scraped(log.port)
        assert found["rlrag_ess"][2] == 2.0
        labels = {"run": "nq", "recipe": "small", "alarm": "collapse"}
        assert found["rlrag_alarms_total"] == ("counter", labels, 1.0)


def test_alarms_are_counted_by_name(run_dir):
    log = PrometheusLog(run_dir.logs)
    for step in range(3):
        log.update({"step": float(step), "alarms/collapse": 1.0})
    (alarms,) = [family for family in log.collect() if family.name == "rlrag_alarms"]
    assert [(sample.labels["alarm"], sample.value) for sample in alarms.samples] == [
        ("collapse", 3.0)
    ]
    log.close()


def test_two_metrics_of_one_name_are_refused_and_the_last_good_step_stays(run_dir):
    log = PrometheusLog(run_dir.logs)
    log.update({"step": 1.0, "reward/std": 0.5})
    with pytest.raises(
        ValueError, match="reward/std and reward_std would both be exported as rlrag_reward_s"
    ):
        log.update({"step": 2.0, "reward_std": 0.1})
    found = scraped(log.port)
    assert (found["rlrag_step"][2], found["rlrag_reward_std"][2]) == (1.0, 0.5)
    log.close()


def test_a_taken_port_ends_the_run_before_it_begins(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run_dir = claimed(tmp_path / "nq", changed(CONFIG, training={"metrics_port": port}))
        with (
            pytest.raises(SetupError, match=rf"on 127\.0\.0\.1:{port}: .*; choose another"),
            consumers(["prometheus"], run_dir.logs, 10),
        ):
            raise AssertionError("the block must not start")


def test_a_host_that_is_not_of_this_machine_is_refused(tmp_path):
    elsewhere = changed(CONFIG, training={"metrics_host": "192.0.2.1"})
    with pytest.raises(SetupError, match=r"cannot serve metrics on 192\.0\.2\.1:0: .*metrics_host"):
        PrometheusLog(claimed(tmp_path / "nq", elsewhere).logs)


def test_the_port_of_a_turn_is_free_for_the_next(tmp_path, unused_port):
    config = changed(CONFIG, training={"metrics_port": unused_port})
    for turn in ("1-retriever", "1-selection"):
        run_dir = claimed(tmp_path / "nq" / "rounds" / turn, config)
        log = PrometheusLog(run_dir.logs)
        log.update({"step": 0.0})
        assert scraped(unused_port)["rlrag_step"][1]["run"] == f"nq/{turn}"
        log.close()
