"""Checks of the machine by themselves: storage, limits, disk, memory, GPUs, what a run needs.

A full disk or a small machine is told to the check by the function that it reads it with.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rlrag.cli.doctor import machine
from rlrag.cli.doctor.accelerator import GpuFacts, check_gpus
from rlrag.cli.doctor.files import check_storage
from rlrag.cli.doctor.ray_cluster import check_cluster
from rlrag.config import DROConfig, GeneratorConfig, RunConfig, TrainingConfig
from rlrag.training.needs import GIB, Needs, needs_of

NEEDS = Needs(
    memory_bytes=4 * GIB,
    gpu_bytes=20 * GIB,
    run_bytes=GIB,
    cache_bytes=2 * GIB,
    cpus=2,
    gpus=0,
    nodes=1,
    unknown=(),
)


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that this process may not write; root is not itself meanwhile."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)
        folder.chmod(stat.S_IRWXU)


def test_an_unwritable_directory(locked_folder):
    answer = check_storage(locked_folder / "runs" / "mine", "--run-dir")
    assert answer.status == "failed"
    assert answer.found == f"{locked_folder} cannot be written: Permission denied"
    assert answer.advice.startswith("choose a folder on another disk by --run-dir")


def test_storage_that_can_be_written_is_left_as_it_was(tmp_path):
    assert check_storage(tmp_path / "runs" / "mine", "--run-dir").status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_on_open_files(few_files):
    answer = machine.check_open_files(RunConfig())
    assert answer.status == "failed"
    assert answer.found == "only 200 files may be open at once, but a run needs 1024"
    assert answer.advice.startswith("raise it with `ulimit -n ")


@dataclass(frozen=True)
class Free:
    """What is left on a disk."""

    free: int


def test_a_full_disk(tmp_path):
    run_dir, cache_dir = tmp_path / "run", tmp_path / "cache"
    answer = machine.check_disk(NEEDS, run_dir, cache_dir, lambda path: Free(2 * GIB))
    assert answer.status == "failed"
    assert answer.found == f"only 2.0 GiB free at {tmp_path}, about 3.0 GiB needed"
    assert "--run-dir and --cache-dir" in answer.advice
    assert machine.check_disk(NEEDS, run_dir, cache_dir, lambda path: Free(3 * GIB)).status == "ok"


def test_little_shared_memory():
    answer = machine.check_shared_memory(RunConfig(), lambda path: Free(2**26))
    assert answer.status == "warning"
    assert answer.found.startswith("only 0.1 GiB free in /dev/shm")
    assert "--shm-size" in answer.advice


@pytest.mark.parametrize(
    ("total", "available", "status"), [(3, 3, "failed"), (8, 3, "warning"), (8, 5, "ok")]
)
def test_little_memory(total, available, status):
    memory = machine.Memory(total * GIB, available * GIB)
    answer = machine.check_memory(NEEDS, lambda: memory)
    assert answer.status == status
    assert "a run needs about 4.0 GiB" in answer.found
    assert f"{total}.0 GiB of memory, {available}.0 GiB of it free" in answer.found


def test_memory_is_read_from_this_machine():
    memory = machine.read_memory()
    assert 0 < memory.available <= memory.total


def facts(built_for: Any, driver: Any, num_gpus: int = 0) -> GpuFacts:
    return GpuFacts("2.9", built_for, driver, ("H",) * num_gpus, (16 * GIB,) * num_gpus)


@pytest.mark.parametrize(
    ("gpus", "seen", "status", "found"),
    [
        (0, facts(None, None), "ok", "none, and the configuration needs none"),
        (1.5, facts((12, 8), None), "failed", "needs 2 GPU(s), but there is no NVIDIA driver"),
        (1, facts(None, (12, 8)), "failed", "torch 2.9 is a CPU-only build"),
        (0, facts(None, (12, 8)), "ok", "torch 2.9 is a CPU-only build"),
        (1, facts((13, 0), (12, 8)), "failed", "driver for CUDA 12.8, torch built for 13.0"),
        (0, facts((13, 0), (12, 8)), "warning", "the driver is too old"),
        (2, facts((12, 4), (12, 8), 1), "failed", "needs 2 GPU(s), but torch sees 1"),
        (
            1,
            facts((12, 8), (12, 4), 1),
            "failed",
            "need about 20.0 GiB of GPU memory, but the small",
        ),
    ],
)
def test_gpus(gpus, seen, status, found):
    needs = replace(NEEDS, gpus=gpus)
    answer = check_gpus(needs, seen)
    assert answer.status == status
    assert found in answer.found
    assert bool(answer.advice) == (status != "ok")


def test_what_a_run_needs_follows_from_its_configuration():
    model = "someone/Model-1B"  # its name says that it has 1e9 parameters
    config = RunConfig(
        generator=GeneratorConfig(model=model, num_actors=2, dtype="bfloat16", kv_cache_gib=3),
        training=TrainingConfig(num_workers=2, worker_cpus=1.5),
    )
    needs = needs_of(config)
    engines = 2 * (2e9 + 3 * GIB)
    assert needs.memory_bytes == round(engines) + 5 * GIB  # this process, two actors, two workers
    assert (needs.cpus, needs.gpus, needs.gpu_bytes, needs.unknown) == (4.0, 0.0, 0, ())
    trained = config.model_copy(
        update={
            "algorithm": DROConfig(parts=("generator",)),
            "training": TrainingConfig(worker_gpus=1),
        }
    )
    full = trained.generator_training.model_copy(update={"method": "full"})
    needs = needs_of(trained.model_copy(update={"generator_training": full}))
    assert needs.gpu_bytes == round(16e9)
    assert needs.gpus == 1.0
    assert needs.nodes == 1
    spread = GeneratorConfig(num_actors=3, placement="strict_spread")
    assert needs_of(config.model_copy(update={"generator": spread})).nodes == 3
    other = GeneratorConfig(model="/no/such/place")
    assert needs_of(config.model_copy(update={"generator": other})).unknown == ("/no/such/place",)


@pytest.mark.parametrize(
    ("limit", "found"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 64)],
)
def test_a_container_has_the_cpus_that_it_may_use(limit, found, tmp_path, monkeypatch):
    """Ray has no more either, and waits for what it lacks."""
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert machine.read_cpus() == found
    wide = RunConfig(training=TrainingConfig(launcher="ray"))
    answer = check_cluster(wide, replace(NEEDS, cpus=3), timeout_s=1)
    assert answer.status == ("ok" if found > 3 else "failed")
    assert f"this machine has {found} CPU" in answer.found


def test_a_machine_that_limits_nothing_has_all_its_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.read_cpus() == os.cpu_count()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_busy_port_of_the_metrics(host):
    def check(**more: Any) -> tuple[str, str]:
        values = {"loggers": ("prometheus",), "metrics_host": host, "metrics_port": port} | more
        answer = machine.check_metrics_port(RunConfig(training=TrainingConfig(**values)))
        return answer.status, answer.found

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert check() == ("failed", f"{host}:{port} is taken")
        assert check(loggers=())[0] == check(metrics_port=0)[0] == "ok"
    assert check() == ("ok", f"{host}:{port} is free")
