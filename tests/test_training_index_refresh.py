"""An index that follows the encoder: one version at a time, whole, and the same after a stop."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_runs import StopAfter, changed, steps_of
from openrag_runs import Task, make_corpus, make_task, openrag_config, start, weights
from tiny_models import save_tiny_encoder, save_tiny_masked_lm

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, SetupError
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.trainable.open import open_trainable_encoder, searched_index
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.openrag import index_refresh
from rlrag.training.openrag.index_refresh import (
    ProcessBuild,
    RefreshedIndex,
    encode_from,
    encode_version,
    open_version,
)

QUESTIONS = ["what does the lamp hold?", "which thing has the river got?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("refresh")
    save_tiny_encoder(directory / "encoder")
    save_tiny_masked_lm(directory / "masked_lm")
    with (directory / "corpus.jsonl").open("w") as stream:
        for passage in make_corpus():
            stream.write(json.dumps({"id": passage.id, "contents": passage.contents}) + "\n")
    return directory


@pytest.fixture(scope="module", params=["dense", "semi_parametric"])
def config(models, request) -> RunConfig:
    return openrag_config(
        models / "cache",
        models / "encoder",
        data={"corpus": str(models / "corpus.jsonl")},
        retrieval={"kind": request.param, "vocabulary_encoder": str(models / "masked_lm")},
        algorithm={"refresh_every": 2, "refresh_waits": True},
    )


@pytest.fixture(scope="module")
def task(config) -> Task:
    return make_task(config)


class Elsewhere:
    """Builds when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Path]] = []
        self.futures: list[Future[None]] = []

    def __call__(self, config_json: str, place: Path) -> Future[None]:
        self.asked.append((config_json, place))
        self.futures.append(Future())
        return self.futures[-1]

    def close(self) -> None:
        """Nothing to end."""

    def finish(self) -> None:
        encode_version(*self.asked[-1])
        self.futures[-1].set_result(None)


class Here:
    """Builds at once, in this process."""

    def __call__(self, config_json: str, place: Path) -> Future[None]:
        encode_version(config_json, place)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def close(self) -> None:
        """Nothing runs."""


class Dying(Here):
    """Its process is killed."""

    def __call__(self, config_json: str, place: Path) -> Future[None]:
        processes = ProcessPoolExecutor(1, get_context("spawn"))
        try:
            return processes.submit(os._exit, 1)
        finally:
            processes.shutdown(wait=False)


def make(config: RunConfig, task: Task, directory: Path, build, workers=None) -> RefreshedIndex:
    first = searched_index(task.library.retrievers.primary)
    workers = workers or SingleWorker()
    return RefreshedIndex(config, task.library.corpus, first, directory, workers, build)


def moved_encoder(config: RunConfig):
    encoder = open_trainable_encoder(config.retrieval, config.openrag, config.cache_path)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in encoder.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return encoder


def vectors_of(encoder) -> np.ndarray:
    with torch.no_grad():
        return encoder.embed(QUESTIONS, "question").vectors_BD.numpy()


def brute_force(encoder, vectors_BD: np.ndarray, m: int) -> list[list[int]]:
    texts = [passage.contents for passage in make_corpus()]
    with torch.no_grad():
        passages_PD = encoder.embed(texts, "passage").vectors_BD.double().numpy()
    scores_BP = vectors_BD.astype(np.float64) @ passages_PD.T
    return np.argsort(-scores_BP, axis=1, kind="stable")[:, :m].tolist()


def test_a_search_sees_the_old_version_until_the_new_one_is_whole(config, task, tmp_path):
    patient = changed(config, algorithm={"refresh_waits": False})
    elsewhere, encoder = Elsewhere(), moved_encoder(config)
    index, vectors = make(patient, task, tmp_path, elsewhere), vectors_of(encoder)
    old = index.propose(QUESTIONS, vectors, 5).tolist()
    for step in range(4):
        index.before_step(step, encoder)
        assert index.propose(QUESTIONS, vectors, 5).tolist() == old
    assert [place.name for _, place in elsewhere.asked] == ["step-000002"]
    snapshot = brute_force(encoder, vectors, 5)
    later = moved_encoder(config)
    with torch.no_grad():
        for _, parameter in later.named_parameters():
            parameter.mul_(-1.0)
    elsewhere.finish()
    assert index.version == 0
    index.before_step(5, later)
    assert index.version == 2
    assert index.propose(QUESTIONS, vectors, 5).tolist() == snapshot != old


def test_the_next_refresh_waits_for_the_one_under_way(config, task, tmp_path):
    elsewhere, encoder = Elsewhere(), moved_encoder(config)
    index = make(changed(config, algorithm={"refresh_waits": False}), task, tmp_path, elsewhere)
    for step in range(6):
        index.before_step(step, encoder)
    assert len(elsewhere.asked) == 1
    elsewhere.finish()
    index.before_step(6, encoder)
    assert (index.version, len(elsewhere.asked)) == (2, 1)
    index.before_step(8, encoder)
    assert [place.name for _, place in elsewhere.asked] == ["step-000002", "step-000008"]


