"""Log-probabilities of answers, by hand and by a loop."""

from __future__ import annotations

import math

import pytest
import torch

from rlrag.algorithms.sequence_logp import answer_batch, shared_length, summed_logp


def test_a_hand_softmax():
    """Logits (0, log 3) give (1/4, 3/4); two tokens multiply, answers do not mix."""
    logits_AV = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [1.0, 1.0]])
    found_S = summed_logp(logits_AV, torch.tensor([0, 1, 0]), [2, 1])
    assert found_S.tolist() == pytest.approx([math.log(0.25 * 0.75), math.log(0.5)], rel=1e-6)


def test_the_gradient_is_the_target_minus_the_probability():
    logits_AV = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
    summed_logp(logits_AV, torch.tensor([0]), [1]).sum().backward()
    assert logits_AV.grad is not None
    assert logits_AV.grad[0].tolist() == pytest.approx([0.75, -0.75], rel=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    logits_AV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    found_S = summed_logp(logits_AV, torch.tensor([1, 2, 3]), [3])
    plain = logits_AV.double().log_softmax(dim=1)[range(3), [1, 2, 3]].sum()
    assert found_S.dtype == torch.float32
    assert found_S.item() == pytest.approx(plain.item(), rel=1e-6)


def test_every_answer_token_is_read_from_the_place_before_it():
    prompts, answers = [(5,), (6, 7, 8), (9, 9)], [(1, 2, 3), (4,), (1, 1)]
    batch = answer_batch(prompts, answers)
    found = []
    for row, column, target in zip(batch.rows_A, batch.columns_A, batch.targets_A, strict=True):
        before = batch.tokens_ST[row, : column + 1].tolist()
        found.append((before, int(target)))
    expected = [
        ([*prompt, *answer[:i]], answer[i])
        for prompt, answer in zip(prompts, answers, strict=True)
        for i in range(len(answer))
    ]
    assert found == expected
    assert batch.lengths_S == [3, 1, 2]


def test_prompts_share_what_all_of_them_begin_with():
    """Whichever of them differs first; the last token of a prompt is never shared."""
    examples = tuple(range(100, 140))
    prompts = [(*examples, *end) for end in ((9, 9), (9, 8, 1), (7, 9))]
    early = (*examples[:20], 5, 5)
    assert shared_length(prompts) == 40
    for place in range(4):
        assert shared_length([*prompts[:place], early, *prompts[place:]]) == 20
    assert shared_length([examples, examples]) == 39
    assert shared_length([(*examples[:16], end) for end in (1, 2)]) == 16
    assert shared_length([(*examples[:15], end) for end in (1, 2)]) == 0
    assert shared_length([examples]) == 0
