"""Compares answers with golden answers, scores in [0, 1]: exact match, F1, containment, ROUGE-L.

Normalisation and the first two measures follow the official SQuAD 2.0 evaluation: golden answers
that normalise to nothing are dropped. A question whose golden answers are all blank is
unanswerable: 1.0 if the normalised answer is empty, else 0.0. The other measures keep the same
rules.

Departure: where all golden answers normalise to nothing although one is not blank, as the letter
"A" or the sign "." does, question and answer are compared with articles, and where punctuation is
all there is, with it too. SQuAD 2.0 takes such a question for unanswerable.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from rlrag.records import Passage

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUGE_TOKEN = re.compile(r"[^\W_]+")

_CACHED_PASSAGES = 16_384
_CACHED_QUESTIONS = 4_096


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, then the words a, an and the, then join words by spaces.

    As SQuAD 2.0 (Rajpurkar et al., arXiv 1806.03822, evaluation script): punctuation is deleted,
    not replaced, so "1,000" becomes "1000" and "co-op" "coop"; punctuation outside ASCII stays.

    Example:
        >>> normalize_answer("  The Côte d'Ivoire (a country), 1,000!")
        'côte divoire country 1000'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def _with_articles(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def _with_punctuation(text: str) -> str:
    return " ".join(text.lower().split())


def is_unanswerable(golden_answers: Sequence[str]) -> bool:
    """Whether there is no golden answer but blank ones.

    Example:
        >>> [is_unanswerable(golden) for golden in ((), (" ",), ("A",), ("?",))]
        [True, True, False, False]
    """
    return not any(golden.strip() for golden in golden_answers)


_Normalize = Callable[[str], str]


@lru_cache(maxsize=_CACHED_QUESTIONS)
def _normalized_golden(golden_answers: tuple[str, ...]) -> tuple[tuple[str, ...], _Normalize]:
    """Golden answers that are left after normalisation, and the normalisation that leaves some."""
    for normalize in (normalize_answer, _with_articles, _with_punctuation):
        normalized = dict.fromkeys(map(normalize, golden_answers))
        if golden := tuple(filter(None, normalized)):
            return golden, normalize
    return (), normalize_answer


@lru_cache(maxsize=_CACHED_PASSAGES)
def _normalized_passage(passage: Passage, normalize: _Normalize) -> str:
    return normalize(passage.contents)


def _contains_words(text: str, words: str) -> bool:
    """Whether normalised `words` stand in normalised `text` with word boundaries at both ends."""
    return f" {words} " in f" {text} "


def exact_match(answer: str, golden_answers: Sequence[str]) -> float:
    """1.0 if the normalised answer equals a normalised golden answer, else 0.0.

    Edges: unanswerable question, 1.0 iff the normalised answer is empty.

    Example:
        >>> exact_match("the Eiffel Tower.", ["Eiffel tower", "La Tour Eiffel"])
        1.0
        >>> exact_match("", []), exact_match("Paris", [])
        (1.0, 0.0)
        >>> exact_match("a.", ["A"]), exact_match("the", ["A"]), exact_match("", ["A"])
        (1.0, 0.0, 0.0)
    """
    golden, normalize = _normalized_golden(tuple(golden_answers))
    normalized = normalize(answer)
    return float(normalized in golden if golden else not normalized)


def token_f1(answer: str, golden_answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall, the best over golden answers.

    F1 = 2 c / (a + g), with `a` and `g` the numbers of words of the normalised answer and golden
    answer and `c` of those in common, counted with their multiplicity.

    Edges: 0.0 for an empty answer to an answerable question; unanswerable question, 1.0 iff the
    normalised answer is empty.

    Example:
        One word in common of 2 and of 3: 2 * 1 / (2 + 3).

        >>> token_f1("Emperor Napoleon", ["Napoleon of France"])
        0.4
    """
    golden_answers, normalize = _normalized_golden(tuple(golden_answers))
    words = Counter(normalize(answer).split())
    if not golden_answers:
        return float(not words)
    best = 0.0
    for golden in golden_answers:
        golden_words = Counter(golden.split())
        num_common = (words & golden_words).total()
        best = max(best, 2 * num_common / (words.total() + golden_words.total()))
    return best


def answer_contained(answer: str, golden_answers: Sequence[str]) -> float:
    """1.0 if the words of a normalised golden answer stand together in the normalised answer.

    Only whole words count: "Niger" is not contained in "Nigeria".

    Edges: unanswerable question, 1.0 iff the normalised answer is empty.

    Example:
        >>> answer_contained("It is Niger, I think", ["Niger"])
        1.0
        >>> answer_contained("Nigeria", ["Niger"])
        0.0
    """
    golden_answers, normalize = _normalized_golden(tuple(golden_answers))
    normalized = normalize(answer)
    if not golden_answers:
        return float(not normalized)
    return float(any(_contains_words(normalized, golden) for golden in golden_answers))


def passages_contain_answer(passages: Sequence[Passage], golden_answers: Sequence[str]) -> float:
    """1.0 if some passage (title and text) contains a golden answer, as `answer_contained` does.

    Normalised passages are kept in a bounded cache, because training meets the same ones often.

    Edges: no passages, 0.0; unanswerable question, 1.0 iff no passage was picked.

    Example:
        >>> niger = Passage(id="ne", title="Niger", text="The capital is Niamey.")
        >>> passages_contain_answer([niger], ["niamey"]), passages_contain_answer([], ["niamey"])
        (1.0, 0.0)
    """
    golden_answers, normalize = _normalized_golden(tuple(golden_answers))
    if not golden_answers:
        return float(not passages)
    return float(
        any(
            _contains_words(_normalized_passage(passage, normalize), golden)
            for passage in passages
            for golden in golden_answers
        )
    )


def rouge_l(answer: str, golden_answers: Sequence[str]) -> float:
    """ROUGE-L F-measure (Lin 2004, section 3.1, with beta = 1), the best over golden answers.

    F = 2 l / (a + g), with l the length of the longest common subsequence of the `a` tokens of the
    answer and the `g` of a golden answer. Tokens are lower-cased runs of letters and digits,
    without stemming. Departure: letters of every script count, where the reference
    implementation knows a to z only.

    Edges: 0.0 where one side has no tokens; unanswerable question, 1.0 iff the normalised answer
    is empty. Where no golden answer has a letter or digit, tokens are what stands between spaces.

    Example:
        The longest common subsequence is "police killed gunman", so 2 * 3 / (4 + 3).

        >>> round(rouge_l("police killed the gunman", ["Police killed gunman"]), 4)
        0.8571
    """
    if is_unanswerable(golden_answers):
        return float(not normalize_answer(answer))
    tokens_of: Callable[[str], list[str]] = _ROUGE_TOKEN.findall
    if not any(map(tokens_of, golden_answers)):
        tokens_of = str.split
    tokens = tokens_of(answer.lower())
    golden_tokens = [tokens_of(golden.lower()) for golden in golden_answers]
    return max(
        2 * _common_subsequence_length(tokens, golden) / (len(tokens) + len(golden))
        for golden in golden_tokens
        if golden
    )


def _common_subsequence_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming one row at a time."""
    row = [0] * (len(right) + 1)
    for left_token in left:
        diagonal = 0
        for column, right_token in enumerate(right, start=1):
            above = row[column]
            row[column] = diagonal + 1 if left_token == right_token else max(above, row[column - 1])
            diagonal = above
    return row[-1]
