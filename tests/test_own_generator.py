"""Generators of anybody's own: by name, with options, answering, scored, trained with, served."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

import cloudpickle
import pytest
from endpoint_server import MODEL, endpoint_server

import rlrag
from rlrag import plugins
from rlrag.bundle_files import read_bundle
from rlrag.cli import evaluate, train
from rlrag.cli.command_line import run_program
from rlrag.config import GeneratorConfig, PromptConfig, RunConfig
from rlrag.errors import ConfigError, GenerationError, SetupError
from rlrag.generation.backends.engine_loop import EngineLoop
from rlrag.generation.backends.stepping import BatchStepper, Update
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.build import check_scores, open_engine, open_generator
from rlrag.generation.identity import own_identity
from rlrag.generation.plugin import PluginGenerator
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.generation.protocol import Generator, Sampling
from rlrag.records import Generation, Prompt, Score
from rlrag.rewards.builtin import BUILTIN_REWARDS
from rlrag.serving.generating import GeneratorPart, engine_config
from rlrag.serving.records import Decoding
from rlrag.serving.settings import ServeSettings
from rlrag.testing import check_generator, check_reward
from rlrag.training.needs import needs_of
from rlrag.training.plan import describe_plan

SENTENCES = "examples.own_generator:SentenceGenerator"
SAMPLING = Sampling(max_new_tokens=4)
PROMPT = PromptConfig(max_prompt_tokens=256)
PROMPTS = [Prompt(tuple(range(40 + n, 60 + n)), f"Question {n}", 0) for n in range(5)]
ANSWERS = [(70, 71)] * 5

SOURCE = '''
from rlrag.errors import GenerationError, SetupError
from rlrag.records import Generation, Score

class Parrot:
    """Says a word; does what `fault` says to the prompts whose text holds `mark`."""
    sizes = []
    closed = 0
    def __init__(self, model_dir, word: str = "word", fault: str = "", mark: str = "3"):
        self.model_dir, self.word, self.fault, self.mark = model_dir, word, fault, mark
    def generate(self, prompts, sampling):
        return self.all(prompts, self.word)
    def score(self, prompts, answers):
        assert all(isinstance(answer, tuple) for answer in answers)
        return self.all(prompts, -1.5)
    def close(self):
        type(self).closed += 1
    def all(self, prompts, usual):
        self.sizes.append(len(prompts))
        marked = [prompt for prompt in prompts if self.mark in prompt.text]
        if marked and self.fault == "raise": raise KeyError("gone")
        if marked and self.fault == "setup": raise SetupError("no licence for this model")
        if marked and self.fault == "few": return [usual] * (len(prompts) - 1)
        if marked and self.fault == "text": return "x" * len(prompts)
        if marked and self.fault == "none": return None
        strange = {
            "type": 7j, "none in a place": None, "says": GenerationError("too dark to read"),
            "nan": Generation("a", float("nan"), 1, 1), "above": Generation("a", 0.7, 1, 1),
            "count": Generation("a", None, None, 1), "lines": Generation(3, None, 1, 1),
            "logp": "-1", "infinite": float("-inf"), "likely": 0.9,
        }
        return [strange.get(self.fault, usual) if prompt in marked else usual for prompt in prompts]

class Silent:
    revision = "1"
    def generate(self, prompts, sampling): return iter(["  said \\n more"] * len(prompts))

class Renewed(Silent):
    revision = property(lambda self: "1")

class Full:
    """Tells what it knows."""
    def generate(self, prompts, sampling):
        return [Generation(" a b ", -2.0, 9, 5, 8) for _ in prompts]
    def score(self, prompts, answers): return [Score(-3.0, 1, 1, 8) for _ in prompts]

def mute(): return object()
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_writers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_writers"
    sys.modules.pop("own_writers", None)


@pytest.fixture
def open_it(module, model_dir):
    def open_it(name: str = "Parrot", *options: str, **changes) -> PluginGenerator:
        values = {"backend": f"{module}:{name}", "options": options, "batch_size": 2, **changes}
        return PluginGenerator(GeneratorConfig(**values), model_dir)

    return open_it


@pytest.fixture
def builder(model_dir) -> PromptBuilder:
    return PromptBuilder(PROMPT, load_tokenizer(model_dir))


def test_answers_and_scores_are_what_it_says(open_it, module, model_dir):
    own = open_it("Parrot", "word=two words")
    assert isinstance(own, Generator)
    assert (own.generate([], SAMPLING), own.score([], [])) == ([], [])
    answers, scores = own.generate(PROMPTS, SAMPLING), own.score(PROMPTS, ANSWERS)
    num_tokens = len(load_tokenizer(model_dir)("two words")["input_ids"])
    assert answers == [Generation("two words", None, num_tokens, 20)] * 5
    assert scores == [Score(-1.5, 2, 20)] * 5
    assert (own.tokens.spent, own.tokens.num_requests) == (5 * (42 + num_tokens), 10)
    part = sys.modules[module].Parrot
    assert part.sizes == [2, 2, 1, 2, 2, 1], "batch_size prompts at once"
    own.close()
    assert part.closed == 1


def test_what_is_known_of_an_answer_is_kept_and_its_end_cut(open_it):
    own = open_it("Silent")
    assert [answer.text for answer in own.generate(PROMPTS, SAMPLING)] == ["said"] * 5
    own.close()
    full = open_it("Full")
    assert full.generate(PROMPTS[:1], SAMPLING) == [Generation("a b", -2.0, 9, 5, 0)]
    assert full.score(PROMPTS[:1], ANSWERS[:1]) == [Score(-3.0, 2, 20, 0)]


FAULTS = {
    "raise": "generate failed with KeyError: 'gone'",
    "few": "generate gave 1 results for 2 prompts; return one result per prompt, in the same order",
    "text": "generate gave 'xx' of type str, not a list with one result per prompt",
    "none": "generate gave None of type NoneType, not a list with one result per prompt",
    "type": "generate gave 7j of type complex as an answer; return a str, a Generation or",
    "none in a place": "generate gave None of type NoneType as an answer",
    "nan": "generate gave nan of type float as a log-probability; return a finite number",
    "above": "generate gave 0.7 of type float as a log-probability",
    "count": "generate gave None of type NoneType as a number of tokens",
    "lines": "generate gave 3 of type int as the text of an answer",
    "says": "too dark to read",
}
OF_A_BATCH = ("few", "text", "none")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_prompt_that_it_fails_on_has_one_error_and_the_others_their_answers(
    open_it, module, fault
):
    found = open_it("Parrot", f"fault={fault}").generate(PROMPTS, SAMPLING)
    failed = [place for place, one in enumerate(found) if isinstance(one, GenerationError)]
    assert failed == ([2, 3] if fault in OF_A_BATCH else [3])
    assert [found[place].text for place in range(5) if place not in failed] == ["word"] * (
        5 - len(failed)
    )
    said = str(found[3])
    assert said.startswith(f"generator '{module}:Parrot': {FAULTS[fault]}")
    if fault != "says":
        assert said.endswith(
            "(the prompt ends with 'Question 3'); fix it, then run the same command again"
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "score failed with KeyError"),
        ("logp", "score gave '-1' of type str as a log-probability"),
        ("infinite", "score gave -inf of type float as a log-probability"),
        ("likely", "score gave 0.9 of type float as a log-probability"),
    ],
)
def test_a_score_that_is_none_has_one_error(open_it, fault, message):
    found = open_it("Parrot", f"fault={fault}").score(PROMPTS, ANSWERS)
    assert [isinstance(one, Score) for one in found] == [True, True, True, False, True]
    assert message in str(found[3])


def test_what_no_other_prompt_mends_ends_the_call(open_it):
    with pytest.raises(SetupError, match="no licence for this model"):
        open_it("Parrot", "fault=setup").generate(PROMPTS, SAMPLING)


def test_one_that_cannot_score_or_be_trained_says_so(open_it, module):
    own = open_it("Silent")
    refusal = rf"generator '{module}:Silent' has no method 'score', which .*exact_match or token_f1"
    with pytest.raises(ConfigError, match=refusal):
        check_scores(own, PROMPTS[0])
    with pytest.raises(GenerationError, match=r"cannot be replaced; .* vllm or transformers"):
        own.load_weights(None)
    values = {"generator": {"backend": f"{module}:Silent"}, "algorithm": {"parts": ["generator"]}}
    with pytest.raises(ConfigError, match="is a generator of your own, whose weights cannot be"):
        RunConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"backend": "tranformers"}, "'tranformers' is unknown; did you mean 'transformers'"),
        ({"options": ["a=1"]}, "generator.options are for a part of your own, but generator.backe"),
        ({"backend": SENTENCES, "url": "http://a/v1"}, "generator.url names what a server has"),
    ],
)
def test_configurations_name_what_is_wrong(generator, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_json(json.dumps({"generator": generator}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Parot", (), "has no 'Parot'; did you mean 'Parrot'"),
        ("Parrot", ("wrod=a",), "has no option 'wrod'; did you mean 'word'"),
        ("mute", (), "no method 'generate'; rlrag.testing.check_generator checks what a generator"),
        ("Renewed", (), "has a revision of type property; set `revision` of the class or function"),
    ],
)
def test_one_that_cannot_be_made_is_one_error(open_it, module, name, options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        open_it(name, *options)
    assert f"generator '{module}:{name}'" in str(raised.value)


def test_results_belong_to_a_name_its_options_its_text_and_the_model(
    module, model_dir, tmp_path, monkeypatch
):
    def identity(name: str, *options: str, directory: Path = model_dir) -> str:
        config = GeneratorConfig(backend=f"{module}:{name}", options=options)
        return own_identity(config, directory)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    found = [identity("Parrot"), identity("Silent"), identity("Parrot", "word=a")]
    found.append(identity("Parrot", directory=tmp_path / "other"))
    part = sys.modules[module]
    monkeypatch.setattr(part.Silent, "revision", "2")
    found.append(identity("Silent"))
    part.made = functools.partial(part.Parrot, word="made")
    found.append(identity("made"))
    assert identity("Parrot", "word=a", "mark=b") == identity("Parrot", "mark=b", "word=a")
    assert identity("Parrot") == found[0]
    (tmp_path / "own_writers.py").write_text(f"{SOURCE}\n# another")
    found.append(identity("Parrot"))
    assert len(set(found)) == 7


@pytest.mark.parametrize("options", [(), ("max_words=1",)])
def test_the_example_keeps_the_contract(model_dir, builder, options):
    own = PluginGenerator(GeneratorConfig(backend=SENTENCES, options=options), model_dir)
    check_generator(own, builder)


def test_built_in_generators_keep_it(model_dir, builder, monkeypatch):
    check_generator(TransformersGenerator(model_dir, "float32", "cpu"), builder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with endpoint_server(model_dir) as server:
        config = GeneratorConfig(backend="endpoint", url=server.url, served_model=MODEL)
        endpoint = open_engine(config, model_dir, ())
        check_generator(endpoint, builder)
        endpoint.close()


class Broken(PluginGenerator):
    """Breaks the contract by what `how` says."""

    how = ""
    num_calls = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list:
        self.num_calls += 1
        found = super().generate(prompts, sampling)
        if self.how == "forgets":
            return found[:-1]
        if self.how == "sorts":
            return sorted(found, key=lambda one: getattr(one, "text", ""))
        if self.how == "raises" and any(isinstance(one, GenerationError) for one in found):
            return [GenerationError("one of them")] * len(found)
        changes = {
            "changes": f"text {self.num_calls}",
            "by batch": f"text {len(prompts)}",
            "stop": "a\nb",
            "ends": " a",
            "by seed": f"text {self.num_calls if sampling.temperature else 0}",
        }
        return [
            Generation(changes.get(self.how, one.text), one.logp, 1, 1)
            if isinstance(one, Generation)
            else one
            for one in found
        ]

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list:
        changed = {"likely": 0.5, "wanders": -1.0 - len(prompts)}
        return [
            Score(changed.get(self.how, -1.0), 9 if self.how == "long" else len(answer), 1)
            for answer in answers
        ]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("", None),
        ("forgets", "0 prompts have|4 prompts have 3 answers"),
        ("sorts", "do not keep the order of their prompts"),
        ("raises", "a prompt has no answer: one of them"),
        ("changes", "equal prompts get other answers with temperature 0"),
        ("by batch", "answered otherwise when it is asked alone"),
        ("by seed", "equal prompts get other answers with temperature 1 and seed 3"),
        ("stop", r"goes on after the stop string '\\n'"),
        ("ends", "is not stripped"),
        ("likely", "a log-probability is 0.5"),
        ("wanders", "an answer scores -5, and -2 in another order or alone"),
        ("long", "a score is of 9 tokens, but its answer has"),
    ],
)
def test_the_contract_can_be_broken(model_dir, builder, how, message):
    own = Broken(GeneratorConfig(backend=SENTENCES), model_dir)
    own.how = how
    if message is None:
        check_generator(own, builder)
        return
    with pytest.raises(AssertionError, match=message):
        check_generator(own, builder)


REWARDS = """
calls = 0

