"""`python -m jobs.doctor`: words of a command line in, see `program`; the exit code out."""

from jobs.command_line import run_program
from jobs.doctor.program import main

if __name__ == "__main__":
    run_program(main)
