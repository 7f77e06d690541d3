"""Which policy draws a batch, which weights reward it, and what is done about old ones."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import partial

import episodes
import numpy as np
import pytest
import torch
from loop_runs import changed
from stand_ins import CutPrompts, ReadingGenerator, WordPrompts, make_table

from rlrag.config import RunConfig
from rlrag.errors import GenerationError, RlragError
from rlrag.generation.weights import GeneratorWeights, pack_weights
from rlrag.pipeline import open_policy, open_reward
from rlrag.records import Passage, Prompt, Question, Score
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.dro.batch import RewardedBatch
from rlrag.training.dro.e_step import BatchCollector, Collection
from rlrag.training.schedule import BatchSchedule

TABLE = make_table(24)


class Parts:
    """A policy that a test changes in place of a learner, and weights of any version."""

    def __init__(self, config: RunConfig, with_generator: bool = False) -> None:
        self.policy = open_policy(config, TABLE)
        self.initial = copy.deepcopy(self.policy)
        self._with_generator = with_generator

    def learn(self) -> None:
        """Change the policy, as an M-step would; the same change each time."""
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))

    def generator_weights(self, version: int) -> GeneratorWeights | None:
        if not self._with_generator:
            return None
        return pack_weights({"w": torch.full((2,), float(version))}, version)


class Recording(ReadingGenerator):
    """Keeps the numbers of the sets that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []

    def load_weights(self, weights: GeneratorWeights) -> None:
        super().load_weights(weights)
        self.given.append(weights.version)


class Case:
    """A collection with its parts."""

    def __init__(
        self,
        config: RunConfig,
        with_generator: bool = False,
        generator: ReadingGenerator | None = None,
        workers: SingleWorker | None = None,
        prompts: WordPrompts | None = None,
    ) -> None:
        self.config = config
        self.generator = generator or Recording()
        self.parts = Parts(config, with_generator)
        self.schedule = BatchSchedule(config.training, config.dro, len(TABLE), config.seed)
        self.collection = Collection(
            config,
            TABLE,
            open_reward(config, self.generator, prompts or WordPrompts()),
            self.generator,
            self.parts,
            self.schedule,
            workers or SingleWorker(),
        )

    def collect(
        self, step: int, pauses_after: bool = False
    ) -> tuple[RewardedBatch, dict[str, float]]:
        """One step of a loop: collect, then learn."""
        found = self.collection.collect(step, pauses_after)
        self.parts.learn()
        return found

    def drawn_by(self, policy, step: int) -> np.ndarray:
        """Positions that a policy draws for a step."""
        size = self.config.training.batch_size
        seeds = [self.schedule.sampling_seed(step, place) for place in range(size)]
        batch = TABLE.batch(self.schedule.rows(step))
        return episodes.sample(policy, batch, self.config.dro.num_samples, seeds).positions_BMK


def policies_before_each_step(config: RunConfig, num_steps: int) -> list:
    """The policy as it is when each step begins."""
    parts, found = Parts(config), []
    for _ in range(num_steps):
        found.append(copy.deepcopy(parts.policy))
        parts.learn()
    return found