def counts(answer):
    global calls
    calls += 1
    return float(calls)

def named(answer):
    return {"right": 1.0} if answer else {"empty": 1.0}

def raises(answer):
    return 1 / len(answer)

def changes(metadata):
    metadata["seen"] = True
    return 1.0

async def fine(answer, passages, answer_logp):
    return {"length": float(len(answer)), "logp": answer_logp}
"""


@pytest.mark.parametrize(
    "name", [*BUILTIN_REWARDS, "examples.custom_reward:short_and_right", "own_rewards:fine"]
)
def test_rewards_keep_theirs(name, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    check_reward(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("counts", "gives the same rollout another number"),
        ("named", r"gives \['own_rewards:named/empty'\] for one rollout and .*right"),
        ("raises", "division by zero"),
        ("changes", "changes what it is given"),
    ],
)
def test_the_contract_of_rewards_can_be_broken(name, message, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    with pytest.raises(AssertionError, match=message):
        check_reward(f"own_rewards:{name}")


def test_on_ray_each_actor_makes_it_by_its_name(module, model_dir, tmp_path, monkeypatch):
    from rlrag.generation.pool import start as pool

    made = []

    class Pool:
        """Makes the engine as an actor does, from what was sent to it."""

        def __init__(self, config, engine, identity, environment, logs) -> None:
            generator = cloudpickle.loads(cloudpickle.dumps(engine))()
            assert generator.identity == identity
            made.append(generator)
            self.identity = identity

    monkeypatch.setattr(pool, "GeneratorPool", Pool)
    config = GeneratorConfig(model=str(model_dir), backend=f"{module}:Silent", prompt=PROMPT)
    generator, _ = open_generator(config, "ray", tmp_path / "cache")
    assert isinstance(generator.inner, Pool)
    assert isinstance(made[0], PluginGenerator)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel 2 needs generator\.backend vllm, not own"
    ):
        open_generator(config.model_copy(update={"tensor_parallel": 2}), "ray", tmp_path / "cache")


class InProcess:
    """An engine of the service in this process, as its actor runs it."""

    def __init__(self, config: GeneratorConfig, model_dir: Path, prefix_ids: tuple) -> None:
        engine = open_engine(config, model_dir, prefix_ids)
        self._loop = EngineLoop(BatchStepper(engine, config.batch_size))
        self.failure = self._loop.failure
        self.close = self._loop.close

    async def stream(
        self, prompt: Prompt, sampling: Sampling, streamed: bool
    ) -> AsyncGenerator[Update, None]:
        async with aclosing(self._loop.stream(prompt, sampling)) as updates:
            async for update in updates:
                yield update


def test_a_prompt_that_fails_leaves_the_engine_of_the_service_working(module, model_dir):
    config = GeneratorConfig(backend=f"{module}:Parrot", options=("fault=raise",))
    engine = InProcess(config, model_dir, ())

    async def ask(prompt: Prompt) -> str:
        return "".join([update.text async for update in engine.stream(prompt, SAMPLING, False)])

    async def ask_all() -> list:
        asked = [ask(prompt) for prompt in PROMPTS]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(ask_all())
    assert "failed with KeyError" in str(found.pop(3))
    assert found == ["word"] * 4
    assert engine.failure() is None
    assert asyncio.run(ask(PROMPTS[0])) == "word"
    engine.close()


def flags(files: Path, folder: Path, **changes: object) -> list[str]:
    values = {
        "run-dir": folder / "run",
        "cache-dir": folder / "cache",
        "data.corpus": files / "corpus.jsonl",
        "data.train-questions": files / "train.jsonl",
        "data.eval-questions": files / "eval.jsonl",
        "data.max-train-questions": 12,
        "data.max-eval-questions": 4,
        "data.num-validation-questions": 4,
        "retrieval.kind": "bm25",
        "retrieval.encoder": None,
        "environment.num-selected": 1,
        "generator.model": files / "generator",
        "generator.backend": SENTENCES,
        "generator.options": "max_words=5",
        "reward.functions": "token_f1",
        "training.launcher": "local",
        "training.num-epochs": 1,
        "training.batch-size": 4,
        "evaluation.systems": "trained",
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["factbook", "--training.loggers", *words]


def test_help_shows_its_options(openrag_files, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(train.main, [*flags(openrag_files, tmp_path), "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"--generator.options of {SENTENCES}:\n    max_words=int (default 20)" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"generator__options": "max_word=5"},
            "has no option 'max_word'; did you mean 'max_words'",
        ),
        ({"generator__backend": "nowhere:Writer"}, "there is no module 'nowhere'; install it"),
        ({"reward__functions": "answer_logp"}, "has no method 'score', which answer_logp and"),
    ],
)
def test_what_cannot_work_costs_no_training(openrag_files, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        run_program(train.main, flags(openrag_files, tmp_path, **changes))
    assert ended.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_that_always_fails_ends_a_run_before_its_first_step(
    openrag_files, tmp_path, module, capsys
):
    own = {"generator__backend": f"{module}:Parrot", "generator__options": "fault=few"}
    words = flags(openrag_files, tmp_path, **own)
    words[words.index("fault=few") :] = [
        "fault=few",
        "mark=",
        *words[words.index("fault=few") + 1 :],
    ]
    with pytest.raises(SystemExit):
        run_program(train.main, words)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"generator '{module}:Parrot': generate gave" in said


@pytest.mark.slow
def test_prompts_that_fail_in_training_are_counted(openrag_files, tmp_path, module):
    own = {"generator__backend": f"{module}:Parrot", "generator__options": "fault=raise"}
    words = flags(openrag_files, tmp_path, **own, training__max_failed_share=0.9)
    words.insert(words.index("fault=raise") + 1, "mark=legend")
    train.main(words)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert any(record.get("num_failed", 0) > 0 for record in records)


@pytest.mark.slow
def test_it_is_trained_with_bundled_loaded_asked_and_served(openrag_files, tmp_path):
    train.main(flags(openrag_files, tmp_path))
    bundle = tmp_path / "run" / "bundle"
    files = read_bundle(bundle)
    assert files.config.generator.backend == SENTENCES
    assert ("generator_code", SENTENCES) in {(each.part, each.name) for each in files.licences}
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["systems"]["trained"]
    refusal = rf"generator\.backend '{SENTENCES}', .*--allow-code {SENTENCES}"
    with pytest.raises(ConfigError, match=refusal):
        rlrag.load_pipeline(bundle)
    question = "what does the lamp hold?"
    with rlrag.load_pipeline(bundle, allow_code=[SENTENCES]) as pipeline:
        answer = pipeline.answer(question)
        (passage,) = answer.passages
    assert 1 <= len(answer.text.split()) <= 5
    assert answer.logp is None
    words = ["--bundle", str(bundle), "--output", str(tmp_path / "again.json"), "--limit", "3"]
    for name in ("corpus", "questions"):
        words += [
            f"--{name}",
            str(openrag_files / f"{'eval' if name == 'questions' else name}.jsonl"),
        ]
    evaluate.main([*words, "--allow-code", SENTENCES])
    assert json.loads((tmp_path / "again.json").read_text())["generator"] == SENTENCES

    with pytest.raises(ConfigError, match=refusal):
        GeneratorPart(ServeSettings(bundle="unused"), InProcess).load(files.version, bundle)
    settings = ServeSettings(bundle="unused", allow_code=(SENTENCES,))
    part = GeneratorPart(settings, InProcess)
    part.load(files.version, bundle)

    async def served() -> list:
        pieces = part.generate(files.version, question, (passage,), Decoding())
        return [piece async for piece in pieces]

    (piece,) = asyncio.run(served())
    assert (piece.text, piece.finished) == (answer.text, True)
    part.drop(files.version)


def test_plans_and_services_know_it(openrag_files):
    generator = GeneratorConfig(backend=SENTENCES, model=str(openrag_files / "generator"))
    config = RunConfig(generator=generator)
    said = describe_plan(config)
    assert f"{SENTENCES}, in each of 2 CPU actors; what it takes is not known here" in said
    assert SENTENCES in needs_of(config).unknown
    assert plugins.check_named(config) == [SENTENCES]
    assert engine_config(generator, ServeSettings(bundle="b")).backend == SENTENCES
    with pytest.raises(ConfigError, match=f"the bundle's generator is {SENTENCES}; leave"):
        engine_config(generator, ServeSettings(bundle="b", generator_backend="vllm"))
    other = generator.model_copy(update={"options": ("max_words=3",)}).with_model("other")
    assert (other.backend, other.options, other.answering_model) == ("auto", (), "other")
