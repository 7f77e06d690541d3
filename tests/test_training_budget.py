"""What a run is expected to ask of the generator, against counts by hand and a real run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from loop_runs import changed, start, steps_of
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import GeneratorConfig, OpenRAGConfig, RunConfig, SelectorConfig
from rlrag.errors import PromptTooLongError
from rlrag.pipeline import TrainingData
from rlrag.training.budget import Budget, estimate_budget


def with_training(config: RunConfig, **changes) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def decided(config: RunConfig, prior_scale: float) -> RunConfig:
    """An untrained policy that is as sure of the retriever's order as `prior_scale` says."""
    selector = SelectorConfig(prior_scale=prior_scale)
    return config.model_copy(update={"selector": selector})


def prompt_tokens(data: TrainingData) -> list[int]:
    """Tokens of the prompt with the first candidate, for every training question."""
    prompts = WordPrompts()
    return [
        len(prompts.build(question, data.train.passages(row)[:1]).token_ids)
        for row, question in enumerate(data.train.questions)
    ]


def test_a_policy_that_never_explores_asks_once_a_question(small_config, training_data):
    """24 questions, 4 passes in batches of 8; 8 held back are answered for two candidates each."""
    config = decided(small_config, prior_scale=1000.0)
    budget = estimate_budget(config, training_data, WordPrompts())
    assert budget.num_steps == 12
    assert budget.num_rollouts == 12 * 8 * 8
    assert budget.num_requests == 24 + 2 * 8
    counts = prompt_tokens(training_data)
    mean = sum(counts) / len(counts) + config.generator.max_new_tokens / 2
    assert budget.num_tokens == round(40 * mean)
    assert [len(prompt.token_ids) for prompt in budget.sample_prompts] == counts


def test_without_validation_only_training_asks(small_config, training_data):
    config = decided(small_config, prior_scale=1000.0)
    data = replace(training_data, validation=None)
    assert estimate_budget(config, data, WordPrompts()).num_requests == 24


def test_part_of_a_pass_asks_for_part_of_the_questions(small_config):
    """One epoch of 20 questions in batches of 8 is two steps: 16 of the 20."""
    config = with_training(decided(small_config, prior_scale=1000.0), num_epochs=1)
    budget = estimate_budget(config, TrainingData(make_table(20), None, {}), WordPrompts())
    assert budget.num_steps == 2
    assert budget.num_requests == 16


def test_an_undecided_policy_asks_for_every_candidate(small_config, training_data):
    """Four passes of eight draws find all five of equal candidates of nearly every question."""
    config = decided(small_config, prior_scale=1e-6)
    data = replace(training_data, validation=None)
    budget = estimate_budget(config, data, WordPrompts())
    assert 24 * 4.9 < budget.num_requests <= 24 * 5


def test_the_estimate_is_of_the_order_of_what_a_run_asks_for(small_config, training_data, tmp_path):
    class Counting(ReadingGenerator):
        """Counts distinct prompts, as a cache would compute them."""

        def __init__(self) -> None:
            super().__init__()
            self.asked: set[tuple[str, str]] = set()

        def generate(self, prompts, sampling):
            self.asked |= {("generate", prompt.text) for prompt in prompts}
            return super().generate(prompts, sampling)

        def score(self, prompts, answers):
            self.asked |= {("score", prompt.text) for prompt in prompts}
            return super().score(prompts, answers)

    budget = estimate_budget(small_config, training_data, WordPrompts())
    generator = Counting()
    start(small_config, training_data, tmp_path / "run", generator=generator).run()
    assert budget.num_steps == steps_of(tmp_path / "run")[-1]["step"]
    assert budget.num_requests / 2 < len(generator.asked) < budget.num_requests * 1.5


def test_a_trained_generator_answers_everything_anew(small_config, training_data):
    """No answer of old weights serves new ones: 12 batches of 8 x 8, and 1 + 4 validations of 8."""
    config = changed(
        decided(small_config, prior_scale=1000.0),
        algorithm={"parts": ["selector", "generator"]},
    )
    budget = estimate_budget(config, training_data, WordPrompts())
    assert budget.num_rollouts == 12 * 8 * 8
    assert budget.num_requests == 12 * 8 * 8 + 5 * 8


def test_sft_asks_for_validations_alone(small_config, training_data):
    config = changed(small_config, algorithm={"name": "sft"})
    budget = estimate_budget(config, training_data, WordPrompts())
    assert (budget.num_steps, budget.num_rollouts) == (12, 0)
    assert budget.num_requests == 5 * 8


