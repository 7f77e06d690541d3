"""What a configuration of JSA may say, and how a wrong one is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlrag.config import RunConfig
from rlrag.errors import ConfigError
from rlrag.recipes import RECIPES


def by_jsa(**sections: dict[str, Any]) -> str:
    """The text of a configuration that trains a dense retriever by JSA, with changes."""
    values = json.loads(RunConfig().to_json())
    values["retrieval"]["kind"] = "dense"
    values["algorithm"] = {"name": "jsa"}
    for name, fields in sections.items():
        values[name].update(fields)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (by_jsa(algorithm={"parts": ["selector"]}), "unknown field 'algorithm.parts'"),
        (by_jsa(algorithm={"overlap": True}), "unknown field 'algorithm.overlap'"),
        (
            by_jsa(retrieval={"kind": "hybrid"}),
            "retrieval.kind 'hybrid' has nothing to train; use dense or semi_parametric",
        ),
        (
            by_jsa(algorithm={"likelihood": "mean", "answer": "likeliest"}),
            "algorithm.likelihood 'mean' divides by the tokens of one answer; set",
        ),
        (
            by_jsa(algorithm={"mis_steps": 0}),
            "algorithm.mis_steps = 0: Input should be greater than or equal",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(text, complaint):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text)
    assert complaint in str(caught.value)


def test_the_parts_of_jsa_take_no_turns():
    joint = RunConfig.from_json(by_jsa(algorithm={"train_generator": True}))
    assert joint.trains_retriever
    assert joint.trains_generator
    assert not joint.trains_in_turns
    assert not joint.trains_by_openrag
    assert joint.num_trained_encoders == 2
    assert RunConfig.from_json(joint.to_json()) == joint


def test_limits_of_openrag_do_not_bind_jsa():
    """OpenRAG would refuse so many selected passages."""
    free = RunConfig.from_json(
        by_jsa(environment={"num_selected": 25}, retrieval={"num_candidates": 30})
    )
    assert free.algorithm.name == "jsa"


def test_the_recipe_differs_from_that_of_openrag_in_how_much_and_how_it_trains_alone():
    for jsa, openrag in (("nq-jsa", "nq-openrag-dense"), ("nq-jsa-semi", "nq-openrag")):
        left, right = RECIPES[jsa]().model_dump(), RECIPES[openrag]().model_dump()
        assert {name for name in left if left[name] != right[name]} == {
            *("recipe", "data", "algorithm", "generator_training", "training")
        }
    whole, joint = RECIPES["nq-jsa"](), RECIPES["nq-jsa-joint"]()
    assert joint.algorithm.parts == ("retriever", "generator")
    assert (whole.data, whole.retrieval) == (joint.data, joint.retrieval)
    assert joint.jsa == whole.jsa.model_copy(update={"train_generator": True})
    assert (whole.jsa.mis_steps, whole.jsa.num_prior, whole.jsa.num_posterior) == (50, 10, 10)
