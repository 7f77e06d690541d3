"""Logits of many continuations of a prompt, which is processed only once.

A causal language model reads a prompt once and keeps its keys and values. All continuations of the
prompt then stand behind it in one sequence, and a mask lets each token see the prompt and its own
continuation alone, at the positions that it would have if there were no other. The logits are those
of reading prompt and continuation alone, up to rounding, for the price of the prompt and of the
tokens that differ. Gradients flow through the keys and values that the continuations share.

The mask replaces the model's own, so a sliding window does not bound what a continuation sees.

Shape letters: B prompts, T prompt tokens, W tokens of all continuations of a prompt, C columns with
logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache

Path = tuple[int, ...]
"""Token ids that continue a prompt."""


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """Prompts, padded on the right, with their keys and values and the logits behind each."""

    past: DynamicCache
    lengths_B: torch.Tensor
    last_BV: torch.Tensor


def read_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> ReadPrompts:
    """Read each prompt of a batch from its beginning."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # Padding stands behind a prompt, where no token of the prompt can see it.
    tokens_BT = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    ends, end_B = (lengths_B - 1).unique(return_inverse=True)
    past = DynamicCache()
    logits_BCV = model(
        input_ids=tokens_BT.to(device), past_key_values=past, use_cache=True, logits_to_keep=ends
    ).logits
    rows = torch.arange(len(prompts), device=device)
    return ReadPrompts(past, lengths_B, logits_BCV[rows, end_B])


def read_branches(
    model: Any, read: ReadPrompts, paths_B: Sequence[Iterable[Path]]
) -> tuple[torch.Tensor, list[dict[Path, int]]]:
    """Read distinct continuations of each prompt; a path that begins another costs nothing.

    Returns:
        Logits of shape (B, C, V), and for each prompt the column that stands behind each path. The
        empty path's is the logits behind the prompt.
    """
    laid_out = [lay_out(paths) for paths in paths_B]
    kept = sorted({end for _, ends in laid_out for end in ends.values() if end >= 0})
    place = {end: column for column, end in enumerate((-1, *kept))}
    columns = [{path: place[end] for path, end in ends.items()} for _, ends in laid_out]
    if not kept:
        return read.last_BV.unsqueeze(1), columns
    width = max(sum(map(len, branches)) for branches, _ in laid_out)
    tokens_BW, depth_BW, branch_BW = torch.zeros(3, len(laid_out), width, dtype=torch.long)
    branch_BW -= 1  # columns of no branch, which only each other see
    for row, (branches, _) in enumerate(laid_out):
        start = 0
        for number, tokens in enumerate(branches):
            span = slice(start, start + len(tokens))
            tokens_BW[row, span] = torch.tensor(tokens)
            depth_BW[row, span] = torch.arange(len(tokens))
            branch_BW[row, span] = number
            start = span.stop
    device = read.lengths_B.device
    columns_T = torch.arange(read.past.get_seq_length(), device=device)
    prompt_BWT = (columns_T < read.lengths_B[:, None])[:, None].expand(-1, width, -1)
    own_BWW = (branch_BW[:, :, None] == branch_BW[:, None, :]).tril().to(device)
    mask_B1WT = torch.cat([prompt_BWT, own_BWW], dim=2)[:, None]
    if model.config._attn_implementation == "eager":  # which adds the mask to the logits
        lowest = torch.finfo(model.dtype).min
        mask_B1WT = torch.zeros_like(mask_B1WT, dtype=model.dtype).masked_fill(~mask_B1WT, lowest)
    logits_BCV = model(
        input_ids=tokens_BW.to(device),
        attention_mask=mask_B1WT,
        position_ids=read.lengths_B[:, None] + depth_BW.to(device),
        past_key_values=read.past,
        use_cache=True,
        logits_to_keep=torch.tensor(kept, device=device),
    ).logits
    read.past.crop(-width)  # whatever is read next starts from the prompts again
    return torch.cat([read.last_BV.unsqueeze(1), logits_BCV], dim=1), columns


def lay_out(paths: Iterable[Path]) -> tuple[list[Path], dict[Path, int]]:
    """The paths that begin no other one, one behind the other, and where each path ends.

    Example:
        >>> lay_out([(), (5,), (5, 6), (7, 8)])
        ([(5, 6), (7, 8)], {(): -1, (5,): 0, (5, 6): 1, (7, 8): 3})
    """
    branches: list[Path] = []
    ends: dict[Path, int] = {}
    start = 0
    ordered = sorted(paths)  # a path stands directly before those that it begins
    for path, after in zip(ordered, [*ordered, ()][1:], strict=True):
        ends[path] = start + len(path) - 1 if path else -1
        if after[: len(path)] != path:
            branches.append(path)
            start += len(path)
    return branches, ends