def test_a_checkpoint_from_before_the_first_refresh_is_searched_with_the_first_index(
    config, task, tmp_path
):
    encoder = moved_encoder(config)
    index, vectors = make(config, task, tmp_path, Here()), vectors_of(encoder)
    first = index.propose(QUESTIONS, vectors, 5).tolist()
    index.before_step(2, encoder)
    index.resume(0)
    assert index.version == 0
    assert index.propose(QUESTIONS, vectors, 5).tolist() == first


def test_an_encoder_is_saved_whole_and_for_whoever_may_read_the_run(config, task, tmp_path):
    """A process that was killed may have left half of one; another user's task reads it."""
    half = tmp_path / "step-000002" / "encoder" / "half.safetensors"
    half.parent.mkdir(parents=True)
    half.write_text("half")
    patient = changed(config, algorithm={"refresh_waits": False})
    make(patient, task, tmp_path, Elsewhere()).before_step(2, moved_encoder(config))
    assert not half.exists()
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    saved = [path for path in half.parent.rglob("*") if path.is_file()]
    assert saved
    assert {path.stat().st_mode for path in saved} == {wanted}


def test_training_may_wait_and_then_swaps_in_the_same_step(config, task, tmp_path):
    encoder = moved_encoder(config)
    index = make(config, task, tmp_path, Here())
    index.before_step(1, encoder)
    assert index.version == 0
    index.before_step(2, encoder)
    assert index.version == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dense"], indirect=True)
def test_another_process_encodes_what_this_one_would(config, task, tmp_path):
    encoder = moved_encoder(config)
    here = make(config, task, tmp_path / "here", Here())
    there = make(config, task, tmp_path / "there", ProcessBuild())
    for index in (here, there):
        index.before_step(2, encoder)
    there.close()
    rows = [index.propose(QUESTIONS, vectors_of(encoder), 6).tolist() for index in (here, there)]
    assert there.version == 2
    assert rows[0] == rows[1]


def test_a_wait_has_a_bound(config, task, tmp_path):
    hasty = changed(config, algorithm={"refresh_timeout_s": 0.05})
    index = make(hasty, task, tmp_path, Elsewhere())
    with pytest.raises(SetupError, match=r"within algorithm.refresh_timeout_s 0.05; raise it"):
        index.before_step(2, moved_encoder(config))


def test_a_process_that_dies_is_named(config, task, tmp_path):
    index = make(config, task, tmp_path, Dying())
    with pytest.raises(SetupError, match=r"process that encodes the passages died.*same command"):
        index.before_step(2, moved_encoder(config))


def test_what_a_refresh_fails_of_ends_the_run(config, task, tmp_path):
    elsewhere, encoder = Elsewhere(), moved_encoder(config)
    index = make(changed(config, algorithm={"refresh_waits": False}), task, tmp_path, elsewhere)
    index.before_step(2, encoder)
    elsewhere.futures[0].set_exception(SetupError("the disk is full; free space"))
    with pytest.raises(SetupError, match="the disk is full"):
        index.before_step(3, encoder)


@pytest.mark.parametrize("config", ["dense"], indirect=True)  # transformers loads in one thread
def test_workers_change_versions_in_the_same_step(config, task, tmp_path):
    """One of them builds; which step finds it done depends on the clock, but not on the worker."""
    elsewhere, encoder, met = Elsewhere(), moved_encoder(config), threading.Barrier(2)
    patient = changed(config, algorithm={"refresh_waits": False})
    indexes = [make(patient, task, tmp_path, elsewhere, workers=worker) for worker in make_group(2)]

    def run(number: int) -> list[int]:
        versions = []
        for step in range(2, 6):
            met.wait(60)
            if step == 4 and number == 0:
                elsewhere.finish()
            indexes[number].before_step(step, encoder)
            versions.append(indexes[number].version)
        return versions

    assert run_together([partial(run, 0), partial(run, 1)]) == [[0, 0, 2, 2]] * 2
    assert len(elsewhere.asked) == 1


def test_a_refresh_that_was_stopped_goes_on_where_it_was(config, task, tmp_path, monkeypatch):
    """The passages that are encoded stay; the version is whole only at the end."""
    encoder, elsewhere = moved_encoder(config), Elsewhere()
    index = make(changed(config, algorithm={"refresh_waits": False}), task, tmp_path, elsewhere)
    index.before_step(2, encoder)
    place = elsewhere.asked[0][1]
    open_version(config, task.library.corpus, place)
    built = {path: path.stat().st_mtime_ns for path in place.rglob("*.npy")}
    built |= {path: path.stat().st_mtime_ns for path in place.rglob("*.bin")}
    assert built
    assert not (place / "done.json").exists()
    encode_version(*elsewhere.asked[0])
    assert (place / "done.json").exists()
    assert built == {path: path.stat().st_mtime_ns for path in built}


