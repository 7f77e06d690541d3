"""A run on disk and what keeps it alive: directory, checkpoints, mirror, logs, alarms."""
