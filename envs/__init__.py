"""Registers the project's Gymnasium environments when it is imported."""

import rlrag.environment  # noqa: F401 - its import registers them
