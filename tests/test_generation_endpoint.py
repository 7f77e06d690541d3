"""A generator behind an address: a tiny model's answers and scores, faults, and a run with it."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

import cloudpickle
import pytest
from endpoint_server import (
    KEY,
    LEGACY,
    MODEL,
    PLAIN,
    VLLM,
    EndpointServer,
    endpoint_server,
    refusal,
)
from stand_ins import make_table
from training_program import tiny_flags

from rlrag.bundle import bundle_version, load_bundle, save_bundle
from rlrag.cli import evaluate, train
from rlrag.cli.doctor.packages import extras_of
from rlrag.config import DataConfig, GeneratorConfig, PromptConfig, RetrievalConfig, RunConfig
from rlrag.errors import ConfigError, GenerationError, GeneratorTimeoutError, SetupError
from rlrag.generation.backends import endpoint_client
from rlrag.generation.backends.endpoint import EndpointGenerator
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.build import check_scores, open_generator, resolve_config
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.identity import endpoint_identity
from rlrag.generation.protocol import Generator, Sampling
from rlrag.pipeline import open_policy
from rlrag.records import Passage, Prompt
from rlrag.serving.endpoint_engine import EndpointEngine
from rlrag.serving.generating import GeneratorPart, engine_config
from rlrag.serving.records import Decoding
from rlrag.serving.settings import ServeSettings
from rlrag.training.needs import needs_of
from rlrag.training.plan import describe_plan

PROMPTS = [
    Prompt(tuple(range(40 + n, 60 + 3 * n)), f"Question: which river, number {n}?\nAnswer:", 0)
    for n in range(6)
]
ANSWERS = [tuple(range(70, 71 + n)) for n in range(6)]
SAMPLING = Sampling(max_new_tokens=4, stop=("\n", " a"))


@pytest.fixture(scope="module")
def running(model_dir) -> Iterator[EndpointServer]:
    with endpoint_server(model_dir) as server:
        yield server


@pytest.fixture
def server(running, monkeypatch) -> EndpointServer:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint_client, "_FIRST_PAUSE_S", 0.001)
    running.reset()
    return running


@pytest.fixture
def open_it(server) -> Iterator:
    opened: list[EndpointGenerator] = []

    def open_it(**changes) -> EndpointGenerator:
        opened.append(EndpointGenerator(settings(server, **changes), "named"))
        return opened[-1]

    yield open_it
    for generator in opened:
        generator.close()


def settings(server: EndpointServer, **changes) -> GeneratorConfig:
    values = {"backend": "endpoint", "url": server.url, "served_model": MODEL, "batch_size": 3}
    return GeneratorConfig(**{**values, **changes})


def asked(server: EndpointServer) -> list[dict]:
    """What was asked, without the requests of a token or two that try the server."""
    return [body for body in server.bodies if len(body["prompt"]) > 2]


def of_second(body: dict) -> bool:
    return body["prompt"][:20] == list(PROMPTS[1].token_ids[:20])


@pytest.fixture(scope="module")
def local(model_dir) -> TransformersGenerator:
    return TransformersGenerator(model_dir, "float32", "cpu")


@pytest.mark.parametrize("can", [VLLM, LEGACY], ids=["vllm", "legacy"])
def test_answers_and_scores_are_those_of_the_model(server, open_it, local, can):
    server.can = can
    generator = open_it()
    assert isinstance(generator, Generator)
    assert (generator.generate([], SAMPLING), generator.score([], [])) == ([], [])
    assert server.bodies == []
    answers = generator.generate(PROMPTS, SAMPLING)
    scores = generator.score(PROMPTS, ANSWERS)
    for found, expected in zip(
        [*answers, *scores],
        [*local.generate(PROMPTS, SAMPLING), *local.score(PROMPTS, ANSWERS)],
        strict=True,
    ):
        assert found.logp == pytest.approx(expected.logp, abs=1e-3)
        assert found.num_tokens == expected.num_tokens
        assert found.num_prompt_tokens == expected.num_prompt_tokens
        assert getattr(found, "text", "") == getattr(expected, "text", "")
    assert generator.tokens.spent == server.num_tokens
    assert generator.tokens.num_requests == len(server.bodies)
    assert len(asked(server)) == 12
    assert 1 < server.most_at_once <= 3


def test_requests_say_how_an_answer_is_decoded(server, open_it):
    generator = open_it()
    drawn = [
        [answer.text for answer in generator.generate(PROMPTS, Sampling(4, 1.5, ("x", ""), seed))]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    bodies = asked(server)
    assert {(b["model"], b["max_tokens"], b["temperature"], b["top_p"]) for b in bodies} == {
        (MODEL, 4, 1.5, 1)
    }
    assert {tuple(body["stop"]) for body in bodies} == {("x",)}
    assert len({body["seed"] for body in bodies}) == 12
    assert max(body["seed"] for body in bodies) < 2**31
    generator.generate(PROMPTS[:1], SAMPLING)
    assert "seed" not in asked(server)[-1]


def test_an_answer_ends_before_its_first_stop_string_whatever_the_server_sends(server, open_it):
    server.fault = lambda body, before: {
        "choices": [{"text": " Rhine \nQuestion: a\n"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    }
    (answer,) = open_it().generate(PROMPTS[:1], SAMPLING)
    assert (answer.text, answer.num_tokens, answer.num_prompt_tokens) == ("Rhine", 3, 5)


def test_a_server_of_texts_alone_answers_and_does_not_score(server, open_it, tmp_path, caplog):
    server.can = PLAIN
    generator = CachedGenerator(open_it(), tmp_path)
    answers = generator.generate(PROMPTS, SAMPLING)
    texts = {prompt.text for prompt in PROMPTS}
    assert {body["prompt"] for body in asked(server)} == texts
    assert "takes prompts only as text" in caplog.text
    assert {answer.logp for answer in answers} == {None}
    num_asked = len(server.bodies)
    assert generator.generate(PROMPTS, SAMPLING) == answers
    assert len(server.bodies) == num_asked
    with pytest.raises(ConfigError, match=r"it takes no token ids.*; use reward.*exact_match"):
        check_scores(generator, PROMPTS[0])


def test_a_server_without_scores_is_found_by_a_request_of_two_tokens(server, open_it):
    server.can = frozenset({"token_ids", "logprobs"})
    with pytest.raises(ConfigError, match="not return log-probabilities of prompt tokens"):
        check_scores(open_it(), PROMPTS[0])
    assert asked(server) == []


def test_a_server_that_refuses_unknown_fields_is_asked_without_them(server, open_it):
    server.fault = lambda body, before: (
        refusal(422, "unknown field") if {"logprobs", "prompt_logprobs"} & body.keys() else None
    )
    generator = open_it()
    (answer,) = generator.generate(PROMPTS[:1], SAMPLING)
    assert answer.logp is None
    with pytest.raises(ConfigError, match=r"by echo: .*unknown field"):
        generator.score(PROMPTS[:1], ANSWERS[:1])


@pytest.mark.parametrize(
    "faults",
    [
        [(500, {}, {}), (503, {}, {}), None],
        [(429, {"Retry-After": "0.02"}, {}), None],
        [(408, {}, "busy"), None],
    ],
    ids=["5xx", "429", "408"],
)
def test_refusals_for_now_are_repeated(server, open_it, faults, caplog):
    caplog.set_level(logging.INFO, "rlrag.generation.backends.endpoint_client")
    server.fault = lambda body, before: faults[before]
    answers = open_it().generate(PROMPTS, SAMPLING)
    assert not any(isinstance(answer, GenerationError) for answer in answers)
    assert len(asked(server)) == len(faults) * len(PROMPTS)
    assert caplog.text.count("again in 0.0 s") == (len(faults) - 1) * (len(PROMPTS) + 1)


def test_the_pause_that_a_server_wants_is_kept_or_the_answer_given_up(server, open_it, caplog):
    caplog.set_level(logging.INFO, "rlrag.generation.backends.endpoint_client")
    soon, late = {"Retry-After": "0.3"}, {"Retry-After": "3600"}
    generator = open_it(request_timeout_s=20)
    generator.generate(PROMPTS[2:3], SAMPLING)
    server.fault = lambda body, before: (
        (429, late, {}) if of_second(body) else (429, soon, {}) if before == 0 else None
    )
    first, second = generator.generate(PROMPTS[:2], SAMPLING)
    assert not isinstance(first, GenerationError)
    assert "again in 0.3 s" in caplog.text
    assert isinstance(second, GenerationError)
    assert "it wants a pause of 3600 s" in str(second)


def test_a_prompt_that_stays_without_an_answer_is_counted_and_the_others_go_on(server, open_it):
    generator = open_it()
    generator.score(PROMPTS[:1], ANSWERS[:1])
    for status, message in ((503, "in 6 attempt"), (400, "refuses a request")):
        server.fault = lambda body, before, status=status: (
            (status, {}, {"error": {"message": "no"}}) if of_second(body) else None
        )
        for found in (generator.generate(PROMPTS, SAMPLING), generator.score(PROMPTS, ANSWERS)):
            wrong = [isinstance(result, GenerationError) for result in found]
            assert wrong == [n == 1 for n in range(6)]
            assert message in str(found[1])


def test_a_slow_answer_is_given_up(server, open_it):
    waiting = threading.Event()
    generator = open_it(request_timeout_s=2)
    generator.generate(PROMPTS[:1], SAMPLING)
    server.fault = lambda body, before: waiting.wait(20) and None if of_second(body) else None
    try:
        found = generator.generate(PROMPTS[:3], SAMPLING)
    finally:
        waiting.set()
    assert isinstance(found[1], GeneratorTimeoutError)
    assert "no answer within 2 s" in str(found[1])
    assert not isinstance(found[0], GenerationError)


def test_a_server_that_is_down_ends_the_call(server, open_it):
    generator = open_it(url="http://127.0.0.1:9/v1")
    with pytest.raises(GenerationError, match=r"127\.0\.0\.1:9/v1 gave no answer in 6 attempt"):
        generator.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize(
    ("status", "code", "kind", "message"),
    [
        (401, None, ConfigError, "set the right key in the environment variable OPENAI_API_KEY"),
        (403, None, ConfigError, "set a key that may use it"),
        (404, None, ConfigError, "check generator.served_model"),
        (402, None, SetupError, "no quota left"),
        (429, "insufficient_quota", SetupError, "no quota left"),
    ],
)
def test_what_no_repetition_mends_ends_the_call_at_once(
    server, open_it, monkeypatch, status, code, kind, message
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    generator = open_it()
    generator.generate(PROMPTS[:1], SAMPLING)
    server.bodies.clear()
    server.fault = lambda body, before: refusal(status, f"not with {KEY}", code)
    with pytest.raises(kind, match=message) as raised:
        generator.generate(PROMPTS, SAMPLING)
    assert KEY not in str(raised.value)
    assert "not with ***" in str(raised.value)
    assert raised.value.__cause__ is None
    assert all(server.bodies.count(body) == 1 for body in server.bodies)


USAGE = {"prompt_tokens": 5, "completion_tokens": 2}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"object": "list"}, "no choices"),
        ({"choices": [], "usage": USAGE}, "no choices"),
        ({"choices": [{"text": None}], "usage": USAGE}, "its text is None"),
        ({"choices": [{"text": "a"}]}, "does not count the prompt tokens"),
        (
            {
                "choices": [{"text": "a", "logprobs": {"token_logprobs": [-1.0, float("nan")]}}],
                "usage": USAGE,
            },
            "one of its log-probabilities is nan",
        ),
        ([1, 2], "not a JSON object"),
        ("<html>welcome</html>", "not a JSON object"),
    ],
)
def test_a_useless_answer_is_counted(server, open_it, reply, message):
    generator = open_it()
    generator.generate(PROMPTS[:1], SAMPLING)
    server.fault = lambda body, before: (200, {}, reply) if of_second(body) else None
    found = generator.generate(PROMPTS, SAMPLING)
    assert [isinstance(result, GenerationError) for result in found] == [n == 1 for n in range(6)]
    assert message in str(found[1])


@pytest.mark.parametrize(
    ("can", "fields", "message"),
    [
        (VLLM, {"prompt_logprobs": [None, {"1": {"logprob": -1.0}}]}, "of 2 tokens, not of 24"),
        (VLLM, {"prompt_logprobs": [None] + [{"1": {"logprob": -1.0}}] * 23}, "token 70 was sent"),
        (
            VLLM,
            {"prompt_logprobs": [None] + [{"70": {"logprob": None}}] * 23},
            "log-probabilities is None",
        ),
        (VLLM, {}, "no log-probabilities of the prompt"),
        (LEGACY, {"logprobs": {"token_logprobs": [-1.0] * 26}}, "of 26 tokens, not of 24"),
        (LEGACY, {"logprobs": {"token_logprobs": [float("nan")] * 25}}, "log-probabilities is nan"),
    ],
)
def test_a_useless_score_is_counted(server, open_it, can, fields, message):
    server.can = can
    generator = open_it()
    answers = [(70, 70)] * 6
    generator.score(PROMPTS[:1], answers[:1])
    choice = {"text": "", **fields}
    server.fault = lambda body, before: (
        {"choices": [choice], "usage": USAGE} if of_second(body) else None
    )
    found = generator.score(PROMPTS, answers)
    assert [isinstance(result, GenerationError) for result in found] == [n == 1 for n in range(6)]
    assert message in str(found[1])


def test_a_copy_knows_the_server_and_takes_the_key_from_its_own_environment(
    server, open_it, monkeypatch
):
    server.key = KEY
    monkeypatch.setenv("ANOTHER_KEY", f"{KEY}\n")
    generator = open_it(key_variable="ANOTHER_KEY")
    generator.score(PROMPTS[:1], ANSWERS[:1])
    packed = cloudpickle.dumps(generator)
    assert KEY.encode() not in packed
    assert KEY not in repr(vars(generator))
    num_asked = len(server.bodies)
    copy = pickle.loads(packed)
    assert copy.score(PROMPTS[:2], ANSWERS[:2]) == generator.score(PROMPTS[:2], ANSWERS[:2])
    assert (copy.identity, copy.tokens.num_requests) == ("named", 2)
    assert len(server.bodies) == num_asked + 4
    copy.close()
    assert server.keys == {f"Bearer {KEY}"}
    monkeypatch.delenv("ANOTHER_KEY")
    with pytest.raises(ConfigError, match="names ANOTHER_KEY, which is not set"):
        pickle.loads(packed)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    packed = pickle.dumps(open_it())
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="but not on this node; set it on every node"):
        pickle.loads(packed)


def test_a_closed_generator_says_so(server, open_it):
    generator = open_it()
    generator.generate(PROMPTS[:1], SAMPLING)
    generator.close()
    with pytest.raises(GenerationError, match="is closed"):
        generator.generate(PROMPTS[:1], SAMPLING)


def test_a_generator_that_is_closed_leaves_nobody_waiting(server, open_it):
    began, waiting = threading.Event(), threading.Event()
    generator = open_it()
    generator.generate(PROMPTS[:1], SAMPLING)

    def hang(body: dict, before: int) -> None:
        began.set()
        waiting.wait(20)

    server.fault = hang
    try:
        with ThreadPoolExecutor() as pool:
            found = pool.submit(generator.generate, PROMPTS, SAMPLING)
            assert began.wait(20)
            generator.close()
            answers = found.result(20)
    finally:
        waiting.set()
    assert {str(answer) for answer in answers} == {"this generator is closed; create a new one"}


def test_weights_are_not_taken(open_it):
    with pytest.raises(GenerationError, match=r"cannot be replaced; .* vllm or transformers"):
        open_it().load_weights(None)


def test_results_belong_to_an_address_a_name_and_a_tokenizer(server, model_dir, tmp_path):
    def identity(directory: Path = model_dir, **changes) -> str:
        return endpoint_identity(settings(server, **changes), directory)

    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    found = [identity(), identity(url="http://host/v1"), identity(served_model="b")]
    found.append(identity(other))
    assert len(set(found)) == 4
    assert identity(url=f"{server.url}/", temperature=1.0) == found[0]


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_both_launchers_ask_from_this_process(server, model_dir, tmp_path, launcher):
    config = settings(server, model=str(model_dir), device="cuda", tensor_parallel=2)
    config = config.model_copy(update={"prompt": PromptConfig(max_prompt_tokens=256)})
    assert resolve_config(config, launcher).backend == "endpoint"
    generator, _ = open_generator(config, launcher, tmp_path)
    assert isinstance(generator.inner, EndpointGenerator)
    assert generator.identity == endpoint_identity(config, model_dir)
    assert len(generator.generate(PROMPTS[:2], SAMPLING)) == 2
    generator.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": None}, "generator.url is unset"),
        ({"backend": "auto"}, "generator.url names what a server has, but generator.backend is"),
        ({"backend": "vllm", "url": None, "served_model": "a"}, "generator.served_model names"),
        ({"url": "localhost:8000"}, "is not a URL"),
        ({"url": "http://me:secret@host/v1"}, "contains a password"),
        ({"url": "http://host/v1?key=secret"}, "has a query or fragment"),
        ({"key_variable": "sk-secret"}, "is no name of an environment variable"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_a_secret(server, changes, message):
    values = settings(server).model_dump() | changes
    with pytest.raises(ConfigError, match=message) as raised:
        RunConfig.from_json(json.dumps({"generator": values}))
    assert "secret" not in str(raised.value)


def test_a_generator_behind_an_address_is_not_trained(server):
    values = {"generator": settings(server).model_dump(), "algorithm": {"parts": ["generator"]}}
    with pytest.raises(ConfigError, match="whose weights cannot be trained from here"):
        RunConfig.from_json(json.dumps(values))
    assert settings(server).with_model("other").backend == "auto"


def test_the_service_asks_the_address_of_the_bundle(server, open_it):
    config = settings(server)
    served = engine_config(config, ServeSettings(bundle="unused"))
    assert (served.backend, served.url) == ("endpoint", server.url)
    with pytest.raises(ConfigError, match="leave the setting at auto"):
        engine_config(config, ServeSettings(bundle="unused", generator_backend="transformers"))
    generator = open_it()

    async def collect() -> list:
        async with aclosing(EndpointEngine(generator).stream(PROMPTS[0], SAMPLING, True)) as found:
            return [update async for update in found]

    (update,) = asyncio.run(collect())
    (expected,) = generator.generate(PROMPTS[:1], SAMPLING)
    assert (update.text, update.logp, update.num_tokens) == (
        expected.text,
        expected.logp,
        expected.num_tokens,
    )
    assert update.finished


def test_a_version_of_the_service_answers_by_its_address(server, model_dir, tmp_path):
    generator = settings(server, model=str(model_dir), max_new_tokens=3)
    config = RunConfig(
        cache_dir=str(tmp_path / "cache"),
        retrieval=RetrievalConfig(kind="bm25", encoder=None, num_candidates=5),
        generator=generator,
    )
    table = make_table(4)
    save_bundle(tmp_path / "bundle", config, open_policy(config, table), table, {}, 1)
    version = bundle_version(tmp_path / "bundle")
    part = GeneratorPart(ServeSettings(bundle="unused"))
    part.load(version, tmp_path / "bundle")
    assert part.loaded() == (version,)

    async def collect() -> list:
        passages = (Passage("a", "France", "The capital is Paris."),)
        return [piece async for piece in part.generate(version, "capital?", passages, Decoding())]

    (piece,) = asyncio.run(collect())
    (body,) = asked(server)
    assert (body["max_tokens"], len(body["prompt"])) == (3, piece.num_prompt_tokens)
    assert piece.finished
    part.drop(version)
    said = describe_plan(config.model_copy(update={"data": DataConfig(corpus="hub:a")}))
    assert f"{MODEL} at {server.url}, asked 3 prompts at once by each process" in said
    assert "generator actor" not in said
    needs = needs_of(config)
    local = config.model_copy(update={"generator": generator.with_model(str(model_dir))})
    assert needs.cpus < needs_of(local).cpus
    assert "endpoint" in extras_of(config)


def endpoint_flags(server: EndpointServer, directory: Path) -> list[str]:
    values = {
        "run-dir": directory / "run",
        "cache-dir": directory / "cache",
        "generator.backend": "endpoint",
        "generator.url": server.url,
        "generator.served-model": MODEL,
        "generator.max-new-tokens": 2,
        "training.launcher": "local",
        "training.num-epochs": 1,
        "data.max-train-questions": 14,
        "data.max-eval-questions": 3,
        "algorithm.num-samples": 2,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["factbook", *tiny_flags(directory), *flags]


@pytest.mark.slow
def test_a_selector_is_trained_and_evaluated_with_a_server(server, tmp_path, monkeypatch, capsys):
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    flags = endpoint_flags(server, tmp_path)
    train.main([*flags, "--reward.functions", "token_f1"])
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["generator_tokens_total"] > 0
    bundle = load_bundle(run / "bundle")
    assert (bundle.config.generator.url, bundle.config.generator.backend) == (
        server.url,
        "endpoint",
    )
    (licence,) = [each for each in bundle.licences if each.part == "generator"]
    assert (licence.name, licence.licence) == (MODEL, "unknown")
    output = tmp_path / "again.json"
    evaluate.main(
        [
            *("--bundle", str(run / "bundle"), "--output", str(output), "--limit", "3"),
            *("--corpus", str(tmp_path / "corpus.jsonl")),
            *("--questions", str(tmp_path / "questions.jsonl")),
        ]
    )
    assert json.loads(output.read_text())["generator"] == MODEL
    held = [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert held == []
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.slow
def test_a_reward_of_scores_is_refused_before_the_first_step(server, tmp_path):
    server.can = frozenset({"token_ids", "logprobs"})
    with pytest.raises(ConfigError, match="not return log-probabilities of prompt tokens"):
        train.main(endpoint_flags(server, tmp_path))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
