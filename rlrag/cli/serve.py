"""Serve a bundle over HTTP with Ray Serve.

    rlrag serve runs/quickstart/bundle
    rlrag serve runs/quickstart/bundle port=8001 limits.timeout_s=5 generator.num_replicas=2

Settings of the service follow the bundle as `name=value`. It says when it is ready, and where, and
runs until Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlrag.errors import ConfigError, SetupError

_USAGE = "usage: rlrag serve BUNDLE [name=value ...], as in rlrag serve runs/quickstart/bundle"


def main(argv: Sequence[str]) -> None:
    """Run the service in this process until it is interrupted.

    Raises:
        ConfigError: when no bundle is named, or a setting is no `name=value`.
        SetupError: when Ray Serve is not installed.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{_USAGE}", flush=True)
        return
    if not argv or "=" in argv[0]:
        raise ConfigError(f"no bundle was given; {_USAGE}")
    bundle, *settings = argv
    for word in settings:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not a setting; {_USAGE}")
    try:
        from ray.serve.scripts import cli
    except ImportError as error:
        raise SetupError("the service needs Ray Serve; install the extra 'serve'") from error
    cli(["run", "rlrag.serving.app:build", f"bundle={bundle}", *settings])