def test_a_checkpoint_names_its_version_and_older_ones_go(config, task, tmp_path):
    encoder = moved_encoder(config)
    index = make(config, task, tmp_path, Here())
    for step in (2, 4, 6):
        index.before_step(step, encoder)
        assert index.version_to_save() == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]
    again = make(config, task, tmp_path, Here())
    again.resume(6)
    vectors = vectors_of(encoder)
    expected = index.propose(QUESTIONS, vectors, 5)
    assert again.propose(QUESTIONS, vectors, 5).tolist() == expected.tolist()
    with pytest.raises(CheckpointError, match=r"step-000002 that the checkpoint was trained with"):
        again.resume(2)


def test_a_checkpoint_names_the_refresh_under_way_which_goes_on(config, task, tmp_path, caplog):
    patient = changed(config, algorithm={"refresh_waits": False})
    encoder = moved_encoder(config)
    index = make(patient, task, tmp_path, Elsewhere())
    index.before_step(2, encoder)
    assert (index.version_to_save(), index.under_way) == (0, 2)
    elsewhere = Elsewhere()
    again = make(patient, task, tmp_path, elsewhere)
    again.resume(0, under_way=2)
    assert [place.name for _, place in elsewhere.asked] == ["step-000002"]
    again.before_step(4, moved_encoder(config))
    assert (again.version, len(elsewhere.asked)) == (0, 1)
    elsewhere.finish()
    again.before_step(5, encoder)
    assert (again.version, again.under_way) == (2, 0)
    with caplog.at_level(logging.WARNING):
        again.resume(2, under_way=8)
    assert again.under_way == 0
    assert "the index refresh of step 8 was stopped" in caplog.text


def test_a_version_that_was_never_finished_is_not_searched(config, task, tmp_path):
    patient = changed(config, algorithm={"refresh_waits": False})
    index = make(patient, task, tmp_path, Elsewhere())
    index.before_step(2, moved_encoder(config))
    with pytest.raises(CheckpointError, match=r"step-000002 .* is missing or incomplete"):
        make(patient, task, tmp_path, Elsewhere()).resume(2)


@pytest.mark.parametrize("config", ["dense"], indirect=True)
def test_all_workers_wait_for_a_refresh_that_goes_on(config, task, tmp_path):
    """The first alone looks for what it left, and has it encoded."""
    patient = changed(config, algorithm={"refresh_waits": False})
    make(patient, task, tmp_path, Elsewhere()).before_step(2, moved_encoder(config))
    elsewhere = Elsewhere()
    indexes = [make(patient, task, tmp_path, elsewhere, workers=worker) for worker in make_group(2)]
    run_together([partial(index.resume, 0, 2) for index in indexes])
    assert [index.under_way for index in indexes] == [2, 2]
    assert len(elsewhere.asked) == 1


@pytest.mark.parametrize("config", ["dense"], indirect=True)
def test_a_task_elsewhere_reads_paths_that_are_relative_to_the_run(
    config, task, models, tmp_path, monkeypatch
):
    near = changed(config, data={"corpus": "corpus.jsonl"})
    index = make(changed(near, algorithm={"refresh_waits": False}), task, tmp_path, Elsewhere())
    index.before_step(2, moved_encoder(config))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    encode_from(str(models), near.to_json(), tmp_path / "step-000002")
    assert (tmp_path / "step-000002" / "done.json").is_file()


def work_for_ever(config_json: str, place: Path) -> None:
    """What a process of its own is asked in place of a corpus that takes hours."""
    time.sleep(3600)


@pytest.mark.slow
def test_a_process_in_the_middle_of_its_work_does_not_hold_up_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr(index_refresh, "encode_version", work_for_ever)
    build = ProcessBuild()
    future = build("{}", tmp_path)
    build.close()
    assert wait([future], 30).done


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dense"], indirect=True)
@pytest.mark.parametrize("stop_at", [7])
def test_a_stopped_run_ends_as_one_that_never_was(config, task, tmp_path, stop_at):
    whole = start(config, task, tmp_path / "whole")
    whole.run()
    with pytest.raises(StopAfter):
        start(config, task, tmp_path / "stopped", stop_at).run()
    continued = start(config, task, tmp_path / "stopped")
    continued.run()
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "stopped")
    found, expected = weights(continued), weights(whole)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    ages = [record["index_age"] for record in steps_of(tmp_path / "whole")[1:]]
    assert ages[:6] == [0, 1, 0, 1, 0, 1]


def test_the_version_is_what_its_encoder_would_be_opened_as(config, task, tmp_path):
    """Whoever opens the saved encoder as a retriever searches the same vectors."""
    encoder, elsewhere = moved_encoder(config), Elsewhere()
    index = make(changed(config, algorithm={"refresh_waits": False}), task, tmp_path, elsewhere)
    index.before_step(2, encoder)
    elsewhere.finish()
    index.before_step(3, encoder)
    field = "encoder" if config.retrieval.kind == "dense" else "vocabulary_encoder"
    tuned = config.retrieval.model_copy(update={field: str(elsewhere.asked[0][1] / "encoder")})
    retriever = open_retrievers(task.library.corpus, tuned, tmp_path / "cache").primary
    rows = index.propose(QUESTIONS, vectors_of(encoder), 4)
    assert retriever.search(QUESTIONS, 4).rows_BK.tolist() == rows.tolist()
