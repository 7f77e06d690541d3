"""Code that a bundle names runs only where whoever uses the bundle names it too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from openrag_runs import write_files

from rlrag import load_pipeline
from rlrag.bundle import copy_bundle, load_bundle, save_bundle
from rlrag.bundle_files import CONFIG, code_named_by
from rlrag.cli import evaluate, probe
from rlrag.config import (
    EnvironmentConfig,
    EvaluationConfig,
    GeneratorConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.errors import ConfigError
from rlrag.pipeline import open_evaluation_data, open_library, open_policy
from rlrag.serving.app import NotServableError, build
from rlrag.serving.selecting import SelectorPart
from rlrag.serving.settings import parse_settings

MODULE = "code_of_a_stranger"
REWARD, ENVIRONMENT = f"{MODULE}:worth", f"{MODULE}:strange/Selection-v0"
SOURCE = """
import gymnasium

def worth(answer):
    return 0.5

gymnasium.register(
    "strange/Selection-v0",
    vector_entry_point="rlrag.environment.vector:DocumentSelectionVectorEnv",
)
"""


@pytest.fixture(scope="module")
def plain(model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_files(folder)
    config = RunConfig(
        cache_dir=str(folder / "cache"),
        retrieval=RetrievalConfig(kind="bm25", encoder=None, num_candidates=4),
        environment=EnvironmentConfig(num_selected=2),
        generator=GeneratorConfig(model=str(model_dir), max_new_tokens=3),
        training=TrainingConfig(launcher="local"),
        evaluation=EvaluationConfig(systems=("retriever_order", "trained")),
    )
    files = {"corpus": str(folder / "corpus.jsonl"), "eval_questions": str(folder / "eval.jsonl")}
    config = config.model_copy(update={"data": config.data.model_copy(update=files)})
    table, _ = open_evaluation_data(config, open_library(config))
    save_bundle(folder / "plain", config, open_policy(config, table), table, {}, 1)
    return folder / "plain"


@pytest.fixture
def naming(plain, tmp_path, monkeypatch):
    """Makes bundles whose configuration names what lies on the path of modules."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)

    def make(**sections: dict[str, object]) -> Path:
        def rename(staging: Path) -> None:
            values = json.loads((staging / CONFIG).read_text())
            for section, changes in sections.items():
                values[section] |= changes
            (staging / CONFIG).write_text(json.dumps(values))

        copy_bundle(plain, tmp_path / "bundle", rename)
        return tmp_path / "bundle"

    return make


def words(bundle: Path, files: Path, *extra: str) -> list[str]:
    corpus, questions = str(files / "corpus.jsonl"), str(files / "eval.jsonl")
    flags = ("--bundle", str(bundle), "--output", str(bundle.parent / "out.json"), "--limit", "2")
    return [*flags, "--corpus", corpus, "--questions", questions, *extra]


def test_a_reward_runs_only_where_it_is_named_and_judges(naming, plain, tmp_path):
    files = plain.parent
    bundle = naming(reward={"functions": [REWARD]})
    refusal = rf"reward\.functions '{REWARD}'.*--allow-code {REWARD}"
    for other in ((), ("--allow-code", f"{MODULE}:other")):
        with pytest.raises(ConfigError, match=refusal):
            evaluate.main(words(bundle, files, *other))
    assert not (tmp_path / "out.json").exists()
    probe.main(words(bundle, files, "--measures", "cost"))
    with load_pipeline(bundle) as pipeline:
        assert pipeline.answer("where is it?").passages
    load_bundle(bundle)
    SelectorPart().load(load_bundle(bundle).version, bundle)
    assert MODULE not in sys.modules, "none of these asks for a reward"
    evaluate.main(words(bundle, files, "--allow-code", REWARD))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["systems"]["trained"]["reward"] == 0.5
    assert MODULE in sys.modules


def test_a_reward_that_does_not_judge_is_left_out(naming, plain, tmp_path):
    bundle = naming(reward={"functions": ["exact_match", REWARD], "weights": [1, 0]})
    evaluate.main(words(bundle, plain.parent))
    assert "trained" in json.loads((tmp_path / "out.json").read_text())["systems"]
    assert MODULE not in sys.modules
    # Without golden answers it is all that judges, which only the questions show.
    (tmp_path / "corpus.jsonl").write_bytes((plain.parent / "corpus.jsonl").read_bytes())
    asked = [json.loads(line) for line in (plain.parent / "eval.jsonl").read_text().splitlines()]
    bare = [{"id": q["id"], "question": q["question"], "golden_answers": []} for q in asked]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(q) + "\n" for q in bare))
    with pytest.raises(ConfigError, match=f"--allow-code {REWARD}"):
        evaluate.main(words(bundle, tmp_path))
    assert MODULE not in sys.modules


def test_an_environment_runs_only_where_it_is_named(naming, plain, tmp_path):
    bundle = naming(environment={"id": ENVIRONMENT})
    version = load_bundle(bundle, (ENVIRONMENT,)).version
    for use in (
        lambda: evaluate.main(words(bundle, plain.parent)),
        lambda: probe.main(words(bundle, plain.parent, "--measures", "cost")),
        lambda: load_pipeline(bundle),
        lambda: load_bundle(bundle, (REWARD, MODULE)),
        lambda: SelectorPart().load(version, bundle),
    ):
        with pytest.raises(ConfigError, match=rf"environment\.id .*--allow-code {ENVIRONMENT}"):
            use()
    with pytest.raises(NotServableError, match="in a service with the setting allow_code"):
        build({"bundle": str(bundle)})
    SelectorPart(allow_code=(ENVIRONMENT,)).load(version, bundle)
    assert MODULE not in sys.modules, "to load is not to play"
    evaluate.main(words(bundle, plain.parent, "--allow-code", ENVIRONMENT))
    assert "trained" in json.loads((tmp_path / "out.json").read_text())["systems"]
    assert MODULE in sys.modules
    probe.main(words(bundle, plain.parent, "--measures", "cost", "--allow-code", ENVIRONMENT))


def test_a_service_takes_names_as_a_list_or_in_words():
    for given in ([REWARD, ENVIRONMENT], f"{REWARD} {ENVIRONMENT}"):
        found = parse_settings({"bundle": "b", "allow_code": given, "access.hosts": "a b"})
        assert found.allow_code == (REWARD, ENVIRONMENT)
        assert found.access.hosts == ("a", "b")
    with pytest.raises(ConfigError, match="allow_code"):
        parse_settings({"bundle": "b", "allow_code": 3})


def test_built_in_names_are_no_code():
    assert not any(code_named_by(RunConfig()).values())
