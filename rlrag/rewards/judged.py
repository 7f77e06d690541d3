"""The reward `judge`: a language model decides whether an answer is correct.

It is asked for a batch at a time, as `rlrag judge` asks it, and its verdicts are kept as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlrag.config import RewardConfig
from rlrag.errors import SetupError
from rlrag.openai_api import read_key
from rlrag.rewards.bounded_calls import CallFailure, Keywords
from rlrag.rewards.llm_judge import CORRECT, UNPARSABLE, Case, Judged, JudgeSettings, judge_answers
from rlrag.rewards.verdict_store import VerdictStore

JUDGE = "judge"
JUDGE_WANTS = frozenset({"question", "golden_answers", "answer"})


class JudgeCalls:
    """1.0 for a correct answer, 0.0 for an incorrect one, a `CallFailure` without a verdict.

    Equal answers to a question are asked for once. A judge that cannot be reached fails the calls
    that it left; one that refuses the key or the model ends the batch, as no repetition mends that.
    """

    def __init__(self, config: RewardConfig, cache_dir: Path | None) -> None:
        """Read the key; nothing is asked yet.

        Args:
            config: The judge, and how long it is asked.
            cache_dir: Where `judge.sqlite` keeps the verdicts; without it they are not kept.

        Raises:
            ConfigError: when the environment lacks the key.
        """
        judge = config.judge
        assert judge.url is not None  # as the configuration sees to
        assert judge.model is not None
        self._settings = JudgeSettings(
            judge.url,
            judge.model,
            concurrency=config.max_concurrent,
            timeout_s=config.timeout_s,
            max_failed_share=1.0,  # training counts failures by itself
        )
        self._key = read_key(judge.key_variable, "reward.judge.key_variable")
        self._cache_dir = cache_dir
        self._store: VerdictStore | None = None

    def __call__(self, calls: Sequence[Keywords]) -> list[float | CallFailure]:
        """One value or failure for each call, in order.

        Raises:
            ConfigError: the judge refuses the key or does not know the model or the address.
            SetupError: the package openai is missing, or the verdicts cannot be kept.
        """
        cases = [Case(call["question"], call["golden_answers"], call["answer"]) for call in calls]
        judged = judge_answers(
            cases, self._settings, self._key, self._opened_store(), keep_going=True
        )
        return [_value(judged, case) for case in cases]

    def _opened_store(self) -> VerdictStore | None:
        if self._store is None and self._cache_dir is not None:
            try:
                self._cache_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"cannot create cache_dir {self._cache_dir}: {error.strerror}; choose another"
                ) from error
            self._store = VerdictStore(self._cache_dir / "judge.sqlite")
        return self._store


def _value(judged: Judged, case: Case) -> float | CallFailure:
    if case in judged.failed:
        return CallFailure(judged.failed[case])
    verdict = judged.verdicts[case]
    if verdict == UNPARSABLE:
        return CallFailure("none of the judge's replies was a verdict; use another model")
    return float(verdict == CORRECT)
