"""Names become directories, directories hashes; what cannot be found is said with a way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlrag.config import BUILTIN_ENCODER, BUILTIN_VOCABULARY_ENCODER
from rlrag.errors import ModelNotFoundError, SetupError
from rlrag.models import directories as models
from rlrag.models.directories import resolve_device, resolve_dtype, resolve_model, weights_hash


def write_model(directory: Path, weight: float = 1.0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((2, 2), weight)}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"hidden_size": 2}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_a_path_becomes_absolute(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    assert resolve_model(str(model), tmp_path / "cache") == model
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model", tmp_path / "cache") == model
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model", tmp_path / "cache") == model
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/model",
        "./model",
        "../model",
        "~/no-such-model",
        "~no-such-user/model",
        f"/{0:300}",
    ],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist; check the path") as caught:
        resolve_model(name, tmp_path)
    assert repr(name) in str(caught.value)


def test_a_name_that_nothing_answers_to_is_refused_with_the_ways_out(tmp_path):
    """The hub is switched off before its library is imported, hence the process of its own."""
    script = (
        "import sys; from pathlib import Path; from rlrag.models.directories import resolve_model\n"
        "from rlrag.errors import ModelNotFoundError\n"
        "try: resolve_model('nobody/nothing', Path(sys.argv[1]))\n"
        "except ModelNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "model 'nobody/nothing' is not a local directory and could not be fetched" in done.stdout
    assert "give a local path, or a built-in name: all-minilm-l6-v2, gemma-3-" in done.stdout


@pytest.fixture
def encoder_package(tmp_path, monkeypatch) -> Path:
    """An importable package that carries a model as the built-in encoder's does."""
    package = tmp_path / "site" / "all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    model = write_model(tmp_path / "packed")
    with zipfile.ZipFile(package / "model.zip", "w") as archive:
        for path in model.iterdir():
            archive.write(path, path.name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return package


def test_a_built_in_model_is_unpacked_once(encoder_package, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    found = resolve_model(BUILTIN_ENCODER, cache)
    assert found == cache / "models" / BUILTIN_ENCODER
    assert weights_hash(found) == weights_hash(tmp_path / "packed")
    (encoder_package / "model.zip").unlink()
    assert resolve_model(BUILTIN_ENCODER, cache) == found
    monkeypatch.chdir(tmp_path)
    assert resolve_model(BUILTIN_ENCODER, Path("cache")) == found
    assert [path.name for path in found.parent.iterdir()] == [BUILTIN_ENCODER]


def test_an_unpacked_model_is_readable_as_the_umask_allows(tmp_path, monkeypatch):
    def unpack(package_dir: Path, target: Path) -> None:
        write_model(target)
        (target / "model.safetensors").chmod(0o600)  # as safetensors 0.8 writes

    monkeypatch.setitem(models._BUILTIN, BUILTIN_ENCODER, ("json", unpack))
    (tmp_path / "ordinary").write_text("")
    mode = (tmp_path / "ordinary").stat().st_mode
    found = resolve_model(BUILTIN_ENCODER, tmp_path / "cache")
    assert {path.stat().st_mode for path in found.iterdir()} == {mode}


def test_unpacking_that_fails_leaves_nothing_half_done(encoder_package, tmp_path):
    archive = encoder_package / "model.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(zipfile.BadZipFile):
        resolve_model(BUILTIN_ENCODER, tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(encoder_package, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"cannot unpack .*file/cache.*another cache_dir"):
        resolve_model(BUILTIN_ENCODER, tmp_path / "file" / "cache")


def test_the_built_in_vocabulary_encoder_is_copied_without_the_rest(tmp_path, monkeypatch):
    package = tmp_path / "site" / "cognition"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('only its files are wanted')")
    model = write_model(package / "model")
    (model / "tokenizer_config.json").write_text("{}")
    expected = weights_hash(model)
    (model / "heads.pt").write_bytes(b"pickle")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = resolve_model(BUILTIN_VOCABULARY_ENCODER, tmp_path / "cache")
    assert weights_hash(found) == expected
    assert not (found / "heads.pt").exists()


def test_a_built_in_model_whose_package_is_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [m for m in sys.meta_path if "Editable" not in str(m)])
    sys.modules.pop("all_minilm_l6_v2", None)
    with pytest.raises(ModelNotFoundError, match=r"all_minilm_l6_v2.*install the extra 'demo'"):
        resolve_model(BUILTIN_ENCODER, tmp_path / "cache")


def test_the_hash_follows_every_file_that_decides_the_results(tmp_path):
    first = weights_hash(write_model(tmp_path / "a"))
    assert first == weights_hash(write_model(tmp_path / "b"))
    assert len(first) == 16
    found = {first, weights_hash(write_model(tmp_path / "c", weight=2.0))}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt"):
        model = write_model(tmp_path / f"with-{name}")
        (model / name).write_text(json.dumps({"another": name}))
        found.add(weights_hash(model))
    pooling = write_model(tmp_path / "pooling")
    (pooling / "1_Pooling").mkdir()
    (pooling / "1_Pooling" / "config.json").write_text("{}")
    found.add(weights_hash(pooling))
    deep = write_model(tmp_path / "deep")
    write_model(deep / "2_Dense", weight=3.0)
    found.add(weights_hash(deep))
    deeper = write_model(tmp_path / "deeper")
    write_model(deeper / "2_Dense", weight=4.0)
    found.add(weights_hash(deeper))
    renamed = write_model(tmp_path / "renamed")
    (renamed / "tokenizer.json").rename(renamed / "tokenizers.json")
    found.add(weights_hash(renamed))
    assert len(found) == 10
    documented = write_model(tmp_path / "documented")
    (documented / "README.md").write_text("anything")
    assert weights_hash(documented) == first


def test_a_directory_without_safetensors_has_no_hash(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors weights; save the model with"):
        weights_hash(tmp_path)


def test_auto_becomes_what_the_machine_does_natively():
    assert resolve_dtype("float16") == "float16"
    assert resolve_dtype("auto", "cpu") in ("float32", "bfloat16")
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("cuda") == "cuda"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
def test_auto_on_a_gpu():
    assert resolve_dtype("auto", "cuda") in ("bfloat16", "float16")
    assert resolve_device("auto") == "cuda"
