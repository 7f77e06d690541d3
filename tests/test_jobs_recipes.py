"""Recipes are complete, valid and comparable: what should be equal between them is."""

from __future__ import annotations

import inspect

import pytest

from rlrag.config import RunConfig, SFTConfig
from rlrag.recipes import RECIPES
from rlrag.training.learners.optimiser import WEIGHT_DECAY

CO_TRAINED = ("nq", "hotpotqa")


def differences(left: RunConfig, right: RunConfig) -> set[str]:
    """Paths of the fields that differ, sections joined by dots."""
    found = set()
    for section, fields in left.model_dump().items():
        other = right.model_dump()[section]
        if isinstance(fields, dict):
            found |= {f"{section}.{name}" for name in fields if fields[name] != other[name]}
        elif fields != other:
            found.add(section)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_bears_its_name(name):
    config = RECIPES[name]()
    assert RunConfig.model_validate(config.model_dump()) == config
    assert config.recipe == name
    assert inspect.getdoc(RECIPES[name]).splitlines()[0].endswith(".")


def test_the_recipes_of_the_comparison_are_there():
    halves = {f"{data}-{system}" for data in CO_TRAINED for system in ("dro", "sft")}
    halves |= {f"{data}-dro-{part}" for data in CO_TRAINED for part in ("selector", "generator")}
    assert halves <= RECIPES.keys()


@pytest.mark.parametrize("data", CO_TRAINED)
@pytest.mark.parametrize("half", ["dro-selector", "dro-generator", "sft"])
def test_each_half_differs_from_the_whole_in_what_it_trains_alone(data, half):
    whole, part = RECIPES[f"{data}-dro"](), RECIPES[f"{data}-{half}"]()
    if half == "sft":
        assert part.algorithm == SFTConfig()
        part_of_whole = part.model_copy(update={"algorithm": whole.algorithm})
        assert differences(whole, part_of_whole) == {"recipe"}
    else:
        assert differences(whole, part) == {"recipe", "algorithm.parts"}
    assert part.algorithm.parts == (("selector",) if half == "dro-selector" else ("generator",))
    assert whole.algorithm.parts == ("selector", "generator")
    assert set(part.systems) <= set(whole.systems)


FIXED = ("retriever_first", "retriever_reversed", "retriever_order")
FIXED_TUNED = ("tuned_generator_first", "tuned_generator_reversed", "tuned_generator")


@pytest.mark.parametrize("name", RECIPES)
def test_every_table_has_the_choices_that_need_no_training(name):
    """A retriever alone picks by itself; one passage has no order; the papers' choose theirs."""
    config = RECIPES[name]()
    if config.algorithm.parts == ("retriever",):
        assert {"original_retriever", "tuned_retriever"} <= set(config.systems)
        return
    orders = FIXED if config.environment.num_selected > 1 else FIXED[-1:]
    assert {*orders, "trained"} <= set(config.systems)
    if config.trains_generator:
        # Behind a generator that is all that was trained, the retriever's order is `trained`.
        tuned = FIXED_TUNED if config.environment.num_selected > 1 else FIXED_TUNED[-1:]
        alone = config.algorithm.parts == ("generator",)
        assert set(tuned[:2] if alone else tuned) <= set(config.systems)
        assert ("tuned_selector" in config.systems) == config.trains_selector


def test_fewer_parts_ask_for_fewer_systems():
    config = RunConfig(environment={"num_selected": 2}, retrieval={"kind": "dense"})
    assert config.systems == ("no_retrieval", "random_order", *FIXED, "trained", "oracle")
    assert RunConfig(evaluation={"systems": []}).systems == ()
    assert RunConfig(evaluation={"systems": ["trained"]}).systems == ("trained",)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("-paper")])
def test_the_small_reader_is_shown_the_best_passage_last(name):
    config = RECIPES[name]()
    # A path ends with what the question is about.
    order = "as_picked" if config.environment.looks_further else "best_last"
    assert config.generator.prompt.passage_order == order


def test_hotpotqa_shows_three_passages():
    assert RECIPES["hotpotqa-dro"]().environment.num_selected == 3
    assert RECIPES["nq-dro"]().environment.num_selected == 2


def test_the_papers_settings():
    """arXiv 2505.03075, section 6.4; the length of an M-step is that of its released scripts."""
    config = RECIPES["dro-paper"]()
    assert config.retrieval.num_candidates == 20
    assert config.environment.num_selected == 5
    assert config.dro.num_samples == 8
    assert config.training.num_epochs == 5
    assert config.training.learning_rate == config.generator_training.learning_rate == 1e-5
    assert WEIGHT_DECAY == 0.01
    assert config.training.batch_size == 128
    assert (config.dro.refresh_every, config.dro.passes) == (None, 3)
    assert (config.dro.baseline, config.dro.weighting) == ("none", "self_normalised")
    assert config.selector.kind == "listwise_lm"
    assert config.training.patience is not None


def test_the_data_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RLRAG_DATA_DIR", "/data")
    assert RECIPES["nq-dro"]().data.corpus == "/data/corpus/nq.jsonl.gz"
    monkeypatch.delenv("RLRAG_DATA_DIR")
    assert RECIPES["nq-dro"]().data.corpus == "$RLRAG_DATA_DIR/corpus/nq.jsonl.gz"
