"""Counts the text that a policy truncates because its input is limited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlrag.config import SelectorConfig
from rlrag.retrieval.cut_tokens import CutTokens, count_cut
from rlrag.selection.listwise_prompt import RankingPrompt


def count_unread(config: SelectorConfig, model_dir: Path, passages: Sequence[str]) -> CutTokens:
    """What of the passages, each its title and text, `selector.max_tokens` leaves out.

    The model is not loaded for it. A cross-encoder reads the question too, and so less of them.

    Args:
        config: Of a policy that `reads_texts`.
        model_dir: Directory of its model.
        passages: The passages.
    """
    if config.kind == "listwise_lm":
        lengths = RankingPrompt(model_dir, config.max_tokens, num_selected=1).lengths(passages)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        found = tokenizer(list(passages), truncation=False, verbose=False)
        lengths = [len(ids) for ids in found["input_ids"]]
    return count_cut(lengths, config.max_tokens)


def unread_warning(cut: CutTokens) -> str | None:
    """What to tell where over 1 % of the passages is not read."""
    return cut.warning("the selector", "selector.max_tokens")
