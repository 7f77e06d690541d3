"""Get the data that recipes train on, as `rlrag data` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.data import main

if __name__ == "__main__":
    run_program(main)
