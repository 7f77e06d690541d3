from __future__ import annotations

import json

import pytest
from stand_ins import fill_disk

from rlrag.errors import CheckpointError, RequestError
from rlrag.serving.records import Routing
from rlrag.serving.versions.registry import PARTS, SILENT_AFTER_S, Report, VersionRegistry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path, clock) -> VersionRegistry:
    return VersionRegistry("a", "/bundles/a", tmp_path / "serving.json", clock)


def hear_parts(registry: VersionRegistry, *loaded: str) -> None:
    """Each part reports what it holds, once it follows what it was told before."""
    for part in PARTS:
        told = registry.hear(Report(f"{part}-1", part, loaded=loaded)).proposal
        registry.hear(Report(f"{part}-1", part, loaded=loaded, proposal=told))


def ingress(registry: VersionRegistry, epoch: int, name: str = "i1", **in_flight: int):
    return registry.hear(Report(name, "ingress", epoch=epoch, in_flight=in_flight))


def test_a_replica_is_told_what_to_hold_and_what_answers(registry):
    wanted = ingress(registry, -1)
    assert wanted.bundles == {"a": "/bundles/a"}
    assert wanted.routing == Routing("a")
    assert wanted.down == PARTS
    hear_parts(registry, "a")
    assert ingress(registry, 0).down == ()


def test_a_part_that_falls_silent_is_down(registry, clock):
    hear_parts(registry, "a")
    clock.now += SILENT_AFTER_S
    registry.hear(Report("selector-2", "selector", loaded=("a",)))
    assert ingress(registry, 0).down == ("retriever", "generator")


def test_a_candidate_waits_for_every_living_replica(registry, clock):
    hear_parts(registry, "a")
    registry.hear(Report("generator-2", "generator", loaded=("a",)))
    registry.propose("b", "/bundles/b")
    assert ingress(registry, 0).bundles == {"a": "/bundles/a", "b": "/bundles/b"}
    hear_parts(registry, "a", "b")
    assert registry.waiting_for("b") == ["generator generator-2"]
    clock.now += SILENT_AFTER_S  # it died
    hear_parts(registry, "a", "b")
    assert registry.waiting_for("b") == []
    assert registry.routing == Routing("a")


def test_a_part_without_replicas_is_waited_for(registry):
    registry.propose("b", "/bundles/b")
    assert registry.waiting_for("b") == ["a retriever", "a selector", "a generator"]


def test_only_one_candidate_at_a_time(registry):
    registry.propose("b", "/bundles/b")
    with pytest.raises(RequestError, match="version b is being loaded"):
        registry.propose("c", "/bundles/c")


def test_a_failure_names_the_replica_and_its_reason(registry):
    registry.propose("b", "/bundles/b")
    assert registry.failure("b") is None
    told = ingress(registry, 0).proposal
    report = Report("selector-1", "selector", failed={"b": "no such file"}, proposal=told)
    registry.hear(report)
    assert registry.failure("b") == "selector selector-1: no such file"
    registry.abandon()
    assert registry.bundles == {"a": "/bundles/a"}
    registry.propose("b", "/bundles/b")
    registry.hear(report)
    assert registry.failure("b") is None  # that was the last time; now it may be there


def test_a_replica_about_to_drop_a_version_does_not_count_as_holding_it(registry):
    """A version that returns at once: its replicas were told to give it up, and may be at it."""
    ingress(registry, 0)
    registry.propose("b", "/bundles/b")
    hear_parts(registry, "a", "b")
    registry.assign("b", "active", 0.0)
    ingress(registry, 1)
    assert registry.bundles == {"b": "/bundles/b"}
    before = ingress(registry, 1).proposal
    for part in PARTS:
        registry.hear(Report(f"{part}-1", part, loaded=("a", "b"), proposal=before))
    registry.propose("a", "/bundles/a")
    assert len(registry.waiting_for("a")) == len(PARTS)
    for part in PARTS:
        registry.hear(Report(f"{part}-1", part, loaded=("b",), proposal=before))
    assert len(registry.waiting_for("a")) == len(PARTS)
    hear_parts(registry, "a", "b")
    assert registry.waiting_for("a") == []


def test_the_old_version_stays_until_its_last_request_ended(registry):
    ingress(registry, 0, a=2)
    ingress(registry, 0, name="i2")
    registry.propose("b", "/bundles/b")
    assert registry.assign("b", "active", 0.0) == Routing("b", epoch=1)
    assert set(registry.bundles) == {"a", "b"}
    ingress(registry, 1, a=2)
    ingress(registry, 1, name="i2")
    assert set(registry.bundles) == {"a", "b"}  # i1 still works on two
    ingress(registry, 1, b=5)
    assert registry.bundles == {"b": "/bundles/b"}


