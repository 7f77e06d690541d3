"""A run that gets a SIGTERM ends with a checkpoint, and goes on as if nothing had happened.

The signals are real and come to this process, in the middle of a step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from loop_runs import changed, co_training, start, steps_of, weights
from stand_ins import ReadingGenerator
from test_jobs_experience import config_of, flags_of, write_log
from training_program import HOP_FLAGS, tiny_flags

from rlrag.cli import train
from rlrag.cli.command_line import exit_code
from rlrag.config import RunConfig
from rlrag.errors import PreemptedError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.protocol import Sampling
from rlrag.pipeline import TrainingData
from rlrag.records import Generation, Prompt, Score
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.runs.preemption import ended_between_steps, ended_by_sigterm, interruptible
from rlrag.testing.thread_workers import make_group, run_together

OFF_POLICY = {"refresh_every": 2, "passes": 2, "baseline": "none"}


@pytest.fixture(autouse=True)
def handler_of_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Signalling(ReadingGenerator):
    """Gets a SIGTERM at the first call after the record of a step."""

    def __init__(self, run: Path, step: int) -> None:
        super().__init__()
        self._run, self._step = RunDirectory(run), step

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        self.interrupt()
        return super().score(prompts, answers)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        self.interrupt()
        return super().generate(prompts, sampling)

    def interrupt(self) -> None:
        records = self._run.read_metrics()
        if self._step is not None and (records or [{"step": -1}])[-1]["step"] >= self._step:
            self._step = None
            os.kill(os.getpid(), signal.SIGTERM)


def preempted(loop, run: Path) -> str:
    with pytest.raises(PreemptedError) as caught, ended_between_steps(RunDirectory(run)):
        loop.run()
    assert exit_code(caught.value) == 75
    assert not (run / "may-run").exists()
    return str(caught.value)


def check(config: RunConfig, data: TrainingData, directory: Path, step: int) -> str:
    """Compare a run that is preempted in the step after `step` with one that nothing disturbs."""
    whole = start(config, data, directory / "whole")
    whole.run()
    run = directory / "stopped"
    said = preempted(start(config, data, run, generator=Signalling(run, step)), run)
    continued = start(config, data, run)
    continued.run()
    assert steps_of(directory / "whole") == steps_of(run)
    found, expected = weights(continued), weights(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    return said


@pytest.mark.parametrize(("step", "ends_at"), [(-1, 0), (2, 3), (10, 11)])
def test_the_step_that_is_under_way_is_finished_and_saved(
    small_config, training_data, tmp_path, step, ends_at
):
    """A signal before the first record comes in the validation of the untrained weights."""
    said = check(small_config, training_data, tmp_path, step)
    assert said == (
        f"preempted after step {ends_at}, with a checkpoint of step {ends_at}; run the same "
        "command to continue"
    )


@pytest.mark.parametrize(("step", "ends_at", "saved"), [(3, 4, 4), (5, 6, 4)])
def test_what_an_estep_has_begun_is_dropped(
    small_config, training_data, tmp_path, step, ends_at, saved
):
    """E-steps of two batches and two passes: only steps 4, 8 and so on can be continued from."""
    config = changed(small_config, algorithm=OFF_POLICY, training={"num_epochs": 2})
    said = check(config, training_data, tmp_path, step)
    assert f"after step {ends_at}, with a checkpoint of step {saved};" in said


def test_a_batch_that_ran_ahead_is_dropped(small_config, training_data, tmp_path):
    """Nothing runs ahead of steps 4 and 6, after which a checkpoint stands."""
    config = changed(small_config, algorithm={"baseline": "none", "overlap": True})
    said = check(config, training_data, tmp_path, 4)
    assert "after step 5, with a checkpoint of step 4;" in said


def test_a_trained_generator_is_saved_too(small_config, few_data, model_dir, tmp_path):
    config = co_training(
        small_config, model_dir, batch_size=4, num_epochs=2, validate_every=9, checkpoint_every=9
    )

    class Engine(TransformersGenerator):
        """A real engine that a signal comes to."""

        interrupt = None

        def score(self, *arguments):
            if self.interrupt:
                self.interrupt()
            return super().score(*arguments)

    whole = start(
        config, few_data, tmp_path / "whole", generator=Engine(model_dir, "float32", "cpu")
    )
    whole.run()
    run, engine = tmp_path / "stopped", Engine(model_dir, "float32", "cpu")
    engine.interrupt = Signalling(run, 2).interrupt
    said = preempted(start(config, few_data, run, generator=engine), run)
    assert "with a checkpoint of step 3" in said
    continued = start(config, few_data, run, generator=Engine(model_dir, "float32", "cpu"))
    continued.run()
    found = weights(continued)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(whole).items())


def test_all_workers_end_after_the_same_step(small_config, training_data, tmp_path):
    """Rank 0 alone looks, so that a sign which one sees earlier than another divides nobody."""
    config = changed(small_config, training={"launcher": "ray", "num_workers": 2})
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.claim(config)

    def work(worker):
        loop = start(config, training_data, run_dir.path, generator=Asking(), workers=worker)
        with pytest.raises(PreemptedError) as caught:
            loop.run()
        return str(caught.value)

    class Asking(ReadingGenerator):
        """Asks the run to stop in the third step, as another process would."""

        def score(self, prompts, answers):
            if len(run_dir.read_metrics()) == 3:
                run_dir.ask_to_stop()
            return super().score(prompts, answers)

    run_dir.allow_to_run()
    group = make_group(2)
    first, second = run_together([lambda worker=worker: work(worker) for worker in group])
    assert first == second
    assert first.startswith("preempted after step 3, with a checkpoint of step 3;")
    assert CheckpointStore(run_dir.checkpoints).steps()[-1] == 3


def test_a_signal_in_the_last_step_leaves_the_rest_to_the_next_start(
    small_config, training_data, tmp_path
):
    run = tmp_path / "run"
    said = preempted(start(small_config, training_data, run, generator=Signalling(run, 11)), run)
    assert said == "preempted after the last training step; run the same command to continue"
    assert CheckpointStore(run / "checkpoints").load(12)[1]["finished"]


def test_a_sign_that_a_killed_process_left_is_no_sign(small_config, training_data, tmp_path):
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.claim(small_config)
    run_dir.allow_to_run()
    run_dir.ask_to_stop()
    with ended_between_steps(run_dir):
        assert not run_dir.stop_is_asked()
        start(small_config, training_data, run_dir.path).run()
    assert not run_dir.stop_is_asked()


def test_a_loop_that_no_signal_reached_leaves_the_handler_that_was_there(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with ended_between_steps(RunDirectory(tmp_path)) as is_asked:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not is_asked()
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_of_the_steps_the_program_ends_at_once():
    def work() -> None:
        with ended_by_sigterm() as listen_again:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library would
            listen_again()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)  # Ray leaves a handler of its own in the process
    with pytest.raises(PreemptedError, match="outside the training steps") as caught:
        work()
    assert exit_code(caught.value) == 75
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_by_hand_is_no_preemption():
    with pytest.raises(KeyboardInterrupt), ended_by_sigterm():
        raise KeyboardInterrupt


def test_a_library_that_ends_the_program_at_ctrl_c_is_overruled():
    def work() -> None:
        with interruptible():
            signal.signal(signal.SIGINT, lambda signum, frame: sys.exit(0))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) == before


def test_another_thread_runs_without_signals(tmp_path):
    def work() -> bool:
        with ended_by_sigterm(), ended_between_steps(RunDirectory(tmp_path)) as is_asked:
            return is_asked()

    assert run_together([work]) == [False]


_TWICE = """
import os, signal, sys, time
from pathlib import Path
from rlrag.runs.preemption import ended_between_steps, ended_by_sigterm, interruptible
from rlrag.runs.directory import RunDirectory

