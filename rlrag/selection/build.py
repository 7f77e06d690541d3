"""Builds the selection policy that a configuration describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlrag import plugins
from rlrag.config import EnvironmentConfig, SelectorConfig
from rlrag.config.sections import SLOT_SELECTORS
from rlrag.models.directories import resolve_model
from rlrag.selection.encoder_scorers import BiEncoderScorer, CrossEncoderScorer, PairScorer
from rlrag.selection.feature_scorer import HIDDEN_SIZE, PROJECTION_SIZE, FeatureScorer
from rlrag.selection.listwise_lm import ListwiseLMPolicy
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.selection.slot_features import GLOBAL_FEATURES, SLOT_FEATURES
from rlrag.selection.slot_policy import SlotPolicy

TrainablePolicy = PlackettLucePolicy | ListwiseLMPolicy | SlotPolicy


def build_policy(
    config: SelectorConfig,
    environment: EnvironmentConfig,
    num_scores: int,
    vector_size: int,
    cache_dir: Path,
    seed: int,
    base: Any = None,
) -> TrainablePolicy:
    """The policy that `config` describes, its initial weights drawn from `seed`.

    Args:
        config: Kind and sizes of the policy.
        environment: What it acts in: its picks (K) and its query writers.
        num_scores: Retriever scores a candidate (C).
        vector_size: Length of the frozen embeddings (D); 0 without them.
        cache_dir: Where built-in models are unpacked.
        seed: Determines the initial weights, whatever else drew random numbers before.
        base: A loaded model whose weights the adapter of `listwise_lm` is put around; see
            `ListwiseLMPolicy`.

    Raises:
        ConfigError: when `listwise_lm` is given a model that is no causal language model, or a
            policy of somebody's own cannot be made.
    """
    num_selected = environment.num_selected
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if plugins.is_own(config.kind):
            own: TrainablePolicy = plugins.make(
                "policy",
                config.kind,
                config.options,
                num_selected=num_selected,
                num_scores=num_scores,
                vector_size=vector_size,
            )
            return own
        if config.kind in SLOT_SELECTORS:
            return SlotPolicy(
                len(SLOT_FEATURES),
                len(GLOBAL_FEATURES),
                len(environment.hops.writers),
                HIDDEN_SIZE,
                vector_size,
                PROJECTION_SIZE if config.kind == "slot_vectors" else 0,
                config.may_stop,
                PairScorer(resolve_model(config.model, cache_dir), config.max_tokens)
                if config.kind == "slot_texts"
                else None,
                config.prior_scale,
            )
        if config.kind == "listwise_lm":
            model_dir = resolve_model(config.model, cache_dir)
            return ListwiseLMPolicy(
                model_dir,
                num_selected,
                config.max_tokens,
                config.adapter_rank,
                base=base,
                precision=config.precision,
            )
        if config.kind == "features":
            scorer: torch.nn.Module = FeatureScorer(
                num_scores, vector_size, num_selected, config.prior_scale
            )
        else:
            kind = BiEncoderScorer if config.kind == "bi_encoder" else CrossEncoderScorer
            model_dir = resolve_model(config.model, cache_dir)
            scorer = kind(model_dir, config.max_tokens, num_selected, config.prior_scale)
    return PlackettLucePolicy(scorer, num_selected, config.may_stop)
