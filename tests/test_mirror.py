"""What a run keeps is in its mirror, training never waits for it, and a lost run comes back."""

from __future__ import annotations

import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from loop_runs import StopAfter, changed, start, steps_of, weights
from mirrored_runs import Run, content, mirrored_config
from pydantic import ValidationError

import rlrag.runs.mirror as mirror_module
from rlrag.config import RunConfig
from rlrag.errors import RunDirectoryError, SetupError
from rlrag.files.directories import whole_directory
from rlrag.files.remote import RemoteDirectory
from rlrag.runs.directory import RunDirectory
from rlrag.runs.mirror import Mirror, mirrored
from rlrag.runs.mirror_fetch import fetch_run

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "_POLL_S", 0.01)
    monkeypatch.setattr(mirror_module, "_FIRST_RETRY_S", 0.01)


@pytest.fixture
def far(tmp_path: Path) -> Path:
    return tmp_path / "far"


def config_for(far: Path, **fields) -> RunConfig:
    return mirrored_config(f"file://{far}", **fields)


def mirror_once(run: Run, said: list[str] | None = None) -> None:
    with mirrored(run.config, run.dir, (said if said is not None else []).append):
        pass


def fetched(directory: Path, config: RunConfig) -> tuple[Run, list[str]]:
    """A new run directory after what the mirror holds was fetched."""
    run, said = Run(directory, config), []
    mirror_once(run, said)
    return run, said


def wait_until(holds) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everything_that_a_run_keeps_is_there_at_its_end(tmp_path, far):
    run = Run(tmp_path / "run", config_for(far)).steps_to(3, best=3).steps_to(6, best=3)
    for place in (run.dir.bundle, run.dir.pools):
        with whole_directory(place) as staging:
            (staging / "a.txt").write_text(place.name)
    run.dir.experience.mkdir()
    (run.dir.experience / "worker-0.jsonl").write_text("{}\n")
    (run.dir.indexes / "step-000003").mkdir(parents=True)
    (run.dir.indexes / "step-000003" / "done.json").write_text("{}")
    (run.dir.indexes / "step-000006").mkdir()
    (run.dir.indexes / "step-000006" / "half.bin").write_text("not finished")
    run.dir.evaluation.write_text("{}")
    run.dir.feedback.write_text("sqlite")
    run.dir.sources.write_text("{}")
    run.dir.questions.write_text("{}")
    mirror_once(run)
    expected = content(run.dir.path)
    del expected["indexes/step-000006/half.bin"]
    assert content(far) == expected
    found, said = fetched(tmp_path / "elsewhere", run.config)
    assert content(found.dir.path) == expected
    assert said == [f"fetched checkpoint 6 from file://{far}/"]


def test_checkpoints_arrive_while_the_run_goes_on_and_old_ones_go(tmp_path, far):
    run = Run(tmp_path / "run", config_for(far, keep_every=10)).steps_to(4)
    with mirrored(run.config, run.dir, print):
        for last in (4, 8, 12, 13, 15, 18):
            run.steps_to(last)
            arrived = far / "checkpoints" / f"step-{last:06d}" / "manifest.json"
            wait_until(arrived.exists)
    kept = {f"step-{step:06d}" for step in (0, 12, 15, 18)}
    assert {path.name for path in run.dir.checkpoints.iterdir()} == kept
    assert {path.name for path in (far / "checkpoints").iterdir()} == kept


def test_what_is_replaced_here_is_replaced_there_and_what_goes_here_goes_there(tmp_path, far):
    run = Run(tmp_path / "run", config_for(far)).steps_to(2)
    for step in (2, 4):
        (run.dir.indexes / f"step-{step:06d}").mkdir(parents=True)
        (run.dir.indexes / f"step-{step:06d}" / "done.json").write_text("{}")
    with whole_directory(run.dir.bundle) as staging:
        (staging / "a.txt").write_text("first")
    with mirrored(run.config, run.dir, print):
        wait_until((far / "bundle" / "manifest.json").exists)
        shutil.rmtree(run.dir.indexes / "step-000002")
        with whole_directory(run.dir.bundle) as staging:
            (staging / "a.txt").write_text("second")
    assert (far / "bundle" / "a.txt").read_text() == "second"
    assert content(far) == content(run.dir.path)