class WithoutTheLast(CutPrompts):
    """Shows every passage but the last."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        return super().build(question, passages[:-1])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_tells_what_its_prompts_left_out(small_config, overlap):
    config = changed(small_config, algorithm={"baseline": "none", "overlap": overlap})
    for prompts, cut, dropped in (
        (WithoutTheLast(), 0.5, 1 / config.environment.num_selected),
        (WordPrompts(), 0.0, 0.0),
    ):
        case = Case(config, prompts=prompts)
        for step in range(3):
            metrics = case.collect(step)[1]
            assert metrics["prompt_cut_share"] == cut
            assert metrics["dropped_passage_share"] == pytest.approx(dropped)
        case.collection.close()


@pytest.mark.parametrize(
    ("dro", "drawers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"refresh_every": 2, "baseline": "none"}, [0, 0, 2, 2, 4, 4]),
        ({"refresh_every": None, "baseline": "none"}, [0, 0, 0, 3, 3, 3]),
        ({"passes": 3, "baseline": "none"}, [0, 0, 0, 3, 3, 3]),
        ({"passes": 2, "refresh_every": 2, "baseline": "none"}, [0, 0, 0, 0, 4, 4]),
    ],
)
def test_the_drawing_policy_is_renewed_when_an_estep_begins(small_config, dro, drawers):
    """24 questions in batches of 8; a learner changes the policy after every step."""
    case = Case(changed(small_config, algorithm=dro))
    policies = policies_before_each_step(case.config, 6)
    for step, drawer in enumerate(drawers):
        experience, metrics = case.collect(step)
        expected = case.drawn_by(policies[drawer], step)
        assert (experience.actions_BMT == expected).all(), step
        assert experience.question_rows.tolist() == case.schedule.rows(step).tolist()
        assert experience.policy_version == case.schedule.estep(step)
        assert metrics["staleness"] == 0.0
        if drawer != step:
            assert (experience.actions_BMT != case.drawn_by(policies[step], step)).any()
    case.collection.close()


def test_behaviour_probabilities_are_those_of_the_policy_that_drew(small_config):
    case = Case(changed(small_config, algorithm={"refresh_every": 3, "baseline": "none"}))
    drawer = copy.deepcopy(case.parts.policy)
    for step in range(3):
        experience, _ = case.collect(step)
        batch = TABLE.batch(experience.question_rows)
        logp_BM = episodes.log_prob(drawer, batch, experience.actions_BMT).detach().numpy()
        assert np.array_equal(experience.behaviour_logp_BMT.sum(axis=2), logp_BM)


def test_each_version_goes_to_the_engines_once_and_before_its_first_batch(small_config):
    config = changed(small_config, algorithm={"refresh_every": 2, "baseline": "none"})
    case = Case(config, with_generator=True)
    versions = []
    for step in range(6):
        experience, _ = case.collect(step)
        versions.append(experience.generator_version)
    assert versions == [0, 0, 1, 1, 2, 2]
    assert case.generator.given == [1, 2]
    case.collection.publish(3)  # as a validation does, before the E-step begins
    assert case.collect(6)[0].generator_version == 3
    assert case.generator.given == [1, 2, 3]
    case.collection.publish(3, again=True)
    assert case.generator.given == [1, 2, 3, 3]


def test_without_a_trained_generator_nothing_is_published(small_config):
    case = Case(small_config)
    case.collect(0)
    case.collection.publish(1, again=True)
    assert case.generator.given == []


@pytest.fixture
def ahead(small_config) -> RunConfig:
    return changed(
        small_config,
        algorithm={"baseline": "none", "overlap": True},
    )


def test_a_batch_that_runs_ahead_is_drawn_by_the_policy_before_the_update(ahead):
    case = Case(ahead)
    policies = policies_before_each_step(ahead, 12)
    for step in range(12):
        experience, metrics = case.collect(step)
        drawer = max(step - 1, 0)
        assert (experience.actions_BMT == case.drawn_by(policies[drawer], step)).all()
        assert experience.policy_version == drawer
        assert metrics["staleness"] == step - drawer
    case.collection.close()


def test_nothing_runs_ahead_of_a_pause(ahead):
    """After one, a batch is drawn by the newest policy and rewarded by the newest weights."""
    case = Case(ahead, with_generator=True)
    policies = policies_before_each_step(ahead, 6)
    expected = {0: 0, 1: 0, 2: 1, 3: 3, 4: 3, 5: 4}  # a pause follows step 2
    for step, drawer in expected.items():
        experience, metrics = case.collect(step, pauses_after=step == 2)
        if step == 2:
            calls = case.generator.num_calls
            case.collection.publish(3)
            assert case.generator.num_calls == calls
        assert (experience.actions_BMT == case.drawn_by(policies[drawer], step)).all()
        assert experience.generator_version == drawer
        assert metrics["staleness"] == step - drawer
    case.collection.close()


def test_within_an_estep_what_runs_ahead_is_not_stale(ahead):
    case = Case(changed(ahead, algorithm={"refresh_every": 3}))
    staleness = [case.collect(step)[1]["staleness"] for step in range(7)]
    assert staleness == [0, 0, 0, 1, 0, 0, 1]
    case.collection.close()


def test_tokens_belong_to_the_batch_that_they_were_spent_on(ahead, small_config):
    """What runs ahead is counted when it is used, whenever it was computed."""
    beside, plain = Case(ahead), Case(changed(small_config, algorithm={"baseline": "none"}))
    for case in (beside, plain):
        case.parts.learn = lambda: None  # the same policy throughout
    for step in range(4):
        expected = plain.collect(step)[1]["generator_tokens_spent"]
        assert beside.collect(step)[1]["generator_tokens_spent"] == expected > 0
    beside.collection.close()


class Slow(Recording):
    """Takes a while to score, and notes when; a change of weights meanwhile is noted too."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.events = threading.Event(), []

    def score(self, prompts, answers):
        self.began.set()
        self.events.append("begin")
        threading.Event().wait(0.3)
        self.events.append("end")
        return super().score(prompts, answers)

    def load_weights(self, weights):
        self.events.append("load")
        super().load_weights(weights)


def test_weights_wait_for_the_batch_that_is_on_its_way(ahead):
    case = Case(ahead, with_generator=True, generator=Slow())
    case.collect(0)
    case.generator.began.clear()
    case.collection.publish(1)  # a run that ends early publishes while a batch runs ahead
    case.collection.close()
    assert case.generator.events == ["begin", "end", "begin", "end", "load"]


def test_an_error_of_a_batch_that_ran_ahead_ends_the_run(ahead):
    class FailingSecond(Recording):
        """Scores one batch and no other."""

        def score(self, prompts, answers):
            if self.num_calls:
                raise GenerationError("the engine is gone; start it again")
            return super().score(prompts, answers)

    case = Case(ahead, generator=FailingSecond())
    case.collect(0)
    with pytest.raises(GenerationError, match="the engine is gone"):
        case.collect(1)
    case.collection.close()