@pytest.mark.parametrize(
    ("openrag", "num_steps", "num_judged", "num_found"),
    [
        ({}, 12, 2 * 120, 2 * 24),  # 24 questions of 5 candidates; 2 + 2 passes in batches of 8
        ({"online_epochs": 0}, 6, 2 * 120, 0),
        ({"offline_epochs": 0, "online_epochs": 3}, 9, 2 * 120, 3 * 24),
        ({"labels": "gold"}, 12, 0, 0),
        ({"loss": "kl", "num_online": 4}, 12, 2 * 120, 4 * 24),  # all that are found are scored
        ({"loss": "kl", "num_online": 4, "online_epochs": 0}, 6, 2 * 120, 0),
    ],
)
def test_a_retriever_asks_for_each_first_candidate_and_for_what_it_finds(
    small_config, training_data, openrag, num_steps, num_judged, num_found
):
    """An answer and a score a candidate; 8 questions are held back and answered each third step."""
    settings = OpenRAGConfig(**{"offline_epochs": 2, "online_epochs": 2, **openrag})
    config = small_config.model_copy(update={"algorithm": settings})
    budget = estimate_budget(config, training_data, WordPrompts())
    assert budget.num_steps == num_steps
    assert budget.num_requests == num_judged + num_found + 8 * (1 + num_steps // 3)
    counts = prompt_tokens(training_data)
    mean = sum(counts) / len(counts) + config.generator.max_new_tokens / 2
    assert budget.num_tokens == round(budget.num_requests * mean)
    assert [len(prompt.token_ids) for prompt in budget.sample_prompts] == counts


def test_passes_over_the_same_samples_ask_for_nothing_new(small_config, training_data):
    config = decided(small_config, prior_scale=1000.0)
    several = config.model_copy(
        update={"algorithm": config.dro.model_copy(update={"passes": 3, "baseline": "none"})}
    )
    once, thrice = (estimate_budget(c, training_data, WordPrompts()) for c in (config, several))
    assert thrice.num_steps == 3 * once.num_steps
    assert thrice.num_requests == once.num_requests
    assert thrice.num_tokens == once.num_tokens


def test_the_estimate_repeats_itself(small_config, training_data):
    first, second = (estimate_budget(small_config, training_data, WordPrompts()) for _ in range(2))
    assert first == second


def test_longer_answers_cost_half_their_length_more(small_config, training_data):
    longer = GeneratorConfig(max_new_tokens=small_config.generator.max_new_tokens + 20)
    short = estimate_budget(small_config, training_data, WordPrompts())
    long = estimate_budget(
        small_config.model_copy(update={"generator": longer}), training_data, WordPrompts()
    )
    assert long.num_tokens - short.num_tokens == pytest.approx(10 * short.num_requests, abs=1)


class RoomForFew(WordPrompts):
    """Refuses all questions but those whose number ends in a digit."""

    def __init__(self, digit: str) -> None:
        super().__init__()
        self._digit = digit

    def build(self, question, passages):
        if not question.question.endswith(f"{self._digit}?"):
            raise PromptTooLongError(f"question {question.id!r} leaves no room")
        return super().build(question, passages)


@pytest.mark.parametrize("parts", [("selector",), ("retriever",)])
def test_questions_that_leave_no_room_are_left_out_of_the_sample(small_config, parts):
    config = with_training(small_config, parts=parts)
    data = TrainingData(make_table(40), None, {})
    prompts = estimate_budget(config, data, RoomForFew("3")).sample_prompts
    assert [prompt.text.split()[-1] for prompt in prompts] == ["3?", "13?", "23?", "33?"]
    with pytest.raises(PromptTooLongError, match="leaves no room"):
        estimate_budget(config, data, RoomForFew("x"))


def test_the_sample_is_bounded_and_spread_over_the_questions(small_config):
    data = TrainingData(make_table(100), None, {})
    prompts = estimate_budget(small_config, data, WordPrompts()).sample_prompts
    assert len(prompts) == 40
    assert prompts[0].text.endswith("what is value 0?")
    assert prompts[-1].text.endswith("what is value 99?")


def test_people_read_one_line():
    budget = Budget(306, 78_336, 11_395, 3_680_000, ())
    line = budget.describe(tokens_per_s=1336.0)
    assert line.startswith("306 steps, 78,336 rollouts, about 11,395 different prompts = 3.68 M")
    assert "at 1,336 tokens/s about 46 min" in line
    assert "\n" not in line


def test_the_line_says_where_a_limit_ends_training():
    budget = Budget(306, 78_336, 11_395, 3_680_000, ())
    assert "training stops" not in budget.describe(1336.0)
    assert budget.describe(1336.0, 800_000).endswith("training stops at 0.80 M tokens")
