"""Have a language model judge the answers of an evaluation, as `rlrag judge` does."""

from rlrag.cli.command_line import run_program
from rlrag.cli.judge import main

if __name__ == "__main__":
    run_program(main)
