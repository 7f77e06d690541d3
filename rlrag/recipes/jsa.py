"""Recipes that train retriever and generator by joint stochastic approximation (JSA-RAG)."""

from __future__ import annotations

from rlrag.config import GeneratorTrainingConfig, JSAConfig, RunConfig
from rlrag.recipes.retriever import Retriever, openrag
from rlrag.recipes.shared import named, questions_of


def jsa(name: str, kind: Retriever = "dense", train_generator: bool = False) -> RunConfig:
    """What the recipes below share: prompt, batches and systems of `openrag`, 600 questions.

    Proposals and domains are as many as in the paper's scripts. Vectors of length 1 need a
    temperature.
    """
    alike = openrag(name, kind=kind)
    dense = kind == "dense"
    return alike.model_copy(
        update={
            "recipe": f"{name}-jsa",
            "data": questions_of(name, 100, 700),
            "algorithm": JSAConfig(
                train_generator=train_generator,
                temperature=0.05 if dense else 1.0,
                learning_rate=2e-5 if dense else 1e-4,
            ),
            "generator_training": GeneratorTrainingConfig(sequences_per_question=1),
            "training": alike.training.model_copy(update={"num_epochs": 10}),
        }
    )


def nq_jsa() -> RunConfig:
    """The dense encoder of questions, by the posterior of proposed passages (RLRAG_DATA_DIR)."""
    return jsa("nq")


def nq_jsa_semi() -> RunConfig:
    """nq-jsa for the semi-parametric retriever."""
    return named("nq-jsa-semi", jsa("nq", "semi_parametric"))


def nq_jsa_joint() -> RunConfig:
    """nq-jsa with an adapter of the generator that learns beside the retriever, as the paper does.

    Its weights change with every step, so that no score is found in the cache: two passes.
    """
    joint = jsa("nq", train_generator=True)
    training = joint.training.model_copy(update={"num_epochs": 2})
    return joint.model_copy(update={"recipe": "nq-jsa-joint", "training": training})
