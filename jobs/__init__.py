"""Programs of the project, run from its root by module: `python -m jobs.train`."""
