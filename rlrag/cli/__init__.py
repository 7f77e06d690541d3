"""The `rlrag` command line: one module for each subcommand."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from rlrag.cli.command_line import run_program
from rlrag.errors import ConfigError, nearest_name

COMMANDS = {
    "train": ("train", "train a recipe, then compare what came out with its baselines"),
    "evaluate": ("evaluate", "compare a bundle with its baselines on any questions"),
    "report": ("report", "write runs and evaluations as one page"),
    "probe": ("probe", "ask a bundle with other passages around the right one"),
    "judge": ("judge", "have a language model judge the answers of an evaluation"),
    "export": ("export", "write a checkpoint as a bundle"),
    "doctor": ("doctor.program", "check, before a run, that it can work"),
    "serve": ("serve", "answer questions over HTTP with a bundle"),
    "data": ("data", "get the data that recipes train on"),
}
"""Each command's module, and what it does. A module is imported when its command is run."""


def main() -> None:
    """Run the command that the first word names."""
    run_program(_run)


def _run(argv: Sequence[str]) -> None:
    listing = "\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: rlrag COMMAND [flags]\n\ncommands:\n{listing}", flush=True)
        if not argv:
            raise ConfigError(f"no command was given; choose from: {', '.join(COMMANDS)}")
        return
    if argv[0] == "--version":
        from rlrag import __version__

        print(f"rlrag {__version__}")
        return
    name, *words = argv
    if name not in COMMANDS:
        hint = nearest_name(name, COMMANDS, f"there are: {', '.join(COMMANDS)}")
        raise ConfigError(f"unknown command {name!r}; {hint}")
    importlib.import_module(f"rlrag.cli.{COMMANDS[name][0]}").main(words)
