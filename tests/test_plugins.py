"""Parts of anybody's own: by name, with options, trained, bundled, served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from serve_load import PROGRAM, started_service
from tiny_models import save_tiny_encoder, save_tiny_llama, save_tiny_masked_lm

import rlrag
from examples.own_policy import AgreementPolicy
from rlrag import plugins
from rlrag.bundle_files import read_bundle
from rlrag.cli import train
from rlrag.cli.command_line import run_program
from rlrag.config import EnvironmentConfig, RetrievalConfig, RunConfig, SelectorConfig
from rlrag.environment.sample_task import sample_candidates
from rlrag.errors import ConfigError, RetrievalError
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.plugin import PluginRetriever
from rlrag.selection.build import build_policy
from rlrag.testing import check_policy, check_retriever

ROOT = Path(__file__).resolve().parents[1]
TITLES = "examples.own_retriever:TitleRetriever"
SENTENCES = "examples.own_generator:SentenceGenerator"
AGREEMENT = "examples.own_policy:AgreementPolicy"
SELF_CRITICAL = "examples.own_trainer:SelfCritical"
QUESTIONS = ["what does the lamp hold?", "and what the whistle?"]

SOURCE = """
class Retriever:
    def __init__(self, corpus, weight: int, places: list[int] = (), *, label="x"):
        self.given = (weight, tuple(places), label)
        self.corpus = corpus
    def search(self, questions, k):
        return [[(p.id, -float(n)) for n, p in enumerate(self.corpus)][:k] for _ in questions]

class Fails:
    what = None
    def __init__(self, corpus): self.corpus = corpus
    def search(self, questions, k):
        if self.what == "raise": raise KeyError("gone")
        hits = [(p.id, -float(n)) for n, p in enumerate(self.corpus)][:k]
        changes = {
            "few": hits[:-1], "rising": hits[:-1] + [(hits[-1][0], 9.0)],
            "unknown": [("nowhere", 9.0)] + hits[1:], "twice": [hits[1], *hits[1:]],
            "nan": [(hits[0][0], float("nan"))] + hits[1:], "shape": [7] * k,
        }
        return [changes[self.what] for _ in questions][: 1 if self.what == "rows" else None]

def broken(corpus): raise OSError("no such server")
def nothing(corpus): return 3
def star(*args): return 3
constant = 7
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_parts"
    sys.modules.pop("own_parts", None)


def test_options_have_the_types_of_their_parameters(module):
    made = plugins.make("retriever", f"{module}:Retriever", ["weight=3"], corpus="c")
    assert (made.given, made.corpus) == ((3, (), "x"), "c")
    words = ["weight=3", "places=[1, 2]", "label=5"]
    made = plugins.make("retriever", f"{module}:Retriever", words, corpus="c")
    assert made.given == (3, (1, 2), "5")
    assert list(plugins.options_of("retriever", f"{module}:Retriever")) == [
        "weight=int (required)",
        "places=list (default ())",
        "label=str (default 'x')",
    ]


@pytest.mark.parametrize(
    ("name", "words", "error"),
    [
        ("Retriever", [], "needs the option 'weight'; give weight="),
        ("Retriever", ["wieght=3"], "has no option 'wieght'; did you mean 'weight'?"),
        ("Retriever", ["corpus=3"], "has no option 'corpus'; it has: weight, places, label"),
        (
            "Retriever",
            ["weight"],
            "option 'weight' of retriever .* is not of the form",
        ),
        (
            "Retriever",
            ["weight=x"],
            "option weight of retriever .* is 'x': Input should be",
        ),
        ("Retreiver", [], "has no 'Retreiver'; did you mean 'Retriever'?"),
        ("broken", [], "creating it failed with OSError: no such server"),
        ("nothing", [], "made a int, which has no method 'search'; rlrag.testing.check_retriever"),
        ("star", [], "cannot be passed by keyword"),
        ("constant", [], "is a int; name a class, or a function that returns a retriever"),
        ("a b", [], "is not of the form 'package.module:name'"),
    ],
)
def test_a_part_that_cannot_be_made_is_one_error(module, name, words, error):
    with pytest.raises(ConfigError, match=error) as raised:
        plugins.make("retriever", f"{module}:{name}", words, corpus=[])
    assert f"{module}:{name}" in str(raised.value)


