"""Recipes whose episodes hop and search before they answer, trained by DRO."""

from __future__ import annotations

from rlrag.config import (
    HOPS,
    DataConfig,
    DROConfig,
    EnvironmentConfig,
    GeneratorConfig,
    HopSettings,
    RetrievalConfig,
    RunConfig,
    SelectorConfig,
    TrainingConfig,
)
from rlrag.recipes.shared import named, questions_of, short_answers

# Without the bonus some seeds learn to stop after one pick before they see what a second is for.
_DRO = DROConfig(num_samples=8, entropy_weight=0.02)


def title_hops(name: str, num_selected: int, pick_cost: float) -> RunConfig:
    """What the recipes below share: BM25's first five, and hops along titles and rare names.

    A cost in nats for each pick weighs against the likelihood of the answer.
    """
    prompt = short_answers(question_mark=True)
    return RunConfig(
        recipe=f"{name}-hops",
        data=questions_of(name, 50),
        retrieval=RetrievalConfig(kind="bm25", num_candidates=20),
        environment=EnvironmentConfig(
            id=HOPS,
            num_selected=num_selected,
            hops=HopSettings(
                edges=("title_out", "title_in", "shared"),
                num_first=5,
                num_revealed=8,
                pick_cost=pick_cost,
            ),
        ),
        selector=SelectorConfig(kind="slots", may_stop=True),
        generator=GeneratorConfig(
            # A path ends with what the question is about, next to which it stands.
            prompt=prompt.model_copy(
                update={"passage_order": "as_picked", "max_prompt_tokens": 1900}
            )
        ),
        algorithm=_DRO,
        training=TrainingConfig(
            worker_threads=2,
            num_epochs=3,
            batch_size=32,
            learning_rate=2e-2,
            validate_every=9,
            checkpoint_every=9,
        ),
    )


def wiki_hops() -> RunConfig:
    """2WikiMultihopQA: up to four passages along titles (RLRAG_DATA_DIR)."""
    return title_hops("2wiki", 4, pick_cost=0.2)


def hotpotqa_hops() -> RunConfig:
    """HotpotQA: up to four passages along titles (RLRAG_DATA_DIR)."""
    return title_hops("hotpotqa", 4, pick_cost=0.2)


def musique_hops() -> RunConfig:
    """MuSiQue, whose passages lead on by rare names more than by titles (RLRAG_DATA_DIR)."""
    return title_hops("musique", 5, pick_cost=0.2)


def factbook_paths(
    num_train: int, num_validation: int, num_test: int, num_epochs: int
) -> RunConfig:
    """What the recipes below share: a fact names the country, whose fields stand apart.

    A pick reveals the 16 passages of its document that are most similar to the question.
    """
    prompt = short_answers(question_mark=True)
    return RunConfig(
        recipe="factbook-hops",
        data=DataConfig(
            train_questions="factbook-hops:train",
            eval_questions="factbook-hops:test",
            max_train_questions=num_train + num_validation,
            num_validation_questions=num_validation,
            max_eval_questions=num_test,
            passage_words=80,
        ),
        retrieval=RetrievalConfig(kind="hybrid", num_candidates=8, encoder_max_tokens=64),
        environment=EnvironmentConfig(
            id=HOPS, num_selected=2, hops=HopSettings(edges=("document",), num_revealed=16)
        ),
        selector=SelectorConfig(kind="slot_vectors"),
        generator=GeneratorConfig(prompt=prompt.model_copy(update={"passage_order": "as_picked"})),
        algorithm=_DRO,
        training=TrainingConfig(
            num_epochs=num_epochs, batch_size=20, learning_rate=3e-2, validate_every=8
        ),
    )


def quickstart() -> RunConfig:
    """Two-hop questions on the World Factbook; minutes on two cores, nothing to download."""
    return named("quickstart", factbook_paths(160, 60, 200, num_epochs=3))


def factbook_hops() -> RunConfig:
    """The task of quickstart, with the questions and steps that it takes to learn it well."""
    return factbook_paths(400, 100, 400, num_epochs=4)
