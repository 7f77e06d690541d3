"""Ask a bundle questions and print each answer with its passages.

    python -m examples.ask_bundle --bundle runs/quickstart/bundle "What is the capital of Mongolia?"

This is what the service does for one request, in one process and without Ray.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlrag import load_pipeline
from rlrag.errors import RlragError


def main(argv: Sequence[str] | None = None) -> None:
    """Print each answer above its passages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--allow-code", action="append", default=[], metavar="NAME")
    parser.add_argument("questions", nargs="+")
    arguments = parser.parse_args(argv)
    with load_pipeline(arguments.bundle, allow_code=arguments.allow_code) as pipeline:
        answers = pipeline.answer_many(arguments.questions)
    for question, answer in zip(arguments.questions, answers, strict=True):
        if isinstance(answer, RlragError):  # such as a question that leaves no room in the prompt
            print(f"{question}\n  not answered: {answer}")
            continue
        print(f"{question}\n  {answer.text}")
        for number, passage in enumerate(answer.passages, start=1):
            print(f"    [{number}] {passage.title}: {passage.text[:100]}")


if __name__ == "__main__":
    main()
