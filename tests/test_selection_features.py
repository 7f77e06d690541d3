"""Features of candidates by hand, and at their edges."""

from __future__ import annotations

import numpy as np
import pytest

from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.features import candidate_features, num_features


def batch_of(question: str, passages: tuple[str, ...], scores_NC) -> CandidateBatch:
    scores_BNC = np.asarray(scores_NC, dtype=np.float32)[None]
    vectors_BND = np.zeros((1, len(passages), 0), dtype=np.float32)
    return CandidateBatch((question,), (passages,), scores_BNC, vectors_BND[:, 0], vectors_BND)


def text_features(question: str, passage: str) -> list[float]:
    features_BNF = candidate_features(batch_of(question, (passage,), [[1.0]]))
    assert features_BNF.shape == (1, 1, num_features(1))
    return features_BNF[0, 0, 4:].tolist()


def test_scores_are_standardised_over_the_candidates():
    # Mean 2 and standard deviation 1.
    features_BNF = candidate_features(batch_of("q", ("a", "b"), [[3.0], [1.0]]))
    assert features_BNF[0, :, :2].tolist() == [[1.0, 0.0], [-1.0, -2.0]]


@pytest.mark.parametrize("score", [0.1, 0.3, 0.7, 1.7, 25.1])
@pytest.mark.parametrize("num_candidates", [3, 7, 10, 20])
def test_equal_scores_are_zeros_whatever_their_mean_rounds_to(score, num_candidates):
    passages = ("text",) * num_candidates
    scores_NC = np.full((num_candidates, 2), score)
    assert not candidate_features(batch_of("q", passages, scores_NC))[..., :4].any()


def test_words_of_text_and_title_count_apart():
    # Of the question's "lamp" and "hold", the title has one and the text one of its two words.
    asked = "what does the lamp hold?"
    in_text, in_title, length, digits = text_features(asked, "A lamp\n3 hold")[:4]
    assert (in_text, in_title, digits) == (0.5, 0.5, 0.5)
    assert length == pytest.approx(np.log(3) / 5)


def test_a_passage_without_a_title_is_all_text():
    asked = "what does the lamp hold?"
    with_empty_title = text_features(asked, "\nThe lamp holds oil since 1933.")
    assert text_features(asked, "The lamp holds oil since 1933.") == with_empty_title
    assert with_empty_title[:2] == [0.5, 0.0]
