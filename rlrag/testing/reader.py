"""A test generator without a language model."""

from __future__ import annotations

from collections.abc import Sequence

from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.generation.weights import GeneratorWeights
from rlrag.records import Generation, Passage, Prompt, Question, Score


class WordPrompts:
    """Builds a prompt whose text is question and passages; its token ids are their bytes."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        """The prompt of a question behind its passages."""
        text = " | ".join([*(p.contents for p in passages), question.question])
        return Prompt(tuple(text.encode()), text, len(passages))

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """The bytes of an answer."""
        return tuple(answer.strip().encode())

    def encode_target(self, answer: str) -> tuple[int, ...]:
        """The same with the end of its line."""
        return (*self.encode_answer(answer), *b"\n")


class ReadingGenerator:
    """Answers with the last word of the first passage that names the question's subject.

    It scores an answer by whether the prompt holds it, so that good selections are rewarded.
    """

    def __init__(self) -> None:
        self.identity, self.version = "reading-generator", 0
        self.tokens = TokenCount()
        self.num_calls = 0

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Take over their name alone."""
        self.identity, self.version = f"reading-{weights.digest}", weights.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """The last word of each prompt's first passage."""
        self._count(prompts)
        return [
            Generation(p.text.split(" | ")[0].split()[-1], -1.0, 1, len(p.token_ids), self.version)
            for p in prompts
        ]

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        """High where the prompt holds the answer."""
        self._count(prompts)
        return [
            Score(
                -0.5 if bytes(a).decode() in p.text else -6.0,
                len(a),
                len(p.token_ids),
                self.version,
            )
            for p, a in zip(prompts, answers, strict=True)
        ]

    def close(self) -> None:
        """Nothing to free."""

    def _count(self, prompts: Sequence[Prompt]) -> None:
        self.num_calls += 1
        self.tokens.spent += sum(len(p.token_ids) for p in prompts)
