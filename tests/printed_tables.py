"""Tables as a terminal shows them."""

from __future__ import annotations

from rich.console import Console

from rlrag.evaluation.table import EvaluationTable, render


def printed(table: EvaluationTable, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(render(table))
    return captured.get()
