"""OpenRAG's label of a passage: how well the generator answers with that passage alone.

The RAG score and the RAG label of OpenRAG (arXiv 2503.08398, section 3.1). With one passage d in
context the score is the log-probability of the golden answer, log P(y | q, d), summed over its
tokens and not divided by their number. With several golden answers it is that of the likeliest: a
passage is right when it succeeds for one of them, and wrong when it fails for all.

A question is free-form or closed-set. A free-form answer is right when it contains a golden answer
as whole words. A question whose metadata has `choices` is closed-set: its answer is the choice
whose first token is likeliest, no text is generated, and the score is that of the correct choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlrag.algorithms.rag_labels import closed_set_label
from rlrag.config import RewardConfig
from rlrag.errors import DataError, GenerationError, RewardError, RlragError
from rlrag.generation.prompts import PromptBuilder, PromptCounts
from rlrag.generation.protocol import Generator, Sampling
from rlrag.records import Passage, Question
from rlrag.rewards.answering import AnsweringReward
from rlrag.rewards.composite import RewardModel


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the generator made of a passage: log P(y | q, d) in nats, and whether it was right.

    `is_right` is None where no answer was asked for.
    """

    logp: float
    is_right: bool | None


class PassageJudge:
    """Asks the generator about single passages."""

    def __init__(self, generator: Generator, prompts: PromptBuilder, sampling: Sampling) -> None:
        self._generator = generator
        self._prompts = prompts
        self._scoring, self._labelling = (
            AnsweringReward(
                generator,
                prompts,
                RewardModel(RewardConfig(functions=names, weights=(1.0,) * len(names))),
                sampling,
            )
            for names in (("answer_logp",), ("answer_logp", "answer_contained"))
        )
        self.prompt_counts = PromptCounts()
        """Of all prompts that were built."""
        self._scoring.prompt_counts = self._labelling.prompt_counts = self.prompt_counts

    def __call__(
        self, questions: Sequence[Question], passages: Sequence[Passage], with_labels: bool
    ) -> list[Judgement | RlragError]:
        """Judge each pair; an error that concerns one pair takes its place.

        Args:
            questions: One question a pair.
            passages: Its passage.
            with_labels: Let the generator answer free-form questions as well, which costs a
                generation a pair; closed-set questions are always labelled.
        """
        closed = [row for row, question in enumerate(questions) if "choices" in question.metadata]
        free = [row for row in range(len(questions)) if row not in set(closed)]
        found: dict[int, Judgement | RlragError] = {}
        reward = self._labelling if with_labels else self._scoring
        results = reward([questions[row] for row in free], [[passages[row]] for row in free])
        for row, result in zip(free, results, strict=True):
            found[row] = (
                result
                if isinstance(result, RlragError)
                else Judgement(
                    result.terms["answer_logp"],
                    bool(result.terms["answer_contained"]) if with_labels else None,
                )
            )
        judged = self._judge_choices(
            [questions[row] for row in closed], [passages[row] for row in closed]
        )
        found.update(zip(closed, judged, strict=True))
        return [found[row] for row in range(len(questions))]

    def _judge_choices(
        self, questions: Sequence[Question], passages: Sequence[Passage]
    ) -> list[Judgement | RlragError]:
        prompts, answers, owners = [], [], []
        errors: dict[int, RlragError] = {}
        for row, (question, passage) in enumerate(zip(questions, passages, strict=True)):
            try:
                tokens = [(token,) for token in self.first_tokens(question)]
                prompt = self._prompts.build(question, [passage])
            except RlragError as error:
                errors[row] = error
                continue
            self.prompt_counts.add(prompt, num_given=1)
            prompts += [prompt] * len(tokens)
            answers += tokens
            owners += [row] * len(tokens)
        scores = self._generator.score(prompts, answers) if prompts else []
        logp: list[list[float]] = [[] for _ in questions]
        for row, score in zip(owners, scores, strict=True):
            if isinstance(score, GenerationError):
                errors[row] = score
            else:
                logp[row].append(score.logp)
        return [
            errors[row] if row in errors else _judge_choice(question, logp[row])
            for row, question in enumerate(questions)
        ]

    def first_tokens(self, question: Question) -> list[int]:
        """The first token of each choice of a closed-set question.

        Raises:
            DataError: when two choices begin with the same token, one has no token, or no choice
                is correct.
        """
        choices = tuple(question.metadata["choices"])
        encoded = [self._prompts.encode_answer(choice) for choice in choices]
        if not all(encoded):
            empty = choices[encoded.index(())]
            raise DataError(
                f"question {question.id!r}: the choice {empty!r} has no token; use letters as "
                "names of the choices"
            )
        tokens = [ids[0] for ids in encoded]
        if len(set(tokens)) < len(tokens):
            raise DataError(
                f"question {question.id!r}: choices {choices} do not differ in their first "
                "token, which decides the generator's choice; use letters as names of the "
                "choices"
            )
        if not set(choices) & set(question.golden_answers):
            raise DataError(
                f"question {question.id!r}: no golden answer {question.golden_answers} is among "
                f"the choices {choices}"
            )
        return tokens


def _judge_choice(question: Question, logp_C: Sequence[float]) -> Judgement | RlragError:
    """With several correct choices the likeliest of them stands against the wrong ones."""
    choices = zip(question.metadata["choices"], logp_C, strict=True)
    correct = max(
        (place for place, (choice, _) in enumerate(choices) if choice in question.golden_answers),
        key=lambda place: logp_C[place],
    )
    wrong = [
        logp
        for choice, logp in zip(question.metadata["choices"], logp_C, strict=True)
        if choice not in question.golden_answers
    ]
    label = closed_set_label([logp_C[correct], *wrong], correct=0)
    if label is None:
        return RewardError(
            f"the choices of question {question.id!r} were scored as {list(logp_C)}; check the "
            "generator's weights and dtype"
        )
    return Judgement(logp_C[correct], bool(label))
