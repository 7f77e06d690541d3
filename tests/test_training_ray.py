"""`python -m jobs.train` on Ray: the same numbers as in one process, and through every kill.

Each test runs the real program on a tiny random model. A reference run that nobody disturbs is
shared by all.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import pytest
from training_program import NUM_STEPS, tiny_flags, without_clocks

from benchmarks.faults.programs import ROOT, TrainingProgram, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

EXIT_TIMEOUT_S = 600.0
ENGINE, LEARNER = "EngineActor", "RayTrainWorker"
CO_TRAINING = (
    *("--algorithm.parts", "selector", "generator", "--training.num-epochs", "2"),
    *("--generator-training.precision", "float32", "--generator-training.lora-rank", "2"),
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """With relative paths, as a user gives them: each process of Ray has a folder of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    return [
        os.path.relpath(word, ROOT) if word.startswith(str(folder)) else word
        for word in tiny_flags(folder)
    ]


@pytest.fixture
def start(flags, tmp_path):
    programs = []

    def start_it(name: str, *more: str, cache: str = "", **variables: str) -> TrainingProgram:
        folder = tmp_path / name
        cache_dir = tmp_path / (cache or name) / "cache"
        programs.append(TrainingProgram(folder, [*flags, *more], cache_dir, variables))
        return programs[-1]

    yield start_it
    for program in programs:
        program.end()


def undisturbed(folder: Path, flags: list[str]) -> TrainingProgram:
    """One worker on Ray, from the first step to the last."""
    program = TrainingProgram(folder, flags, folder / "cache", {})
    try:
        assert program.wait(EXIT_TIMEOUT_S) == 0, program.stderr()
    finally:
        program.end()
    return program


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory) -> TrainingProgram:
    traced = [*flags, "--training.profile-steps", "2:2"]
    return undisturbed(tmp_path_factory.mktemp("reference"), traced)


@pytest.fixture(scope="module")
def co_trained(flags, tmp_path_factory) -> TrainingProgram:
    """As `reference`, but the generator learns too."""
    return undisturbed(tmp_path_factory.mktemp("co_trained"), [*flags, *CO_TRAINING])


def assert_close(left: list[dict[str, float]], right: list[dict[str, float]], rel: float) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.pop("alarms", None) == other.pop("alarms", None), one["step"]
        assert one == pytest.approx(other, rel=rel, abs=rel), one["step"]


SELECTOR_FILES = ("policy", "optimizer")
CO_TRAINED_FILES = (*SELECTOR_FILES, "generator", "generator_optimizer")


def assert_same_run(
    program: TrainingProgram,
    reference: TrainingProgram,
    num_steps: int = NUM_STEPS,
    kept: tuple[str, ...] = SELECTOR_FILES,
) -> None:
    """Equal to the last bit, except for what the cache saved a step that was done twice."""
    counts = ("generator_tokens_spent", "generator_tokens_saved")
    assert without_clocks(read_metrics(program.run_dir), *counts) == without_clocks(
        read_metrics(reference.run_dir), *counts
    )
    last = f"checkpoints/step-{num_steps:06d}"
    for name in (*(f"{last}/{file}" for file in kept), "bundle/selector"):
        path = f"{name}.safetensors"
        assert (program.run_dir / path).read_bytes() == (reference.run_dir / path).read_bytes()
    assert (program.run_dir / "evaluation.json").read_text() == (
        reference.run_dir / "evaluation.json"
    ).read_text()


def test_a_run_on_ray_leaves_its_products_and_nothing_else(reference):
    assert [line["step"] for line in read_metrics(reference.run_dir)] == list(range(NUM_STEPS + 1))
    for name in ("config.json", "evaluation.json", "bundle/bundle.json", "logs/libraries.log"):
        assert (reference.run_dir / name).is_file(), name
    assert "Token authentication" not in reference.stdout() + reference.stderr()
    last = [line.partition(":")[0] for line in reference.stderr().splitlines()[-2:]]
    assert last == ["see the report by", "serve it by"]
    assert reference.leftovers() == []


def test_a_run_on_ray_is_traced_and_each_process_logs_lines_of_json(reference):
    profile = reference.run_dir / "profile"
    with gzip.open(profile / "step-000002.json.gz") as trace:
        assert json.load(trace)["traceEvents"]
    events = json.loads((profile / "ray-timeline.json").read_text())
    assert "task::EngineActor.generate" in {event.get("cat") for event in events}
    assert sorted(path.name for path in profile.iterdir()) == [
        "ray-timeline.json",
        "step-000002.json.gz",
    ]
    logs = reference.run_dir / "logs"
    actors = {"libraries": "driver", "worker-0": "worker-0", "generator-0": "generator-0"}
    for name, actor in actors.items():
        for line in map(json.loads, (logs / f"{name}.log").read_text().splitlines()):
            assert (line["run"], line["actor"]) == (reference.run_dir.name, actor)
    assert "is ready after" in (logs / "generator-0.log").read_text()


def test_one_process_without_ray_gives_the_same_metrics(reference, start):
    local = start("local", "--training.launcher", "local")
    assert local.wait(EXIT_TIMEOUT_S) == 0, local.stderr()
    assert_close(
        without_clocks(read_metrics(local.run_dir)),
        without_clocks(read_metrics(reference.run_dir)),
        rel=2e-5,
    )


def test_two_workers_give_the_same_metrics_as_one(reference, start):
    two = start("two", "--training.num-workers", "2", "--generator.num-actors", "2")
    assert two.wait(EXIT_TIMEOUT_S) == 0, two.stderr()
    assert_close(
        without_clocks(read_metrics(two.run_dir)),
        without_clocks(read_metrics(reference.run_dir)),
        rel=2e-4,
    )