def test_a_module_that_is_missing_is_one_error():
    with pytest.raises(ConfigError, match="there is no module 'nowhere_at_all'; install it"):
        plugins.check("policy", "nowhere_at_all:Policy", [])


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("few", "2 passages were found, but 3 were asked for"),
        ("rising", "score 9.0 of passage .* higher than that of the passage before"),
        ("unknown", "the corpus has no passage 'nowhere'"),
        ("twice", "a result has the same passage twice"),
        ("nan", "score nan of passage .* is not finite"),
        ("shape", "a result is not a list of pairs"),
        ("rows", "gave 1 results for 2 questions"),
        ("raise", "search failed with KeyError: 'gone'"),
    ],
)
def test_a_retriever_that_breaks_its_contract_is_named(module, what, error):
    corpus = sample_candidates().corpus
    own = PluginRetriever(corpus, RetrievalConfig(kind=f"{module}:Fails", encoder=None))
    own._part.what = "few" if what == "rows" else what
    if what == "rows":
        own._part.search = lambda questions, k: [[]]
    with pytest.raises(RetrievalError, match=error) as raised:
        own.search(QUESTIONS, 3)
    assert f"retriever '{module}:Fails'" in str(raised.value)


def test_configurations_name_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"retrieval\.kind 'bm52' is unknown; did you mean 'bm25'\?"
    ):
        RetrievalConfig(kind="bm52")
    with pytest.raises(ValueError, match=r"retrieval\.options are for a part of your own"):
        RetrievalConfig(options=("weight=3",))
    with pytest.raises(ValueError, match=r"selector\.options are for a part of your own"):
        SelectorConfig(options=("weight=3",))
    with pytest.raises(ValueError, match="a policy of your own decides itself when it stops"):
        SelectorConfig(kind=AGREEMENT, may_stop=True)


def test_the_examples_keep_their_contracts():
    table = sample_candidates()
    own = RetrievalConfig(kind=TITLES, encoder=None, options=("weight=2",))
    texts = [question.question for question in table.questions]
    check_retriever(PluginRetriever(table.corpus, own), table.corpus, texts)
    torch.manual_seed(0)
    check_policy(AgreementPolicy(table.vector_size), num_selected=1)


@pytest.mark.parametrize("kind", ["bm25", "dense", "hybrid", "semi_parametric"])
def test_built_in_retrievers_keep_theirs(kind, tmp_path):
    table = sample_candidates()
    models = {
        "encoder": str(save_tiny_encoder(tmp_path / "encoder")) if kind != "bm25" else None,
        "vocabulary_encoder": str(save_tiny_masked_lm(tmp_path / "vocabulary")),
    }
    config = RetrievalConfig(kind=kind, num_candidates=3, encoder_max_tokens=96, **models)
    found = open_retrievers(table.corpus, config, tmp_path)
    texts = [question.question for question in table.questions]
    check_retriever(found.primary, table.corpus, texts)


@pytest.mark.parametrize(
    ("kind", "may_stop"),
    [
        ("features", False),
        ("features", True),
        ("bi_encoder", False),
        ("cross_encoder", True),
        ("listwise_lm", False),
    ],
)
def test_built_in_policies_keep_theirs(kind, may_stop, tmp_path):
    table = sample_candidates()
    save = save_tiny_llama if kind == "listwise_lm" else save_tiny_encoder
    config = SelectorConfig(kind=kind, may_stop=may_stop, model=str(save(tmp_path / "model")))
    policy = build_policy(
        config,
        EnvironmentConfig(num_selected=2),
        table.scores_QNC.shape[2],
        table.vector_size,
        tmp_path,
        0,
    )
    check_policy(policy, num_selected=2)


class Liar(AgreementPolicy):
    """Says of its actions what is not so."""

    def log_prob(self, trajectories):
        return 0.5 * super().log_prob(trajectories)


class Forgetful(AgreementPolicy):
    """Draws with no regard to the seeds."""

    def act(self, observations, infos, turn):
        if turn.draws is not None:
            turn.notes["generators"] = [np.random.default_rng() for _ in turn.draws.seeds]
        return super().act(observations, infos, turn)


@pytest.mark.parametrize(
    ("policy", "error"),
    [(Liar, "act and log_prob differ by"), (Forgetful, "equal seeds draw other actions")],
)
def test_the_contract_of_policies_can_be_broken(policy, error):
    with pytest.raises(AssertionError, match=error):
        check_policy(policy(sample_candidates().vector_size), num_selected=1)


def test_what_a_retriever_found_is_found_anew_when_its_options_change(openrag_files, tmp_path):
    corpus = sample_candidates().corpus
    hashes = {
        open_retrievers(
            corpus,
            RetrievalConfig(kind=TITLES, encoder=None, num_candidates=3, options=options),
            tmp_path,
        ).manifest_hash
        for options in ((), ("weight=2",), ("weight=2",))
    }
    assert len(hashes) == 2


