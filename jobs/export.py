"""Write a checkpoint as a bundle, as `rlrag export` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.export import main

if __name__ == "__main__":
    run_program(main)
