"""The application that `serve run serve.app:build` starts; see `rlrag.serving.app`."""

from rlrag.serving.app import build

__all__ = ["build"]
