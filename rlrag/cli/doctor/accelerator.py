"""GPU checks: whether torch can use the GPUs that a run needs."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from rlrag.cli.doctor.checks import Answer, failed, ok, warning
from rlrag.training.needs import GIB, Needs

_WITHOUT = (
    "use a machine with one, or none: --generator.device cpu --generator.gpus-per-actor 0 "
    "--training.worker-gpus 0"
)


@dataclass(frozen=True)
class GpuFacts:
    """What torch and the driver say; versions of CUDA as (major, minor)."""

    torch: str
    built_for: tuple[int, int] | None
    driver: tuple[int, int] | None
    names: tuple[str, ...] = ()
    memory_bytes: tuple[int, ...] = ()


def read_gpus() -> GpuFacts:
    """Ask torch and the driver's library, which is there without torch's help."""
    import torch

    built = torch.version.cuda
    found = []
    if built and torch.cuda.is_available():
        found = [
            torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())
        ]
    return GpuFacts(
        str(torch.__version__),
        _version(built) if built else None,
        _driver_version(),
        tuple(properties.name for properties in found),
        tuple(properties.total_memory for properties in found),
    )


def check_gpus(needs: Needs, facts: GpuFacts) -> Answer:
    """Whether the GPUs that are asked for can be used."""
    wanted = math.ceil(needs.gpus)
    if not wanted and facts.driver is None:
        return ok("none, and the configuration needs none")
    asks = f"the configuration needs {wanted} GPU(s)"
    if facts.driver is None:
        return failed(f"{asks}, but there is no NVIDIA driver", _WITHOUT)
    if facts.built_for is None:
        said = f"there is a GPU driver, but torch {facts.torch} is a CPU-only build"
        advice = "install a CUDA build of torch (the extra 'vllm' includes one)"
        return failed(f"{asks}; {said}", advice) if wanted else ok(said)
    versions = f"driver for CUDA {_text(facts.driver)}, torch built for {_text(facts.built_for)}"
    if facts.driver[0] < facts.built_for[0]:
        advice = (
            f"update the driver to one for CUDA {facts.built_for[0]}, or install a torch build "
            f"for CUDA {facts.driver[0]}"
        )
        said = f"the driver is too old: {versions}"
        return failed(said, advice) if wanted else warning(said, advice)
    if len(facts.names) < wanted:
        return failed(
            f"{asks}, but torch sees {len(facts.names)} ({versions})",
            f"look at nvidia-smi and CUDA_VISIBLE_DEVICES, or {_WITHOUT}",
        )
    if wanted and needs.gpu_bytes > min(facts.memory_bytes):
        return failed(
            f"weights and optimiser need about {needs.gpu_bytes / GIB:.1f} GiB of GPU memory, "
            f"but the smallest GPU has {min(facts.memory_bytes) / GIB:.1f} GiB",
            "use a smaller model, --generator-training.method lora, or sharding fsdp2",
        )
    return ok(f"{len(facts.names)} of {', '.join(sorted(set(facts.names))) or 'none'}; {versions}")


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports; None without a driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return None
    except OSError:  # the driver installs this library
        return None
    return number.value // 1000, number.value % 1000 // 10


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor.partition(".")[0] or 0)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
