"""What a run will take is said before anything is loaded, fetched or started."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from loop_runs import changed
from tiny_models import save_tiny_encoder, save_tiny_llama

from rlrag.config import BETTER_GENERATOR, BUILTIN_GENERATOR, RunConfig
from rlrag.data.split import are_here
from rlrag.errors import ConfigError
from rlrag.recipes import RECIPES
from rlrag.training.needs import num_parameters
from rlrag.training.plan import describe_plan


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever opens a connection fails."""

    def refuse(*args) -> None:
        raise AssertionError(f"a plan must not open a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("plan") / "tiny")


def headings(config: RunConfig) -> list[str]:
    """First words of the lines that a plan of this run must have, in their order."""
    by_jsa = config.algorithm.name == "jsa"
    selects = config.algorithm.parts != ("retriever",) and not by_jsa
    named = {
        "rounds": config.trains_in_turns,
        "retriever": config.trains_retriever,
        "sampling": by_jsa,
        "offline": config.trains_by_openrag and config.openrag.labels == "generator",
        "online": config.trains_by_openrag and "online" in config.openrag.stages,
        "E-step": selects,
        "rollouts": selects,
        "passages": are_here(config.data.corpus),
        "generator": True,
        "M-step": "generator" in config.algorithm.parts,
        "learner": config.trains_retriever,
        "M-step (selector)": "selector" in config.algorithm.parts and config.selector.reads_texts,
        "placement": True,
        "nodes": config.training.launcher == "ray",
    }
    return [name.split()[0] for name, is_there in named.items() if is_there]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_plan(recipe, tmp_path):
    config = RECIPES[recipe]().model_copy(update={"cache_dir": str(tmp_path)})
    lines = describe_plan(config).splitlines()
    parts = " and ".join(config.algorithm.parts)
    assert lines[0] == f"{recipe}: trains {parts}"
    found = [line.split()[0] for line in lines[1:]]
    assert [word for word in found if word not in ("data", "warning")] == headings(config)
    assert found.count("data") == 1 + config.trains_in_turns


def test_the_papers_settings_name_twelve_gpus(tmp_path):
    """8 learners that share 8 B parameters, and 4 engines of 2 bytes a parameter."""
    plan = describe_plan(RECIPES["dro-paper"]().model_copy(update={"cache_dir": str(tmp_path)}))
    assert (
        "12 CPU and 12 GPU together\n  nodes       workers: pack; generator actors: where" in plan
    )
    assert (
        "8 selections of 5 from 20 candidates a question; renewed once a pass; 3 pass(es)" in plan
    )
    assert "rollouts    40 a training question" in plan
    assert "8.00 B parameters: 14.9 GiB of weights in each of 4 GPU actors" in plan
    share = 16 * 8e9 / 8 / 2**30
    assert f"generator, full, fsdp2: about {share:.1f} GiB" in plan
    selector = (4 * 8e9 + 12 * 0.01 * 8e9) / 2**30
    assert f"selector, listwise_lm: about {selector:.1f} GiB" in plan


def test_the_steps_are_counted_where_the_questions_are(tmp_path):
    """700 questions less 100 held back, once, in batches of 24."""
    plan = describe_plan(RECIPES["nq-dro"]().model_copy(update={"cache_dir": str(tmp_path)}))
    assert "data        600 questions, 25 steps, 1 passes, 24 a step" in plan
    assert "4 selections of 2 from 5 candidates a question; renewed every 1 step(s)" in plan
    assert "rollouts    4 a training question" in plan


def test_a_plan_counts_the_questions_that_are_here(tmp_path):
    """82 of the 300 that are asked for, less 48 held back: two batches of 16."""
    path = tmp_path / "few.jsonl"
    lines = [
        json.dumps({"id": f"q{i}", "question": f"what is {i}?", "golden_answers": ["v"]})
        for i in range(82)
    ]
    path.write_text("\n".join(lines))
    data = {
        "corpus": str(tmp_path / "none.jsonl"),
        "train_questions": str(path),
        "eval_questions": str(path),
        "max_train_questions": 300,
        "num_validation_questions": 48,
    }
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        data=data,
        generator={"model": "somebody/model-1b"},
        training={"batch_size": 16, "num_epochs": 1},
    )
    plan = describe_plan(config)
    assert "data        34 questions, 2 steps, 1 passes, 16 a step" in plan
    warnings = [line for line in plan.splitlines() if line.startswith("  warning     ")]
    assert len(warnings) == 2
    assert "holds back 48 of 82 questions, more than the 34 that are left to train on" in plan
    assert "82 of 82 evaluation questions are training questions too: 82 by their text (q0" in plan
    missing = changed(config, data={"train_questions": str(tmp_path / "none.jsonl")})
    assert "252 questions, 15 steps" in describe_plan(missing)
    assert "none.jsonl is not here: it may have fewer questions" in describe_plan(missing)


