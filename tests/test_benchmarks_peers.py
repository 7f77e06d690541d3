"""Peers beside each other: what they are given, how they run, and how they are measured."""

from __future__ import annotations

import ast
import json
import string
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import PEERS, PeersArguments, compare
from benchmarks.peers.environments import torch_source
from benchmarks.peers.running import Peer, finished_peer
from rlrag.config import RunConfig
from rlrag.errors import ConfigError, RunDirectoryError, SetupError
from rlrag.evaluation.question_records import QuestionRecorder
from rlrag.evaluation.systems import Answered
from rlrag.recipes import RECIPES
from rlrag.records import Generation
from rlrag.rewards.answer_match import token_f1

K = 2
SCRIPT = '''
"""Does what the name of its output folder says."""
import json, pathlib, sys, time
work, output = map(pathlib.Path, sys.argv[1:])
with (work / "calls.txt").open("a") as calls:
    calls.write(output.name + "\\n")
plan = json.loads((work / "plan.json").read_text())
dev = json.loads((work / "dev.json").read_text())
if output.name == "failing":
    print("training")
    raise ValueError("no such model")
if output.name == "slow":
    time.sleep(60)
if output.name == "continued" and not (output / "checkpoint").exists():
    (output / "checkpoint").touch()
    raise SystemExit("stopped")
picks = {r["id"]: [c["id"] for c in r["candidates"]][: plan["num_selected"]] for r in dev}
found = {
    "picks": {"picks": {key: ids[::-1] for key, ids in picks.items()}},
    "wrong": {"picks": {key: ids[:1] for key, ids in picks.items()}},
    "encoder": {"encoder": plan["encoder"]},
    "generator": {"generator": plan["generator"]},
    "continued": {"generator": plan["generator"], "seconds_before": 1000.0},
}[output.name]
found |= {"generator_tokens": 4321, "training_examples": 12}
(output / "result.json").write_text(json.dumps(found))
'''


@dataclass(frozen=True)
class Trial:
    arguments: PeersArguments
    peers: dict[str, Peer]
    text: str

    def again(self, **changes) -> str:
        arguments = replace(self.arguments, **changes)
        return compare(arguments, self.peers, this_python, "python -m benchmarks.peers small")

    def calls(self) -> list[str]:
        return (self.arguments.folder / "calls.txt").read_text().split()

    def row(self, name: str) -> list[str]:
        return rows_of(self.text)[name]


