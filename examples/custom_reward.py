"""Train the Factbook's selector with a reward of your own.

    python -m examples.custom_reward --run-dir runs/short

Every flag of `python -m jobs.train factbook` may follow. Training runs in this process alone;
under Ray the folder with your reward must be on PYTHONPATH, so that its workers find it too.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlrag.cli import train
from rlrag.cli.command_line import run_program

WORD_PRICE = 0.02


def short_and_right(answer: str, golden_answers: tuple[str, ...]) -> dict[str, float]:
    """1 for an answer that contains a golden one, less a price for every word of it.

    The two terms are logged apart, as `reward/examples.custom_reward:short_and_right/right` and so
    on, and summed for training.
    """
    right = any(golden.lower() in answer.lower() for golden in golden_answers)
    return {"right": float(right), "price": -WORD_PRICE * len(answer.split())}


def main(argv: Sequence[str]) -> None:
    """Name the reward, lower the temperature to its scale, and train."""
    train.main(
        [
            "factbook",
            *("--training.launcher", "local"),
            *("--reward.functions", "examples.custom_reward:short_and_right"),
            *("--reward.weights", "1"),
            *("--algorithm.reward-temperature", "0.2"),
            *argv,
        ]
    )


if __name__ == "__main__":
    run_program(main)
