"""Splits a run's questions into training and validation, with warnings for the user."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass

from rlrag.config import RunConfig
from rlrag.data.corpus import Corpus
from rlrag.data.load import BUILTIN_QUESTIONS, load_questions
from rlrag.data.questions import QuestionSet
from rlrag.errors import DataError

_NUM_NAMED = 3


@dataclass(frozen=True)
class TrainingQuestions:
    """The sampled questions and the two parts of them: to train on, and held back.

    `num_found` counts all questions of the source, `num_left_out` those of them without golden
    answers, where the run learns from these.
    """

    sampled: QuestionSet
    train: QuestionSet
    held_back: QuestionSet | None
    num_found: int
    num_left_out: int


def training_questions(config: RunConfig, corpus: Corpus | None = None) -> TrainingQuestions:
    """Read, sample and split the training questions, by a rule that `seed` does not change.

    Args:
        config: The run.
        corpus: When given, gold ids that it lacks are counted.

    Raises:
        DataError: when none has the golden answers that the run learns from, or fewer are left
            than one batch needs.
    """
    data, batch_size = config.data, config.training.batch_size
    found = load_questions(data.train_questions, config.cache_path, corpus)
    usable = found
    if config.needs_golden_answers:
        usable = found.answerable()
        if not len(usable):
            raise _unanswerable(config, len(found))
    sampled = usable.sample(data.max_train_questions, seed=0)
    train, held_back = sampled, None
    if data.num_validation_questions:
        train, held_back = sampled.split(data.num_validation_questions, seed=0)
    if len(train) < batch_size:
        raise DataError(
            f"{data.train_questions} leaves {len(train)} questions to train on, fewer than "
            f"training.batch_size {batch_size}; lower it or data.num_validation_questions"
        )
    return TrainingQuestions(sampled, train, held_back, len(found), len(found) - len(usable))


def _unanswerable(config: RunConfig, num_questions: int) -> DataError:
    spec = config.data.train_questions
    if config.algorithm.name == "sft" or config.trains_by_openrag:
        return DataError(
            f"none of the {num_questions} questions of {spec} has golden_answers, but the run "
            "learns from them; give golden answers"
            + (", or use algorithm.labels gold" if config.trains_by_openrag else "")
        )
    # Exact match and its like would be 1 for an empty answer, and teach silence.
    return DataError(
        f"none of the {num_questions} questions of {spec} has golden_answers, but "
        f"reward.functions {', '.join(config.reward.functions)} compare with them; give golden "
        "answers, or a reward without them: selection_recall where metadata has gold_ids, or "
        "your own function"
    )


def are_here(spec: str) -> bool:
    """Whether the questions of a source can be read without fetching anything."""
    if spec.partition(":")[0] in BUILTIN_QUESTIONS:
        return True
    path = os.path.expanduser(spec)
    return os.path.exists(path) or os.path.isdir(path.rpartition(":")[0])


def remarks(
    config: RunConfig, found: TrainingQuestions, evaluation: QuestionSet | None = None
) -> list[str]:
    """What a user should know of the questions before a run begins, a sentence each.

    Args:
        config: The run.
        found: Its training questions.
        evaluation: The questions of its comparison, where it has one.
    """
    said, num_train = [], len(found.train)
    num_left_out = found.num_left_out
    if config.algorithm.name == "jsa":  # whose batches leave them out
        num_left_out = num_train - len(found.train.answerable())
    if num_left_out:
        said.append(
            f"{num_left_out:,} of {found.num_found:,} questions of "
            f"{config.data.train_questions} have no golden answers and are left out of training"
        )
    if found.held_back is not None:
        num_held_back = len(found.held_back)
        if num_held_back > num_train:
            said.append(
                f"data.num_validation_questions holds back {num_held_back:,} of "
                f"{len(found.sampled):,} questions, more than the {num_train:,} that are left to "
                "train on; lower it"
            )
        said += _shared(found.held_back, found.train, "held-back")
    if evaluation is not None:
        said += _shared(evaluation, found.sampled, "evaluation")
    return said


def _shared(asked: QuestionSet, known: QuestionSet, name: str) -> list[str]:
    """One sentence where questions that are to be answered are among those of training."""
    texts = {normalized(question.question) for question in known.questions}
    ids = {question.id for question in known.questions}
    by_text = [q.id for q in asked.questions if normalized(q.question) in texts]
    by_id = {q.id for q in asked.questions if q.id in ids} - set(by_text)
    if not by_text and not by_id:
        return []
    kinds = [f"{len(by_text):,} by their text"] if by_text else []
    kinds += [f"{len(by_id):,} by their id alone"] if by_id else []
    shared = by_text + [q.id for q in asked.questions if q.id in by_id]
    named = ", ".join(shared[:_NUM_NAMED]) + ", ..." * (len(shared) > _NUM_NAMED)
    return [
        f"{len(shared):,} of {len(asked):,} {name} questions are training questions too: "
        f"{' and '.join(kinds)} ({named}); results on them do not show what carries over to others"
    ]


def normalized(text: str) -> str:
    """A text by which equal questions are told: letters and digits in one case, single spaces.

    Example:
        >>> normalized("Who  wrote “Emma”?") == normalized("who wrote emma")
        True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()
