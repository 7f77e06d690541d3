"""Configurations load back as they were saved, and what cannot be is refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rlrag import shard_actors
from rlrag.config import (
    DROConfig,
    FewShotExample,
    GeneratorConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    TrainingConfig,
    describe_validation_error,
)
from rlrag.config.fixed import FIXED
from rlrag.errors import ConfigError
from rlrag.recipes import RECIPES
from rlrag.retrieval import hybrid
from rlrag.retrieval.dense import index
from rlrag.runs import mirror
from rlrag.training.feedback import trainer
from rlrag.training.openrag import offline_stage

EXAMPLE = FewShotExample(title="t", text="a text", question="q?", answer="a")
Path = tuple[str, ...]


def saved(**sections: Any) -> str:
    """The default configuration's JSON with some keys set."""
    values = json.loads(RunConfig().to_json())
    for name, value in sections.items():
        if isinstance(value, dict):
            values[name].update(value)
        else:
            values[name] = value
    return json.dumps(values)


def training_retriever(retrieval: Mapping[str, Any] | None = None, **sections: Any) -> str:
    """The default configuration's JSON with the dense retriever trained, and some keys set."""
    training = {"parts": ["retriever"], **sections.pop("training", {})}
    return saved(retrieval={"kind": "dense", **(retrieval or {})}, training=training, **sections)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_loads_back_to_an_equal_configuration(recipe):
    config = RECIPES[recipe]()
    text = config.to_json()
    loaded = RunConfig.from_json(text)
    assert loaded == config
    assert loaded.to_json() == text
    assert loaded.digest() == config.digest()
    assert config.recipe == recipe
    assert text.endswith("}\n")


@settings(max_examples=60)
@given(
    learning_rate=st.floats(min_value=1e-300, max_value=1e300),
    instruction=st.text(),
    stop=st.lists(st.text()).map(tuple),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
    logp_weight=st.floats(allow_nan=False, allow_infinity=False).filter(bool),
)
def test_any_value_survives_the_file(learning_rate, instruction, stop, seed, logp_weight):
    config = RunConfig(
        seed=seed,
        generator=GeneratorConfig(
            stop=stop, prompt=PromptConfig(instruction=instruction, few_shot=(EXAMPLE,))
        ),
        reward=RewardConfig(weights=(logp_weight,)),
        training=TrainingConfig(learning_rate=learning_rate, loggers=()),
    )
    assert RunConfig.from_json(config.to_json()) == config