def test_file_systems_without_hard_links_are_mirrored_too(tmp_path, far, monkeypatch):
    def refuse(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    run = Run(tmp_path / "run", config_for(far)).steps_to(2)
    mirror_once(run)
    assert content(far) == content(run.dir.path)


class Gated(RemoteDirectory):
    """Storage whose first checkpoint takes until the gate opens."""

    def __init__(self, far: Path) -> None:
        from pyarrow.fs import LocalFileSystem

        super().__init__(LocalFileSystem(), str(far), str(far))
        self.gate = threading.Event()
        self.is_busy = threading.Event()
        self.uploaded: list[str] = []

    def upload_whole(self, name: str, source: Path) -> None:
        self.is_busy.set()
        assert self.gate.wait(WAIT_S)
        super().upload_whole(name, source)
        self.uploaded.append(name.rpartition("-")[2].lstrip("0") or "0")


def test_of_checkpoints_that_wait_the_newest_goes_first_and_dropped_ones_never(tmp_path, far):
    """The one on its way arrives whole, though training has deleted it long since."""
    run = Run(tmp_path / "run", config_for(far)).steps_to(2)
    gated = Gated(far)
    mirror = Mirror(run.config, run.dir, gated)
    mirror.start()
    assert gated.is_busy.wait(WAIT_S)
    for last in (4, 6, 8, 10):
        run.steps_to(last)  # the step that saves waits for nobody
    assert run.store.steps() == [0, 8, 10]
    gated.gate.set()
    assert mirror.finish() == ""
    assert gated.uploaded == ["2", "10", "8", "0"]
    assert {path.name for path in (far / "checkpoints").iterdir()} == {
        f"step-{step:06d}" for step in (0, 8, 10)
    }
    assert not (run.dir.logs / "mirroring").exists()


def test_a_lost_run_continues_as_if_nothing_had_happened(
    small_config, training_data, tmp_path, far
):
    config = changed(small_config, mirror={"uri": f"file://{far}"})
    whole = start(config, training_data, tmp_path / "whole")
    whole.run()
    lost = tmp_path / "run"
    stopped = start(config, training_data, lost, stop_at=7)
    with pytest.raises(StopAfter), mirrored(config, RunDirectory(lost), print):
        stopped.run()
    shutil.rmtree(lost)
    said: list[str] = []
    continued = start(config, training_data, lost)
    with mirrored(config, RunDirectory(lost), said.append):
        continued.run()
    assert said == [f"fetched checkpoint 6 from file://{far}/"]
    assert steps_of(lost) == steps_of(tmp_path / "whole") == steps_of(far)
    found = weights(continued)
    assert all(bool((tensor == found[name]).all()) for name, tensor in weights(whole).items())


def test_what_is_newer_here_stays_and_what_is_newer_there_is_fetched(tmp_path, far):
    config = config_for(far)
    run = Run(tmp_path / "run", config).steps_to(3)
    mirror_once(run)
    copy = tmp_path / "copy"
    shutil.copytree(run.dir.path, copy)
    said: list[str] = []
    mirror_once(run.steps_to(6), said)
    assert said == []
    behind, said = fetched(copy, config)
    assert said == [f"fetched checkpoint 6 from file://{far}/"]
    assert behind.store.steps() == [0, 3, 6]
    assert behind.dir.read_metrics() == run.dir.read_metrics()


def test_nothing_is_fetched_where_the_run_here_is_as_far(tmp_path, far):
    """What was deleted here by hand is made anew, or is not wanted."""
    run = Run(tmp_path / "run", config_for(far)).steps_to(3)
    with whole_directory(run.dir.bundle) as staging:
        (staging / "a.txt").write_text("bundle")
    run.dir.evaluation.write_text("{}")
    mirror_once(run)
    shutil.rmtree(run.dir.bundle)
    run.dir.evaluation.unlink()
    before, said = content(run.dir.path), list[str]()
    mirror_once(run, said)
    assert said == []
    assert content(run.dir.path) == before


def test_a_checkpoint_that_is_damaged_here_comes_back_from_there(tmp_path, far):
    run = Run(tmp_path / "run", config_for(far)).steps_to(3)
    mirror_once(run)
    (run.store.path(3) / "policy.safetensors").write_bytes(b"torn")
    said: list[str] = []
    mirror_once(run, said)
    aside = run.dir.checkpoints / "damaged-step-000003"
    assert said == [
        f"{run.store.path(3)} is damaged and set aside as {aside}",
        f"fetched checkpoint 3 from file://{far}/",
    ]
    assert (aside / "policy.safetensors").read_bytes() == b"torn"
    newest = run.store.load_newest()
    assert newest is not None
    assert (newest.step, newest.damaged) == (3, ())


@pytest.mark.parametrize("harm", ["weights", "manifest", "metrics"])
def test_of_what_is_damaged_there_the_newest_whole_one_is_taken(tmp_path, far, harm):
    run = Run(tmp_path / "run", config_for(far)).steps_to(3).steps_to(6)
    mirror_once(run)
    place = far / "checkpoints" / "step-000006"
    if harm == "weights":
        (place / "policy.safetensors").write_bytes(b"torn")
    elif harm == "manifest":
        (place / "manifest.json").unlink()
    else:
        lines = (far / "metrics.jsonl").read_text().splitlines(keepends=True)
        (far / "metrics.jsonl").write_text("".join(lines[:6]))  # up to step 5
    found, said = fetched(tmp_path / "elsewhere", run.config)
    assert found.store.steps() == [0, 3]
    assert said[-1] == f"fetched checkpoint 3 from file://{far}/"
    assert len(said) == (1 if harm == "manifest" else 2)


def test_damaged_pools_and_half_an_upload_are_left_out(tmp_path, far):
    """The run makes pools anew; a hidden file is what an upload left that was stopped."""
    run = Run(tmp_path / "run", config_for(far)).steps_to(3)
    with whole_directory(run.dir.pools) as staging:
        (staging / "a.txt").write_text("pools")
    mirror_once(run)
    (far / "pools" / "a.txt").write_text("torn")
    (far / "indexes" / "step-000003").mkdir(parents=True)
    (far / "indexes" / "step-000003" / ".half.bin.new").write_text("half")
    found, said = fetched(tmp_path / "elsewhere", run.config)
    assert said[0].startswith(f"pools in file://{far} is left out: ")
    assert said[1:] == [f"fetched checkpoint 3 from file://{far}/"]
    assert not found.dir.pools.exists()
    assert not found.dir.indexes.exists()


def test_names_that_lead_out_of_the_run_are_not_fetched(tmp_path, far):
    """Object storage takes any name, and whoever may write there could choose one."""
    run = Run(tmp_path / "run", config_for(far)).steps_to(3)
    mirror_once(run)
    asked: list[str] = []

    class Hostile(Noting):
        """Storage with a name that leads out of the run."""

        def files(self):
            return {*super().files(), "indexes/step-000003/../../../outside.txt"}

        def download(self, name, place):
            asked.append(name)
            return "" if "outside" in name else super().download(name, place)

    elsewhere = Run(tmp_path / "elsewhere", run.config)
    fetch_run(run.config, elsewhere.dir, Hostile(far), print)
    assert elsewhere.store.steps() == [0, 3]
    assert "metrics.jsonl" in asked
    assert not [name for name in asked if ".." in name]


def test_another_run_there_is_refused_and_left_alone(tmp_path, far):
    mirror_once(Run(tmp_path / "run", config_for(far)).steps_to(3))
    before = content(far)
    other = config_for(far).model_copy(update={"seed": 7})
    with pytest.raises(RunDirectoryError, match="seed: 0 there, 7 given"):
        mirror_once(Run(tmp_path / "other", other))
    (far / "config.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"contains files but no config\.json"):
        mirror_once(Run(tmp_path / "run", config_for(far)))
    (far / "config.json").write_bytes(before["config.json"])
    assert content(far) == before


def test_a_run_that_fails_before_its_first_record_leaves_no_claim(tmp_path, far):
    mirror_once(Run(tmp_path / "run", config_for(far)))
    assert not far.exists()


def test_turns_are_mirrored_each_with_its_own_checkpoints(tmp_path, far):
    config = config_for(far)
    whole = Run(tmp_path / "run", config)
    turn = Run(whole.dir.rounds / "1-retriever", config).steps_to(4)
    mirror_once(whole)
    expected = content(whole.dir.path)
    assert "rounds/1-retriever/checkpoints/step-000004/manifest.json" in expected
    assert {"config.json", "rounds/1-retriever/config.json"} <= expected.keys()
    assert content(far) == expected
    found, said = fetched(tmp_path / "elsewhere", config)
    assert said == [f"fetched checkpoint 4 from file://{far}/rounds/1-retriever/"]
    assert content(found.dir.path) == {k: v for k, v in expected.items() if "logs" not in k}
    assert turn.store.steps() == [0, 4]


def test_a_checkpoint_there_keeps_its_best_also_when_both_are_gone_here(tmp_path, far):
    """Step 6 counts 2 as the best; until two newer ones are there, it may be continued from."""
    config = config_for(far)
    run = Run(tmp_path / "run", config).steps_to(2, best=2).steps_to(6, best=2)
    mirror_once(run)
    run.steps_to(8, best=10).steps_to(10, best=10)
    assert run.store.steps() == [0, 8, 10]

    class Lacking(Noting):
        """Storage that does not take step 8."""

        def upload_whole(self, name: str, source: Path) -> None:
            if name.endswith("8"):
                raise SetupError("no room")
            super().upload_whole(name, source)

    mirror = Mirror(config, run.dir, Lacking(far), max_attempts=1)
    mirror.start()
    assert "checkpoints/step-000008 (no room)" in mirror.finish()
    assert {path.name for path in (far / "checkpoints").iterdir()} == {
        f"step-{step:06d}" for step in (0, 2, 6, 10)
    }


def test_each_turn_keeps_its_own_checkpoints(tmp_path, far):
    config = config_for(far)
    whole = Run(tmp_path / "run", config)
    early = Run(whole.dir.rounds / "1-retriever", config).steps_to(2).steps_to(4)
    late = Run(whole.dir.rounds / "2-selection", config)
    with mirrored(config, whole.dir, print):
        for last in (6, 8, 10, 12):
            late.steps_to(last)
            name = f"rounds/2-selection/checkpoints/step-{last:06d}/manifest.json"
            wait_until((far / name).exists)
    assert (early.store.steps(), late.store.steps()) == ([0, 2, 4], [0, 10, 12])
    assert content(far) == content(whole.dir.path)


def test_before_anything_else_the_storage_knows_whose_run_it_is(tmp_path, far):
    """A reader that finds files and no configuration refuses them."""
    whole = Run(tmp_path / "run", config_for(far))
    Run(whole.dir.rounds / "1-retriever", whole.config).steps_to(2)
    noting = Noting(far)
    mirror = Mirror(whole.config, whole.dir, noting)
    mirror.start()
    assert mirror.finish() == ""
    assert noting.uploaded[:3] == [
        "config.json",
        "rounds/1-retriever/config.json",
        "rounds/1-retriever/metrics.jsonl",
    ]


class Noting(RemoteDirectory):
    """Storage that notes in which order files come."""

    def __init__(self, far: Path) -> None:
        from pyarrow.fs import LocalFileSystem

        super().__init__(LocalFileSystem(), str(far), "far")
        self.uploaded: list[str] = []

    def upload(self, name: str, source: Path) -> str:
        self.uploaded.append(name)
        return super().upload(name, source)


class Refusing(RemoteDirectory):
    """Storage that takes nothing until it is repaired."""

    def __init__(self, far: Path) -> None:
        from pyarrow.fs import LocalFileSystem

        super().__init__(LocalFileSystem(), str(far), "far")
        self.is_broken = True
        self.num_tries = 0

    def upload(self, name: str, source: Path) -> str:
        if self.is_broken:
            self.num_tries += 1
            raise SetupError("no route to host")
        return super().upload(name, source)


def test_storage_that_fails_is_tried_a_few_times_then_said_once_and_counted(tmp_path, far, caplog):
    run = Run(tmp_path / "run", config_for(far)).steps_to(2)
    refusing = Refusing(far)
    mirror = Mirror(run.config, run.dir, refusing, max_attempts=2)
    mirror.start()
    wait_until(lambda: refusing.num_tries == 2)
    run.steps_to(4)
    left = mirror.finish()
    assert left.startswith("5 parts of the run are not in far, after ")
    assert "checkpoints/step-000004 (" in left
    assert "config.json (no route to host)" in left
    assert "run the same command to try again" in left
    assert len([r for r in caplog.records if "was not mirrored" in r.getMessage()]) == 1
    mended = Mirror(run.config, run.dir, refusing)
    refusing.is_broken = False
    mended.start()
    assert mended.finish() == ""
    assert content(far) == content(run.dir.path)


def test_after_a_failure_the_next_checkpoint_tries_again(tmp_path, far):
    run = Run(tmp_path / "run", config_for(far)).steps_to(2)
    refusing = Refusing(far)
    mirror = Mirror(run.config, run.dir, refusing, max_attempts=1)
    mirror.start()
    wait_until(lambda: refusing.num_tries == 1)
    refusing.is_broken = False
    run.steps_to(4)
    for step in (4, 2):
        wait_until((far / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists)
    assert mirror.finish() == ""


def test_an_end_that_comes_too_soon_names_what_is_not_there(tmp_path, far):
    run = Run(tmp_path / "run", config_for(far, wait_s=0.05)).steps_to(2)
    gated = Gated(far)
    mirror = Mirror(run.config, run.dir, gated)
    mirror.start()
    left = mirror.finish()
    gated.gate.set()
    assert "checkpoints/step-000002 (not uploaded within mirror.wait_s 0.05)" in left


def test_the_error_comes_last_and_hides_no_other(tmp_path, monkeypatch, far):
    run = Run(tmp_path / "run", config_for(far)).steps_to(2)
    refusing = Refusing(far)
    monkeypatch.setattr(mirror_module, "open_remote", lambda uri, timeout_s: refusing)
    with pytest.raises(SetupError, match=r"4 parts of the run are not in far, .*\(not tried"):
        mirror_once(run)
    said: list[str] = []
    with pytest.raises(StopAfter), mirrored(run.config, run.dir, said.append):
        raise StopAfter
    assert len(said) == 1
    assert said[0].startswith("error: 4 parts of the run are not in far, after ")


def test_without_an_address_nothing_happens(tmp_path):
    run = Run(tmp_path / "run", RunConfig()).steps_to(2)
    before = threading.active_count()
    with mirrored(run.config, run.dir, print):
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("s3://key:secret@bucket/run", "holds credentials"),
        ("s3://bucket/run?access_key=k", "has the option 'access_key'"),
        ("file:///a?region=b", "has the option 'region'"),
        ("s3:///run", "give s3://bucket/prefix"),
        ("ftp://host/run", "give s3://bucket/prefix"),
        ("/a/b", "give s3://bucket/prefix"),
        ("file://host/run", "give s3://bucket/prefix"),
    ],
)
def test_an_address_that_cannot_be_meant_is_refused_and_no_secret_is_saved(uri, complaint):
    with pytest.raises(ValidationError, match=re.escape(complaint)):
        mirrored_config(uri)
    for right in ("s3://bucket/run?region=eu-west-1&scheme=http", "gs://bucket", "file:///a%20b"):
        assert mirrored_config(right).mirror.uri == right