def test_two_workers_train_by_a_trainer_of_ones_own_as_one_process_does(start):
    own = ("--algorithm.name", "examples.own_trainer:SelfCritical")
    own = (*own, "--algorithm.options", "num_samples=3", "--training.num-epochs", "2")
    runs = [
        start("two", *own, "--training.num-workers", "2"),
        start("local", *own, "--training.launcher", "local"),
    ]
    for program in runs:
        assert program.wait(EXIT_TIMEOUT_S) == 0, program.stderr()
        assert (program.run_dir / "bundle" / "selector.safetensors").is_file()
    two, local = (without_clocks(read_metrics(program.run_dir)) for program in runs)
    assert len(two) == NUM_STEPS // 3 + 1
    assert_close(two, local, rel=2e-4)


def test_a_run_goes_on_after_kill_9_of_the_driver_a_generator_actor_and_the_learner(
    reference, start
):
    first = start("killed")
    first.wait_for_step(5, EXIT_TIMEOUT_S)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL
    assert first.leftovers() == []
    stopped_at = int(read_metrics(first.run_dir)[-1]["step"])
    assert 5 <= stopped_at < NUM_STEPS
    again = start("killed")
    step = again.wait_for_step(stopped_at + 1, EXIT_TIMEOUT_S)
    (engine,) = again.family.named(ENGINE)
    engine.kill()
    # The step that was under way ends only when the engine is back.
    step = again.wait_for_step(step + 3, EXIT_TIMEOUT_S)
    assert step < NUM_STEPS
    (restarted,) = again.family.named(ENGINE)
    assert restarted != engine
    (learner,) = again.family.named(LEARNER)
    learner.kill()
    assert again.wait(EXIT_TIMEOUT_S) == 0, again.stderr()
    assert again.family.num_seen(LEARNER) == 2
    assert again.leftovers() == []
    assert_same_run(again, reference)


def test_a_run_that_trains_both_goes_on_after_kill_9_of_the_learner_and_a_generator_actor(
    co_trained, start
):
    """The engines outlive the learner: they hold weights of steps that are undone by its death."""
    killed = start("both-killed", *CO_TRAINING)
    step = killed.wait_for_step(1, EXIT_TIMEOUT_S)
    (learner,) = killed.family.named(LEARNER)
    learner.kill()
    step = killed.wait_for_step(max(step + 1, 5), EXIT_TIMEOUT_S)
    (engine,) = killed.family.named(ENGINE)
    engine.kill()
    assert killed.wait(EXIT_TIMEOUT_S) == 0, killed.stderr()
    assert killed.family.num_seen(LEARNER) == 2
    assert killed.leftovers() == []
    assert_same_run(killed, co_trained, 10, CO_TRAINED_FILES)
    weights = "bundle/generator/model.safetensors"
    assert (killed.run_dir / weights).read_bytes() == (co_trained.run_dir / weights).read_bytes()


def test_two_workers_train_both_as_one_does(co_trained, start):
    two = start("two-workers", *CO_TRAINING, "--training.num-workers", "2")
    assert two.wait(EXIT_TIMEOUT_S) == 0, two.stderr()
    counted = "generator/grad_variance"  # over the passes of all workers, which are others
    assert_close(
        without_clocks(read_metrics(two.run_dir), counted),
        without_clocks(read_metrics(co_trained.run_dir), counted),
        rel=2e-3,
    )


REWARDS = """
import time

BAD = "Which bird is the emblem of Oskai?"

def raises(question, answer):
    if question == BAD:
        raise KeyError("no such bird")
    return float(len(answer))

def is_nan(question, answer):
    return float("nan") if question == BAD else float(len(answer))

def hangs(question, answer):
    if question == BAD:
        time.sleep(3600)
    return float(len(answer))

def mended(question, answer):
    return float(len(answer))
"""


def reward_flags(function: str) -> list[str]:
    return [
        *("--reward.functions", f"bird_rewards:{function}", "--reward.weights", "1.0"),
        *("--reward.timeout-s", "3"),
    ]


@pytest.mark.parametrize(
    ("function", "more", "said"),
    [
        ("raises", ("--training.num-workers", "2"), "KeyError: 'no such bird'"),
        ("is_nan", ("--training.launcher", "local"), "nan"),
        ("hangs", ("--training.launcher", "local"), "ran past its limit of 3 s"),
    ],
)
def test_a_broken_reward_ends_the_run_with_one_line_that_names_function_and_question(
    start, tmp_path, function, more, said
):
    (tmp_path / "bird_rewards.py").write_text(REWARDS)
    broken = start("broken", *reward_flags(function), *more, PYTHONPATH=str(tmp_path))
    assert broken.wait(EXIT_TIMEOUT_S) == 1, broken.stderr()
    last = broken.stderr().splitlines()[-1]
    assert last.startswith("error: ")
    assert f"reward 'bird_rewards:{function}' for question 'sample-16'" in last
    assert said in last
    assert "Traceback" not in broken.stderr()
    assert broken.leftovers() == []
    assert (broken.run_dir / "checkpoints" / "step-000000").is_dir()
    if function != "is_nan":
        return
    mended = start(
        "mended", *reward_flags("mended"), *more, cache="broken", PYTHONPATH=str(tmp_path)
    )
    assert mended.wait(EXIT_TIMEOUT_S) == 0, mended.stderr()
    assert read_metrics(mended.run_dir)[1]["generator_tokens_saved"] > 0