def test_an_ingress_that_follows_the_old_routing_may_still_begin_requests(registry):
    ingress(registry, 0)
    registry.propose("b", "/bundles/b")
    registry.assign("b", "active", 0.0)
    ingress(registry, 0)
    assert "a" in registry.bundles
    ingress(registry, 1)
    assert "a" not in registry.bundles


def test_an_ingress_that_died_is_not_waited_for(registry, clock):
    ingress(registry, 0, a=1)
    registry.propose("b", "/bundles/b")
    registry.assign("b", "active", 0.0)
    clock.now += SILENT_AFTER_S
    ingress(registry, 1, name="i2")
    assert registry.bundles == {"b": "/bundles/b"}


def test_canary_and_shadow_are_held_promoted_and_dropped(registry):
    registry.propose("b", "/bundles/b")
    registry.assign("b", "canary", 0.25)
    assert registry.routing == Routing("a", canary="b", canary_share=0.25, epoch=1)
    registry.propose("c", "/bundles/c")
    registry.assign("c", "shadow", 0.0)
    assert set(registry.bundles) == {"a", "b", "c"}
    registry.propose("b", "/bundles/b")
    registry.assign("b", "active", 0.0)
    assert registry.routing == Routing("b", shadow="c", epoch=3)
    ingress(registry, 3)
    assert set(registry.bundles) == {"b", "c"}
    registry.drop("shadow")
    ingress(registry, 4)
    assert set(registry.bundles) == {"b"}


def test_a_candidate_outlives_the_end_of_another_version(registry):
    """Somebody ends the shadow while a new bundle is being loaded."""
    registry.propose("b", "/bundles/b")
    registry.assign("b", "shadow", 0.0)
    registry.propose("c", "/bundles/c")
    registry.drop("shadow")
    ingress(registry, 2)
    assert set(registry.bundles) == {"a", "c"}
    assert registry.assign("c", "active", 0.0).active == "c"


def test_a_canary_gets_its_share_of_the_requests():
    routing = Routing("a", canary="b", canary_share=0.25)
    versions = [routing.version_of(f"request-{number}") for number in range(4000)]
    assert versions.count("b") == pytest.approx(1000, abs=100)
    assert versions == [routing.version_of(f"request-{number}") for number in range(4000)]
    assert Routing("a").version_of("request-1") == "a"


def test_a_restarted_registry_goes_on_with_the_same_roles(registry, tmp_path, clock):
    registry.propose("b", "/bundles/b")
    registry.assign("b", "canary", 0.5)
    again = VersionRegistry("a", "/bundles/a", tmp_path / "serving.json", clock)
    assert again.routing == registry.routing
    assert again.bundles == registry.bundles


@pytest.mark.parametrize("text", ["", "{}", '{"routing": {"active": "a"}, "bundles": {}}', "[1]"])
def test_a_damaged_state_file_is_refused(tmp_path, clock, text):
    path = tmp_path / "serving.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="delete it to start"):
        VersionRegistry("a", "/bundles/a", path, clock)


def test_a_change_that_cannot_be_kept_is_not_made(registry, tmp_path, clock, monkeypatch):
    registry.propose("b", "/bundles/b")
    kept = registry.assign("b", "shadow", 0.0)
    message = r"serving\.json cannot be written \(No space left.*\).*another state_dir"
    with monkeypatch.context() as full:
        fill_disk(full, tmp_path / "serving.json")
        with pytest.raises(CheckpointError, match=message):
            registry.drop("shadow")
    assert registry.routing == kept
    again = VersionRegistry("a", "/bundles/a", tmp_path / "serving.json", clock)
    assert again.routing == kept
    assert registry.drop("shadow").shadow is None


def test_a_state_file_that_cannot_be_read_is_named(tmp_path, clock):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for state in (tmp_path / "folder", tmp_path / "file" / "serving.json"):
        with pytest.raises(CheckpointError, match=f"{state}, .* cannot be read .*state_dir"):
            VersionRegistry("a", "/bundles/a", state, clock)


def test_the_state_file_holds_what_has_a_role(registry, tmp_path):
    registry.propose("b", "/bundles/b")
    registry.assign("b", "active", 0.0)
    known = json.loads((tmp_path / "serving.json").read_text())
    assert known["bundles"] == {"b": "/bundles/b"}
