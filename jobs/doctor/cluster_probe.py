"""The address of a Ray cluster in, as the only word; its resources on stdout, as JSON, out."""

from __future__ import annotations

import json
import logging
import sys


def main(address: str) -> None:
    """Connect, ask, leave."""
    import ray

    ray.init(
        address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False
    )
    print(json.dumps(ray.cluster_resources()))
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
