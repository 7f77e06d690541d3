"""Write a report of runs and evaluations, as `rlrag report` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.report import main

if __name__ == "__main__":
    run_program(main)
