"""Check, before a run, that it can work, as `rlrag doctor` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.doctor.program import main

if __name__ == "__main__":
    run_program(main)
