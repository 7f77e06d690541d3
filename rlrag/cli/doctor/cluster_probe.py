"""Prints the resources of a Ray cluster as JSON; run as a program with its address."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rlrag.cli.cluster import connect
from rlrag.cli.command_line import run_program


def main(argv: Sequence[str]) -> None:
    """Connect, ask, leave.

    Raises:
        SetupError: when the cluster cannot be joined.
    """
    connect(argv[0])
    import ray

    print(json.dumps(ray.cluster_resources()))
    ray.shutdown()


if __name__ == "__main__":
    run_program(main)
