"""Checks of this machine: free memory, disk, shared memory, file descriptors, ports.

What is read from the machine is read by a function that a caller may replace.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from rlrag.cli.doctor.checks import Answer, failed, ok, warning
from rlrag.config import RunConfig
from rlrag.training.needs import GIB, Needs, uses_vllm

_SHARED_MEMORY = Path("/dev/shm")
_SHARED_BYTES = GIB
_MIN_FILES = {"local": 256, "ray": 1024}
_GOOD_FILES = {"local": 256, "ray": 4096}
_COMPILE_TIMEOUT_S = 30.0
_CGROUP = Path("/sys/fs/cgroup")
PORTS = {
    6379: "the head of a Ray cluster (`ray start --head --port`)",
    8265: "Ray's dashboard and job server (`ray start --head --dashboard-port`)",
    10001: "Ray's client server (`ray start --head --ray-client-server-port`)",
    8000: "the answering service (`port` of its HTTP options)",
}


class Usage(Protocol):
    """What `shutil.disk_usage` returns, as far as it is looked at."""

    @property
    def free(self) -> int:
        """Free bytes."""
        ...


class Memory(NamedTuple):
    """Bytes of memory that this process and its children may use."""

    total: int
    available: int


def check_compiler(config: RunConfig) -> Answer:
    """Whether vLLM on a CPU will be able to compile its sampler."""
    if not uses_vllm(config) or config.generator.gpus_per_actor:
        return ok("not needed: no vLLM engine on a CPU")
    from rlrag.generation.backends import vllm as vllm_backend

    vllm_backend.check_compiler()
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    name = next(name for name in names if shutil.which(name))
    done = subprocess.run(
        [name, "-x", "c++", "-fsyntax-only", "-"],
        input="#include <vector>\n",
        capture_output=True,
        text=True,
        timeout=_COMPILE_TIMEOUT_S,
    )
    if done.returncode:
        return failed(
            f"{name} cannot compile: {' '.join(done.stderr.split())[:200]}",
            "install the C++ standard library's headers (Debian: apt-get install g++)",
        )
    return ok(f"{shutil.which(name)}")


def check_shared_memory(
    config: RunConfig, disk_usage: Callable[[Path], Usage] = shutil.disk_usage
) -> Answer:
    """Whether Ray's object store fits where processes share memory."""
    if config.training.launcher == "local":
        return ok("not needed: one process")
    if not _SHARED_MEMORY.is_dir():
        return ok(f"this system has no {_SHARED_MEMORY}")
    free = disk_usage(_SHARED_MEMORY).free
    if free >= _SHARED_BYTES:
        return ok(f"{_gib(free)} free in {_SHARED_MEMORY}")
    return warning(
        f"only {_gib(free)} free in {_SHARED_MEMORY}; Ray will spill objects to disk and GPUs "
        "may fail to exchange data",
        f"increase it to {_gib(_SHARED_BYTES)} or more (docker run --shm-size=2g; an emptyDir of "
        "medium Memory on Kubernetes)",
    )


def check_open_files(config: RunConfig) -> Answer:
    """Whether the limit on open files allows for Ray's connections and the indexes."""
    limit, hardest = resource.getrlimit(resource.RLIMIT_NOFILE)
    launcher = config.training.launcher
    if limit == resource.RLIM_INFINITY or limit >= _GOOD_FILES[launcher]:
        return ok(f"{limit if limit != resource.RLIM_INFINITY else 'any number of'} files")
    advice = f"raise it with `ulimit -n {min(65536, hardest) if hardest > 0 else 65536}`"
    if limit < _MIN_FILES[launcher]:
        return failed(
            f"only {limit} files may be open at once, but a run needs {_MIN_FILES[launcher]}",
            advice,
        )
    return warning(f"{limit} files may be open at once, too few for many actors", advice)


