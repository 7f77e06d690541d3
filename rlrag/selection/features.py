"""Features of each candidate relative to the question's other candidates.

Every feature is relative to the question's other candidates or bounded, so that one network serves
any corpus and retriever.

Shape letters: B questions, N candidates, C retriever scores, F features.
"""

from __future__ import annotations

import re

import numpy as np

from rlrag.retrieval.candidates import CandidateBatch

_WORD = re.compile(r"\w+")
_FUNCTION_WORDS = frozenset(
    # One string is easier to read and change than sixty quoted words.
    """a an and are as at be by did do does for from had has have how in is it its of on or s that
    the there they this to was were what when where which who whom whose why will with would
    """.split()  # noqa: SIM905
)
_ASKED_FOR = ("who", "when", "where", "what", "which", "how many", "how much", "why")
_NUMBER = re.compile(r"\d")


def content_words(text: str) -> set[str]:
    """Different words of a text, lower-cased, without function words.

    Example:
        >>> sorted(content_words("Where is the Tower of London?"))
        ['london', 'tower']
    """
    return set(_WORD.findall(text.lower())) - _FUNCTION_WORDS


def num_features(num_scores: int) -> int:
    """Length F of the feature vector for C retriever scores."""
    return 2 * num_scores + 2 + 4 + len(_ASKED_FOR)


def candidate_features(batch: CandidateBatch) -> np.ndarray:
    """Features of every candidate, float32 of shape (B, N, F).

    In order: each retriever score standardised over the candidates, and its distance from the best
    one in standard deviations; reciprocal rank and log rank; share of the question's content words
    in the text and in the title, log length, share of words with a digit; and one-hot what the
    question asks for. Candidates with equal scores get zeros for the standardised ones. A passage
    without a title has a share of 0 in it.
    """
    parts = [_score_features(batch.scores_BNC), _rank_features(batch.scores_BNC.shape[:2])]
    parts.append(
        np.array(
            [
                [_text_features(question, passage) for passage in passages]
                for question, passages in zip(
                    batch.question_texts, batch.passage_texts, strict=True
                )
            ],
            dtype=np.float32,
        )
    )
    return np.concatenate(parts, axis=-1)


def _score_features(scores_BNC: np.ndarray) -> np.ndarray:
    # In float64 the mean of equal scores is exact; in float32 its rounding would be their spread.
    scores_BNC = scores_BNC.astype(np.float64)
    spread = scores_BNC.std(axis=1, keepdims=True)
    spread = np.where(spread > 0, spread, 1.0)
    standard = (scores_BNC - scores_BNC.mean(axis=1, keepdims=True)) / spread
    from_best = (scores_BNC - scores_BNC.max(axis=1, keepdims=True)) / spread
    return np.concatenate([standard, from_best], axis=-1).astype(np.float32)


def _rank_features(shape: tuple[int, int]) -> np.ndarray:
    rank_N = np.arange(1, shape[1] + 1, dtype=np.float32)
    features_N2 = np.stack([1 / rank_N, np.log(rank_N)], axis=-1)
    return np.broadcast_to(features_N2, (*shape, 2))


def _text_features(question: str, passage: str) -> list[float]:
    title, newline, text = passage.partition("\n")
    if not newline:
        title, text = "", passage
    asked = question.lower()
    wanted = content_words(question)
    words = _WORD.findall(text.lower())
    total = max(len(wanted), 1)
    return [
        len(wanted & set(words)) / total,
        len(wanted & set(_WORD.findall(title.lower()))) / total,
        float(np.log1p(len(words))) / 5,
        sum(bool(_NUMBER.search(word)) for word in words) / max(len(words), 1),
        *(float(asked.startswith(start) or f" {start} " in asked) for start in _ASKED_FOR),
    ]
