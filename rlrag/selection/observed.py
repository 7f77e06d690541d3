"""Converts observations of the environment into batches for scorers.

Shape letters: E episodes, U different questions, N candidates, C retriever scores, D vector length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlrag.errors import EpisodeError
from rlrag.records import Columns
from rlrag.retrieval.candidates import CandidateBatch


@dataclass(frozen=True)
class Observed:
    """What E episodes show: U different questions with their candidates, and whose they are.

    The questions stand in the order in which they first appear; `places_E` says which of them an
    episode shows.
    """

    batch: CandidateBatch
    places_E: np.ndarray

    def still_shown(self, observations: Columns, infos: Columns) -> bool:
        """Whether the episodes show the same candidates now."""
        batch, places_E = self.batch, self.places_E
        scores_ENC = batch.scores_BNC[places_E]
        return np.array_equal(scores_ENC, observations["retriever_scores"]) and all(
            passages is batch.passage_texts[place] or passages == batch.passage_texts[place]
            for passages, place in zip(infos["passages"], places_E.tolist(), strict=True)
        )


def observed(observations: Columns, infos: Columns) -> Observed:
    """Read questions and candidates from what episodes show.

    Episodes with equal texts and scores share a row of the batch.

    Raises:
        EpisodeError: when the environment does not show them.
    """
    missing = [name for name in ("question", "passages") if name not in infos]
    missing += [name for name in ("retriever_scores",) if name not in observations]
    if missing:
        raise EpisodeError(
            f"the environment does not show {', '.join(missing)}, which this policy needs; add "
            "them to the observations and infos of the environment, or use a policy of your own"
        )
    scores_ENC = observations["retriever_scores"]
    places: dict[tuple[object, ...], int] = {}
    first: list[int] = []
    places_E = np.zeros(len(scores_ENC), dtype=np.int64)
    shown = zip(infos["question"], infos["passages"], scores_ENC, strict=True)
    for e, (question, passages, scores_NC) in enumerate(shown):
        key = (question, passages, scores_NC.tobytes())
        if key not in places:
            places[key] = len(first)
            first.append(e)
        places_E[e] = places[key]
    num_candidates = scores_ENC.shape[1]
    nothing_UND = np.zeros((len(first), num_candidates, 0), dtype=np.float32)
    question_ED = observations.get("question_embedding")
    passages_END = observations.get("candidate_embeddings")
    batch = CandidateBatch(
        question_texts=tuple(infos["question"][first]),
        passage_texts=tuple(infos["passages"][first]),
        scores_BNC=scores_ENC[first],
        question_vectors_BD=nothing_UND[:, 0] if question_ED is None else question_ED[first],
        passage_vectors_BND=nothing_UND if passages_END is None else passages_END[first],
    )
    return Observed(batch, places_E)
