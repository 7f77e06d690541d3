"""The loop learns, records, ends when it should, and does the same with any number of workers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from loop_runs import StopAfter, changed, policy_weights, start, steps_of, weights
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import RunConfig, TrainingConfig
from rlrag.errors import GenerationError, NonFiniteLossError
from rlrag.evaluation.systems import evaluate
from rlrag.pipeline import TrainingData, open_reward
from rlrag.records import Generation, Score
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.training.distributed.workers import SingleWorker, TorchWorkers
from rlrag.training.loop import TrainingLoop
from rlrag.training.trainer import Before, Trainer


def test_training_finds_the_passages_that_answer(small_config, training_data, tmp_path):
    loop = start(small_config, training_data, tmp_path / "run")
    unseen = make_table(40, seed=5)
    gold = np.array(
        [
            [p.id for p in unseen.passages(q)].index(unseen.questions[q].gold_ids[0])
            for q in range(40)
        ]
    )
    before = (episodes.picks(loop.trainer.parts.policy, unseen)[:, 0] == gold).mean()
    parts = loop.run().parts
    after = (episodes.picks(parts.policy, unseen)[:, 0] == gold).mean()
    assert before < 0.5 < 0.8 < after
    metrics = steps_of(tmp_path / "run")
    assert [line["step"] for line in metrics] == list(range(13))
    assert metrics[-1]["validation/em"] > metrics[0]["validation/em"]
    assert metrics[1]["num_rollouts"] == 8 * 8
    assert metrics[1]["staleness"] == 0.0
    assert metrics[1]["kl_to_initial"] == 0.0 < metrics[-1]["kl_to_initial"]


def test_the_evaluation_of_a_trained_policy_beats_the_retriever(
    small_config, training_data, tmp_path
):
    policy = start(small_config, training_data, tmp_path / "run").run().parts.policy
    reward = open_reward(small_config, ReadingGenerator(), WordPrompts())
    table = evaluate(small_config, policy, make_table(60, seed=6), reward)
    assert list(table.systems) == list(small_config.systems)
    assert table.systems["oracle"].em == 1.0
    assert table.systems["retriever_order"].recall == table.systems["retriever_order"].em
    paired = table.paired["trained_vs_retriever_order"]
    assert paired.em_diff > 0.5
    assert paired.p_value < 0.01


def test_one_seed_repeats_and_two_differ(small_config, training_data, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small_config.model_copy(update={"seed": seed})
        loop = start(config, training_data, tmp_path / name)
        loop.run()
        runs.append(weights(loop))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def _work(rank: int, size: int, config_json: str, directory: str, port: int, out) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    config = RunConfig.from_json(config_json)
    data = TrainingData(make_table(24), make_table(8, seed=1), {})
    loop = start(config, data, Path(directory), workers=TorchWorkers())
    loop.run()
    if rank == 0:
        out.put({name: tensor.numpy() for name, tensor in weights(loop).items()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_do_what_one_does(small_config, training_data, tmp_path, unused_port):
    alone = start(small_config, training_data, tmp_path / "alone")
    alone.run()
    RunDirectory(tmp_path / "two").claim(small_config)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    together = [
        context.Process(
            target=_work,
            args=(rank, 2, small_config.to_json(), str(tmp_path / "two"), unused_port, out),
        )
        for rank in range(2)
    ]
    for process in together:
        process.start()
    found = out.get(timeout=240)
    for process in together:
        process.join(timeout=60)
        assert process.exitcode == 0
    for name, tensor in weights(alone).items():
        assert np.allclose(tensor.numpy(), found[name], atol=1e-5), name
    one, two = steps_of(tmp_path / "alone"), steps_of(tmp_path / "two")
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"generator_tokens_spent", "generator_tokens_total"}:
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-4), key


class BrokenGenerator(ReadingGenerator):
    """Scores some answers as it should not."""

    def __init__(self, logp: float, share: float) -> None:
        super().__init__()
        self._logp, self._share = logp, share

    def score(self, prompts, answers):
        return [
            Score(self._logp, 1, 1) if (hash(p.token_ids) % 100) < 100 * self._share else score
            for p, score in zip(prompts, super().score(prompts, answers), strict=True)
        ]


def test_failed_rewards_are_counted_and_too_many_end_the_run(small_config, training_data, tmp_path):
    nan = float("nan")
    lenient = changed(small_config, training={"max_failed_share": 0.9})
    loop = start(lenient, training_data, tmp_path / "some", generator=BrokenGenerator(nan, 0.2))
    loop.run()
    assert sum(line.get("num_failed", 0) for line in steps_of(tmp_path / "some")) > 0
    with pytest.raises(GenerationError, match="max_failed_share"):
        start(
            small_config, training_data, tmp_path / "many", generator=BrokenGenerator(nan, 0.5)
        ).run()
    with pytest.raises(Exception, match="answer_logp for question"):
        start(
            small_config, training_data, tmp_path / "all", generator=BrokenGenerator(nan, 1.0)
        ).run()


def test_a_gradient_that_is_not_finite_ends_the_run(small_config, training_data, tmp_path):
    loop = start(small_config, training_data, tmp_path / "run")
    with torch.no_grad():
        loop.trainer.parts.policy.scorer.out.weight.fill_(float("inf"))
    with pytest.raises((NonFiniteLossError, ValueError)):
        loop.run()


@pytest.mark.parametrize("dro", [{}, {"refresh_every": 2, "passes": 2, "baseline": "none"}])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_token_budget_stops_a_run_and_its_repetition_at_the_same_step(
    small_config, training_data, tmp_path, dro, overlap
):
    """The last step of an E-step is the first that may be the last."""
    if overlap:
        dro = dro | {"baseline": "none", "overlap": True} | ({"passes": 1} if dro else {})
    limited = changed(small_config, algorithm=dro, training={"max_generator_tokens": 5000})
    for name in ("first", "second"):
        start(limited, training_data, tmp_path / name).run()
    first = steps_of(tmp_path / "first")
    assert first == steps_of(tmp_path / "second")
    end = int(first[-1]["step"])
    assert end < 12
    size = dro.get("refresh_every", 1) * dro.get("passes", 1)
    assert end % size == 0
    assert first[-1 - size]["generator_tokens_total"] < 5000
    assert first[-1]["generator_tokens_total"] >= 5000
    spent = [line["generator_tokens_spent"] for line in first[1:]]
    assert sum(spent) == first[-1]["generator_tokens_total"]


class Hopeless(ReadingGenerator):
    """Never says the answer and finds every one equally unlikely."""

    def generate(self, prompts, sampling):
        return [Generation("nothing", -1.0, 1, 1, self.version) for _ in prompts]

    def score(self, prompts, answers):
        self._count(prompts)
        return [Score(-3.0, 1, 1, self.version) for _ in prompts]


def test_patience_ends_a_run_after_so_many_validations_without_a_better_f1(
    small_config, training_data, tmp_path
):
    """Nothing is better than at step 0; validations come at 3 and 6."""
    config = changed(small_config, training={"patience": 2})
    loop = start(config, training_data, tmp_path / "run", generator=Hopeless())
    first = policy_weights(loop)
    parts = loop.run().parts
    assert (loop.progress.step, loop.progress.best_step, loop.progress.finished) == (6, 0, True)
    assert [line["step"] for line in steps_of(tmp_path / "run")] == list(range(7))
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps()[-1] == 6
    assert all(torch.equal(first[name], t) for name, t in parts.policy.state_dict().items())
    again = start(config, training_data, tmp_path / "run", generator=Hopeless())
    again.run()
    assert len(steps_of(tmp_path / "run")) == 7


def test_a_better_validation_starts_patience_anew(small_config, training_data, tmp_path):
    """The better one after step 2 forgives that after step 1; those after 3 and 4 end the run."""
    config = changed(small_config, training={"patience": 2, "validate_every": 1})
    loop = start(config, training_data, tmp_path / "run")
    scores = iter([0.5, 0.4, 0.6, 0.5, 0.5, 0.9])
    names = {"validation/em", "validation/f1", loop.trainer.best_by}
    loop.trainer.validate = lambda step: dict.fromkeys(names, next(scores))
    loop.run()
    assert (loop.progress.step, loop.progress.best_step) == (4, 2)


@pytest.mark.parametrize("stop_at", [None, 9, 11])
def test_an_alarm_is_recorded_once_also_after_a_resume(
    small_config, training_data, tmp_path, stop_at
):
    """Ten steps without signal raise it at the tenth; the run goes on from step 8 or 10."""
    if stop_at is not None:
        with pytest.raises(StopAfter):
            start(small_config, training_data, tmp_path / "run", stop_at, Hopeless()).run()
    start(small_config, training_data, tmp_path / "run", generator=Hopeless()).run()
    records = steps_of(tmp_path / "run")
    assert [line["step"] for line in records] == list(range(13))
    raised = {int(line["step"]): line["alarms"] for line in records if "alarms" in line}
    assert list(raised) == [10]
    assert list(raised[10]) == ["zero_signal"]
    assert raised[10]["zero_signal"].startswith("100 % of the questions had equal rewards")


def test_the_first_the_best_and_the_newest_checkpoints_are_kept(
    small_config, training_data, tmp_path
):
    config = changed(small_config, training={"keep_checkpoints": 1, "validate_every": 4})
    loop = start(config, training_data, tmp_path / "run")
    loop.run()
    steps = CheckpointStore(tmp_path / "run" / "checkpoints").steps()
    assert steps == sorted({0, loop.progress.best_step, 12})


class Plain(Trainer):
    """A trainer of one number, without a validation; asks the generator from step 4 on."""

    before, num_steps = Before(num_tokens=7), 10

    def __init__(self, fails_at: int | None = None) -> None:
        self.weight, self.fails_at, self.is_closed = torch.zeros(1), fails_at, False

    def asks_generator(self, step):
        return step >= 4

    def warm_start(self):
        self.weight += 1

    def step(self, step, pauses_after):
        if step == self.fails_at:
            raise GenerationError("the engine is gone")
        self.weight = self.weight + step
        return {"generator_tokens_spent": 2.0, "generator_tokens_saved": 1.0}

    def tensors(self):
        return {"policy": {"weight": self.weight}}

    def load(self, files):
        self.weight = files["policy"]["weight"]

    def close(self):
        self.is_closed = True


def plain_loop(directory: Path, trainer: Plain, **training) -> TrainingLoop[Plain]:
    config = RunConfig(training=TrainingConfig(launcher="local", **training))
    run_dir = RunDirectory(directory)
    run_dir.claim(config)
    return TrainingLoop(config, trainer, run_dir, SingleWorker())


def test_one_checkpoint_of_each_stretch_is_kept_for_good(tmp_path):
    settings = {"keep_checkpoints": 1, "keep_every": 4, "checkpoint_every": 1}
    assert plain_loop(tmp_path / "run", Plain(), **settings).run().weight.tolist() == [46.0]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [0, 4, 8, 10]


def test_a_spent_token_budget_stops_no_step_that_asks_for_nothing(tmp_path):
    """Seven tokens before the first step and three in each: all are spent after step 1."""
    loop = plain_loop(tmp_path / "run", Plain(), max_generator_tokens=10)
    loop.run()
    assert (loop.progress.step, loop.progress.generator_tokens) == (4, 19)


@pytest.mark.parametrize("fails_at", [None, 3])
def test_a_trainer_is_closed_however_its_run_ends(tmp_path, fails_at):
    trainer = Plain(fails_at)
    loop = plain_loop(tmp_path / "run", trainer)
    if fails_at is None:
        loop.run()
    else:
        with pytest.raises(GenerationError, match="the engine is gone"):
            loop.run()
    assert trainer.is_closed


def test_validations_and_checkpoints_stand_between_esteps(small_config, training_data, tmp_path):
    """E-steps of four steps: what is due after 3 or 2 steps waits for the end of one."""
    config = changed(
        small_config,
        algorithm={"refresh_every": 2, "passes": 2, "baseline": "none"},
        training={"keep_checkpoints": 9, "num_epochs": 2},
    )
    start(config, training_data, tmp_path / "run").run()
    records = steps_of(tmp_path / "run")
    assert [x["step"] for x in records if "validation/f1" in x] == [0, 4, 8, 12]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [0, 4, 8, 12]
    assert [x["epoch"] for x in records[:5]] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
