"""Measure how a bundle answers with other passages around the right one, as `rlrag probe` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.probe import main

if __name__ == "__main__":
    run_program(main)
