"""What a person types: each mistake gives one sentence, on stderr, with the right exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import save_tiny_llama

from rlrag import errors
from rlrag.cli import evaluate, export, report, train
from rlrag.cli.command_line import exit_code, parse, pick_recipe, run_program
from rlrag.cli.doctor.program import main as program_of_doctor
from rlrag.cli.short_help import first_fields
from rlrag.config import FeedbackConfig, RunConfig
from rlrag.errors import (
    ConfigError,
    DataError,
    ModelNotFoundError,
    PreemptedError,
    RlragError,
    RunDirectoryError,
)
from rlrag.recipes import RECIPES
from rlrag.runs.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
Program = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Ended:
    """How a program ended and what it said."""

    code: int
    out: str
    err: str


def program(module: str, *words: str) -> Ended:
    """Run a program as a person does, from the project's root."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def generator_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@dataclass(frozen=True)
class Files:
    """A folder with a small corpus, questions, and the flags of a run that uses them."""

    folder: Path
    flags: tuple[str, ...]

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.jsonl"

    @property
    def run_dir(self) -> RunDirectory:
        return RunDirectory(self.folder / "run")


@pytest.fixture
def files(tmp_path, generator_dir) -> Files:
    """Without vectors, since these runs end before anything would be encoded."""
    corpus = [{"id": f"p{i}", "contents": f"Title {i}\nthe value is v{i}"} for i in range(5)]
    questions = [
        {"id": f"q{i}", "question": f"what is value {i}?", "golden_answers": [f"v{i}"]}
        for i in range(5)
    ]
    for name, records in (("corpus", corpus), ("questions", questions)):
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    flags = {
        "run-dir": tmp_path / "run",
        "cache-dir": tmp_path / "cache",
        "data.corpus": tmp_path / "corpus.jsonl",
        "data.train-questions": tmp_path / "questions.jsonl",
        "data.eval-questions": tmp_path / "questions.jsonl",
        "data.num-validation-questions": 0,
        "retrieval.kind": "bm25",
        "retrieval.encoder": None,
        "retrieval.num-candidates": 3,
        "generator.model": generator_dir,
        "training.launcher": "local",
        "training.batch-size": 2,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return Files(tmp_path, tuple(words))


def test_a_misspelt_flag_is_refused_with_the_nearest_name():
    ended = program("jobs.train", "nq", "--algorithm.num-sample", "3")
    assert ended.code == 2
    assert "--algorithm.num-sample" in ended.err
    assert "--algorithm.num-samples" in ended.err.partition("Perhaps you meant")[2]
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_malformed_corpus_line_is_named_with_file_and_line(files):
    lines = files.corpus.read_text().splitlines(keepends=True)
    files.corpus.write_text("".join([*lines[:2], '{"id": "p9", "contents": \n', *lines[2:]]))
    ended = program("jobs.train", "factbook", *files.flags)
    assert ended.code == 3
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"error: {files.corpus}:3: not JSON")
    assert "expected one JSON object per line" in last
    assert "Traceback" not in ended.err


def test_a_missing_model_is_named(files):
    ended = program("jobs.train", "factbook", *files.flags, "--generator.model", "/no/such/model")
    assert ended.code == 4
    assert ended.err.splitlines() == [
        "error: model directory '/no/such/model' does not exist; check the path, and that you may "
        "read it"
    ]
    assert not files.run_dir.config.exists()


@pytest.mark.slow
def test_a_missing_bundle_is_named(tmp_path):
    ended = program(
        "jobs.evaluate",
        *("--bundle", str(tmp_path / "bundle"), "--corpus", "c", "--questions", "q"),
        *("--output", str(tmp_path / "out.json")),
    )
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == (
        f"error: bundle {tmp_path / 'bundle'} does not exist; give the bundle directory of a "
        "finished run"
    )
    assert not (tmp_path / "out.json").exists()


def test_candidates_beyond_the_corpus_are_refused(files):
    with pytest.raises(ConfigError) as caught:
        train.main(["factbook", *files.flags, "--retrieval.num-candidates", "6"])
    assert "6" in str(caught.value)
    assert "5" in str(caught.value)
    assert "num_candidates" in str(caught.value)


