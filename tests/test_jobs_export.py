"""Any checkpoint of a run becomes a bundle, for serving, for peft and for a model hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import episodes
import pytest
import torch
from huggingface_hub.repocard import metadata_load
from stand_ins import fill_disk, make_table
from tiny_models import save_tiny_llama

from rlrag.bundle import load_bundle, save_bundle
from rlrag.bundle_files import bundle_version, parse_bundle, read_bundle
from rlrag.cli import export, train
from rlrag.cli.model_card import model_card
from rlrag.cli.single_run import best_step, evaluate_bundle
from rlrag.config import (
    BETTER_GENERATOR,
    BUILTIN_GENERATOR,
    AlternatingConfig,
    DROConfig,
    GeneratorConfig,
    RunConfig,
)
from rlrag.errors import CheckpointError, ConfigError, DataError
from rlrag.generation.build import open_generator
from rlrag.pipeline import open_evaluation_data, open_library, open_policy, open_reward
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory

NUM_QUESTIONS = 24
NUM_STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that trained selector and generator together on one core, in seconds."""
    folder = tmp_path_factory.mktemp("export")
    corpus = [
        {"id": f"p{i}", "contents": f"Title {i}\nthe value {i % 8} is v{i}"}
        for i in range(NUM_QUESTIONS)
    ]
    questions = [
        {"id": f"q{i}", "question": f"what is value {i % 8} of {i}?", "golden_answers": [f"v{i}"]}
        for i in range(NUM_QUESTIONS)
    ]
    for name, records in (("corpus", corpus), ("questions", questions)):
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    flags = {
        "run-dir": folder / "run",
        "cache-dir": folder / "cache",
        "data.corpus": folder / "corpus.jsonl",
        "data.train-questions": folder / "questions.jsonl",
        "data.eval-questions": folder / "questions.jsonl",
        "data.num-validation-questions": 0,
        "data.max-train-questions": None,
        "retrieval.kind": "bm25",
        "retrieval.encoder": None,
        "retrieval.num-candidates": 3,
        "generator.model": save_tiny_llama(folder / "generator"),
        "generator.dtype": "float32",
        "generator.max-new-tokens": 3,
        "generator-training.lora-rank": 2,
        "generator-training.learning-rate": 0.01,
        "generator-training.precision": "float32",
        "algorithm.num-samples": 2,
        "training.launcher": "local",
        "training.batch-size": NUM_QUESTIONS // NUM_STEPS,
        "training.num-epochs": 1,
        "training.checkpoint-every": 2,
        "training.keep-checkpoints": 3,
        "training.loggers": "",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value)) if word]
    parts = ["--algorithm.parts", "selector", "generator"]
    systems = ["--evaluation.systems", "retriever_order", "tuned_generator", "trained"]
    train.main(["factbook", *words, *parts, *systems])
    return folder


@pytest.fixture
def run(folder) -> RunDirectory:
    return RunDirectory(folder / "run")


def export_words(output: Path, **flags: object) -> list[str]:
    values = {"output": output, **flags}
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def test_the_best_checkpoint_gives_the_bundle_that_the_run_ended_with(run, tmp_path, capsys):
    export.main(export_words(tmp_path / "out", run_dir=run.path))
    assert bundle_version(tmp_path / "out") == bundle_version(run.bundle)
    said = capsys.readouterr()
    assert said.out == f"written to {tmp_path / 'out'}\n"
    assert said.err == f"checkpoint {NUM_STEPS} of {run.path}\n"


def test_golden_questions_are_what_the_bundle_answers(run):
    """Asked again of the bundle alone, as a service does before it switches."""
    bundle = load_bundle(run.bundle)
    assert bundle.evaluation == json.loads(run.evaluation.read_text())
    assert bundle.facts.hashes == bundle.evaluation["hashes"]
    assert bundle.facts.hashes.keys() == {"corpus", "train_questions", "questions"}
    assert len(bundle.golden) == 20
    config = bundle.config
    candidates, _ = open_evaluation_data(config, open_library(config))
    generator, prompts = open_generator(config.generator, "local", config.cache_path)
    generator.load_weights(bundle.generator_weights("float32"))
    picks = episodes.picks(bundle.policy, candidates)
    selections = [
        [candidates.passages(row)[position] for position in picks[row]]
        for row in range(len(candidates))
    ]
    answers = open_reward(config, generator, prompts).answer(candidates.questions, selections)
    generator.close()
    found = {
        question.id: (answer.text, tuple(p.id for p in selection), answer.logp)
        for question, selection, answer in zip(
            candidates.questions, selections, answers, strict=True
        )
    }
    for golden in bundle.golden:
        text, ids, logp = found[golden.id]
        assert (golden.answer, golden.passage_ids) == (text, ids)
        assert golden.answer_logp == pytest.approx(logp, abs=1e-4)
    assert len({golden.answer_logp for golden in bundle.golden}) > 5