@pytest.mark.parametrize("num_broken", [1, 2])
def test_a_batch_without_a_single_reward_is_the_first_failure(small_config, num_broken):
    """A batch with one reward is a batch; what its failures mean is for others to say."""

    class Broken(ReadingGenerator):
        """Cannot score anything that is asked of some questions."""

        def score(self, prompts, answers):
            return [
                Score(float("nan"), 1, 1) if p.text.endswith(broken) else found
                for p, found in zip(prompts, super().score(prompts, answers), strict=True)
            ]

    rows = np.array([3, 5])
    broken = tuple(TABLE.questions[row].question for row in rows[:num_broken])
    collector = BatchCollector(
        small_config.environment,
        small_config.dro,
        TABLE,
        open_reward(small_config, Broken(), WordPrompts()),
        2,
    )
    policy, seeds = open_policy(small_config, TABLE), [[0, 1], [0, 2]]
    if num_broken == 2:
        with pytest.raises(RlragError, match="answer_logp for question 'q3'"):
            collector.collect(policy, rows, seeds, 0, 0)
    else:
        found = collector.collect(policy, rows, seeds, 0, 0)
        assert np.isnan(found.rewards_BM).all(axis=1).tolist() == [True, False]
        assert len(found.errors) == small_config.dro.num_samples
    collector.close()


class Member(SingleWorker):
    """One of two workers; notes in `events` when it meets the other."""

    size = 2

    def __init__(self, rank: int, events: list[str]) -> None:
        self.rank = rank
        self._events = events

    def barrier(self) -> None:
        self._events.append("meet")


class Client(Recording):
    """A client of engines that several processes share."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def load_weights(self, weights):
        self._events.append(f"push {weights.version}")
        super().load_weights(weights)

    def expect_weights(self, version: int, digest: str) -> None:
        self._events.append(f"expect {version}")
        self.identity, self.version = f"reading-{digest}", version


@pytest.mark.parametrize(
    ("rank", "events"), [(0, ["meet", "push 1", "meet"]), (1, ["meet", "meet", "expect 1"])]
)
def test_one_worker_pushes_when_no_batch_is_on_its_way_and_the_others_follow(
    small_config, rank, events
):
    found: list[str] = []
    case = Case(small_config, True, Client(found), Member(rank, found))
    assert case.collect(0)[0].generator_version == 0
    assert found == []
    assert case.collect(1)[0].generator_version == 1
    assert found == events
    assert case.generator.identity == f"reading-{case.parts.generator_weights(1).digest}"


def test_workers_share_a_batch(small_config):
    whole, _ = Case(small_config).collect(0)
    parts = [Case(small_config, workers=Member(rank, [])).collect(0)[0] for rank in range(2)]
    for rank, part in enumerate(parts):
        for name in ("question_rows", "actions_BMT", "behaviour_logp_BMT", "rewards_BM"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[rank::2]), name


def num_prompt_tokens(experience: RewardedBatch) -> int:
    """Tokens that the prompts of all different episodes show."""
    found = experience.trajectories
    prompts = {
        WordPrompts().build(TABLE.questions[row], evidence).token_ids
        for row, evidence in zip(found.question_rows_E, found.evidence, strict=True)
    }
    return sum(map(len, prompts))


def test_what_is_told_of_a_batch_is_that_of_all_workers(ahead):
    """One of them cuts as much of its prompts as it shows, the other shows them whole."""
    cases = [
        Case(ahead, with_generator=True, workers=worker, prompts=prompts)
        for worker, prompts in zip(make_group(2), (CutPrompts(), WordPrompts()), strict=True)
    ]

    def work(case: Case) -> tuple[RewardedBatch, dict[str, float]]:
        case.collect(0)
        found = case.collect(1, pauses_after=True)
        case.collection.close()
        return found

    (cut, first), (whole, second) = run_together([partial(work, case) for case in cases])
    assert first == second
    num_cut, num_whole = (num_prompt_tokens(experience) for experience in (cut, whole))
    assert first["prompt_cut_share"] == num_cut / (2 * num_cut + num_whole)


def test_sft_takes_the_untrained_policys_order_with_weight_one_and_asks_nobody(small_config):
    config = changed(
        small_config,
        environment={"num_selected": 3},
        algorithm={"name": "sft"},
    )
    case = Case(config, with_generator=True)
    for step in range(2):
        experience, metrics = case.collect(step)
        assert experience.actions_BMT.tolist() == [[[0, 1, 2]]] * 8  # the retriever's order
        assert experience.question_rows.tolist() == case.schedule.rows(step).tolist()
        assert experience.log_weights_BM.tolist() == [[0.0]] * 8
        assert experience.errors == ()
        assert metrics["num_rollouts"] == metrics["generator_tokens_spent"] == 0.0
    assert case.generator.num_calls == 0
    assert case.generator.given == []
