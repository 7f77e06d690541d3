"""The loop learns, resumes to the same weights, and does the same with any number of workers."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, GenerationError, NonFiniteLossError
from rlrag.evaluation.systems import evaluate, greedy_picks
from rlrag.pipeline import TrainingData, open_reward
from rlrag.records import Score
from rlrag.training.loop import TrainingLoop
from rlrag.training.run_directory import RunDirectory
from rlrag.training.workers import SingleWorker, TorchWorkers


class StopAfter(Exception):
    """Raised by a test to end a run at a chosen step, as a kill would."""


def start(
    config: RunConfig, data: TrainingData, directory: Path, stop_at: int | None = None, **parts
) -> TrainingLoop:
    run_dir = RunDirectory(directory)
    run_dir.claim(config)
    generator = parts.get("generator") or ReadingGenerator()

    def on_step(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_at:
            raise StopAfter

    return TrainingLoop(
        config,
        data,
        generator,
        open_reward(config, generator, WordPrompts()),
        run_dir,
        parts.get("workers") or SingleWorker(),
        on_step,
    )


def weights(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.policy.state_dict().items()}


def steps_of(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    clocks = ("_s", "rollouts_per_s")
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(clocks)} for line in lines]


def test_training_finds_the_passages_that_answer(small_config, training_data, tmp_path):
    loop = start(small_config, training_data, tmp_path / "run")
    unseen = make_table(40, seed=5)
    gold = np.array(
        [
            [p.id for p in unseen.passages(q)].index(unseen.questions[q].gold_ids[0])
            for q in range(40)
        ]
    )
    before = (greedy_picks(loop.policy, unseen)[:, 0] == gold).mean()
    loop.run()
    after = (greedy_picks(loop.policy, unseen)[:, 0] == gold).mean()
    assert before < 0.5 < 0.8 < after
    metrics = steps_of(tmp_path / "run")
    assert [line["step"] for line in metrics] == list(range(13))
    assert metrics[-1]["validation/em"] > metrics[0]["validation/em"]
    assert metrics[1]["num_rollouts"] == 8 * 8


def test_the_evaluation_of_a_trained_policy_beats_the_retriever(
    small_config, training_data, tmp_path
):
    loop = start(small_config, training_data, tmp_path / "run")
    policy = loop.run()
    reward = open_reward(small_config, ReadingGenerator(), WordPrompts())
    table = evaluate(small_config, policy, make_table(60, seed=6), reward)
    assert list(table.systems) == list(small_config.evaluation.systems)
    assert table.systems["oracle"].em == 1.0
    assert table.systems["retriever_order"].recall == table.systems["retriever_order"].em
    paired = table.paired["trained_vs_retriever_order"]
    assert paired.em_diff > 0.5
    assert paired.p_value < 0.01


@pytest.mark.parametrize("stop_at", [0, 1, 3, 7, 12])
def test_a_stopped_run_continues_to_the_same_weights(
    small_config, training_data, tmp_path, stop_at
):
    whole = start(small_config, training_data, tmp_path / "whole")
    whole.run()
    with pytest.raises(StopAfter):
        start(small_config, training_data, tmp_path / "stopped", stop_at=stop_at).run()
    continued = start(small_config, training_data, tmp_path / "stopped")
    continued.run()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(continued)[name]), name
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "stopped")


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
        out.put({name: tensor.numpy() for name, tensor in loop.policy.state_dict().items()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_do_what_one_does(small_config, training_data, tmp_path, unused_port):
    alone = start(small_config, training_data, tmp_path / "alone")
    alone.run()
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
    lenient = small_config.model_copy(
        update={"training": small_config.training.model_copy(update={"max_failed_share": 0.9})}
    )
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
        loop.policy.scorer.out.weight.fill_(float("inf"))
    with pytest.raises((NonFiniteLossError, ValueError)):
        loop.run()


def test_the_token_budget_stops_a_run_and_its_repetition_at_the_same_step(
    small_config, training_data, tmp_path
):
    limited = small_config.model_copy(
        update={"training": small_config.training.model_copy(update={"max_generator_tokens": 9000})}
    )
    ends = []
    for name in ("first", "second"):
        loop = start(limited, training_data, tmp_path / name)
        loop.run()
        ends.append(loop.progress.step)
    assert ends[0] == ends[1] < 12


def test_a_truncated_checkpoint_is_refused_by_name(small_config, training_data, tmp_path):
    with pytest.raises(StopAfter):
        start(small_config, training_data, tmp_path / "run", stop_at=7).run()
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    weights_file = newest / "policy.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"policy.safetensors is missing, truncated"):
        start(small_config, training_data, tmp_path / "run").run()