def flags(files: Path, folder: Path) -> list[str]:
    found = {
        "run-dir": folder / "run",
        "cache-dir": folder / "cache",
        "data.corpus": files / "corpus.jsonl",
        "data.train-questions": files / "train.jsonl",
        "data.eval-questions": files / "eval.jsonl",
        "data.max-train-questions": 12,
        "data.num-validation-questions": 4,
        "retrieval.encoder": files / "encoder",
        "retrieval.kind": TITLES,
        "retrieval.options": "weight=2",
        "environment.num-selected": 1,
        "selector.kind": AGREEMENT,
        "generator.model": files / "generator",
        "training.launcher": "local",
        "algorithm.name": SELF_CRITICAL,
        "algorithm.options": "num_samples=2",
        "training.num-epochs": 1,
        "training.batch-size": 4,
        "evaluation.systems": "trained",
    }
    return [word for name, value in found.items() for word in (f"--{name}", str(value))]


def test_help_shows_the_options_of_the_parts_that_are_named(openrag_files, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(train.main, ["factbook", *flags(openrag_files, tmp_path), "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"--retrieval.options of {TITLES}:\n    weight=float (default 3.0)" in said
    assert f"--algorithm.options of {SELF_CRITICAL}:\n    num_samples=int (default 4)" in said


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ("weight=2", "wieght=2", "has no option 'wieght'; did you mean 'weight'?"),
        ("num_samples=2", "samples=2", "has no option 'samples'; did you mean 'num_samples'?"),
        (SELF_CRITICAL, "drp", "algorithm.name 'drp' is unknown; did you mean 'dro'?"),
        (SELF_CRITICAL, "dro", "Unrecognized options: --algorithm.options"),
        (SELF_CRITICAL, "nowhere_at_all:T", "there is no module 'nowhere_at_all'"),
        (SELF_CRITICAL, "rlrag.training.trainer:Trainer", "has no method 'load'"),
    ],
)
def test_a_misspelt_name_or_option_costs_no_training(
    right, wrong, error, openrag_files, tmp_path, capsys
):
    words = ["factbook", *flags(openrag_files, tmp_path)]
    words[words.index(right)] = wrong
    if ":" in wrong:
        place = words.index("--algorithm.options")
        del words[place : place + 2]
    with pytest.raises(SystemExit) as ended:
        run_program(train.main, words)
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.slow
def test_parts_are_trained_bundled_evaluated_and_asked(openrag_files, tmp_path):
    train.main(["factbook", *flags(openrag_files, tmp_path)])
    bundle = tmp_path / "run" / "bundle"
    config = read_bundle(bundle).config
    assert (config.retrieval.kind, config.selector.kind) == (TITLES, AGREEMENT)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["systems"]["trained"]
    for allowed, missing in (((), AGREEMENT), ((AGREEMENT,), TITLES)):
        with pytest.raises(ConfigError, match=f"uses custom code.*{missing}"):
            rlrag.load_pipeline(bundle, allow_code=allowed)
    with rlrag.load_pipeline(bundle, allow_code=(AGREEMENT, TITLES)) as pipeline:
        answer = pipeline.answer(QUESTIONS[0])
        assert answer.passages == pipeline.select(QUESTIONS[0])
        assert len(answer.passages) == 1
    assert config.algorithm.name == SELF_CRITICAL  # whose code an answer does not need


@pytest.mark.slow
def test_they_work_on_ray_and_behind_the_service(openrag_files, tmp_path):
    here = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    given = {
        "training.launcher": "ray",
        "algorithm.name": "examples.own_trainer:SelfCritical",
        "generator.backend": SENTENCES,
        "generator.num-actors": 1,
        "reward.functions": "examples.custom_reward:short_and_right",
        "reward.weights": 1,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    subprocess.run(
        [*PROGRAM, "train", "factbook", *flags(openrag_files, tmp_path), *words],
        cwd=tmp_path,
        env=os.environ | here,
        check=True,
        timeout=300,
    )
    bundle = tmp_path / "run" / "bundle"
    trusted = (AGREEMENT, TITLES, SENTENCES)
    with rlrag.load_pipeline(bundle, allow_code=trusted) as pipeline:
        answer = pipeline.answer(QUESTIONS[0])
    settings = (bundle, f"allow_code={' '.join(trusted)}", "generator.num_cpus=0.2")
    with started_service(*settings, folder=tmp_path, variables=here) as url:
        reply = httpx.post(f"{url}/v1/answer", json={"question": QUESTIONS[0]}, timeout=60).json()
    assert reply["answer"] == answer.text
    assert [passage["id"] for passage in reply["passages"]] == [p.id for p in answer.passages]


def test_defaults_name_no_code():
    from rlrag.bundle_files import code_to_answer

    assert code_to_answer(RunConfig()) == ()
