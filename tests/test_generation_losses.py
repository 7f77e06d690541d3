"""What happens to lost chunks, without any actor."""

from __future__ import annotations

import pytest

from rlrag.errors import GenerationError, GeneratorTimeoutError
from rlrag.generation.pool.calls import DIED, HUNG, RAISED, Chunk, Losses
from rlrag.records import Prompt


def prompts(*ids: int) -> list[Prompt]:
    return [Prompt(token_ids=(i,), text=str(i), num_passages=0) for i in ids]


def died(name: str = "a") -> GenerationError:
    return GenerationError(f"{name} died")


def test_a_chunk_is_sent_again_then_apart_and_a_prompt_alone_twice():
    losses, chunk, asked = Losses(), Chunk([4, 7]), prompts(1, 2)
    assert losses.lost(chunk, DIED, died(), asked) == [Chunk([4, 7], losses=1)]
    apart = losses.lost(chunk, DIED, died(), asked)
    assert apart == [Chunk([4]), Chunk([7])]
    assert losses.lost(apart[1], DIED, died(), asked[1:]) == [Chunk([7], losses=1)]
    assert losses.refusal(asked[1]) is None
    last = died("the last")
    assert losses.lost(apart[1], DIED, last, asked[1:]) == []
    assert losses.refusal(asked[1]) is last
    assert losses.refusal(asked[0]) is None


@pytest.mark.parametrize("count", [HUNG, RAISED])
def test_what_would_happen_again_counts_twice(count):
    losses, asked = Losses(), prompts(1, 2)
    apart = losses.lost(Chunk([0, 1]), count, died(), asked)
    assert apart == [Chunk([0]), Chunk([1])]
    assert losses.lost(apart[0], count, died(), asked[:1]) == []


def test_losses_without_an_answer_between_them_end_the_call_with_their_own_class():
    losses = Losses()
    for number in range(3):
        losses.lost(Chunk([number]), HUNG, died(), prompts(number))
    late = GeneratorTimeoutError("b did not answer")
    with pytest.raises(GeneratorTimeoutError, match=r"^b did not answer; several chunks") as caught:
        losses.lost(Chunk([3]), HUNG, late, prompts(3))
    assert caught.value.__cause__ is late
    losses.lost(Chunk([4]), HUNG, died(), prompts(4))  # a later call counts anew


def test_an_answer_between_losses_shows_that_the_pool_works():
    losses = Losses()
    for number in range(20):
        losses.lost(Chunk([number]), DIED, died(), prompts(number))
        losses.answered()


def test_a_question_of_which_two_prompts_are_given_up_is_refused_whole():
    def asking(question: str, *ids: int) -> list[Prompt]:
        return [Prompt((i,), str(i), 0, question=question) for i in ids]

    losses, first, second, third = Losses(), *asking("why?", 1, 2, 3)
    (other,), (nobodys,) = asking("who?", 4), prompts(5)
    for prompt in (first, nobodys, second):
        assert losses.refusal(third) is None
        assert losses.lost(Chunk([0]), HUNG, died(), [prompt]) == []
    refused = losses.refusal(third)
    assert refused is not None
    assert "2 other prompts of the question 'why?' failed on every actor" in str(refused)
    assert str(losses.refusal(first)) == "a died"
    assert losses.refusal(other) is None
    assert losses.refusal(prompts(6)[0]) is None


def test_the_more_actors_the_more_losses_in_a_row_may_be_one_questions():
    losses = Losses()
    for number in range(7):
        losses.lost(Chunk([number]), HUNG, died(), prompts(number), num_actors=2)
    with pytest.raises(GenerationError, match="several chunks in a row"):
        losses.lost(Chunk([7]), HUNG, died(), prompts(7), num_actors=2)
