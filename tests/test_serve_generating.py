"""Which engine answers which version, with which prompt, decoded how; engines are stand-ins."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest
from serve_bundles import bundle_config
from stand_ins import make_table
from tiny_models import save_tiny_llama

from rlrag.bundle import bundle_version, save_bundle
from rlrag.config import GeneratorConfig, RetrievalConfig, RunConfig
from rlrag.errors import (
    CheckpointError,
    GenerationError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    SetupError,
)
from rlrag.generation.backends.stepping import Update
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.generation.protocol import Sampling
from rlrag.models.directories import weights_hash
from rlrag.pipeline import open_policy
from rlrag.records import Passage, Prompt, Question
from rlrag.serving.generating import GeneratorPart, decoded_so, engine_config
from rlrag.serving.records import AnswerPiece, Decoding
from rlrag.serving.settings import PartSettings, ServeSettings

PASSAGES = (Passage("a", "France", "The capital is Paris."), Passage("b", "Peru", "It is Lima."))
SETTINGS = ServeSettings(bundle="unused", generator_backend="transformers")


class Recorder:
    """An engine that says a fixed answer and remembers what it was asked."""

    def __init__(self, config: GeneratorConfig, model_dir: Path, prefix: tuple[int, ...]) -> None:
        self.config, self.model_dir, self.prefix = config, model_dir, prefix
        self.asked: list[tuple[Prompt, Sampling]] = []
        self.streamed: list[bool] = []
        self.num_left, self.closed = 0, False
        self.trouble: str | None = None

    async def stream(
        self, prompt: Prompt, sampling: Sampling, streamed: bool
    ) -> AsyncGenerator[Update, None]:
        self.asked.append((prompt, sampling))
        self.streamed.append(streamed)
        finished = False
        try:
            for count, text in enumerate((" Pa", "ris"), start=1):
                finished = count == 2
                yield Update(text, -0.5 * count, count, finished)
        finally:
            self.num_left += not finished

    def failure(self) -> str | None:
        return self.trouble

    def close(self) -> None:
        self.closed = True


class Recorders:
    """Opens recorders and keeps them."""

    def __init__(self) -> None:
        self.opened: list[Recorder] = []

    def __call__(
        self, config: GeneratorConfig, model_dir: Path, prefix_ids: tuple[int, ...]
    ) -> Recorder:
        self.opened.append(Recorder(config, model_dir, prefix_ids))
        return self.opened[-1]


@pytest.fixture
def recorders() -> Recorders:
    return Recorders()


@pytest.fixture
def part(recorders) -> GeneratorPart:
    return GeneratorPart(SETTINGS, recorders)


@pytest.fixture(scope="module")
def generator_bundles(tmp_path_factory, model_dir):
    """Writes bundles over one base model, each with other settings of its generator."""
    root = tmp_path_factory.mktemp("bundles")

    def write(name: str, trained: bool = False, **changes) -> Path:
        directory = root / name
        if not directory.exists():
            config = config_of(root, model_dir, **changes)
            table = make_table(4)
            policy = open_policy(config, table)
            tuned = (lambda folder: save_tiny_llama(folder, seed=1)) if trained else None
            save_bundle(directory, config, policy, table, {}, 1, tuned)
        return directory

    return write


def config_of(root: Path, model_dir: Path, **changes) -> RunConfig:
    config = bundle_config(root, root / "cache")
    generator = config.generator.model_copy(update={"model": str(model_dir), **changes})
    # Nobody retrieves here, so that no encoder is needed.
    retrieval = RetrievalConfig(kind="bm25", encoder=None, num_candidates=5)
    return config.model_copy(update={"generator": generator, "retrieval": retrieval, "seed": 11})


async def collect(part: GeneratorPart, version: str, decoding=None, question="capital?"):
    pieces = part.generate(version, question, PASSAGES, decoding or Decoding())
    return [piece async for piece in pieces]


def load(part: GeneratorPart, directory: Path) -> str:
    """Under its own version, which it returns."""
    version = bundle_version(directory)
    part.load(version, directory)
    return version


def ask(part: GeneratorPart, version: str, **decoding) -> list[AnswerPiece]:
    return asyncio.run(collect(part, version, Decoding(**decoding)))


def test_an_answer_is_asked_for_as_evaluation_does(
    part, recorders, generator_bundles, model_dir, tmp_path
):
    version = load(part, generator_bundles("plain"))
    (engine,) = recorders.opened
    assert part.loaded() == (version,)
    assert engine.model_dir == model_dir
    pieces = ask(part, version)
    ((prompt, sampling),) = engine.asked
    config = config_of(tmp_path, model_dir).generator
    builder = PromptBuilder(config.prompt, load_tokenizer(model_dir))
    evaluated = builder.build(Question("q1", "capital?", ("Paris",)), PASSAGES)
    assert prompt == evaluated
    assert engine.prefix == builder.prefix_ids
    assert sampling == Sampling(config.max_new_tokens, 0.0, config.stop, seed=0)
    num_prompt_tokens = len(evaluated.token_ids)
    assert pieces == [
        AnswerPiece(" Pa", -0.5, 1, num_prompt_tokens, len(PASSAGES), 0, finished=False),
        AnswerPiece("ris", -1.0, 2, num_prompt_tokens, len(PASSAGES), 0, finished=True),
    ]


def test_an_answer_says_what_its_prompt_had_no_room_for(part, generator_bundles):
    version = load(part, generator_bundles("plain"))
    long = [Passage(f"p{n}", "Paris", "lies on the Seine " * (100 * n)) for n in (1, 2)]

    async def last(passages: Sequence[Passage]) -> AnswerPiece:
        pieces = part.generate(version, "capital?", passages, Decoding())
        return [piece async for piece in pieces][-1]

    whole, cut = (asyncio.run(last(passages)) for passages in (PASSAGES, long))
    assert (whole.num_passages, whole.num_cut_tokens) == (len(PASSAGES), 0)
    assert (cut.num_passages, cut.num_prompt_tokens) == (2, 200)
    assert cut.num_cut_tokens > 500
    many = asyncio.run(last([*PASSAGES, *long] * 20))
    assert 2 < many.num_passages < 20 * len([*PASSAGES, *long])


def test_versions_with_the_same_weights_share_an_engine_until_the_last_one_goes(
    part, recorders, generator_bundles
):
    first = load(part, generator_bundles("plain"))
    second = load(part, generator_bundles("longer", max_new_tokens=20))
    (engine,) = recorders.opened
    ask(part, second)
    assert engine.asked[0][1].max_new_tokens == 20
    part.drop(first)
    assert part.loaded() == (second,)
    assert not engine.closed
    with pytest.raises(OverloadedError, match=f"version {first} is still being loaded; try again"):
        ask(part, first)
    part.drop(second)
    assert engine.closed
    part.drop(second)
    load(part, generator_bundles("plain"))
    assert len(recorders.opened) == 2


def test_other_weights_or_another_engine_setting_take_another_engine(
    part, recorders, generator_bundles, model_dir
):
    load(part, generator_bundles("plain"))
    trained = load(part, generator_bundles("trained", trained=True))
    load(part, generator_bundles("shorter", max_model_len=240))
    again = load(part, generator_bundles("trained again", trained=True, max_new_tokens=20))
    first, second, third = recorders.opened
    assert second.model_dir == generator_bundles("trained").resolve() / "generator"
    assert weights_hash(second.model_dir) != weights_hash(model_dir)
    assert (first.config.max_model_len, third.config.max_model_len) == (256, 240)
    ask(part, again)
    assert len(second.asked) == 1
    part.drop(trained)
    assert not second.closed


def test_a_prefix_that_an_engine_computes_apart_is_part_of_what_it_is(
    recorders, generator_bundles, model_dir, tmp_path
):
    prompt = config_of(tmp_path, model_dir).generator.prompt
    other = prompt.model_copy(update={"instruction": "Answer the question.\n"})
    bundles = generator_bundles("plain"), generator_bundles("instructed", prompt=other)
    for backend, num_engines in (("transformers", 2), ("vllm", 3)):
        part = GeneratorPart(SETTINGS.model_copy(update={"generator_backend": backend}), recorders)
        for bundle in bundles:
            load(part, bundle)
        assert len(recorders.opened) == num_engines


def test_versions_whose_own_generators_have_other_options_have_an_engine_each(
    recorders, generator_bundles
):
    own = "examples.own_generator:SentenceGenerator"
    part = GeneratorPart(ServeSettings(bundle="unused", allow_code=(own,)), recorders)
    for number, words in enumerate(("max_words=3", "max_words=4", "max_words=4"), start=1):
        changes = {"backend": own, "options": (words,), "max_new_tokens": number}
        load(part, generator_bundles(f"own-{number}", **changes))
    assert [engine.config.options for engine in recorders.opened] == [
        ("max_words=3",),
        ("max_words=4",),
    ]


def test_closing_the_answer_closes_it_in_the_engine(part, recorders, generator_bundles):
    version = load(part, generator_bundles("plain"))

    async def leave() -> None:
        pieces = part.generate(version, "capital?", PASSAGES, Decoding())
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(leave())
    assert recorders.opened[0].num_left == 1
    ask(part, version)
    assert recorders.opened[0].num_left == 1


def test_a_failed_engine_makes_the_part_unhealthy(part, recorders, generator_bundles):
    part.check_health()
    version = load(part, generator_bundles("plain"))
    part.check_health()
    recorders.opened[0].trouble = "it burnt"
    with pytest.raises(GenerationError, match=f"engine of version {version} has failed: it burnt"):
        part.check_health()


def test_a_version_whose_engine_has_failed_is_loaded_again_with_another(
    part, recorders, generator_bundles
):
    first = load(part, generator_bundles("plain"))
    second = load(part, generator_bundles("longer", max_new_tokens=20))
    (dead,) = recorders.opened
    dead.trouble = "it burnt"
    assert part.loaded() == ()
    part.load(second, generator_bundles("longer", max_new_tokens=20))
    assert dead.closed
    assert part.loaded() == (second,)
    part.load(first, generator_bundles("plain"))
    part.check_health()
    assert set(part.loaded()) == {first, second}
    _, living = recorders.opened
    ask(part, first)
    ask(part, second)
    assert (len(dead.asked), len(living.asked)) == (0, 2)
    part.drop(first)
    assert not living.closed
    part.drop(second)
    assert living.closed


def test_a_part_counts_as_healthy_while_it_opens_another_engine(generator_bundles, recorders):
    def open_and_look(config: GeneratorConfig, model_dir: Path, prefix_ids: tuple[int, ...]):
        if recorders.opened:
            part.check_health()
        return recorders(config, model_dir, prefix_ids)

    part = GeneratorPart(SETTINGS, open_and_look)
    load(part, generator_bundles("plain"))
    recorders.opened[0].trouble = "it burnt"
    with pytest.raises(GenerationError, match="it burnt"):
        part.check_health()
    load(part, generator_bundles("plain"))
    assert len(recorders.opened) == 2
    part.check_health()


def test_an_engine_that_does_not_start_leaves_what_was_loaded(generator_bundles, recorders):
    def open_or_refuse(config: GeneratorConfig, model_dir: Path, prefix_ids: tuple[int, ...]):
        if recorders.opened:
            raise SetupError("no compiler")
        return recorders(config, model_dir, prefix_ids)

    part = GeneratorPart(SETTINGS, open_or_refuse)
    version = load(part, generator_bundles("plain"))
    with pytest.raises(SetupError, match="no compiler"):
        load(part, generator_bundles("trained", trained=True))
    assert part.loaded() == (version,)
    assert len(ask(part, version)) == 2


def test_a_base_model_with_other_weights_is_refused(part, generator_bundles, tmp_path, model_dir):
    model = save_tiny_llama(tmp_path / "model", seed=0)
    directory = generator_bundles("moved", model=str(model))
    save_tiny_llama(model, seed=1)
    with pytest.raises(CheckpointError, match=f"has weights {weights_hash(model)} here"):
        load(part, directory)


def test_a_path_that_holds_another_version_by_now_is_refused(part, recorders, generator_bundles):
    named = load(part, generator_bundles("plain"))
    part.drop(named)
    replaced = generator_bundles("longer", max_new_tokens=20)
    version = bundle_version(replaced)
    message = f"longer now contains version {version}, not {named}; restore {named} there"
    with pytest.raises(CheckpointError, match=message):
        part.load(named, replaced)
    assert part.loaded() == ()
    assert len(recorders.opened) == 1


def test_a_request_changes_what_it_sets_and_nothing_else(part, recorders, generator_bundles):
    version = load(part, generator_bundles("plain"))
    ask(part, version, max_new_tokens=3)
    ask(part, version, temperature=0.7, seed=5)
    found = [sampling for _, sampling in recorders.opened[0].asked]
    base = Sampling(max_new_tokens=12, temperature=0.0, stop=("\n",), seed=0)
    assert found == [
        Sampling(3, base.temperature, base.stop, base.seed),
        Sampling(base.max_new_tokens, 0.7, base.stop, seed=5),
    ]


def test_an_engine_is_told_whether_the_answer_is_streamed(part, recorders, generator_bundles):
    version = load(part, generator_bundles("plain"))
    ask(part, version)
    ask(part, version, streamed=True)
    assert recorders.opened[0].streamed == [False, True]


def test_a_seed_counts_only_where_something_is_drawn():
    drawn = Sampling(temperature=1.0, seed=11)
    assert decoded_so(drawn, Decoding(), 100) == drawn
    assert decoded_so(drawn, Decoding(seed=5), 100).seed == 5
    assert decoded_so(drawn, Decoding(temperature=0.0, seed=5), 100).seed == 0
    assert decoded_so(Sampling(), Decoding(seed=5), 100) == Sampling()


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        (Decoding(max_new_tokens=0), "max_new_tokens is 0"),
        (Decoding(max_new_tokens=101), "from 1 to 100 tokens"),
        (Decoding(temperature=-1.0), r"temperature is -1\.0"),
        (Decoding(temperature=math.nan), "temperature is nan"),
        (Decoding(temperature=math.inf), "temperature is inf"),
    ],
)
def test_an_impossible_decoding_is_refused(decoding, message):
    assert decoded_so(Sampling(), Decoding(max_new_tokens=100), 100).max_new_tokens == 100
    with pytest.raises(RequestError, match=message):
        decoded_so(Sampling(), decoding, 100)


def test_the_room_for_an_answer_is_what_prompt_and_model_leave(part, recorders, generator_bundles):
    version = load(part, generator_bundles("plain"))
    num_prompt_tokens = ask(part, version)[0].num_prompt_tokens
    room = 256 - num_prompt_tokens
    ask(part, version, max_new_tokens=room)
    with pytest.raises(RequestError, match=f"from 1 to {room} tokens"):
        ask(part, version, max_new_tokens=room + 1)
    assert len(recorders.opened[0].asked) == 2


def test_a_question_without_room_is_refused(part, recorders, generator_bundles):
    version = load(part, generator_bundles("plain"))
    with pytest.raises(PromptTooLongError, match="max_prompt_tokens is 200"):
        asyncio.run(collect(part, version, question="why " * 300))
    assert recorders.opened[0].asked == []


def test_the_service_decides_about_resources_and_the_bundle_about_answers():
    bundled = GeneratorConfig(
        backend="vllm", device="cuda", gpus_per_actor=1, num_actors=4, max_new_tokens=7
    )
    settings = ServeSettings(
        bundle="unused",
        generator=PartSettings(num_cpus=2, num_gpus=0, max_batch_size=5),
        generator_backend="transformers",
        threads=3,
        start_timeout_s=9,
    )
    found = engine_config(bundled, settings)
    assert (found.backend, found.device, found.batch_size) == ("transformers", "auto", 5)
    assert (found.cpus_per_actor, found.gpus_per_actor) == (2, 0)
    assert (found.threads_per_actor, found.start_timeout_s) == (3, 9)
    assert (found.max_new_tokens, found.prompt) == (7, bundled.prompt)
    chosen = engine_config(bundled, settings.model_copy(update={"generator_backend": "auto"}))
    assert chosen.backend in ("vllm", "transformers")
