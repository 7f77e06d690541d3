"""MIRAGE's measures of outcomes counted by hand, of all eight patterns, by the released rule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rlrag.errors import DataError
from rlrag.evaluation.probe.mirage import SHARES, loosely_right, mirage

PATTERNS = list(itertools.product((0, 1), repeat=3))


def means(base, mixed, oracle) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in mirage(base, mixed, oracle).items()}


@pytest.mark.parametrize(
    ("base", "mixed", "oracle", "expected"),
    [
        (0, 0, 0, "context_insensitivity"),
        (0, 0, 1, "noise_vulnerability"),
        (0, 1, 0, "context_insensitivity"),
        (0, 1, 1, "context_acceptability"),
        (1, 0, 0, "context_misinterpretation"),
        (1, 0, 1, "noise_vulnerability"),
        (1, 1, 0, "context_misinterpretation"),
        (1, 1, 1, "context_acceptability"),
    ],
)
def test_each_outcome_falls_under_one_share(base, mixed, oracle, expected):
    found = means([base], [mixed], [oracle])
    overall = found.pop("overall")
    assert found == {name: float(name == expected) for name in SHARES}
    assert overall == (1.0 if expected == "context_acceptability" else -1.0)


def test_five_questions_by_hand():
    found = means(base=[0, 1, 1, 0, 0], mixed=[1, 1, 0, 0, 1], oracle=[1, 1, 1, 0, 0])
    assert found == pytest.approx(
        {
            "noise_vulnerability": 0.2,
            "context_acceptability": 0.4,
            "context_insensitivity": 0.4,
            "context_misinterpretation": 0.0,
            "overall": -0.2,
        }
    )


@pytest.mark.parametrize("seed", range(20))
def test_shares_sum_to_one_and_give_the_overall_score(seed):
    """Counted a second time as the released program does, branch by branch."""
    counts = np.random.default_rng(seed).integers(4, size=len(PATTERNS))
    counts[seed % len(PATTERNS)] += 1
    rows = [pattern for pattern, n in zip(PATTERNS, counts, strict=True) for _ in range(n)]
    base, mixed, oracle = map(list, zip(*rows, strict=True))
    found = means(base, mixed, oracle)
    assert sum(found[name] for name in SHARES) == pytest.approx(1)
    tally = dict.fromkeys(SHARES, 0)
    for b, m, o in rows:
        if m == 0 and o == 1:
            tally["noise_vulnerability"] += 1
        elif m == 1 and o == 1:
            tally["context_acceptability"] += 1
        elif b == 0 and o == 0:
            tally["context_insensitivity"] += 1
        elif b == 1 and o == 0:
            tally["context_misinterpretation"] += 1
    assert {name: found[name] for name in SHARES} == pytest.approx(
        {name: count / len(rows) for name, count in tally.items()}
    )
    assert found["overall"] == pytest.approx(2 * found["context_acceptability"] - 1)


@pytest.mark.parametrize(
    ("base", "mixed", "oracle", "message"),
    [
        ([1, 0], [1], [1, 0], r"shapes \[\(2,\), \(1,\), \(2,\)\]; give one label"),
        ([], [], [], "give one label for each question"),
        ([1], [0.5], [1], r"a label is 0.5; .* 1 \(right\) or 0 \(wrong\)"),
        ([1], [1], [np.nan], "a label is nan"),
    ],
)
def test_labels_that_are_none_are_refused(base, mixed, oracle, message):
    with pytest.raises(DataError, match=message):
        mirage(base, mixed, oracle)


@pytest.mark.parametrize(
    ("answer", "golden", "expected"),
    [
        ("The capital is PARIS", ["paris"], 1),
        ("Nigeria", ["Niger"], 1),  # part of a word counts
        ("the U.S.", ["US"], 0),  # nothing is normalised
        ("Lyon", ["Paris", "lyon"], 1),
        ("", ["Paris"], 0),
        ("Paris", [], 0),
        ("New York", ["Paris", "", " "], 0),  # blank ones stand in everything
    ],
)
def test_the_label_is_a_substring_of_lower_case_text(answer, golden, expected):
    assert loosely_right(answer, golden) == expected
