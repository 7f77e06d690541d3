"""The run directory and what works on it: metrics, checkpoints, mirror, logs, alarms."""
