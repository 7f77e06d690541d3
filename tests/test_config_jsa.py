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
    values["training"] |= {"objective": "jsa", "parts": ["retriever"]}
    for name, fields in sections.items():
        values[name].update(fields)
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            by_jsa(training={"parts": ["retriever", "selector"]}),
            "trains the retriever, alone or with the generator, but training.parts is "
            "['retriever', 'selector']; set it to retriever or retriever,generator",
        ),
        (by_jsa(training={"parts": ["generator"]}), "but training.parts is ['generator']"),
        (
            by_jsa(retrieval={"kind": "hybrid"}),
            "retrieval.kind 'hybrid' has nothing to train; use dense or semi_parametric",
        ),
        (
            by_jsa(training={"parts": ["retriever", "generator"], "rounds": 2}),
            "trains its parts together, but training.rounds is 2; set it to 1",
        ),
        (by_jsa(training={"overlap": True}), "'jsa' has no policy; leave it out"),
        (
            by_jsa(jsa={"likelihood": "mean", "answer": "likeliest"}),
            "jsa.likelihood 'mean' divides by the tokens of one answer; set jsa.answer to 'first'",
        ),
        (by_jsa(jsa={"mis_steps": 0}), "jsa.mis_steps = 0: Input should be greater than or equal"),
        (by_jsa(training={"parts": ["selector"]}), "training.objective 'jsa' trains the retriever"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(text, complaint):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text)
    assert complaint in str(caught.value)


def test_the_parts_of_jsa_take_no_turns():
    joint = RunConfig.from_json(by_jsa(training={"parts": ["retriever", "generator"]}))
    assert joint.trains_retriever
    assert joint.trains_generator
    assert not joint.trains_in_turns
    assert not joint.trains_by_openrag
    assert joint.num_trained_encoders == 2
    assert RunConfig.from_json(joint.to_json()) == joint


def test_fields_of_openrag_do_not_bind_jsa():
    """OpenRAG would refuse each of these."""
    free = by_jsa(
        openrag={"num_online": 2, "tied": False, "first_stage": "bm25", "stages": []},
        environment={"num_selected": 5},
    )
    assert RunConfig.from_json(free).training.objective == "jsa"


def test_the_recipe_differs_from_that_of_openrag_in_how_much_and_how_it_trains_alone():
    for jsa, openrag in (("nq-jsa", "nq-openrag-dense"), ("nq-jsa-semi", "nq-openrag")):
        left, right = RECIPES[jsa]().model_dump(), RECIPES[openrag]().model_dump()
        assert {name for name in left if left[name] != right[name]} == {
            *("recipe", "data", "jsa", "generator_training", "training")
        }
    whole, joint = RECIPES["nq-jsa"](), RECIPES["nq-jsa-joint"]()
    assert joint.training.parts == ("retriever", "generator")
    assert (whole.data, whole.jsa, whole.retrieval) == (joint.data, joint.jsa, joint.retrieval)
    assert (whole.jsa.mis_steps, whole.jsa.num_prior, whole.jsa.num_posterior) == (50, 10, 10)
