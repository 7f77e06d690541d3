"""Entry points of a checkout: `python -m jobs.train` and the others."""
