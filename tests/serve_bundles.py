"""Tiny bundles that a service can load: a real corpus, encoder, policy and language model."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch

from rlrag.bundle import save_bundle
from rlrag.config import (
    HOPS,
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    HopSettings,
    PromptConfig,
    RetrievalConfig,
    RunConfig,
    SelectorConfig,
    TrainingConfig,
)
from rlrag.pipeline import open_evaluation_data, open_library, open_policy

NUM_CANDIDATES, NUM_SELECTED = 5, 2


def bundle_config(files: Path, cache_dir: Path) -> RunConfig:
    """Two of five passages, over the files that `openrag_files` wrote."""
    return RunConfig(
        recipe="served",
        cache_dir=str(cache_dir),
        data=DataConfig(
            corpus=str(files / "corpus.jsonl"),
            train_questions=str(files / "train.jsonl"),
            eval_questions=str(files / "eval.jsonl"),
        ),
        retrieval=RetrievalConfig(
            kind="dense",
            encoder=str(files / "encoder"),
            encoder_dtype="float32",
            encoder_max_tokens=32,
            bm25_scores=True,
            num_candidates=NUM_CANDIDATES,
        ),
        environment=EnvironmentConfig(num_selected=NUM_SELECTED),
        generator=GeneratorConfig(
            model=str(files / "generator"),
            dtype="float32",
            max_model_len=256,
            prompt=PromptConfig(instruction="", max_prompt_tokens=200),
        ),
        training=TrainingConfig(launcher="local"),
    )


def hop_config(files: Path, cache_dir: Path) -> RunConfig:
    """Two passages of a pool that starts with two and grows by hops and a query writer."""
    config = bundle_config(files, cache_dir)
    hops = HopSettings(
        edges=("title_out", "title_in", "document"),
        writers=("title",),
        num_first=2,
        num_revealed=2,
        num_hits=2,
        max_queries=1,
    )
    environment = EnvironmentConfig(id=HOPS, num_selected=NUM_SELECTED, hops=hops)
    selector = SelectorConfig(kind="slots")
    return config.model_copy(update={"environment": environment, "selector": selector})


def make_bundle(
    directory: Path,
    files: Path,
    cache_dir: Path,
    seed: int,
    retriever: Path | None = None,
    config: RunConfig | None = None,
) -> Path:
    """A bundle whose policy was drawn from `seed`; `retriever` is the encoder that it tuned."""
    config = config or bundle_config(files, cache_dir)
    candidates = open_evaluation_data(config, open_library(config))[0]
    policy = open_policy(config, candidates)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    hashes = {"corpus": candidates.corpus.content_hash, "train_questions": "q"}
    save_retriever = partial(shutil.copytree, retriever) if retriever else None
    save_bundle(directory, config, policy, candidates, hashes, seed, save_retriever=save_retriever)
    return directory
