"""Robustness, abstention and calibration of a system's answers."""
