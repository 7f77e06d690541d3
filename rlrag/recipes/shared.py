"""What recipes of several kinds have in common: the data, the prompt, the name."""

from __future__ import annotations

import os

from rlrag.config import DATA_DIR_VARIABLE, DataConfig, FewShotExample, PromptConfig, RunConfig
from rlrag.data.folder import corpus_path, questions_path


def _data_folder() -> str:
    """What the variable names; where it is unset, its name for the error to show."""
    return os.environ.get(DATA_DIR_VARIABLE, f"${DATA_DIR_VARIABLE}")


def questions_of(
    name: str, num_validation: int, max_train_questions: int | None = None
) -> DataConfig:
    """The corpus and questions of a data set in that folder."""
    folder = _data_folder()
    return DataConfig(
        corpus=str(corpus_path(folder, name)),
        train_questions=str(questions_path(folder, name, "train")),
        eval_questions=str(questions_path(folder, name, "dev")),
        max_train_questions=max_train_questions,
        num_validation_questions=num_validation,
    )


def named(name: str, config: RunConfig) -> RunConfig:
    """The same configuration under another name."""
    return config.model_copy(update={"recipe": name})


def short_answers(question_mark: bool) -> PromptConfig:
    """Three worked examples that keep a small model's answers to a few words.

    Args:
        question_mark: Whether the data's questions end with one. The prompt adds what is missing:
            a small model answers better to a question that ends with it.
    """
    mark = "?" if question_mark else ""
    return PromptConfig(
        instruction="",
        passage_order="best_last",  # by benchmarks/results/layouts.md
        passage_template="Context: [{number}] Title: {title} {text}\n",
        question_template="Question: {question}" + ("" if question_mark else "?") + "\nAnswer:",
        few_shot=(
            FewShotExample(
                title="Danube",
                text="The Danube is Europe's second-longest river, after the Volga. It flows "
                "through ten countries, rising in Germany and emptying into the Black Sea.",
                question=f"which sea does the danube flow into{mark}",
                answer="Black Sea",
            ),
            FewShotExample(
                title="Apollo 11",
                text="Apollo 11 was the spaceflight that first landed humans on the Moon. "
                "Commander Neil Armstrong and pilot Buzz Aldrin landed on July 20, 1969.",
                question=f"who was the first person to walk on the moon{mark}",
                answer="Neil Armstrong",
            ),
            FewShotExample(
                title="Penicillin",
                text="Penicillin was discovered in 1928 by the Scottish scientist Alexander "
                "Fleming at St Mary's Hospital in London.",
                question=f"when was penicillin discovered{mark}",
                answer="1928",
            ),
        ),
    )