def test_any_checkpoint_is_exported_without_what_was_found_of_another(run, tmp_path):
    output = tmp_path / "out"
    export.main(export_words(output, checkpoint=run.checkpoints / "step-000002"))
    found, last = load_bundle(output), load_bundle(run.bundle)
    assert (found.facts.step, found.golden, found.evaluation) == (2, (), None)
    assert found.facts.hashes.keys() == {"corpus", "train_questions"}
    files, _ = CheckpointStore(run.checkpoints).load(2)
    for name, tensor in found.policy.state_dict().items():
        assert torch.equal(tensor, files["policy"][name])
    weights = [bundle.generator_weights("float32").digest for bundle in (found, last)]
    assert weights[0] != weights[1]
    assert {path.name for path in output.iterdir()} == {
        *("config.json", "bundle.json", "golden.json", "licences.json", "manifest.json"),
        *("selector.safetensors", "generator"),
    }


def test_an_adapter_apart_is_what_peft_loads(run, folder, tmp_path):
    """Base model and adapter compute what the merged model does; a second export is the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    export.main(export_words(output, run_dir=run.path, adapter="apart", hub=True))
    again = tmp_path / "again"
    export.main(export_words(again, run_dir=run.path, adapter="apart", hub=True))
    assert bundle_version(again) == bundle_version(output) != bundle_version(run.bundle)
    files = read_bundle(output)
    assert files.adapter_dir == output / "adapter"
    assert {path.name for path in files.adapter_dir.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    settings = json.loads((files.adapter_dir / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    tokens = torch.arange(5, 25).reshape(2, 10)
    base = AutoModelForCausalLM.from_pretrained(folder / "generator", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(files.generator_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        untrained = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, files.adapter_dir).eval()(tokens).logits
        assert torch.allclose(adapted, merged(tokens).logits, atol=1e-4)
        assert not torch.allclose(adapted, untrained, atol=1e-2)
    assert "`adapter/` is its LoRA adapter alone" in (output / "README.md").read_text()


def test_the_index_goes_along_and_is_not_built_again(run, tmp_path):
    export.main(export_words(tmp_path / "out", run_dir=run.path, index=True))
    bundle = read_bundle(tmp_path / "out")
    assert bundle.golden == read_bundle(run.bundle).golden
    assert bundle.index_dir == tmp_path / "out" / "index"
    built = open_library(bundle.config)
    elsewhere = bundle.config.model_copy(update={"cache_dir": str(tmp_path / "empty")})
    found = open_library(elsewhere, bundle.index_dir)
    assert found.retrievers.manifest_hash == built.retrievers.manifest_hash
    assert [place.parent for place in found.retrievers.index_dirs] == [bundle.index_dir]
    assert not (tmp_path / "empty" / "indexes").exists()
    questions = ["what is value 3 of 11?"]
    expected = built.retrievers.primary.search(questions, 3)
    assert (found.retrievers.primary.search(questions, 3).rows_BK == expected.rows_BK).all()


def test_a_model_card_says_what_the_bundle_is(run, folder, tmp_path):
    output = tmp_path / "out"
    export.main(export_words(output, run_dir=run.path, hub=True))
    table = read_bundle(output).evaluation
    facts = metadata_load(output / "README.md")
    assert facts["library_name"] == "rlrag"
    assert facts["license"] == "unknown"  # the tiny model says nothing
    assert facts["datasets"] == ["corpus", "questions"]
    assert "base_model" not in facts
    (result,) = facts["model-index"][0]["results"]
    own = table["systems"]["trained"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "exact_match": round(own["em"], 4),
        "f1": round(own["f1"], 4),
    }
    assert result["metrics"][1]["args"]["ci95"] == [round(end, 4) for end in own["f1_ci95"]]
    text = (output / "README.md").read_text()
    assert str(folder) not in text
    low, high = own["em_ci95"]
    assert f"| trained | {own['em']:.3f} ({low:.3f} to {high:.3f}) |" in text
    assert "serve run serve.app:build bundle=bundle" in text
    assert "| generator | generator | unknown | check the model's page" in text


@pytest.mark.parametrize(
    ("name", "own", "of_all", "hub_id"),
    [
        (BUILTIN_GENERATOR, "apache-2.0", "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (BETTER_GENERATOR, "gemma", "other", "google/gemma-3-270m"),
    ],
)
def test_a_card_of_built_in_parts_names_their_licence_and_origin(
    name, own, of_all, hub_id, tmp_path, small_config
):
    table = make_table(4)
    model = {"model": str(save_tiny_llama(tmp_path / "tiny"))}
    config = small_config.model_copy(update={"generator": GeneratorConfig(**model)})
    save_bundle(tmp_path / "bundle", config, open_policy(config, table), table, {}, 3)
    (tmp_path / "bundle" / "config.json").write_text(
        config.model_copy(update={"generator": GeneratorConfig(model=name)}).to_json()
    )
    path = tmp_path / "bundle" / "licences.json"
    licences = json.loads(path.read_text())
    licences[0] |= {"name": name, "licence": own}
    path.write_text(json.dumps(licences))
    text = model_card(parse_bundle(tmp_path / "bundle"))
    (tmp_path / "README.md").write_text(text)
    facts = metadata_load(tmp_path / "README.md")
    assert facts["license"] == of_all
    assert facts["base_model"] == [hub_id, "sentence-transformers/all-MiniLM-L6-v2"]
    assert f"| generator | {name} | {own} |" in text
    assert facts["datasets"] == ["factbook"]
    assert "model-index" not in facts
    assert "These weights were not evaluated." in text


@pytest.mark.parametrize(
    "flags", [{}, {"checkpoint": "run/checkpoints/step-000002", "run_dir": "run"}]
)
def test_one_place_is_given(tmp_path, flags):
    with pytest.raises(ConfigError, match=r"give either --checkpoint .* or --run-dir DIR"):
        export.main(export_words(tmp_path / "out", **flags))


@pytest.mark.parametrize("name", ["run/checkpoints/latest", "run/bundle", "step-000001"])
def test_what_is_no_checkpoint_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} is not a checkpoint of a run; give RUN_DIR/"):
        export.main(export_words(tmp_path / "out", checkpoint=tmp_path / name))


def test_a_missing_checkpoint_is_named_with_those_that_are_there(run, tmp_path):
    message = (
        r"step-000003 does not exist or was never finished; there are 0, 2, 4: give an existing one"
    )
    with pytest.raises(CheckpointError, match=message):
        export.main(export_words(tmp_path / "out", checkpoint=run.checkpoints / "step-000003"))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_checkpoint_is_refused(run, tmp_path):
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    (copy.checkpoints / "step-000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000002/manifest\.json is missing"):
        export.main(export_words(tmp_path / "out", checkpoint=copy.checkpoints / "step-000002"))
    shutil.rmtree(copy.checkpoints)
    with pytest.raises(CheckpointError, match="has no checkpoint yet; train first"):
        export.main(export_words(tmp_path / "out", run_dir=copy.path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ['{"num_quest', "[]", '{"systems": {}}'])
def test_a_damaged_evaluation_is_named(run, tmp_path, text):
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    copy.evaluation.write_text(text)
    with pytest.raises(DataError, match=r"evaluation\.json is damaged: .*delete it and run"):
        export.main(export_words(tmp_path / "out", run_dir=copy.path))
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_whole_where_the_disk_is_full(run, tmp_path, monkeypatch):
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    copy.evaluation.unlink()
    config = RunConfig.from_json(copy.config.read_text())
    library = open_library(config)
    fill_disk(monkeypatch, copy.evaluation)
    with pytest.raises(CheckpointError, match=r"cannot write .*evaluation\.json: No space left"):
        evaluate_bundle(config, copy, library)
    assert not list(copy.path.glob("*evaluation.json*"))


def test_an_output_that_exists_is_kept(run, tmp_path):
    with pytest.raises(ConfigError, match="exists; choose another, or delete it"):
        export.main(export_words(tmp_path, run_dir=run.path))


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing is not a run: it has no config\.json"):
        export.main(export_words(tmp_path / "out", run_dir=tmp_path / "nothing"))


def test_an_adapter_that_was_not_trained_is_refused(tmp_path, small_config):
    RunDirectory(tmp_path / "run").claim(small_config)
    with pytest.raises(ConfigError, match="--adapter apart needs a run that trains a LoRA adapter"):
        export.main(export_words(tmp_path / "out", run_dir=tmp_path / "run", adapter="apart"))


def test_a_run_in_turns_is_exported_when_it_is_finished(tmp_path, folder):
    (tmp_path / "cache" / "models").mkdir(parents=True)
    config = RunConfig(
        recipe="joint",
        cache_dir=str(tmp_path / "cache"),
        retrieval={"kind": "dense"},
        generator=GeneratorConfig(model=str(folder / "generator")),
        algorithm=AlternatingConfig(selection=DROConfig(parts=("selector", "generator"))),
    )
    run = RunDirectory(tmp_path / "run")
    run.claim(config)
    words = export_words(tmp_path / "out", run_dir=run.path, hub=True)
    with pytest.raises(CheckpointError, match="in turns and can be exported only when it is"):
        export.main(words)
    table = make_table(4)
    save_bundle(run.bundle, config, open_policy(config, table), table, {}, 3)
    with pytest.raises(CheckpointError, match=r"one of its turns, such as .*rounds/1-retriever"):
        export.main(export_words(tmp_path / "out", checkpoint=run.checkpoints / "step-000002"))
    with pytest.raises(ConfigError, match="--adapter apart needs the checkpoint of a single turn"):
        export.main([*words, "--adapter", "apart"])
    export.main(words)
    assert load_bundle(tmp_path / "out").config == config
    assert "# joint, step 3" in (tmp_path / "out" / "README.md").read_text()


def test_the_best_step_is_that_of_the_newest_checkpoint(run):
    assert best_step(CheckpointStore(run.checkpoints)) == NUM_STEPS
