"""A bundle says by itself what it holds, and whatever is wrong with it ends in one sentence."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stand_ins import make_table

from rlrag.bundle import add_evaluation, copy_bundle, load_bundle, save_bundle
from rlrag.bundle_files import (
    NUM_GOLDEN,
    Evaluated,
    GoldenQuestion,
    bundle_version,
    golden_sample,
    read_bundle,
)
from rlrag.config import (
    BETTER_GENERATOR,
    BUILTIN_GENERATOR,
    RetrievalConfig,
    RunConfig,
    SelectorConfig,
)
from rlrag.errors import CheckpointError, ConfigError, ModelNotFoundError
from rlrag.files.directories import check_whole
from rlrag.models.licences import UNKNOWN, licences_json, licences_of
from rlrag.pipeline import open_policy
from rlrag.records import Generation, Passage, Question

GOLDEN = (
    GoldenQuestion("q1", "what is it?", "a lamp", ("p3", "p1"), -1.5),
    GoldenQuestion("q7", "and this?", "", (), -0.25),
)
TABLE = {"num_questions": 2, "systems": {}, "hashes": {"questions": "e" * 16}, "bundle_step": 12}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    model = tmp_path_factory.mktemp("models") / "tiny"
    model.mkdir()
    save_file({"weight": torch.ones(2, 2)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    (model.parent / "cache" / "models").mkdir(parents=True)
    values = RunConfig(cache_dir=str(model.parent / "cache")).model_dump()
    values["generator"]["model"] = str(model)
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def original(config, tmp_path_factory) -> Path:
    """A bundle with a generator, golden questions and a comparison; not to be changed."""
    table = make_table(4)
    directory = tmp_path_factory.mktemp("bundles") / "original"

    def save_generator(target: Path) -> None:
        shutil.copytree(config.generator.model, target)

    hashes = {"corpus": "c" * 16, "train_questions": "q" * 16}
    policy = open_policy(config, table)
    save_bundle(directory, config, policy, table, hashes, 12, save_generator)
    add_evaluation(directory, Evaluated(GOLDEN, TABLE))
    return directory


@pytest.fixture
def bundle(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def seal(bundle: Path) -> None:
    """List everything that is there, as a writer would."""
    files = {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    (bundle / "manifest.json").write_text(json.dumps({"files": files}))


def test_a_bundle_is_read_without_the_models_that_it_names(config, bundle, tmp_path):
    elsewhere = RunConfig.model_validate(
        config.model_dump()
        | {"generator": config.generator.model_dump() | {"model": str(tmp_path / "gone")}}
    )
    (bundle / "config.json").write_text(elsewhere.to_json())
    seal(bundle)
    found = read_bundle(bundle)
    assert found.config == elsewhere
    assert found.golden == GOLDEN
    assert found.evaluation == TABLE
    assert found.facts.step == 12
    assert found.facts.hashes == {
        "corpus": "c" * 16,
        "train_questions": "q" * 16,
        "questions": "e" * 16,
    }
    assert found.generator_dir == bundle / "generator"
    assert (found.retriever_dir, found.adapter_dir) == (None, None)
    assert found.generator_weights("float32").shapes == {"weight": (2, 2)}
    with pytest.raises(ModelNotFoundError):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("there", "is_used"),
    [(None, False), ("", False), ("notes", False), ("models", True), ("generations.sqlite", True)],
)
def test_a_cache_is_used_where_it_is_one(config, bundle, tmp_path, there, is_used):
    cache = tmp_path / "elsewhere"
    if there is not None:
        (cache / there).mkdir(parents=True)
    named = config.model_copy(update={"cache_dir": str(cache)})
    (bundle / "config.json").write_text(named.to_json())
    seal(bundle)
    used = read_bundle(bundle).config.cache_dir
    assert used == (str(cache) if is_used else RunConfig().cache_dir)
    assert cache.exists() == (there is not None)


def test_a_cache_that_cannot_be_looked_into_is_none(config, bundle):
    named = config.model_copy(update={"cache_dir": "/" + "a" * 300})
    (bundle / "config.json").write_text(named.to_json())
    seal(bundle)
    assert read_bundle(bundle).config.cache_dir == RunConfig().cache_dir


def test_the_version_is_that_of_every_file(bundle):
    manifest = (bundle / "manifest.json").read_bytes()
    version = hashlib.sha256(manifest).hexdigest()[:12]
    assert read_bundle(bundle).version == bundle_version(bundle) == version
    (bundle / "golden.json").write_text("[]\n")
    seal(bundle)
    assert bundle_version(bundle) != version
    assert read_bundle(bundle).golden == ()
    with pytest.raises(CheckpointError, match=r"none/manifest\.json cannot be read"):
        bundle_version(bundle / "none")


def test_an_evaluation_is_added_as_a_whole_and_leaves_the_tensors(bundle):
    weights = bundle / "generator" / "model.safetensors"
    before, inode = weights.read_bytes(), weights.stat().st_ino
    add_evaluation(bundle, Evaluated(GOLDEN[:1], {**TABLE, "bundle_step": 13}))
    found = load_bundle(bundle)
    assert found.golden == GOLDEN[:1]
    assert found.evaluation == {**TABLE, "bundle_step": 13}
    assert (weights.read_bytes(), weights.stat().st_ino) == (before, inode)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_damaged_bundle_is_not_sealed_anew(bundle, tmp_path):
    (bundle / "selector.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"selector\.safetensors is missing, trunc"):
        add_evaluation(bundle, Evaluated((), TABLE))
    with pytest.raises(CheckpointError, match=r"selector\.safetensors is missing, trunc"):
        copy_bundle(bundle, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_is_the_same_version_with_files_of_its_own(bundle, tmp_path):
    copy_bundle(bundle, tmp_path / "copy")
    assert bundle_version(tmp_path / "copy") == bundle_version(bundle)
    weights = Path("generator", "model.safetensors")
    assert (tmp_path / "copy" / weights).stat().st_ino != (bundle / weights).stat().st_ino
    copy_bundle(bundle, tmp_path / "more", lambda staging: (staging / "README.md").write_text("#"))
    check_whole(tmp_path / "more")
    assert bundle_version(tmp_path / "more") != bundle_version(bundle)


def test_golden_questions_are_a_sample_that_is_always_the_same():
    number = 3 * NUM_GOLDEN
    questions = [Question(f"q{n}", f"what is {n}?", ()) for n in range(number)]
    selections = [[Passage(f"p{n}", "", ""), Passage("p", "", "")] for n in range(number)]
    answers = [Generation(f"it is {n}", -float(n), 3, 9) for n in range(number)]
    found = golden_sample(questions, selections, answers)
    assert found == golden_sample(questions, selections, answers)
    assert len({each.id for each in found}) == NUM_GOLDEN
    numbers = [int(each.id[1:]) for each in found]
    assert numbers == sorted(numbers) != list(range(NUM_GOLDEN))
    for n, each in zip(numbers, found, strict=True):
        expected = (f"what is {n}?", f"it is {n}", (f"p{n}", "p"), -float(n))
        assert (each.question, each.answer, each.passage_ids, each.answer_logp) == expected
    few = golden_sample(questions[:3], selections[:3], answers[:3])
    assert [each.id for each in few] == ["q0", "q1", "q2"]
    assert golden_sample([], [], []) == ()


@pytest.mark.parametrize("name", ["extra.json", "generator/extra.json", "generator/.hidden"])
def test_a_file_that_the_manifest_does_not_list_is_refused(bundle, name):
    (bundle / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name} is not in the manifest .*manifest\.json"):
        read_bundle(bundle)


def test_what_a_download_hides_beside_the_files_is_no_part_of_it(bundle):
    version = bundle_version(bundle)
    (bundle / ".cache" / "huggingface").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "lock").write_text("")
    (bundle / ".gitattributes").write_text("*.safetensors lfs")
    assert read_bundle(bundle).version == version
    add_evaluation(bundle, Evaluated(GOLDEN, TABLE))
    assert bundle_version(bundle) == version
    assert not (bundle / ".cache").exists()


@pytest.mark.parametrize("name", ["golden.json", "generator", "manifest.json"])
def test_symbolic_links_are_refused(bundle, name):
    (bundle / name).rename(bundle.parent / "outside")
    (bundle / name).symlink_to(bundle.parent / "outside")
    with pytest.raises(CheckpointError, match=rf"{name} is a symbolic link") as caught:
        read_bundle(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../outside.json", "generator/../../outside.json", "/etc/passwd"])
def test_names_that_lead_outside_are_refused(bundle, name):
    (bundle.parent / "outside.json").write_text("{}")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(b"{}").hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"lists '{name}', which is outside"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["generator/model.bin", "generator/model.py", "index/rows.pkl", "a.pkl", "run"]
)
def test_what_may_run_is_refused_even_where_it_is_listed(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"import os")
    seal(bundle)
    with pytest.raises(CheckpointError, match=f"contains '{name}', which is neither tensors nor"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["config.json", "bundle.json", "golden.json", "licences.json"])
def test_a_file_that_every_bundle_has_is_missed(bundle, name):
    (bundle / name).unlink()
    seal(bundle)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(FileNotFoundError\)"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "golden.json",
            '[{"id": "q"}]',
            "golden.json is invalid: 0.question: Field required",
        ),
        (
            "golden.json",
            "{}",
            "golden.json is invalid: its content: Input should",
        ),
        ("golden.json", "\x00", "golden.json is invalid: its content: Invalid J"),
        ("bundle.json", "[1]", "has format None, this version reads 4"),
        ("bundle.json", '{"format": 4, "step": "1"}', "bundle.json is invalid"),
        ("config.json", "[" * 100_000, "config.json is not JSON: maximum recursion"),
        ("config.json", "5", "config.json: the configuration = 5: Input should be"),
        ("config.json", '{"seed": NaN}', "config.json: seed = nan"),
        ("evaluation.json", "[]", "evaluation.json is invalid"),
        ("licences.json", '[{"part": 1}]', "licences.json is invalid"),
    ],
)
def test_content_of_another_form_is_named(bundle, name, content, message):
    (bundle / name).write_text(content)
    seal(bundle)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        read_bundle(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "[" * 9999]
)
def test_a_manifest_of_another_form_is_named(bundle, content):
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or unreadable"):
        read_bundle(bundle)


FILES = (
    *("config.json", "bundle.json", "golden.json", "licences.json", "evaluation.json"),
    *("selector.safetensors", "generator/config.json", "generator/model.safetensors"),
    "manifest.json",
)
DOCUMENTS = (*FILES[:5], "manifest.json")
VALUES: list[Any] = [None, True, -1, 0, 10**30, 1.5, float("nan"), "", "x", [], {}, [[]], {"a": 1}]


def ends_well(directory: Path) -> bool:
    """Whether it is read; any error must be one of ours and of one line."""
    said = ""
    try:
        read_bundle(directory)
    except (CheckpointError, ConfigError) as error:
        said = str(error) or "\n"
    assert "\n" not in said
    return not said


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FILES), st.sampled_from(["delete", "truncate", "alter"]), st.data())
def test_any_harm_to_a_file_is_found(original, name, harm, data):
    with tempfile.TemporaryDirectory() as place:
        directory = Path(shutil.copytree(original, Path(place, "bundle")))
        path = directory / name
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        if harm == "delete":
            path.unlink()
        elif harm == "truncate":
            path.write_bytes(whole[:at])
        else:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        # Outside of the names and hashes a manifest may change as long as it is JSON.
        assert not ends_well(directory) or name == "manifest.json"


def containers(value: Any) -> list[Any]:
    """Every list and object of a document that is not empty."""
    if not isinstance(value, dict | list) or not value:
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for each in inner for found in containers(each))]


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(DOCUMENTS), st.sampled_from(["delete", "set", "add"]), st.data())
def test_any_other_content_is_read_or_named(original, name, change, data):
    """As by somebody who also wrote the manifest anew."""
    document = copy.deepcopy(json.loads((original / name).read_text()))
    chosen = data.draw(st.sampled_from(containers(document)))
    keys = list(chosen) if isinstance(chosen, dict) else list(range(len(chosen)))
    key, value = data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(VALUES))
    if change == "delete":
        del chosen[key]
    elif change == "set":
        chosen[key] = value
    elif isinstance(chosen, dict):
        chosen["added"] = value
    else:
        chosen.append(value)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(shutil.copytree(original, Path(place, "bundle")))
        (directory / name).write_text(json.dumps(document))
        if name != "manifest.json":
            seal(directory)
        ends_well(directory)


def licence_of(part: str, **sections: Any) -> tuple[str, str]:
    found = {each.part: each for each in licences_of(RunConfig(**sections))}
    return found[part].licence, found[part].source


def test_licences_of_the_built_in_parts_are_known():
    config = RunConfig(
        retrieval=RetrievalConfig(kind="semi_parametric"),
        selector=SelectorConfig(kind="bi_encoder"),
    )
    found = {each.part: (each.name, each.licence) for each in licences_of(config)}
    assert found == {
        "generator": (BUILTIN_GENERATOR, "apache-2.0"),
        "encoder": ("all-minilm-l6-v2", "apache-2.0"),
        "vocabulary_encoder": ("splade-tiny", "apache-2.0"),
        "selector": ("all-minilm-l6-v2", "apache-2.0"),
        "corpus": ("factbook", "public-domain"),
    }
    plain = RunConfig(retrieval=RetrievalConfig(kind="bm25", encoder=None))
    assert [each.part for each in licences_of(plain)] == ["generator", "corpus"]
    licence, source = licence_of("generator", generator={"model": BETTER_GENERATOR})
    assert licence == "gemma"
    # The notice that the terms ask for.
    notice = (
        "provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    )
    assert notice in source


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Model", "mit"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\ntags: [a]\n---\n", UNKNOWN),
        ("# Under the MIT licence", UNKNOWN),
        ("---\nlicense: [mit\n---\n", UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_licences_of_other_models_are_read_and_never_guessed(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    found = licence_of("generator", generator={"model": str(tmp_path)})
    assert found[0] == licence
    assert (licence == UNKNOWN) == found[1].startswith("check the model's page")


def test_what_nobody_states_is_unknown(tmp_path):
    licence, source = licence_of("generator", generator={"model": "nobody/has-this"})
    assert (licence, source) == (
        UNKNOWN,
        "check the model's page https://huggingface.co/nobody/has-this",
    )
    assert licence_of("corpus", data={"corpus": "mine.jsonl"})[0] == UNKNOWN


def test_a_model_from_another_bundle_keeps_its_licence(tmp_path):
    """As in turns, where each trains on from what the one before it left."""
    (tmp_path / "generator").mkdir()
    (tmp_path / "retriever").mkdir()
    (tmp_path / "licences.json").write_text(licences_json(licences_of(RunConfig())))
    for part, section in (
        ("generator", {"generator": {"model": str(tmp_path / "generator")}}),
        ("encoder", {"retrieval": {"encoder": str(tmp_path / "retriever")}}),
    ):
        assert licence_of(part, **section) == licence_of(part)
    (tmp_path / "licences.json").write_text("[1]")
    licence, source = licence_of("generator", generator={"model": str(tmp_path / "generator")})
    assert (licence, source.partition(";")[0]) == (UNKNOWN, "check the model's page")
