"""Recipes that train the retriever by OpenRAG (arXiv 2503.08398)."""

from __future__ import annotations

from typing import Literal

from rlrag.config import (
    EnvironmentConfig,
    EvaluationConfig,
    GeneratorConfig,
    OpenRAGConfig,
    PromptConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.recipes.shared import named, questions_of, short_answers

Retriever = Literal["dense", "semi_parametric"]


def openrag(
    name: str,
    offline_epochs: int = 4,
    online_epochs: int = 3,
    kind: Retriever = "semi_parametric",
) -> RunConfig:
    """What the recipes below share: all questions, 5 candidates each, one passage in context.

    For the same generator tokens, many questions with few candidates leave more pairs than few
    with many: of 200 with 20 each, 77 had a passage that helped and one that did not; of 1,600
    with 5 each, which is twice the tokens, 535 had. Vectors of length 1 need a temperature; those
    in vocabulary space are the paper's and have none.
    """
    dense = kind == "dense"
    prompt = short_answers(question_mark=name == "hotpotqa")
    return RunConfig(
        recipe=f"{name}-openrag",
        data=questions_of(name, 235),
        retrieval=RetrievalConfig(kind=kind, num_candidates=10),
        environment=EnvironmentConfig(num_selected=1),
        generator=GeneratorConfig(
            # Room for ten passages, with which the bundle is evaluated too.
            prompt=prompt.model_copy(update={"max_prompt_tokens": 1900}),
        ),
        algorithm=OpenRAGConfig(
            num_offline=5,
            num_online=5,
            offline_epochs=offline_epochs,
            online_epochs=online_epochs,
            learning_rate=2e-5 if dense else 1e-4,
            temperature=0.05 if dense else 1.0,
        ),
        training=TrainingConfig(
            worker_threads=2,
            batch_size=32,
            warmup_steps=10,
            validate_every=20,
            checkpoint_every=20,
        ),
    )


def nq_openrag() -> RunConfig:
    """The semi-parametric retriever trained on what helped the generator (RLRAG_DATA_DIR)."""
    return openrag("nq")


def nq_openrag_offline() -> RunConfig:
    """The first stage of nq-openrag alone: pairs from the pools of the first retrieval."""
    return named("nq-openrag-offline", openrag("nq", online_epochs=0))


def nq_openrag_online() -> RunConfig:
    """The second stage of nq-openrag alone: pairs from what the retriever finds in training."""
    return named("nq-openrag-online", openrag("nq", offline_epochs=0))


def nq_openrag_dense() -> RunConfig:
    """nq-openrag for the dense encoder."""
    return named("nq-openrag-dense", openrag("nq", kind="dense"))


def openrag_paper() -> RunConfig:
    """The settings of arXiv 2503.08398: Llama-3-8B, k = 100, m = 20, 40 + 40 passes, batch 128.

    The paper starts from SiDR trained on MS MARCO; this starts from the masked language model
    beneath it. To start as the paper does, give the path of such an encoder in
    retrieval.vocabulary_encoder.
    """
    return RunConfig(
        recipe="openrag-paper",
        data=questions_of("nq", 200),
        retrieval=RetrievalConfig(
            kind="semi_parametric",
            vocabulary_encoder="google-bert/bert-base-uncased",
            vocabulary_head="layer_norm",
            encoder_max_tokens=256,
            num_candidates=20,
        ),
        generator=GeneratorConfig(
            model="meta-llama/Meta-Llama-3-8B",
            device="cuda",
            num_actors=4,
            gpus_per_actor=1,
            cpus_per_actor=1,
            batch_size=256,
            max_model_len=4096,
            max_new_tokens=100,
            prompt=PromptConfig(
                instruction="",
                passage_template="### Paragraph:\n[{number}] {title}\n{text}\n",
                question_template="### Instruction:\n{question}\n### Response:",
                max_prompt_tokens=2048,
            ),
        ),
        algorithm=OpenRAGConfig(
            num_offline=100,
            num_online=20,
            first_stage="bag_of_tokens",
            offline_epochs=40,
            online_epochs=40,
            tied=False,
        ),
        training=TrainingConfig(
            num_workers=4,
            worker_cpus=1,
            worker_gpus=1,
            batch_size=128,
        ),
        evaluation=EvaluationConfig(
            systems=("bm25", "original_retriever", "tuned_retriever", "oracle")
        ),
    )
