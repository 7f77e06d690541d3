"""Recipes that train the selector, the generator or both by DRO (arXiv 2505.03075)."""

from __future__ import annotations

from typing import Literal

from rlrag.config import (
    DataConfig,
    DROConfig,
    EnvironmentConfig,
    GeneratorConfig,
    GeneratorTrainingConfig,
    PromptConfig,
    RetrievalConfig,
    RunConfig,
    SelectorConfig,
    SFTConfig,
    TrainingConfig,
)
from rlrag.recipes.shared import named, questions_of, short_answers

Part = Literal["selector", "generator"]


def factbook() -> RunConfig:
    """One search over the World Factbook, built-in models; minutes on two cores, no download."""
    return RunConfig(
        recipe="factbook",
        data=DataConfig(
            max_train_questions=316,
            num_validation_questions=60,
            max_eval_questions=240,
            passage_words=80,
        ),
        retrieval=RetrievalConfig(
            kind="dense", bm25_scores=True, num_candidates=5, encoder_max_tokens=64
        ),
        environment=EnvironmentConfig(num_selected=2),
        generator=GeneratorConfig(prompt=short_answers(question_mark=True)),
        algorithm=DROConfig(num_samples=4),
        training=TrainingConfig(num_epochs=4, batch_size=32, learning_rate=5e-3, validate_every=8),
    )


def nq() -> RunConfig:
    """Natural Questions from the folder that RLRAG_DATA_DIR names."""
    return RunConfig(
        recipe="nq",
        data=questions_of("nq", 150),
        retrieval=RetrievalConfig(kind="dense", bm25_scores=True, num_candidates=5),
        environment=EnvironmentConfig(num_selected=2),
        generator=GeneratorConfig(prompt=short_answers(question_mark=False)),
        algorithm=DROConfig(num_samples=4),
        training=TrainingConfig(num_epochs=1, batch_size=24, learning_rate=5e-3, validate_every=10),
    )


def sampled_dro(*parts: Part) -> DROConfig:
    """DRO of these parts with the samples a question that two cores have time for."""
    return DROConfig(parts=parts, num_samples=4)


def co_training(name: str, num_selected: int, algorithm: DROConfig | SFTConfig) -> RunConfig:
    """What the recipes below share: the same 600 questions and steps for every system.

    The generator trains a low-rank adapter on one of the m selections a question, drawn by weight.
    """
    return RunConfig(
        recipe=f"{name}-{algorithm.name}",
        data=questions_of(name, 100, 700),
        retrieval=RetrievalConfig(kind="dense", bm25_scores=True, num_candidates=5),
        environment=EnvironmentConfig(num_selected=num_selected),
        generator=GeneratorConfig(prompt=short_answers(question_mark=name == "hotpotqa")),
        algorithm=algorithm,
        generator_training=GeneratorTrainingConfig(sequences_per_question=1),
        training=TrainingConfig(
            worker_threads=2,
            num_epochs=1,
            batch_size=24,
            learning_rate=1e-2,
            warmup_steps=2,
            validate_every=12,
            checkpoint_every=12,
        ),
    )


def nq_dro() -> RunConfig:
    """Selector and generator together on Natural Questions (RLRAG_DATA_DIR)."""
    return co_training("nq", 2, sampled_dro("selector", "generator"))


def nq_dro_selector() -> RunConfig:
    """The selector half of nq-dro, with the generator frozen."""
    return named("nq-dro-selector", co_training("nq", 2, sampled_dro("selector")))


def nq_dro_generator() -> RunConfig:
    """The generator half of nq-dro, with the untrained selector's samples."""
    return named("nq-dro-generator", co_training("nq", 2, sampled_dro("generator")))


def nq_sft() -> RunConfig:
    """The generator fine-tuned on the retriever's order, in as many steps as nq-dro."""
    return co_training("nq", 2, SFTConfig())


def hotpotqa_dro() -> RunConfig:
    """Selector and generator together on HotpotQA, three passages (RLRAG_DATA_DIR)."""
    return co_training("hotpotqa", 3, sampled_dro("selector", "generator"))


def hotpotqa_dro_selector() -> RunConfig:
    """The selector half of hotpotqa-dro, with the generator frozen."""
    return named("hotpotqa-dro-selector", co_training("hotpotqa", 3, sampled_dro("selector")))


def hotpotqa_dro_generator() -> RunConfig:
    """The generator half of hotpotqa-dro, with the untrained selector's samples."""
    return named("hotpotqa-dro-generator", co_training("hotpotqa", 3, sampled_dro("generator")))


def hotpotqa_sft() -> RunConfig:
    """The generator fine-tuned on the retriever's order, in as many steps as hotpotqa-dro."""
    return co_training("hotpotqa", 3, SFTConfig())


def dro_paper() -> RunConfig:
    """The settings of arXiv 2505.03075: 8 B models, n = 20, K = 5, m = 8; wants 12 large GPUs."""
    model = "meta-llama/Meta-Llama-3-8B-Instruct"
    return RunConfig(
        recipe="dro-paper",
        data=questions_of("nq", 200),
        retrieval=RetrievalConfig(kind="dense", num_candidates=20),
        environment=EnvironmentConfig(num_selected=5),
        selector=SelectorConfig(
            kind="listwise_lm", model=model, adapter_rank=64, imitation_steps=200, max_tokens=160
        ),
        generator=GeneratorConfig(
            model=model,
            device="cuda",
            num_actors=4,
            gpus_per_actor=1,
            cpus_per_actor=1,
            batch_size=256,
            max_model_len=4096,
            max_new_tokens=32,
            prompt=PromptConfig(style="chat", max_prompt_tokens=3072),
        ),
        algorithm=DROConfig(
            parts=("selector", "generator"),
            num_samples=8,
            baseline="none",
            passes=3,
            refresh_every=None,
        ),
        generator_training=GeneratorTrainingConfig(
            method="full",
            learning_rate=1e-5,
            gradient_checkpointing=True,
            micro_batch_tokens=16_384,
            sharding="fsdp2",
        ),
        training=TrainingConfig(
            num_workers=8,
            worker_cpus=1,
            worker_gpus=1,
            num_epochs=5,
            batch_size=128,
            learning_rate=1e-5,
            patience=2,
            validate_every=1,
            checkpoint_every=1,
        ),
    )
