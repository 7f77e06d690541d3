"""Complete configurations by name; a recipe is a function that returns one.

Each says what it needs and about how long it takes. Change single fields by flags; write a function
here for a setting of your own.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from rlrag.config import (
    DATA_DIR_VARIABLE,
    DataConfig,
    DROConfig,
    EnvironmentConfig,
    EvaluationConfig,
    FewShotExample,
    GeneratorConfig,
    PromptConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)


def short_answers(question_mark: bool) -> PromptConfig:
    """Three worked examples that keep a small model's answers to a few words.

    Args:
        question_mark: Whether the data's questions end with one. The prompt adds what is missing:
            a small model answers better to a question that ends with it.
    """
    mark = "?" if question_mark else ""
    return PromptConfig(
        instruction="",
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


def quickstart() -> RunConfig:
    """The World Factbook, built-in models; about ten minutes on two cores, nothing to download."""
    return RunConfig(
        recipe="quickstart",
        data=DataConfig(
            max_train_questions=316,
            num_validation_questions=60,
            max_eval_questions=240,
            passage_words=80,
        ),
        retrieval=RetrievalConfig(kind="dense", bm25_scores=True, num_candidates=5),
        environment=EnvironmentConfig(num_selected=2),
        generator=GeneratorConfig(prompt=short_answers(question_mark=True)),
        training=TrainingConfig(num_epochs=6, batch_size=32, learning_rate=5e-3, validate_every=12),
    )


def nq() -> RunConfig:
    """Natural Questions from the folder that RLRAG_DATA_DIR names."""
    folder = os.environ.get(DATA_DIR_VARIABLE, f"${DATA_DIR_VARIABLE}")
    return RunConfig(
        recipe="nq",
        data=DataConfig(
            corpus=f"{folder}/corpus/nq.jsonl.gz",
            train_questions=f"{folder}/questions/nq.train.jsonl",
            eval_questions=f"{folder}/questions/nq.dev.jsonl",
            num_validation_questions=150,
        ),
        retrieval=RetrievalConfig(kind="dense", bm25_scores=True, num_candidates=5),
        environment=EnvironmentConfig(num_selected=2),
        generator=GeneratorConfig(prompt=short_answers(question_mark=False)),
        dro=DROConfig(num_samples=4),
        training=TrainingConfig(num_epochs=1, batch_size=24, learning_rate=3e-3, validate_every=10),
        evaluation=EvaluationConfig(
            systems=(
                "no_retrieval",
                "random_order",
                "retriever_first",
                "retriever_reversed",
                "retriever_order",
                "trained",
                "oracle",
            )
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"quickstart": quickstart, "nq": nq}