def test_a_plan_says_what_of_the_passages_is_cut(model_dir, tmp_path):
    """Of 12 passages two are long, for the words kept, the encoder and the prompts."""
    passages = [{"id": f"p{n}", "contents": f"Title\nriver {n}"} for n in range(10)]
    passages += [{"id": f"p{n}", "contents": "Title\n" + "river " * 600} for n in (10, 11)]
    asked = [
        {"id": f"q{n}", "question": f"what is {n}?", "golden_answers": ["v"]} for n in range(6)
    ]
    for name, records in (("corpus", passages), ("questions", asked)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        data={
            "corpus": str(tmp_path / "corpus.jsonl"),
            "train_questions": str(tmp_path / "questions.jsonl"),
            "eval_questions": str(tmp_path / "none.jsonl"),
            "num_validation_questions": 0,
            "passage_words": 500,
        },
        retrieval={"encoder": str(save_tiny_encoder(tmp_path / "encoder")), "num_candidates": 5},
        environment={"num_selected": 3},
        generator={"model": str(model_dir), "prompt": {"max_prompt_tokens": 300}},
        training={"launcher": "local", "batch_size": 2},
    )
    lines = describe_plan(config).splitlines()
    (said,) = [line for line in lines if line.startswith("  passages    ")]
    assert "the first 12 of" in said
    assert "data.passage_words 500 cuts 2 of them; " in said
    assert f"{tmp_path / 'encoder'} reads 160 tokens, and 2 are longer; " in said
    assert said.endswith("room for 300 tokens, and 1 of 4 with 3 of them leave something out")
    warnings = [line for line in lines if line.startswith("  warning     ")]
    assert [" ".join(line.split()[1:4]) for line in warnings] == [
        "passages cut: 2",
        "the encoder reads",
        "prompts had no",
    ]
    assert "(p10, p11), 16.4% of all words" in warnings[0]
    reading = {"kind": "bi_encoder", "model": str(tmp_path / "encoder"), "max_tokens": 32}
    plan = describe_plan(changed(config, selector=reading))
    assert "; the selector reads 32 tokens, and 2 are longer; prompts have" in plan
    assert "  warning     the selector reads 32 tokens of a passage: " in plan
    roomy = changed(
        config,
        data={"passage_words": 900},
        retrieval={"encoder": None, "kind": "bm25"},
        generator={"prompt": {"max_prompt_tokens": 9000}, "max_model_len": 9100},
    )
    lines = describe_plan(roomy).splitlines()
    assert not any(line.startswith("  warning") for line in lines)
    (said,) = [line for line in lines if line.startswith("  passages    ")]
    assert "cuts 0 of them; prompts have room for 9000 tokens, and 0 of 4" in said
    fetched = changed(config, generator={"model": "somebody/model-1b"})
    assert "somebody/model-1b is not here: what prompts have no room" in describe_plan(fetched)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8e9),
        ("Qwen/Qwen2.5-0.5B", 5e8),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 3.6e8),
        (BUILTIN_GENERATOR, 1.35e8),
        (BETTER_GENERATOR, 2.7e8),
        ("somebody/model-7b", 7e9),
    ],
)
def test_the_name_says_how_large_a_model_is(name, count, tmp_path):
    assert num_parameters(name, tmp_path) == round(count)


def test_a_model_on_this_machine_is_counted(model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(model_dir).num_parameters()
    assert num_parameters(str(model_dir), tmp_path) == expected
    renamed = model_dir.with_name("tiny-70b")
    renamed.symlink_to(model_dir)
    assert num_parameters(str(renamed), tmp_path) == expected  # whatever it is called


@pytest.mark.parametrize("name", ["somebody/small", "/nowhere/model", "large-4bit", "a//b"])
def test_a_model_of_unknown_size_is_named(name, tmp_path):
    config = RunConfig(cache_dir=str(tmp_path))
    config = changed(config, generator={"model": name})
    with pytest.raises(ConfigError, match=rf"size of model '{name}' is unknown.*give a local path"):
        describe_plan(config)


@pytest.mark.parametrize(
    ("training", "trained"),
    [
        ({"method": "lora"}, 0.01),
        ({"method": "full"}, 1.0),
    ],
)
def test_the_learners_memory_is_that_of_weights_gradients_and_moments(tmp_path, training, trained):
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        generator={"model": "somebody/model-1b"},
        generator_training=training,
        algorithm={"parts": ["generator"]},
    )
    gib = (4 + 12 * trained) * 1e9 / 2**30
    assert f"generator, {training['method']}, replicated: about {gib:.1f} GiB" in describe_plan(
        config
    )