def leaves(section: BaseModel, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """Every field below a section: path, value and annotation."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value, field.annotation


def another(value: Any, annotation: Any) -> Any:
    """A value that differs; it need not agree with the other fields."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        choices = [choice for choice in get_args(annotation) if isinstance(choice, str)]
        return next((choice for choice in choices if choice != value), f"{value}x")
    if isinstance(value, tuple):
        return value[1:] if value else (EXAMPLE,)
    assert value is None
    return () if "tuple" in str(annotation) else "x" if str in get_args(annotation) else 7


def changed(section: BaseModel, path: Path, value: Any) -> BaseModel:
    name, *rest = path
    inner = changed(getattr(section, name), tuple(rest), value) if rest else value
    return section.model_copy(update={name: inner})


def test_the_digest_changes_with_every_field():
    config = RunConfig()
    fields = list(leaves(config))
    variants = [changed(config, path, another(value, kind)) for path, value, kind in fields]
    digests = {config.digest(), *(variant.digest() for variant in variants)}
    assert len(digests) == len(fields) + 1 > 100
    assert config.digest() == RunConfig().digest()
    assert len(config.digest()) == 16


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (saved(seeed=1), "unknown field 'seeed'; did you mean 'seed'?"),
        (saved(dro={"num_sample": 4}), "field 'dro.num_sample'; did you mean 'num_samples'?"),
        (
            saved(generator={"prompt": {"instrution": ""}}),
            "unknown field 'generator.prompt.instrution'; did you mean 'instruction'?",
        ),
        (
            saved(generator={"prompt": {"few_shot": [{**EXAMPLE.model_dump(), "anser": "b"}]}}),
            "unknown field 'generator.prompt.few_shot.0.anser'; did you mean 'answer'?",
        ),
        (
            saved(reward={"xyz": 1}),
            "unknown field 'reward.xyz'; valid fields: functions, golden_answers, judge",
        ),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(text, sentence):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: unknown field")
    assert sentence in str(caught.value)


def stored(name: str, value: object) -> str:
    """The JSON of a configuration that still has this setting."""
    section, field = name.split(".")
    return saved(**{section: {field: value}})


@pytest.mark.parametrize(("name", "value"), FIXED.items())
def test_a_stored_setting_that_became_a_constant_is_read_at_its_value_alone(name, value):
    assert RunConfig.from_json(stored(name, value)) == RunConfig()
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(stored(name, value + 1), "DIR/config.json")
    said = f"{name} is no setting any more and fixed at {value:g}; leave it out"
    assert str(caught.value) == f"DIR/config.json: {said}"


def test_settings_that_became_constants_are_fixed_at_the_values_that_are_used():
    used = {
        "retrieval.hnsw_links": index.HNSW_LINKS,
        "retrieval.hnsw_search_depth": index.HNSW_SEARCH_DEPTH,
        "retrieval.shard_restarts": shard_actors.MAX_RESTARTS,
        "retrieval.rrf_k": hybrid.RRF_K,
        "off_policy.min_ess": trainer.MIN_ESS,
        "off_policy.confidence": trainer.CONFIDENCE,
        "openrag.min_auc": offline_stage.MIN_AUC,
        "mirror.timeout_s": mirror.TIMEOUT_S,
        "mirror.max_attempts": mirror.MAX_ATTEMPTS,
    }
    assert used == FIXED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            saved(environment={"num_selected": 11}),
            "environment.num_selected is 11 but retrieval.num_candidates only 10; pick",
        ),
        (saved(reward={"weights": [1, 2]}), "functions has 1 entries and reward.weights 2; give"),
        (saved(reward={"weights": [0.0]}), "all zero; at least one"),
        (
            saved(training={"launcher": "local"}, generator={"backend": "vllm"}),
            "'local' runs without vLLM; use generator.backend transformers",
        ),
        (
            saved(training={"launcher": "local", "num_workers": 2}),
            "'local' is one process; set training.num_workers to 1",
        ),
        (
            saved(training={"batch_size": 2, "num_workers": 3}),
            "batch_size 2 leaves some of training.num_workers 3 without a question; use fewer",
        ),
        (
            saved(dro={"weighting": "raw"}),
            "dro.baseline 'mean' does not fit dro.weighting 'raw'; use one of 'none', 'leave_one",
        ),
        (
            saved(dro={"baseline": "leave_one_out"}),
            "does not fit dro.weighting 'self_normalised'; use one of 'none', 'mean'",
        ),
        (
            saved(dro={"weighting": "raw", "baseline": "leave_one_out", "num_samples": 1}),
            "'leave_one_out' needs another sample; raise dro.num_samples to 2",
        ),
        (
            saved(dro={"weighting": "raw", "baseline": "leave_one_out", "replacement": False}),
            "'leave_one_out' needs independent samples; use dro.replacement True",
        ),
        (
            saved(dro={"passes": 2}),
            "dro.baseline 'mean' is unbiased on-policy only; with dro.passes 2 and "
            "dro.refresh_every 1 set dro.clip_ratio, or use baseline 'none'",
        ),
        (saved(dro={"refresh_every": None}), "dro.passes 1 and dro.refresh_every None set"),
        (saved(dro={"clip_ratio": 1.0}), "dro.clip_ratio = 1.0: Input should be less than 1"),
        (
            saved(training={"parts": []}),
            "training.parts is empty; train 'retriever', 'selector', 'generator' or several",
        ),
        (
            saved(training={"objective": "sft"}),
            "'sft' trains the generator alone; set training.parts generator",
        ),
        (
            saved(training={"objective": "sft", "parts": ["selector", "generator"]}),
            "'sft' trains the generator alone; set training.parts generator",
        ),
        (
            saved(training={"overlap": True}),
            "training.overlap draws with a policy that is one update old and dro.baseline 'mean' "
            "is unbiased on-policy only; set dro.clip_ratio, or use baseline 'none'",
        ),
        (
            saved(
                dro={"baseline": "none"},
                training={"overlap": True, "parts": ["selector", "generator"]},
            ),
            "generator weights that are one version old; set generator_training.max_staleness to 1",
        ),
        (
            saved(training={"parts": ["retriever"]}),
            "training.parts names the retriever, but retrieval.kind 'hybrid' has nothing to train; "
            "use dense or semi_parametric",
        ),
        (
            training_retriever({"kind": "bm25"}),
            "retrieval.kind 'bm25' has nothing to train; use dense or semi_parametric",
        ),
        (
            training_retriever(openrag={"stages": []}),
            "openrag.stages is []; name offline, online or both in this order",
        ),
        (
            training_retriever(openrag={"stages": ["online", "offline"]}),
            "openrag.stages is ['online', 'offline']; name offline, online or both in this order",
        ),
        (
            saved(evaluation={"systems": ["tuned_retriever"]}),
            "evaluation.systems asks for tuned_retriever, but training.parts trains no retriever",
        ),
        (
            saved(retrieval={"kind": "bm25", "encoder": None}, evaluation={"systems": ["hybrid"]}),
            "evaluation.systems asks for hybrid, but retrieval.encoder is unset",
        ),
        (
            training_retriever(openrag={"labels": "gold", "loss": "kl"}),
            "openrag.loss 'kl' distils the generator's likelihoods, which openrag.labels 'gold' "
            "does without; use loss contrastive",
        ),
        (
            training_retriever(openrag={"first_stage": "bm25"}),
            "'bm25' needs a BM25 index; set retrieval.bm25_scores True",
        ),
        (
            training_retriever(openrag={"first_stage": "bag_of_tokens"}),
            "'bag_of_tokens' is searched by vectors over a vocabulary, which retrieval.kind",
        ),
        (
            training_retriever(openrag={"tied": False}),
            "openrag.tied False is for semi_parametric; a dense encoder reads questions and",
        ),
        (
            training_retriever(openrag={"num_online": 4}, environment={"num_selected": 5}),
            "openrag.num_online 4 finds fewer passages than environment.num_selected 5 shows",
        ),
        (saved(openrag={"num_offline": 1}), "openrag.num_offline = 1: Input should be greater"),
        (saved(openrag={"temperature": 0}), "openrag.temperature = 0: Input should be greater"),
        (
            saved(training={"rounds": 2}),
            "training.rounds is 2, but only a run that trains the retriever and another part takes "
            "turns; set it to 1",
        ),
        (
            training_retriever(training={"parts": ["retriever"], "rounds": 3}),
            "training.rounds is 3, but only a run that trains the retriever and another part takes "
            "turns; set it to 1",
        ),
        (
            training_retriever(training={"parts": ["retriever", "retriever"]}),
            "training.parts is ['retriever', 'retriever']; name each part once",
        ),
        (
            training_retriever(training={"parts": ["retriever", "generator"], "objective": "sft"}),
            "training.objective 'sft' takes no turns with the retriever; use dro",
        ),
        (
            saved(selector={"imitation_steps": 5}),
            "selector.imitation_steps is 5, but selector.kind 'features' starts from the",
        ),
        (
            saved(generator={"max_model_len": 1030}),
            "1030 is shorter than max_prompt_tokens 1024 plus max_new_tokens 12",
        ),
        (saved(retrieval={"encoder": None}), "'hybrid' needs retrieval.encoder; name one"),
        (saved(dro={"num_samples": 0}), "dro.num_samples = 0: Input should be greater than or"),
        (saved(training={"learning_rate": float("nan")}), "training.learning_rate = nan"),
        (saved(generator={"request_timeout_s": float("inf")}), "request_timeout_s = inf"),
        *(
            (
                saved(training={"profile_steps": steps}),
                f"training.profile_steps is {steps!r}; give the first and the last step",
            )
            for steps in ("0:3", "4:3", "4", "4-5", "1:2:3", "-1:2", " 1:2", "١:٢", "1:2\n")
        ),
        (saved(training={"metrics_port": 65536}), "training.metrics_port = 65536: Input should"),
        ("[1]", "the configuration = [1]"),
        (
            saved(data={"num_validation_questions": 0}, training={"patience": 2}),
            "training.patience 2 counts validations, but data.num_validation_questions is 0, so",
        ),
        (
            saved(
                off_policy={"held_back_share": 0},
                training={"experience": "log.sqlite", "patience": 2},
            ),
            "training.patience 2 counts validations, but off_policy.held_back_share is 0, so",
        ),
        (saved(mirror={"uri": "s3://[bucket"}), "mirror.uri is no address (Invalid IPv6 URL)"),
        (saved(cache_dir=""), "cache_dir = '': String should have at least 1 character"),
        (saved(data={"passage_words": 10**10}), "data.passage_words = 10000000000: Input should"),
        ('{"seed": 1', "is not JSON"),
        ('{"seed": ' + "1" * 5000 + "}", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_contradictions_and_bad_values_give_one_clear_sentence(text, words):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text, "config.json")
    message = str(caught.value)
    assert words in message
    assert message.startswith("config.json")
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    "sections",
    [
        {"dro": {"passes": 3, "clip_ratio": 0.2}},
        {"dro": {"refresh_every": None, "baseline": "none"}},
        {"dro": {"weighting": "raw", "baseline": "leave_one_out"}},
        {"dro": {"num_samples": 1}},
        {"dro": {"clip_ratio": 0.2}, "training": {"overlap": True}},
        {"training": {"parts": ["generator"], "objective": "sft"}},
        {
            "dro": {"baseline": "none"},
            "generator_training": {"max_staleness": 1},
            "training": {"overlap": True, "parts": ["generator", "selector"]},
        },
        {"selector": {"kind": "listwise_lm", "imitation_steps": 5}},
        {"retrieval": {"kind": "dense"}, "training": {"parts": ["retriever"]}},
        {
            "retrieval": {"kind": "semi_parametric", "bm25_scores": True},
            "openrag": {"first_stage": "bm25", "tied": False, "loss": "kl", "num_online": 2},
            "training": {"parts": ["retriever"]},
        },
        {
            "retrieval": {"kind": "dense"},
            "openrag": {"labels": "gold", "stages": ["online"]},
            "training": {"parts": ["retriever", "selector", "generator"], "rounds": 2},
        },
    ],
)
def test_what_agrees_is_accepted_and_loads_back(sections):
    config = RunConfig.from_json(saved(**sections))
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("settings", "on_policy"),
    [
        ({}, True),
        ({"passes": 2}, False),
        ({"refresh_every": 2}, False),
        ({"refresh_every": None}, False),
    ],
)
def test_on_policy_is_one_pass_over_the_newest_samples(settings, on_policy):
    assert DROConfig(baseline="none", **settings).on_policy is on_policy


