"""Reinforcement learning for the whole of a retrieval-augmented generation pipeline."""

__version__ = "0.1.0"