def test_trained_encoders_are_counted_too(tmp_path):
    encoder = save_tiny_encoder(tmp_path / "encoder")
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        selector={"kind": "bi_encoder", "model": str(encoder)},
        training={"launcher": "local"},
    )
    plan = describe_plan(config)
    assert "selector, bi_encoder: about 0.0 GiB" in plan
    assert "placement   this process alone" in plan


def retriever_plan(tmp_path: Path, **sections) -> str:
    training = {"launcher": "local", "batch_size": 10}
    algorithm = {"name": "openrag"}
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        retrieval={"kind": "dense"},
        generator={"model": "somebody/model-1b"},
        training=training | sections.pop("training", {}),
        algorithm=algorithm | sections.pop("algorithm", {}),
        data={"max_train_questions": 250, "num_validation_questions": 50},
        **sections,
    )
    return describe_plan(config)


def test_the_plan_of_a_retriever_says_what_each_stage_costs(tmp_path):
    """250 questions less 50 held back, with 100 passages each."""
    plan = retriever_plan(tmp_path)
    assert "data        200 questions; 40 passes offline, then 40 passes online; 10 qu" in plan
    assert "retriever   dense, loss contrastive, 32 texts embedded at once" in plan
    assert "offline     judges 100 a question, 20,000 in all, each answered and scored once" in plan
    assert "online      ranks 20 passages a question anew at each step" in plan
    one = retriever_plan(tmp_path, algorithm={"online_epochs": 0, "offline_epochs": 3})
    assert "200 questions; 3 passes offline; 10 questions a step" in one
    assert "  online" not in one
    gold = retriever_plan(tmp_path, algorithm={"labels": "gold", "offline_epochs": 0})
    assert "200 questions; 40 passes online; 10 questions a step" in gold
    assert "judges" not in gold


@pytest.mark.parametrize(("tied", "times"), [(True, 1), (False, 2)])
def test_an_encoder_each_takes_twice_the_memory(tmp_path, tied, times):
    encoder = {"kind": "semi_parametric", "vocabulary_encoder": "somebody/encoder-100m"}
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        retrieval=encoder,
        generator={"model": "somebody/model-1b"},
        algorithm={"name": "openrag", "tied": tied},
        training={"launcher": "local"},
    )
    gib = 16 * times * 1e8 / 2**30
    assert f"learner     somebody/encoder-100m: about {gib:.1f} GiB" in describe_plan(config)


def test_an_encoder_of_unknown_size_does_not_end_the_plan(tmp_path):
    plan = retriever_plan(tmp_path, training={"launcher": "ray"})
    assert "placement" in plan
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        retrieval={"kind": "dense", "encoder": "somebody/encoder"},
        generator={"model": "somebody/model-1b"},
        algorithm={"name": "openrag"},
    )
    assert "somebody/encoder: 16 bytes" in describe_plan(config)


def test_turns_are_planned_one_after_the_other(tmp_path):
    config = changed(
        RunConfig(cache_dir=str(tmp_path)),
        retrieval={"kind": "dense"},
        generator={"model": "somebody/model-1b"},
        algorithm={"name": "alternating", "rounds": 3},
    )
    lines = describe_plan(config).splitlines()
    assert lines[1] == "  rounds      3, each: the retriever, then selector"
    assert [line.split()[0] for line in lines[2:8]] == [
        *("data", "retriever", "offline", "online", "data", "E-step")
    ]


def test_the_papers_retriever_has_its_settings(tmp_path):
    config = RECIPES["openrag-paper"]().model_copy(update={"cache_dir": str(tmp_path)})
    plan = describe_plan(config)
    assert "40 passes offline, then 40 passes online; 128 questions a step" in plan
    assert "offline     judges 100 a question" in plan
    assert "ranks 20 passages a question anew" in plan
    assert "Meta-Llama-3-8B, 8.00 B parameters: 14.9 GiB" in plan