def test_a_corrected_flag_may_use_the_run_directory_of_the_mistake(files):
    wrong = ["factbook", *files.flags, "--data.corpus", str(files.folder / "corpus.json")]
    with pytest.raises(DataError, match=r"corpus\.json does not exist"):
        train.main(wrong)
    with pytest.raises(DataError, match="fewer than training"):
        train.main(["factbook", *files.flags, "--training.batch-size", "64"])


def test_a_run_directory_of_another_configuration_is_refused(files):
    files.run_dir.claim(RunConfig())
    with pytest.raises(RunDirectoryError, match="recipe: 'custom' there, 'factbook' given"):
        train.main(["factbook", *files.flags])
    assert RunConfig.from_json(files.run_dir.config.read_text()) == RunConfig()


def test_without_the_data_folder_the_message_says_what_to_set(files, monkeypatch):
    monkeypatch.delenv("RLRAG_DATA_DIR", raising=False)
    kept = {"--run-dir", "--cache-dir", "--generator.model", "--training.launcher"}
    pairs = zip(files.flags[::2], files.flags[1::2], strict=True)
    words = [word for pair in pairs if pair[0] in kept for word in pair]
    with pytest.raises(DataError) as caught:
        train.main(["nq", *words])
    assert "$RLRAG_DATA_DIR/questions/nq.dev.jsonl does not exist" in str(caught.value)
    assert "set the environment variable RLRAG_DATA_DIR to the data folder" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quikstart"], "unknown recipe 'quikstart'; did you mean 'quickstart'?"),
        (["zzz"], "unknown recipe 'zzz'; there are: quickstart, factbook"),
        (["--algorithm.num-samples", "3"], "unknown recipe '--algorithm.num-samples'; there are:"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest_name(words, message):
    with pytest.raises(ConfigError) as caught:
        pick_recipe(words, RECIPES, "python -m jobs.train")
    assert message in str(caught.value)


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_lists_the_recipes(words, code, capsys):
    with pytest.raises(SystemExit) as caught:
        run_program(lambda argv: train.main(words))
    assert caught.value.code == code
    said, complaint = capsys.readouterr()
    assert complaint.startswith("error: no recipe was given; choose from: quickstart") == bool(code)
    assert said.startswith("usage: python -m jobs.train RECIPE [--run-dir DIR] [flags]")
    for name, make in RECIPES.items():
        assert f"  {name:22} {make.__doc__.splitlines()[0]}" in said


def flag_names(section, prefix: str = "") -> list[str]:
    names = []
    for name, value in section:
        flag = f"{prefix}{name.replace('_', '-')}"
        names += flag_names(value, f"{flag}.") if hasattr(value, "model_fields_set") else [flag]
    return names


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["factbook", "--help-all"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    names = flag_names(RunConfig())
    assert len(names) > 60
    assert [name for name in names if f"--{name}" not in said] == []
    assert "Selections drawn for each question (m)" in said


def shown_flags(recipe: str, word: str, capsys) -> set[str]:
    """Flags of the configuration in the help of a recipe."""
    with pytest.raises(SystemExit) as caught:
        train.main([recipe, word])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert ("--help-all lists every flag" in said) == (word != "--help-all")
    return {name for name in flag_names(RECIPES[recipe]()) if re.search(rf"--{name}[ ,]", said)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_help_of_a_recipe_shows_what_is_changed_first(recipe, capsys):
    shown = shown_flags(recipe, "--help", capsys)
    assert shown < shown_flags(recipe, "--help-all", capsys)
    named = {name.replace("_", "-") for name in first_fields(RECIPES[recipe]())}
    assert shown == named
    assert 15 < len(shown) < 30


def test_the_help_shows_the_step_size_of_what_the_recipe_trains(capsys):
    by_recipe = {
        "nq": {"training.learning-rate"},
        "nq-sft": {"generator-training.learning-rate"},
        "nq-openrag": {"algorithm.learning-rate"},
        "nq-jsa-joint": {"algorithm.learning-rate", "generator-training.learning-rate"},
    }
    for recipe, names in by_recipe.items():
        shown = shown_flags(recipe, "-h", capsys)
        assert {name for name in shown if name.endswith("learning-rate")} == names


def test_the_short_help_shows_the_values_of_the_recipe(capsys):
    with pytest.raises(SystemExit):
        train.main(["nq-jsa", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Peak AdamW step size of both retrievers. (default: 2e-05)" in said
    assert "(default: runs/nq-jsa)" in said
    assert "--dry-run" in said


def arguments(*words: str) -> train.TrainArguments:
    default = train.TrainArguments(RECIPES["nq"](), Path("runs/nq"))
    return parse(train.TrainArguments, default, words, "python -m jobs.train nq")


def test_flags_change_single_fields_and_nothing_else():
    assert arguments() == train.TrainArguments(RECIPES["nq"](), Path("runs/nq"))
    found = arguments(
        *("--run-dir", "elsewhere", "--seed", "7", "--algorithm.num-samples", "3"),
        *("--generator.prompt.instruction", "Read.", "--data.max-train-questions", "50"),
        *("--reward.functions", "token_f1", "my.module:reward", "--reward.weights", "1", "0.5"),
        *("--training.loggers", "--retrieval.bm25-scores", "False"),
    )
    assert found.run_dir == Path("elsewhere")
    config, recipe = found.config, RECIPES["nq"]()
    assert (config.seed, config.dro.num_samples) == (7, 3)
    assert config.generator.prompt.instruction == "Read."
    assert config.data.max_train_questions == 50
    assert config.reward.functions == ("token_f1", "my.module:reward")
    assert config.reward.weights == (1.0, 0.5)
    assert config.training.loggers == ()
    assert config.retrieval.bm25_scores is False
    assert config.generator.prompt.few_shot == recipe.generator.prompt.few_shot
    assert config.selector == recipe.selector
    assert config.evaluation == recipe.evaluation


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.batch-size", "0"], "training.batch_size = 0: Input should be greater"),
        (
            ["--algorithm.weighting", "raw"],
            "algorithm.baseline 'mean' does not fit algorithm.weighting 'raw'",
        ),
        (
            ["--algorithm.name", "sft", "--algorithm.num-samples", "3"],
            "--algorithm.num-samples is a setting of algorithm dro, but this run's is sft; choose",
        ),
        (
            ["--algorithm.name", "alternating", "--algorithm.num-offline", "3"],
            "--algorithm.num-offline is --algorithm.retriever.num-offline in this run",
        ),
        (["--environment.num-selected", "9"], "num_selected is 9 but retrieval.num_candidates"),
        (["--reward.weights", "1", "2"], "reward.functions has 1 entries and reward.weights 2"),
        (["--generator.backend", "vllm", "--training.launcher", "local"], "runs without vLLM"),
        (["--retrieval.rrf-k", "60"], "--retrieval.rrf-k is no setting any more and fixed at 60"),
        (["--mirror.max_attempts=5"], "--mirror.max_attempts is no setting any more and fixed"),
        (
            ["--generator.prompt.no-score-end-of-answer"],
            "--generator.prompt.no-score-end-of-answer is no setting any more and fixed at False",
        ),
        (
            ["--generator-training.max-staleness", "1"],
            "--generator-training.max-staleness is no setting any more; leave it out",
        ),
    ],
)
def test_values_that_contradict_give_one_sentence(words, message, capsys):
    with pytest.raises(ConfigError) as caught:
        arguments(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize(
    "words",
    [["--training.launcher", "remote"], ["--seed", "one"], ["--seed"], ["stray"], ["--sed", "1"]],
)
def test_words_that_are_no_values_end_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        arguments(*words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert words[0] in said
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--limit", "0"], "--limit is 0; give at least 1"),
        (["--docs-in-context", "0"], "--docs-in-context is 0; give at least 1"),
        (["--docs-in-context", "-3"], "--docs-in-context is -3; give at least 1"),
        (["--output", "/no/such/folder/out.json"], "directory /no/such/folder does not exist"),
        (["--output", "/"], "--output / is a directory; give the name of a file in it"),
    ],
)
def test_evaluation_checks_its_flags_before_it_loads_anything(extra, message, tmp_path):
    words = {"bundle": "b", "corpus": "c", "questions": "q", "output": str(tmp_path / "out.json")}
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    with pytest.raises(ConfigError) as caught:
        evaluate.main([*flags, *extra])
    assert message in str(caught.value)


def test_evaluation_needs_its_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--bundle", "b"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("--questions", "--output"))


CODES = {
    ConfigError: 2,
    RunDirectoryError: 2,
    DataError: 3,
    errors.SetupError: 4,
    ModelNotFoundError: 4,
    errors.InUseError: 4,
    PreemptedError: 75,
}


def own_errors() -> list[type[RlragError]]:
    found, left = [], [RlragError]
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    return found


@pytest.mark.parametrize("kind", own_errors(), ids=lambda kind: kind.__name__)
def test_each_error_has_its_exit_code_and_one_line(kind, capsys):
    def fail(argv: Sequence[str]) -> None:
        raise kind("what is wrong;\n  what to do")

    assert exit_code(kind("x")) == CODES.get(kind, 1)
    with pytest.raises(SystemExit) as caught:
        run_program(fail)
    assert caught.value.code == CODES.get(kind, 1)
    assert capsys.readouterr().err == "error: what is wrong; what to do\n"


def test_a_program_gets_its_words_and_ends_quietly(monkeypatch, capsys):
    seen: list[str] = []
    monkeypatch.setattr(sys, "argv", ["program", "factbook", "--seed", "1"])
    run_program(seen.extend)
    assert seen == ["factbook", "--seed", "1"]
    assert capsys.readouterr().err == ""


def test_a_stop_is_said(capsys):
    def stop(argv: Sequence[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_program(stop)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: stopped; the same command continues\n"


def test_a_bug_is_not_hidden(capsys):
    def fail(argv: Sequence[str]) -> None:
        raise ZeroDivisionError("by\nnothing")

    with pytest.raises(SystemExit) as caught:
        run_program(fail)
    assert caught.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Traceback")
    assert said[-1] == (
        "error: ZeroDivisionError: by nothing (unexpected: report it with the lines above)"
    )


NOWHERE = "/no/such/folder"
MISTAKES: dict[str, tuple[Program, list[str], int, str]] = {
    "train, no such recipe": (train.main, ["zzz"], 2, "unknown recipe 'zzz'"),
    "train, no such log": (
        train.main,
        [
            "factbook",
            "--run-dir",
            "run",
            "--algorithm.name",
            "feedback",
            "--algorithm.log",
            f"{NOWHERE}/log.sqlite",
        ],
        3,
        "log.sqlite does not exist; give the file that a service's feedback.path names",
    ),
    "train, wrong flag": (
        train.main,
        ["factbook", "--sed", "1"],
        2,
        "Unrecognized options: --sed, 1; see the flags by --help",
    ),
    "train, wrong choice": (
        train.main,
        ["factbook", "--training.launcher", "remote"],
        2,
        "Expected one of ('ray', 'local'); see the flags by --help",
    ),
    "doctor, no such recipe": (program_of_doctor, ["zzz"], 2, "unknown recipe 'zzz'"),
    "evaluate, no flags": (evaluate.main, [], 2, "--bundle PATH --questions STR --output PATH"),
    "evaluate, no folder": (
        evaluate.main,
        ["--bundle", "b", "--corpus", "c", "--questions", "q", "--output", f"{NOWHERE}/out"],
        2,
        f"the directory {NOWHERE} does not exist",
    ),
    "export, nothing named": (export.main, ["--output", "out"], 2, "give either --checkpoint"),
    "export, no run": (
        export.main,
        ["--run-dir", NOWHERE, "--output", "out"],
        2,
        f"{NOWHERE} is not a run",
    ),
    "report, no run": (
        report.main,
        ["--run-dir", NOWHERE, "--output", "out.html"],
        2,
        f"--run-dir {NOWHERE} is not a run, it does not exist; give the directory that",
    ),
    "report, nothing named": (
        report.main,
        [],
        2,
        "report.html; the folder runs here does not exist",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_program_ends_with_its_code_and_one_last_line(name, capsys, monkeypatch, tmp_path):
    main, words, code, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert caught.value.code == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_begun_does_without_the_log_that_it_copied(tmp_path):
    run_dir = RunDirectory(tmp_path / "run")
    config = RunConfig(algorithm=FeedbackConfig(log=f"{NOWHERE}/log.sqlite"))
    with pytest.raises(DataError, match="does not exist"):
        train.check_log(config, run_dir)
    run_dir.claim(config)
    run_dir.feedback.touch()
    train.check_log(config, run_dir)
