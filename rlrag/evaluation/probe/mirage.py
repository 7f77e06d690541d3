"""MIRAGE: how a system answers without context, with mixed context and with gold passages only.

MIRAGE (Park et al., NAACL 2025 Findings, arXiv 2504.17137) asks every question three times: with no
passage (base, b), with gold passages among distractors (mixed, m) and with gold passages alone
(oracle, o). Each answer is right (1) or wrong (0), and N questions give the shares

    noise vulnerability        NV = (1/N) sum [m = 0 and o = 1]   distractors spoil the answer
    context acceptability      CA = (1/N) sum [m = 1 and o = 1]   the passage is used, noise or not
    context insensitivity      CI = (1/N) sum [o = 0 and b = 0]   the passage does not help
    context misinterpretation  CM = (1/N) sum [o = 0 and b = 1]   the passage spoils what was known
    overall                    CA - NV - CI - CM

as the released `evaluation.py` counts them. Each of the eight outcomes falls under exactly one, so
that the four sum to 1 and the overall score is 2 CA - 1, between -1 and 1. b counts only where o is
0, m only where o is 1.

Shape letter: Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from rlrag.errors import DataError

SHARES = (
    "noise_vulnerability",
    "context_acceptability",
    "context_insensitivity",
    "context_misinterpretation",
)
"""The four measures that sum to 1."""


def loosely_right(answer: str, golden_answers: Sequence[str]) -> float:
    """1.0 if a lower-cased golden answer stands somewhere in the lower-cased answer, else 0.0.

    MIRAGE's own label (`calculate_EM_loose` of its released `LLM.py`). Unlike `answer_contained` it
    neither normalises nor asks for whole words.

    Edges: no golden answers, 0.0; such a question has no place in MIRAGE. A blank one stands in
    everything and does not count.

    Example:
        >>> loosely_right("It is Nigeria.", ["niger"]), loosely_right("the u.s.", ["US"])
        (1.0, 0.0)
    """
    said = answer.lower()
    return float(any(golden.strip() and golden.lower() in said for golden in golden_answers))


def mirage(base: ArrayLike, mixed: ArrayLike, oracle: ArrayLike) -> dict[str, np.ndarray]:
    """Each question's part in the four shares and in `overall`; their means are the measures.

    Args:
        base: Whether the answer without passages is right, shape (Q,), 0 or 1.
        mixed: The same with the gold passages among distractors.
        oracle: The same with the gold passages alone.

    Raises:
        DataError: the arrays differ in shape, are empty or hold something else than 0 and 1.

    Example:
        Two questions: known and spoilt by distractors, and read from them.

        >>> found = mirage(base=[1, 0], mixed=[0, 1], oracle=[1, 1])
        >>> {name: float(values.mean()) for name, values in found.items() if values.any()}
        {'noise_vulnerability': 0.5, 'context_acceptability': 0.5, 'overall': 0.0}
    """
    base_Q, mixed_Q, oracle_Q = _labels(base, mixed, oracle)
    cases = (oracle_Q & ~mixed_Q, oracle_Q & mixed_Q, ~oracle_Q & ~base_Q, ~oracle_Q & base_Q)
    shares = {name: case_Q.astype(float) for name, case_Q in zip(SHARES, cases, strict=True)}
    vulnerable_Q, accepted_Q, insensitive_Q, misread_Q = shares.values()
    return shares | {"overall": accepted_Q - vulnerable_Q - insensitive_Q - misread_Q}


def _labels(*given: ArrayLike) -> list[np.ndarray]:
    arrays = [np.asarray(labels, dtype=float) for labels in given]
    shapes = [labels.shape for labels in arrays]
    if len(set(shapes)) > 1 or arrays[0].ndim != 1 or not len(arrays[0]):
        raise DataError(
            f"base, mixed and oracle have the shapes {shapes}; give one label for each question"
        )
    for labels in arrays:
        strange = labels[(labels != 0) & (labels != 1)]
        if len(strange):
            raise DataError(f"a label is {strange[0]}; it must be 1 (right) or 0 (wrong)")
    return [labels.astype(bool) for labels in arrays]
