"""Metrics, baselines, intervals and the comparison of systems."""
