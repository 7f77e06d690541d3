"""The programs by module, from the root of a checkout: `python -m jobs.train`."""