@pytest.mark.parametrize(
    ("parts", "trains"),
    [(("selector",), False), (("generator",), True), (("generator", "selector"), True)],
)
def test_a_run_says_whether_it_trains_the_generator(parts, trains):
    assert RunConfig(training=TrainingConfig(parts=parts)).trains_generator is trains


@pytest.mark.parametrize(
    ("parts", "trains", "in_turns"),
    [
        (("selector",), False, False),
        (("retriever",), True, False),
        (("retriever", "selector"), True, True),
        (("generator", "retriever"), True, True),
    ],
)
def test_a_run_says_whether_it_trains_the_retriever_and_in_turns(parts, trains, in_turns):
    config = RunConfig.from_json(
        saved(retrieval={"kind": "dense"}, training={"parts": list(parts)})
    )
    assert config.trains_retriever is trains
    assert config.trains_in_turns is in_turns


def test_several_problems_are_named_together():
    with pytest.raises(ConfigError, match=r"dro\.num_samples = 0.*; unknown field 'seeed'"):
        RunConfig.from_json(saved(dro={"num_samples": 0}, seeed=1))


def test_a_section_that_is_built_alone_names_its_fields_from_the_root():
    with pytest.raises(ValidationError) as caught:
        TrainingConfig(batch_size=0)
    assert describe_validation_error(caught.value).startswith("training.batch_size = 0: ")
    with pytest.raises(ValidationError) as caught:
        FewShotExample(**EXAMPLE.model_dump(), anser="b")
    assert describe_validation_error(caught.value) == (
        "unknown field 'generator.prompt.few_shot.anser'; did you mean 'answer'?"
    )


@pytest.mark.parametrize(
    ("steps", "numbers"), [(None, []), ("1:1", [1]), ("10:13", [10, 11, 12, 13])]
)
def test_both_ends_of_the_profiled_steps_are_profiled(steps, numbers):
    assert list(TrainingConfig(profile_steps=steps).profiled_steps) == numbers


def test_configurations_do_not_change():
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.generator.prompt.instruction = "x"
    assert hash(config.dro) == hash(DROConfig())


def test_every_field_says_what_it_means():
    for section in (value for value in vars(RunConfig()).values() if isinstance(value, BaseModel)):
        for name, field in type(section).model_fields.items():
            assert field.description or isinstance(getattr(section, name), BaseModel), name


def test_importing_the_configuration_imports_nothing_heavy():
    script = (
        "import sys, rlrag.config, rlrag.recipes; "
        "print([n for n in ('torch', 'transformers', 'ray', 'vllm', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
