"""Recipes that train retriever, selector and generator in turns."""

from __future__ import annotations

from rlrag.config import AlternatingConfig, RunConfig
from rlrag.recipes.retriever import openrag
from rlrag.recipes.selection import co_training, sampled_dro


def _full(name: str, num_selected: int) -> RunConfig:
    """Two rounds; each turn takes the settings of the recipe that trains its parts alone.

    A retriever in vocabulary space ranks, the dense encoder's vectors are features of the selector.
    """
    retriever = openrag(name)
    selection = co_training(name, num_selected, sampled_dro("selector", "generator"))
    return selection.model_copy(
        update={
            "recipe": f"{name}-full",
            "retrieval": retriever.retrieval.model_copy(
                update={"num_candidates": selection.retrieval.num_candidates, "bm25_scores": True}
            ),
            "algorithm": AlternatingConfig(
                rounds=2,
                retriever=retriever.openrag.model_copy(
                    update={"offline_epochs": 3, "online_epochs": 3}
                ),
                selection=selection.dro,
            ),
        }
    )


def nq_full() -> RunConfig:
    """Retriever, selector and generator in turns on Natural Questions (RLRAG_DATA_DIR)."""
    return _full("nq", 2)


def hotpotqa_full() -> RunConfig:
    """Retriever, selector and generator in turns on HotpotQA, three passages (RLRAG_DATA_DIR)."""
    return _full("hotpotqa", 3)
