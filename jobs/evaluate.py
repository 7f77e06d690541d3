"""Compare a bundle with its baselines, as `rlrag evaluate` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.evaluate import main

if __name__ == "__main__":
    run_program(main)
