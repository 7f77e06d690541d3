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
    AlternatingConfig,
    DROConfig,
    FeedbackConfig,
    FewShotExample,
    GeneratorConfig,
    JSAConfig,
    OpenRAGConfig,
    OwnTrainerConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    TrainingConfig,
    describe_validation_error,
)
from rlrag.config.fixed import FIXED, WITHOUT_EFFECT
from rlrag.errors import ConfigError
from rlrag.evaluation import significance
from rlrag.generation.pool import start
from rlrag.recipes import RECIPES
from rlrag.retrieval import hybrid
from rlrag.retrieval.dense import encoder, index
from rlrag.retrieval.vocabulary import encoder as vocabulary_encoder
from rlrag.runs import mirror, watchdog
from rlrag.selection import feature_scorer
from rlrag.training import launch
from rlrag.training.dro import imitation
from rlrag.training.feedback import trainer
from rlrag.training.learners import generator_model, optimiser
from rlrag.training.openrag import offline_stage

EXAMPLE = FewShotExample(title="t", text="a text", question="q?", answer="a")
Path = tuple[str, ...]


def saved(**sections: Any) -> str:
    """The default configuration's JSON with some keys set."""
    values = json.loads(RunConfig().to_json())
    for name, value in sections.items():
        if isinstance(value, dict):
            other = name == "algorithm" and value.get("name", "dro") != "dro"
            values[name] = value if other else values[name] | value
        else:
            values[name] = value
    return json.dumps(values)


def training_retriever(retrieval: Mapping[str, Any] | None = None, **sections: Any) -> str:
    """The default configuration's JSON with the dense retriever trained, and some keys set."""
    algorithm = {"name": "openrag", **sections.pop("algorithm", {})}
    return saved(retrieval={"kind": "dense", **(retrieval or {})}, algorithm=algorithm, **sections)


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
    assert len(digests) == len(fields) + 1 > 50
    assert config.digest() == RunConfig().digest()
    assert len(config.digest()) == 16


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (saved(seeed=1), "unknown field 'seeed'; did you mean 'seed'?"),
        (
            saved(algorithm={"num_sample": 4}),
            "field 'algorithm.num_sample'; did you mean 'num_samples'?",
        ),
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
    *path, field = name.split(".")
    values = json.loads(saved())
    if path[0] not in values:
        del values["algorithm"]  # had this section
    section = values
    for part in path:
        section = section.setdefault(part, {})
    section[field] = value
    return json.dumps(values)


@pytest.mark.parametrize(("name", "value"), FIXED.items())
def test_a_stored_setting_that_became_a_constant_is_read_at_its_value_alone(name, value):
    assert RunConfig.from_json(stored(name, value)) == RunConfig()
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(stored(name, another(value, type(value))), "DIR/config.json")
    shown = value if isinstance(value, bool) else f"{value:g}"
    said = f"{name} is no setting any more and fixed at {shown}; leave it out"
    assert str(caught.value) == f"DIR/config.json: {said}"


@pytest.mark.parametrize("value", [0, 1])
def test_a_stored_setting_whose_values_do_the_same_now_is_read_at_each(value):
    [name] = WITHOUT_EFFECT
    assert RunConfig.from_json(stored(name, value)) == RunConfig()
    section, field = name.split(".")
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({section: {field: value}})
    said = f"{name} is no setting any more; leave it out"
    assert describe_validation_error(caught.value) == said


@pytest.mark.parametrize(
    ("name", "value"),
    [("retrieval.shard_cpus", True), ("generator.prompt.score_end_of_answer", 0)],
)
def test_true_and_false_are_no_numbers(name, value):
    with pytest.raises(ConfigError, match="is no setting any more"):
        RunConfig.from_json(stored(name, value))