def this_python(requirements: Path) -> Path:
    assert requirements.name == "requirements.txt"
    return Path(sys.executable)


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells after the first, by the first."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def tiny_config(files: Path, cache: Path) -> RunConfig:
    values = RECIPES["factbook"]().model_dump()
    values["cache_dir"] = str(cache)
    values["data"] |= {
        "corpus": str(files / "corpus.jsonl"),
        "train_questions": str(files / "train.jsonl"),
        "eval_questions": str(files / "eval.jsonl"),
        "max_train_questions": 12,
        "num_validation_questions": 2,
        "max_eval_questions": 8,
    }
    values["retrieval"] |= {"encoder": str(files / "encoder"), "encoder_max_tokens": 32}
    values["environment"]["num_selected"] = K
    values["generator"] |= {"model": str(files / "generator"), "max_new_tokens": 3}
    values["training"] |= {"launcher": "local", "batch_size": 8}
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def trial(openrag_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A comparison that has run once."""
    folder = tmp_path_factory.mktemp("peers")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    arguments = PeersArguments(
        tiny_config(openrag_files, folder / "cache"), folder / "work", folder / "table.md"
    )
    names = ("picks", "encoder", "generator", "failing", "wrong")
    trial = Trial(arguments, {name: Peer(script, ranks=name == "picks") for name in names}, "")
    return replace(trial, text=trial.again())


def test_peers_get_all_that_training_needs_and_no_answer_to_a_measured_question(trial):
    work = trial.arguments.folder
    train, dev = (json.loads((work / f"{name}.json").read_text()) for name in ("train", "dev"))
    assert (len(train), len(dev)) == (10, 8)
    assert not {record["id"] for record in train} & {record["id"] for record in dev}
    for record in train:
        titles = [f"{c['contents']}" for c in record["candidates"]]
        assert len(titles) == len(record["candidate_prompts"]) == 5
        assert record["golden_answers"]
        assert record["gold"]
        first, second, third = (text.splitlines()[-1] for text in titles[:3])
        assert record["prompt"].index(second) < record["prompt"].rindex(first)
        assert third not in record["prompt"]
        assert second in record["candidate_prompts"][1]
        assert record["question"] in record["candidate_prompts"][1]
        scores = [c["score"] for c in record["candidates"]]
        assert scores == sorted(scores, reverse=True)
    assert {key for record in dev for key in record} == {"id", "question", "candidates"}
    plan = json.loads((work / "plan.json").read_text())
    assert plan["token_budget"] == trial.arguments.token_budget
    assert Path(plan["generator"]).is_dir()
    assert RunConfig.from_json((work / "config.json").read_text()) == trial.arguments.config


def test_all_are_measured_in_one_way(trial):
    """Equal weights and equal passages give equal figures, whoever hands them in."""
    quality = slice(0, 3)
    baseline = trial.row("retriever_order")
    assert trial.row("encoder")[quality] == baseline[quality]
    assert trial.row("generator")[quality] == baseline[quality]
    assert trial.row("generator")[3:5] == ["+0.000 (+0.000 to +0.000)", "1"]
    assert trial.row("picks")[quality] == trial.row("retriever_order, best first")[quality]
    assert trial.row("picks, best first")[quality] == baseline[quality]
    assert trial.row("picks")[5:7] == ["4", "12"]
    assert trial.arguments.output.read_text() == trial.text


def test_a_failed_peer_is_named_with_its_last_line_and_spoils_nothing(trial):
    for name in ("failing", "wrong"):
        assert trial.row(name) == ["failed", *["-"] * 7]
    assert "- failing: exit code 1: ValueError: no such model" in trial.text
    assert f"give {K} different candidates" in trial.text


def test_only_what_has_not_finished_runs_again(trial):
    before = trial.calls()
    text = trial.again()
    assert trial.calls() == [*before, "failing"]
    assert rows_of(text) == rows_of(trial.text)
    with pytest.raises(RunDirectoryError, match="another configuration or token budget"):
        trial.again(token_budget=1)
    with pytest.raises(RunDirectoryError, match="another configuration or token budget"):
        trial.again(config=trial.arguments.config.model_copy(update={"seed": 1}))


def test_a_peer_that_takes_too_long_is_ended(trial):
    with pytest.raises(SetupError, match="not finished in"):
        finished_peer("slow", trial.peers["picks"], trial.arguments.folder, this_python, 0.5)


def test_a_peer_that_continues_keeps_its_checkpoints_and_the_time_they_took(trial):
    peer, work = Peer(trial.peers["picks"].script, continues=True), trial.arguments.folder
    with pytest.raises(SetupError, match="exit code 1: stopped"):
        finished_peer("continued", peer, work, this_python, 30)
    assert 1000 < finished_peer("continued", peer, work, this_python, 30).seconds < 1030
    log = (work / "continued" / "output.log").read_text()
    assert log.splitlines() == ["stopped"]


def test_a_finished_run_stands_beside_the_peers(trial, tmp_path):
    """Its figures are those of its own evaluation, if that was of the same questions."""
    from benchmarks.peers.plan import prepare

    arguments = trial.arguments
    prepared = prepare(arguments.config, arguments.folder, arguments.token_budget)
    evaluation = {"hashes": dict(prepared.hashes), "bundle_step": 1}
    records = [{"step": 0}, {"step": 1, "collect_s": 50.0, "generator_tokens_total": 9000.0}]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(arguments.config.to_json())
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    questions = prepared.dev.questions
    right = [question.golden_answers[0] for question in questions]
    texts = [*right[:4], *["no such thing"] * 4]
    answers = [Generation(text, 0.0, 1, 1) for text in texts]
    recorder = QuestionRecorder(K)
    recorder.keep("trained", Answered(questions, [[]] * 8, answers))
    recorder.write(run_dir / "evaluation.questions.jsonl", evaluation)
    alone = replace(trial, peers={})
    rows = rows_of(alone.again(runs=(f"own={run_dir}",)))
    own, baseline = rows["own"], rows["retriever_order"]
    assert [cell.split()[0] for cell in own[:3]] == ["0.500"] * 3
    assert own[3].startswith(f"{0.5 - float(baseline[0].split()[0]):+.3f} (")
    assert own[5:] == ["9", "-", "0.8"]
    evaluation["hashes"]["questions"] = "others"
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(ConfigError, match="differs from this comparison in: questions"):
        alone.again(runs=(f"own={run_dir}",))
    with pytest.raises(ConfigError, match="write NAME=DIR"):
        alone.again(runs=("own",))


def test_the_cpu_build_of_torch_is_found_as_make_finds_it():
    assert torch_source({"PIP_FIND_LINKS": "/a"}, "/b") == {"UV_FIND_LINKS": "/a"}
    assert torch_source({}, "/b") == {"UV_FIND_LINKS": "/b"}
    assert torch_source({}, "") == {"UV_TORCH_BACKEND": "cpu"}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_pinned_and_short(name):
    script = PEERS[name].script
    assert len(script.read_text().splitlines()) < 200
    lines = (script.parent / "requirements.txt").read_text().splitlines()
    pins = {line for line in lines if not line.startswith(("#", "-e "))}
    assert pins
    assert all("==" in line for line in pins)
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0]: line for line in constraints if "==" in line}
    assert {pinned.get(line.split("==")[0], line) for line in pins} == pins


def functions_of_grpo(*names: str) -> dict:
    """Its script cannot be imported without TRL; these functions stand alone."""
    tree = ast.parse(PEERS["trl_grpo"].script.read_text())
    functions = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    found: dict = {"Counter": Counter, "string": string, "Path": Path}
    exec(compile(ast.Module(functions, []), "train.py", "exec"), found)
    return found


def test_grpo_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    newest_checkpoint = functions_of_grpo("newest_checkpoint")["newest_checkpoint"]
    assert newest_checkpoint(tmp_path / "none") == (None, 0.0)
    for step in (90, 100, 110):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) == (None, 0.0)
    for step in (90, 100):
        (tmp_path / f"checkpoint-{step}" / "seconds.txt").write_text(f"{step}.5")
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", 100.5)


def test_the_reward_of_grpo_is_the_f1_of_rlrag():
    restated = functions_of_grpo("normalized", "f1")
    pairs = [
        (" the Eiffel Tower.", ["Eiffel tower"]),
        ("Emperor Napoleon", ["Napoleon of France", "an emperor"]),
        ("1,000 a 1000", ["1000"]),
        ("", ["Paris"]),
        ("Paris", ["Rome", "the"]),
    ]
    for answer, golden in pairs:
        assert restated["f1"](answer, golden) == pytest.approx(token_f1(answer, golden))
