"""The training program by JSA: from files to a bundle, its comparison and its report."""

from __future__ import annotations

import json

import pytest
from openrag_runs import small_flags

from rlrag.bundle import load_bundle
from rlrag.cli import evaluate, report, train

COMPARED = ("original_retriever", "tuned_retriever")


@pytest.mark.parametrize("joint", [False, True])
def test_a_retriever_is_trained_bundled_and_compared(openrag_files, tmp_path, joint):
    """Over an index that is built once: the passages' encoder stays."""
    systems = [*COMPARED, *(["tuned_generator"] if joint else []), "trained"]
    flags = {
        "algorithm.name": ["jsa"],
        "algorithm.train-generator": [str(joint)],
        "training.num-epochs": ["1"],
        "algorithm.learning-rate": ["3e-3"],
        "algorithm.mis-steps": ["6"],
        "generator-training.lora-rank": ["2"],
        "generator-training.sequences-per-question": ["1"],
        "evaluation.systems": systems,
    }
    extra = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    train.main(["factbook", *small_flags(openrag_files, tmp_path), *extra])
    run_dir = tmp_path / "run"
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert list(found["systems"]) == systems
    assert "tuned_retriever_vs_original_retriever" in found["paired"]
    if not joint:
        assert found["systems"]["trained"] == found["systems"]["tuned_retriever"]
    bundle = load_bundle(run_dir / "bundle")
    assert bundle.retriever_dir == run_dir / "bundle" / "retriever"
    assert {place.name for place in bundle.retriever_dir.iterdir()} == {"question", "passage"}
    assert (run_dir / "bundle" / "generator").is_dir() == joint
    assert len(list((tmp_path / "cache" / "indexes").glob("vectors-*"))) == 1
    assert not (run_dir / "pools").exists()
    page = tmp_path / "report.html"
    report.main(["--run-dir", str(run_dir), "--output", str(page)])
    assert "Share of proposals that the chains accepted" in page.read_text()
    if joint:
        return
    words = ["--bundle", str(run_dir / "bundle"), "--corpus", str(openrag_files / "corpus.jsonl")]
    words += ["--questions", str(openrag_files / "eval.jsonl"), "--docs-in-context", "3"]
    evaluate.main([*words, "--output", str(tmp_path / "three.json")])
    three = json.loads((tmp_path / "three.json").read_text())
    assert three["systems"]["trained"] == three["systems"]["tuned_retriever"]