def test_settings_that_became_constants_are_fixed_at_the_values_that_are_used():
    used = {
        "retrieval.encode_batch_size": encoder.BATCH_SIZE,
        "retrieval.vocabulary_top_k": vocabulary_encoder.TOP_K,
        "retrieval.ivf_lists": index.IVF_LISTS,
        "retrieval.ivf_probes": index.IVF_PROBES,
        "retrieval.pq_bytes": index.PQ_BYTES,
        "retrieval.shard_cpus": shard_actors.CPUS,
        "retrieval.shard_timeout_s": shard_actors.TIMEOUT_S,
        "selector.hidden_size": feature_scorer.HIDDEN_SIZE,
        "selector.projection_size": feature_scorer.PROJECTION_SIZE,
        "selector.imitation_learning_rate": imitation.LEARNING_RATE,
        "generator.max_restarts": start.MAX_RESTARTS,
        "generator.prompt.score_end_of_answer": False,
        "generator_training.lora_alpha": generator_model.LORA_ALPHA,
        "generator_training.weight_decay": optimiser.WEIGHT_DECAY,
        "generator_training.max_grad_norm": optimiser.MAX_GRAD_NORM,
        "training.collective_timeout_s": launch.COLLECTIVE_TIMEOUT_S,
        "training.weight_decay": optimiser.WEIGHT_DECAY,
        "training.max_grad_norm": optimiser.MAX_GRAD_NORM,
        "training.stall_report_s": watchdog.PERIOD_S,
        "evaluation.num_bootstrap": significance.NUM_RESAMPLES,
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
            saved(algorithm={"weighting": "raw"}),
            "algorithm.baseline 'mean' does not fit algorithm.weighting 'raw'; use one of 'none', "
            "'leave_one",
        ),
        (
            saved(algorithm={"baseline": "leave_one_out"}),
            "does not fit algorithm.weighting 'self_normalised'; use one of 'none', 'mean'",
        ),
        (
            saved(algorithm={"weighting": "raw", "baseline": "leave_one_out", "num_samples": 1}),
            "'leave_one_out' needs another sample; raise algorithm.num_samples to 2",
        ),
        (
            saved(
                algorithm={"weighting": "raw", "baseline": "leave_one_out", "replacement": False}
            ),
            "'leave_one_out' needs independent samples; use algorithm.replacement True",
        ),
        (
            saved(algorithm={"passes": 2}),
            "algorithm.baseline 'mean' is unbiased on-policy only; with algorithm.passes 2 and "
            "algorithm.refresh_every 1 set algorithm.clip_ratio, or use baseline 'none'",
        ),
        (
            saved(algorithm={"refresh_every": None}),
            "algorithm.passes 1 and algorithm.refresh_every None set",
        ),
        (
            saved(algorithm={"clip_ratio": 1.0}),
            "algorithm.clip_ratio = 1.0: Input should be less than 1",
        ),
        (
            saved(algorithm={"parts": []}),
            "algorithm.parts is empty; name what is to be trained",
        ),
        (
            saved(algorithm={"parts": ["selector", "selector"]}),
            "algorithm.parts is ['selector', 'selector']; name each part once",
        ),
        (
            saved(algorithm={"name": "sft", "num_samples": 4}),
            "unknown field 'algorithm.num_samples'; valid fields: name",
        ),
        (
            saved(algorithm={"name": "dor"}),
            "algorithm.name 'dor' is unknown; did you mean 'dro'?",
        ),
        (
            saved(algorithm={"name": "my.trainers:Mine", "parts": []}),
            "algorithm.parts is empty; name what is to be trained",
        ),
        (
            saved(algorithm={"overlap": True, "passes": 2, "baseline": "none"}),
            "algorithm.overlap draws across the end of an E-step, so that algorithm.passes 2",
        ),
        (
            saved(algorithm={"overlap": True}),
            "algorithm.overlap draws with a policy that is one update old and algorithm.baseline "
            "'mean' is unbiased on-policy only; set algorithm.clip_ratio, or use baseline 'none'",
        ),
        (
            saved(algorithm={"name": "openrag"}),
            "algorithm.name 'openrag' trains the retriever, but retrieval.kind 'hybrid' has "
            "nothing to train; use dense or semi_parametric",
        ),
        (
            training_retriever({"kind": "bm25"}),
            "retrieval.kind 'bm25' has nothing to train; use dense or semi_parametric",
        ),
        (
            training_retriever(algorithm={"offline_epochs": 0, "online_epochs": 0}),
            "algorithm.offline_epochs and algorithm.online_epochs are both 0, so that nothing",
        ),
        (
            training_retriever(algorithm={"vectors": "one_whole", "loss": "kl"}),
            "algorithm.vectors 'one_whole' belongs to algorithm.loss 'contrastive'",
        ),
        (
            saved(evaluation={"systems": ["tuned_retriever"]}),
            "evaluation.systems asks for tuned_retriever, but algorithm.name 'dro' trains no",
        ),
        (
            saved(retrieval={"kind": "bm25", "encoder": None}, evaluation={"systems": ["hybrid"]}),
            "evaluation.systems asks for hybrid, but retrieval.encoder is unset",
        ),
        (
            training_retriever(algorithm={"labels": "gold", "loss": "kl"}),
            "algorithm.loss 'kl' distils the generator's likelihoods, which algorithm.labels "
            "'gold' does without; use loss contrastive",
        ),
        (
            training_retriever(algorithm={"first_stage": "bm25"}),
            "'bm25' needs a BM25 index; set retrieval.bm25_scores True",
        ),
        (
            training_retriever(algorithm={"first_stage": "bag_of_tokens"}),
            "'bag_of_tokens' is searched by vectors over a vocabulary, which retrieval.kind",
        ),
        (
            training_retriever(algorithm={"tied": False}),
            "algorithm.tied False is for semi_parametric; a dense encoder reads questions and",
        ),
        (
            training_retriever(algorithm={"num_online": 4}, environment={"num_selected": 5}),
            "algorithm.num_online 4 finds fewer passages than environment.num_selected 5 shows",
        ),
        (
            training_retriever(algorithm={"num_offline": 1}),
            "algorithm.num_offline = 1: Input should be greater",
        ),
        (
            training_retriever(algorithm={"temperature": 0}),
            "algorithm.temperature = 0: Input should be greater",
        ),
        (
            training_retriever(algorithm={"rounds": 3}),
            "unknown field 'algorithm.rounds'; valid fields: contribution_margin",
        ),
        (
            training_retriever(algorithm={"name": "alternating", "selection": {"parts": []}}),
            "algorithm.parts is empty; name what is to be trained",
        ),
        (
            saved(
                algorithm={"name": "feedback", "log": "log.sqlite"},
                selector={"kind": "listwise_lm", "imitation_steps": 5},
            ),
            "'feedback' starts from selector.weights, but selector.imitation_steps is 5",
        ),
        (saved(algorithm={"name": "feedback"}), "algorithm.log = "),
        (
            saved(selector={"imitation_steps": 5}),
            "selector.imitation_steps is 5, but selector.kind 'features' starts from the",
        ),
        (
            saved(generator={"max_model_len": 1030}),
            "1030 is shorter than max_prompt_tokens 1024 plus max_new_tokens 12",
        ),
        (saved(retrieval={"encoder": None}), "'hybrid' needs retrieval.encoder; name one"),
        (
            saved(algorithm={"num_samples": 0}),
            "algorithm.num_samples = 0: Input should be greater than or",
        ),
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
                algorithm={"name": "feedback", "log": "log.sqlite", "held_back_share": 0},
                training={"patience": 2},
            ),
            "training.patience 2 counts validations, but algorithm.held_back_share is 0, so",
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
        {"algorithm": {"passes": 3, "clip_ratio": 0.2}},
        {"algorithm": {"refresh_every": None, "baseline": "none"}},
        {"algorithm": {"weighting": "raw", "baseline": "leave_one_out"}},
        {"algorithm": {"num_samples": 1}},
        {"algorithm": {"clip_ratio": 0.2, "overlap": True}},
        {"algorithm": {"name": "sft"}},
        {
            "algorithm": {
                "baseline": "none",
                "overlap": True,
                "parts": ["generator", "selector"],
            },
        },
        {"selector": {"kind": "listwise_lm", "imitation_steps": 5}},
        {"retrieval": {"kind": "dense"}, "algorithm": {"name": "openrag"}},
        {
            "retrieval": {"kind": "semi_parametric", "bm25_scores": True},
            "algorithm": {
                "name": "openrag",
                "first_stage": "bm25",
                "tied": False,
                "loss": "kl",
                "num_online": 10,
            },
        },
        {
            "retrieval": {"kind": "dense"},
            "algorithm": {
                "name": "alternating",
                "rounds": 2,
                "retriever": {"labels": "gold", "offline_epochs": 0},
                "selection": {"parts": ["selector", "generator"]},
            },
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
    assert RunConfig(algorithm=DROConfig(parts=parts)).trains_generator is trains


@pytest.mark.parametrize(
    ("algorithm", "parts", "in_turns"),
    [
        ({}, ("selector",), False),
        ({"name": "sft"}, ("generator",), False),
        ({"name": "openrag"}, ("retriever",), False),
        ({"name": "jsa"}, ("retriever",), False),
        ({"name": "jsa", "train_generator": True}, ("retriever", "generator"), False),
        ({"name": "feedback", "log": "log.sqlite"}, ("selector",), False),
        ({"name": "alternating"}, ("retriever", "selector"), True),
        (
            {"name": "alternating", "selection": {"parts": ["generator"]}},
            ("retriever", "generator"),
            True,
        ),
        ({"name": "my.trainers:Mine", "parts": ["generator"]}, ("generator",), False),
    ],
)
def test_a_run_says_what_it_trains_and_whether_in_turns(algorithm, parts, in_turns):
    config = RunConfig.from_json(saved(retrieval={"kind": "dense"}, algorithm=algorithm))
    assert config.algorithm.parts == parts
    assert config.trains_retriever is ("retriever" in parts)
    assert config.trains_selector is ("selector" in parts)
    assert config.trains_generator is ("generator" in parts)
    assert config.trains_in_turns is in_turns


def former(**sections: Any) -> str:
    """A configuration as it was written before `algorithm` was one section."""
    values = json.loads(saved(retrieval={"kind": "dense"}))
    del values["algorithm"]
    values["training"] |= sections.pop("training", {})
    return json.dumps(values | sections)


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        (former(dro={"num_samples": 3}), {"name": "dro", "num_samples": 3}),
        (
            former(
                training={"parts": ["generator", "selector"], "overlap": True},
                dro={"baseline": "none"},
                generator_training={"max_staleness": 1},
            ),
            {"parts": ["generator", "selector"], "baseline": "none", "overlap": True},
        ),
        (
            former(training={"objective": "sft", "parts": ["generator"]}, dro={"num_samples": 3}),
            {"name": "sft"},
        ),
        (
            former(
                training={"parts": ["retriever"]}, openrag={"offline_epochs": 0, "num_online": 9}
            ),
            {"name": "openrag", "offline_epochs": 0, "num_online": 9},
        ),
        (
            former(
                training={"objective": "jsa", "parts": ["retriever", "generator"]},
                jsa={"mis_steps": 5},
            ),
            {"name": "jsa", "train_generator": True, "mis_steps": 5},
        ),
        (
            former(training={"experience": "log.sqlite"}, off_policy={"num_epochs": 3}),
            {"name": "feedback", "log": "log.sqlite", "num_epochs": 3},
        ),
        (
            former(
                training={"parts": ["retriever", "selector"], "rounds": 3},
                dro={"num_samples": 3},
                openrag={"num_offline": 7},
            ),
            {
                "name": "alternating",
                "rounds": 3,
                "retriever": {"num_offline": 7},
                "selection": {"parts": ["selector"], "num_samples": 3},
            },
        ),
        (
            former(training={"objective": "my.trainers:Mine", "options": ["a=1"]}),
            {"name": "my.trainers:Mine", "options": ["a=1"]},
        ),
    ],
)
def test_a_file_of_an_earlier_version_loads_and_says_the_new_form(text, algorithm, caplog):
    sections = {"generator_training": json.loads(text)["generator_training"]}
    config = RunConfig.from_json(
        saved(retrieval={"kind": "dense"}, algorithm=algorithm, **sections)
    )
    assert RunConfig.from_json(text, "old.json") == config
    (record,) = caplog.records
    assert record.getMessage().startswith("old.json has the form of an earlier version")
    assert "'algorithm': {" in record.getMessage()
    RunConfig.from_json(config.to_json())
    assert len(caplog.records) == 1  # the new form is nothing to talk about


@pytest.mark.parametrize("name", [[], {}, 3, None])
def test_a_name_that_is_no_text_is_refused_like_an_unknown_one(name):
    with pytest.raises(ConfigError, match=r"algorithm\.name = "):
        RunConfig.from_json(saved(algorithm={"name": name}))


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"objective": 3}},
        {"training": {"objective": []}},
        {"training": {"parts": 3}},
        {"training": {}, "openrag": {"stages": 3}},
    ],
)
def test_an_earlier_form_with_values_of_other_types_is_refused(sections):
    with pytest.raises(ConfigError, match="unknown field"):
        RunConfig.from_json(former(**sections))


def test_several_problems_are_named_together():
    with pytest.raises(ConfigError, match=r"algorithm\.num_samples = 0.*; unknown field 'seeed'"):
        RunConfig.from_json(saved(algorithm={"num_samples": 0}, seeed=1))


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
    sections = [value for value in vars(RunConfig()).values() if isinstance(value, BaseModel)]
    sections += [AlternatingConfig(), OpenRAGConfig(), JSAConfig(), SFTConfig()]
    sections += [FeedbackConfig(log="l"), OwnTrainerConfig(name="a:B")]
    for section in sections:
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
