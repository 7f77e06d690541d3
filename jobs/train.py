"""Train a recipe, as `rlrag train` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.train import main

if __name__ == "__main__":
    run_program(main)
