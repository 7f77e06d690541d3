"""Log-probabilities of answers from a causal language model's logits.

Rows are padded on the right and no mask is needed: in a causal model no token sees what follows it,
so that padding changes nothing at the positions that count.

Shape letters: S sequences, T tokens read, A answer tokens of all sequences one after the other,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

# Below this, a second forward pass costs as much as it saves.
_WORTH_SHARING = 16


class AnswerBatch(NamedTuple):
    """What a model reads, and where in it the answers are predicted.

    `tokens_ST` holds prompts followed by answers without their last token, which nothing is
    predicted from. Element a of `rows_A` and `columns_A` is the place whose output predicts the
    answer token `targets_A[a]`; sequence s owns `lengths_S[s]` of them in a row.
    """

    tokens_ST: torch.Tensor
    rows_A: torch.Tensor
    columns_A: torch.Tensor
    targets_A: torch.Tensor
    lengths_S: list[int]


def shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with and that are worth reading apart from the rest.

    Every prompt keeps at least its last token, from which its answer's first is predicted. 0 for a
    single prompt, and where the prompts share few tokens.

    Example:
        >>> examples = tuple(range(100))
        >>> shared_length([(*examples, 1), (*examples, 2), examples])
        99
        >>> shared_length([(1, 2, 3), (1, 2, 4)]), shared_length([examples])
        (0, 0)
    """
    first, last = min(prompts), max(prompts)  # what these share, all between them share
    same = (a == b for a, b in zip(first, last, strict=False))
    length = next((place for place, equal in enumerate(same) if not equal), min(map(len, prompts)))
    length = min(length, min(map(len, prompts)) - 1)
    return length if len(prompts) > 1 and length >= _WORTH_SHARING else 0


def answer_batch(
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[tuple[int, ...]],
    device: torch.device | str = "cpu",
) -> AnswerBatch:
    """Lay out prompts with their answers; each has at least one token.

    Example:
        >>> batch = answer_batch([(7, 8), (5,)], [(1,), (2, 3)])
        >>> batch.tokens_ST.tolist()
        [[7, 8], [5, 2]]
        >>> [t.tolist() for t in (batch.rows_A, batch.columns_A, batch.targets_A)]
        [[0, 1, 1], [1, 0, 1], [1, 2, 3]]
    """
    read = [torch.tensor([*p, *a[:-1]]) for p, a in zip(prompts, answers, strict=True)]
    lengths_S = [len(answer) for answer in answers]
    first_S = torch.tensor([len(prompt) - 1 for prompt in prompts])
    rows_A = torch.repeat_interleave(torch.tensor(lengths_S))
    within_A = torch.cat([torch.arange(length) for length in lengths_S])
    return AnswerBatch(
        pad_sequence(read, batch_first=True).to(device),
        rows_A.to(device),
        (first_S[rows_A] + within_A).to(device),
        torch.tensor([token for answer in answers for token in answer], device=device),
        lengths_S,
    )


def summed_logp(
    logits_AV: torch.Tensor, targets_A: torch.Tensor, lengths_S: Sequence[int]
) -> torch.Tensor:
    """Sum of log softmax(logits)[token] over the tokens of each answer, float32 in nats, (S,).

    Differentiable. The softmax is taken in float32 whatever the model computes in. A logit of -inf
    for a target gives -inf.

    Example:
        >>> logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]))
        >>> summed_logp(logits, torch.tensor([0, 1, 1]), [2, 1]).exp()
        tensor([0.3750, 0.9000])
    """
    logp_A = -functional.cross_entropy(logits_AV.float(), targets_A, reduction="none")
    return pad_sequence(list(logp_A.split(list(lengths_S))), batch_first=True).sum(dim=1)