def ask():
    os.kill(os.getpid(), signal.SIGTERM)

with ended_by_sigterm():
    try:
        with ended_between_steps(RunDirectory(Path(sys.argv[1]))) as is_asked:
            ask()
            if sys.argv[2] == "within":
                ask()
    finally:
        ask()
        time.sleep(60)
"""


@pytest.mark.parametrize("place", ["within", "after"])
def test_a_second_signal_kills_also_while_the_run_is_taken_down(tmp_path, place):
    done = subprocess.run(
        [sys.executable, "-c", _TWICE, str(tmp_path), place],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == (
        "error: ended at once by a second SIGTERM; run the same command to continue\n"
    )


def signal_at(run: Path, step: int) -> None:
    """Send this process a SIGTERM once a step is recorded."""

    def watch() -> None:
        while not any(record["step"] >= step for record in RunDirectory(run).read_metrics()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run_like(words: list[str], tmp_path: Path, step: int) -> tuple[Path, Path]:
    """The run directories of a program that was left alone and of one that was preempted."""
    words = [*words, "--cache-dir", str(tmp_path / "cache"), "--evaluation.systems"]
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    train.main([*words, "--run-dir", str(whole)])
    signal_at(run, step)
    with pytest.raises(PreemptedError, match=r"with a checkpoint of step \d+; run the same"):
        train.main([*words, "--run-dir", str(run)])
    assert not (run / "bundle").exists()
    stopped_at = CheckpointStore(run / "checkpoints").steps()[-1]
    assert step <= stopped_at
    train.main([*words, "--run-dir", str(run)])
    return whole, run


def assert_same_products(whole: Path, run: Path) -> None:
    steps = [CheckpointStore(path / "checkpoints").steps()[-1] for path in (whole, run)]
    assert steps[0] == steps[1]
    last = f"checkpoints/step-{steps[0]:06d}"
    names = (f"{last}/policy", f"{last}/optimizer", "bundle/selector")
    for name in (f"{name}.safetensors" for name in names):
        assert (whole / name).read_bytes() == (run / name).read_bytes(), name
    assert not (run / "may-run").exists()


@pytest.mark.parametrize("extra", [(), HOP_FLAGS], ids=["selections", "paths"])
def test_the_program_is_preempted_and_goes_on(tmp_path, extra):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    flags = [*tiny_flags(inputs), "--training.launcher", "local", *extra]
    whole, run = run_like(["factbook", *flags], tmp_path, 4)
    assert_same_products(whole, run)


def test_training_on_a_log_is_preempted_and_goes_on(openrag_files, tmp_path):
    log = tmp_path / "feedback.sqlite"
    words = flags_of(openrag_files, tmp_path)
    write_log(log, config_of(words), 200)
    words += [
        "--algorithm.log",
        str(log),
        "--algorithm.num-epochs",
        "60",
    ]
    whole, run = run_like(words, tmp_path, 3)
    assert_same_products(whole, run)


def test_a_corrected_command_may_use_the_directory_of_a_run_without_records(tmp_path):
    """The signal comes while indexes and models are opened."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    run = tmp_path / "run"
    words = ["factbook", *tiny_flags(inputs), "--training.launcher", "local"]
    words += ["--run-dir", str(run), "--cache-dir", str(tmp_path / "cache")]

    def watch() -> None:
        while not (run / "config.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    with pytest.raises(PreemptedError, match="outside the training steps"):
        train.main(words)
    assert not (run / "config.json").exists()
    RunDirectory(run).check(RunConfig())
