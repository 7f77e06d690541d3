"""The program that probes a bundle: its measures, its flags, and what it leaves out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import episodes
import numpy as np
import pytest
from openrag_runs import make_questions, write_files
from stand_ins import fill_disk

from rlrag.bundle import save_bundle
from rlrag.cli import evaluate, probe
from rlrag.cli.opened_bundle import on_other_data, write_output
from rlrag.config import (
    DataConfig,
    EnvironmentConfig,
    EvaluationConfig,
    GeneratorConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.errors import CheckpointError, ConfigError, DataError
from rlrag.evaluation.picked import first_picks, policy_picks
from rlrag.evaluation.probe.measures import MEASURES
from rlrag.evaluation.probe.mirage import SHARES
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.pipeline import open_evaluation_data, open_library, open_policy
from rlrag.retrieval.candidates import CandidateTable


# The generator repeats the last word of the first passage or, without one, of the question.
@pytest.fixture(scope="module")
def bundle(model_dir, tmp_path_factory) -> Path:
    """Two passages of six candidates; the tiny generator makes its answers up."""
    folder = tmp_path_factory.mktemp("probe")
    write_files(folder)
    questions = [
        {
            "id": question.id,
            "question": question.question,
            "golden_answers": [] if number == 0 else list(question.golden_answers),
            "metadata": {"gold_ids": list(question.gold_ids)},
        }
        for number, question in enumerate(make_questions()[30:36])
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    config = RunConfig(
        cache_dir=str(folder / "cache"),
        retrieval=RetrievalConfig(kind="bm25", encoder=None, num_candidates=6),
        environment=EnvironmentConfig(num_selected=2),
        generator=GeneratorConfig(model=str(model_dir), max_new_tokens=3, temperature=0.7),
        training=TrainingConfig(launcher="local"),
        evaluation=EvaluationConfig(systems=("trained",)),
    )
    data = config.data.model_copy(
        update={
            "corpus": str(folder / "corpus.jsonl"),
            "eval_questions": str(folder / "questions.jsonl"),
        }
    )
    config = config.model_copy(update={"data": data})
    table, _ = open_evaluation_data(config, open_library(config))
    save_bundle(folder / "bundle", config, open_policy(config, table), table, {}, 1)
    return folder / "bundle"


def run(bundle: Path, *words: str) -> dict:
    output = bundle.parent / "probe.json"
    output.unlink(missing_ok=True)
    probe.main(["--bundle", str(bundle), "--output", str(output), *words])
    return json.loads(output.read_text())


def test_a_bundle_is_probed_on_the_questions_of_its_run(bundle, capsys):
    """Untrained, it equals its baseline in all but the seconds."""
    found = run(bundle, "--baseline", "True", "--max-orders", "2")
    assert found["num_questions"] == 6
    assert found["questions_with_gold"] == {"used": 5, "left_out": {"unanswerable": 1}}
    assert found["measures_left_out"] == found["questions_unanswered"] == {}
    assert found["prompts"] == {"prompt_cut_share": 0.0, "dropped_passage_share": 0.0}
    trained, original = (found["systems"][name] for name in ("trained", "retriever_order"))
    parts = {"mirage_picked", "calibration_answer", "calibration_selection"}
    parts |= {"calibration_first_pick"}
    assert set(trained) == set(MEASURES) - {"calibration"} | parts
    for name in ("mirage", "mirage_picked"):
        shares = trained[name]
        assert sum(shares[share]["mean"] for share in SHARES) == pytest.approx(1)
        assert shares["overall"]["num_questions"] == 5
    assert set(trained) - set(original) == {"calibration_selection", "calibration_first_pick"}
    for name, of in original.items():
        if name != "cost":
            assert of == trained[name]
    assert trained["cost"]["prompt_tokens"] == original["cost"]["prompt_tokens"]
    assert {name for name in trained["cost"] if name.endswith("_seconds")} == {
        *("retrieval_seconds", "selection_seconds", "generation_seconds")
    }
    pair = found["paired"]["trained_vs_retriever_order"]
    assert all(one["diff"] == 0 for of in pair.values() for one in of.values())
    said = capsys.readouterr()
    assert "context_acceptability" in said.out
    assert "left out around gold passages: 1 unanswerable" in said.out
    assert said.err.splitlines()[0] == "retriever_order: mirage"
    assert "trained: cost" in said.err


def test_probed_answers_are_those_of_evaluation(bundle, tmp_path):
    """Of a greedy bundle, on the same questions in a file of their own."""
    config = json.loads((bundle / "config.json").read_text())
    config["generator"]["temperature"] = 0.0
    greedy = RunConfig.model_validate(config)
    table, _ = open_evaluation_data(greedy, open_library(greedy))
    save_bundle(tmp_path / "bundle", greedy, open_policy(greedy, table), table, {}, 1)
    files = (str(bundle.parent / f"{name}.jsonl") for name in ("corpus", "questions"))
    data = [word for pair in zip(("--corpus", "--questions"), files, strict=True) for word in pair]
    output = tmp_path / "evaluation.json"
    evaluate.main(["--bundle", str(tmp_path / "bundle"), "--output", str(output), *data])
    accuracy = json.loads(output.read_text())["systems"]["trained"]["accuracy"]
    found = run(tmp_path / "bundle", "--measures", "calibration", *data)
    assert list(found["systems"]) == ["trained"]
    assert found["systems"]["trained"]["calibration_answer"]["share"]["mean"] == accuracy
    assert found["paired"] == {}


def test_what_prompts_have_no_room_for_is_counted(bundle, model_dir, tmp_path, capsys):
    config = RunConfig.from_json((bundle / "config.json").read_text())
    prompt = config.generator.prompt
    builder = PromptBuilder(prompt, load_tokenizer(model_dir))
    table, _ = open_evaluation_data(config, open_library(config))
    bare = max(len(builder.build(question, []).token_ids) for question in table.questions)
    prompt = prompt.model_copy(update={"max_prompt_tokens": bare + 12})
    generator = config.generator.model_copy(update={"prompt": prompt})
    config = config.model_copy(update={"generator": generator})
    save_bundle(tmp_path / "bundle", config, open_policy(config, table), table, {}, 1)
    found = run(tmp_path / "bundle", "--measures", "abstention")
    assert found["prompts"]["prompt_cut_share"] > 0.01
    assert found["prompts"]["dropped_passage_share"] > 0.01
    assert "prompts had no room for" in " ".join(capsys.readouterr().out.split())


def test_what_the_questions_do_not_allow_is_left_out_unless_it_is_asked_for(bundle, tmp_path):
    lines = (bundle.parent / "questions.jsonl").read_text().splitlines()[1:4]
    bare = [{k: v for k, v in json.loads(line).items() if k != "metadata"} for line in lines]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(q) + "\n" for q in bare))
    words = ["--questions", str(tmp_path / "bare.jsonl"), "--limit", "2", "--max-orders", "2"]
    found = run(bundle, *words)
    assert found["num_questions"] == 2
    out = found["measures_left_out"]
    around = ["mirage", "position", "distractors", "duplicates", "contradictions"]
    assert list(out) == [*around, "abstention"]
    assert "calibration_first_pick" not in found["systems"]["trained"]
    for name in ("distractors", "abstention"):
        with pytest.raises(DataError) as caught:
            run(bundle, *words, "--measures", f"cost,{name}")
        assert str(caught.value) == out[name]
    assert not (bundle.parent / "probe.json").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--measures", "cost,mirag"], "unknown name 'mirag'; did you mean 'mirage'?"),
        (["--measures", "zzz"], "unknown name 'zzz'; there are: mirage, order, position"),
        (["--limit", "0"], "--limit is 0; give at least 1"),
        (["--copies", "2", "1"], "copies is [2, 1]; give ascending numbers"),
        (["--output", "/no/such/folder/out.json"], "directory /no/such/folder does not exist"),
        (["--output", "/"], "--output / is a directory; give the name of a file in it"),
    ],
)
def test_flags_are_checked_before_anything_is_loaded(extra, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        probe.main(["--bundle", "b", "--output", str(tmp_path / "out.json"), *extra])
    assert message in str(caught.value)


both_programs = pytest.mark.parametrize(
    ("main", "extra", "shown"),
    [
        (probe.main, ["--measures", "cost"], "cost"),
        (evaluate.main, ["--corpus", "corpus.jsonl", "--questions", "questions.jsonl"], "trained"),
    ],
    ids=["probe", "evaluate"],
)


@both_programs
def test_a_table_that_nobody_reads_costs_no_result(
    main, extra, shown, bundle, tmp_path, monkeypatch
):
    monkeypatch.chdir(bundle.parent)
    unread, terminal = os.pipe()
    os.close(unread)
    output = tmp_path / "found.json"
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as caught:
            main(["--bundle", str(bundle), "--output", str(output), *extra])
    assert caught.value.code == 1
    assert shown in output.read_text()


def test_the_runs_own_questions_are_the_sample_that_it_was_evaluated_on():
    config = RunConfig(data=DataConfig(max_eval_questions=5))

    def asked(questions: str | None, limit: int | None) -> int | None:
        return on_other_data(config, None, questions, limit).data.max_eval_questions

    assert (asked(None, None), asked(None, 9)) == (5, 9)
    assert (asked("other.jsonl", None), asked("other.jsonl", 3)) == (None, 3)


@both_programs
def test_a_full_disk_leaves_the_table_and_the_old_file(
    main, extra, shown, bundle, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(bundle.parent)
    output = tmp_path / "found.json"
    output.write_text("old")
    fill_disk(monkeypatch, output)
    with pytest.raises(CheckpointError, match=r"cannot write .*found\.json: No space left.*again"):
        main(["--bundle", str(bundle), "--output", str(output), *extra])
    assert shown in capsys.readouterr().out
    assert output.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_a_file_is_written_where_a_link_leads_and_a_pipe_stays_one(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    write_output(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(pipe, "new")
    assert os.read(end, 9) == b"new"
    os.close(end)
    assert pipe.is_fifo()
    with pytest.raises(CheckpointError, match=r"cannot write .*no/f: No such file"):
        write_output(tmp_path / "no" / "f", "new")


def test_picks_of_a_policy_carry_their_probabilities(bundle):
    """Of one batch and several; an untrained policy picks as the retriever ranks."""
    config = RunConfig.from_json((bundle / "config.json").read_text())
    table, _ = open_evaluation_data(config, open_library(config))
    rows = np.tile(np.arange(len(table)), 13)[:70]
    many = CandidateTable(
        **{
            **vars(table),
            "questions": tuple(table.questions[row] for row in rows),
            "rows_QN": table.rows_QN[rows],
            "scores_QNC": table.scores_QNC[rows],
            "question_vectors_QD": table.question_vectors_QD[rows],
        }
    )
    policy = open_policy(config, table)
    environment = config.environment
    few = policy_picks(environment, policy, table)
    found = policy_picks(environment, policy, many)
    assert few.action_logp_QT is not None
    assert found.action_logp_QT is not None
    assert few.action_logp_QT.shape == (6, 2)
    assert found.action_logp_QT == pytest.approx(few.action_logp_QT[rows])
    picks = np.tile([[0, 1]], (6, 1))
    whole = episodes.log_prob(policy, table.batch(range(6)), picks[:, None])[:, 0]
    assert few.action_logp_QT.sum(axis=1) == pytest.approx(whole.detach().numpy(), abs=1e-5)
    assert list(few.selections) == list(first_picks(table, 2).selections)