def check_memory(needs: Needs, read: Callable[[], Memory] | None = None) -> Answer:
    """Whether memory has room for what the plan estimates."""
    total, available = (read or read_memory)()
    wanted = f"a run needs about {_gib(needs.memory_bytes)}"
    if needs.unknown:
        wanted += f" besides {', '.join(needs.unknown)}, whose size is unknown"
    has = f"{_gib(total)} of memory, {_gib(available)} of it free"
    advice = (
        "use fewer or smaller parts (--generator.num-actors, --generator.kv-cache-gib, a smaller "
        "model), or a larger machine"
    )
    if needs.memory_bytes > total:
        return failed(f"{wanted}, but this machine has {has}", advice)
    if needs.memory_bytes > available:
        return warning(
            f"{wanted}, but this machine has {has}", f"close other programs, or {advice}"
        )
    return ok(f"{has}; {wanted}")


def read_memory() -> Memory:
    """Of this machine, or of the container where that has less."""
    import psutil

    found = psutil.virtual_memory()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is None or used is None:
        return Memory(found.total, found.available)
    return Memory(min(found.total, limit), min(found.available, limit - used + _droppable_bytes()))


def read_cpus() -> int:
    """CPUs of this machine, or of the container where that may use fewer, as Ray counts them."""
    all_there = os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except OSError:  # as in `_cgroup`
        return all_there
    return min(all_there, max(1, int(quota) // int(period))) if quota.isdecimal() else all_there


def _cgroup(name: str) -> int | None:
    """A number of this container's control group; None where there is none, or no limit."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:  # no container, or an older kind of control group
        return None
    return int(text) if text.isdecimal() else None


def _droppable_bytes() -> int:
    """What the container's files occupy in memory until something else needs it."""
    for line in (_CGROUP / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def check_disk(
    needs: Needs,
    run_dir: Path,
    cache_dir: Path,
    disk_usage: Callable[[Path], Usage] = shutil.disk_usage,
) -> Answer:
    """Whether checkpoints fit beside the run, and copies and indexes into the cache."""
    wanted: dict[int, int] = {}
    places: dict[int, Path] = {}
    for path, num_bytes in ((run_dir, needs.run_bytes), (cache_dir, needs.cache_bytes)):
        there = existing(path)
        device = there.stat().st_dev
        wanted[device] = wanted.get(device, 0) + num_bytes
        places.setdefault(device, there)
    said = []
    for device, place in places.items():
        free = disk_usage(place).free
        said.append(f"{_gib(free)} free at {place}, about {_gib(wanted[device])} needed")
        if free < wanted[device]:
            return failed(
                f"only {said[-1]}",
                "free disk space, or choose other directories with --run-dir and --cache-dir",
            )
    return ok("; ".join(said))


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    while not os.path.exists(path):  # not path.exists, which raises where it may not look
        path = path.parent
    return path


def check_metrics_port(config: RunConfig) -> Answer:
    """Whether the address can be listened on where Prometheus is to find the run's metrics."""
    host, port = config.training.metrics_host, config.training.metrics_port
    if "prometheus" not in config.training.loggers:
        return ok("not needed: training.loggers does not name prometheus")
    if port and (reason := _refusal(port, host)):
        return failed(
            f"{host}:{port} {reason}",
            "stop the program that listens there, or set --training.metrics-port to another "
            "port (0 uses any free one)",
        )
    return ok(f"{host}:{port} is free" if port else "any free port")


def check_ports(asked: Sequence[int]) -> Answer:
    """Whether the ports can be listened on that Ray and the service want.

    Training by itself takes whichever ports are free, so that those which nobody asked for by name
    are no failure.
    """
    taken = {port: reason for port in asked or PORTS if (reason := _refusal(port))}
    if not taken:
        return ok(f"{', '.join(map(str, asked or PORTS))} are free")
    said = "; ".join(
        f"port {port} {reason}" + (f", for {PORTS[port]}" if port in PORTS else "")
        for port, reason in taken.items()
    )
    if asked:
        return failed(said, "stop the program that listens there, or choose another port")
    return warning(
        said, "training does not need it; for a cluster or the service choose another port"
    )


def _refusal(port: int, host: str = "") -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return "is taken" if taken else f"cannot be used ({error.strerror})"
    return None


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
