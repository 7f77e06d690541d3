"""The file readers to fuzz, each with valid content to mutate."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A reader and valid content for it.

    Attributes:
        name: For the table.
        seeds: Contents that it accepts, by file name.
        read: Called with the folder that holds the files.
        seal: Called before, to make hashes fit the changed file.
    """

    name: str
    seeds: dict[str, bytes]
    read: Callable[[Path], object]
    seal: Callable[[Path], None] = lambda folder: None


def targets(scratch: Path) -> list[Target]:
    """Everything that reads a file that somebody else may have written.

    Args:
        scratch: An empty folder in which valid files are made.
    """
    return [
        *_data_targets(),
        *_manifest_targets(scratch),
        _config_target(),
        _bundle_target(scratch),
    ]


def _lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _data_targets() -> list[Target]:
    from rlrag.data.checks import Tally
    from rlrag.data.ranking_run import read_ranking_run
    from rlrag.data.readers import read_passages, read_questions

    passages = _lines(
        {"id": "p1", "contents": '"Rome"\nA city of Italy.'},
        {"id": "p2", "title": "Oslo", "text": "A city of Norway."},
    )
    questions = _lines(
        {"id": "q1", "question": "where is Rome?", "golden_answers": ["Italy"], "metadata": {}},
        {
            "id": "q2",
            "question": "where is Oslo?",
            "golden_answers": [],
            "metadata": {"gold_ids": ["p2"], "choices": ["Norway", "Italy"]},
        },
    )
    run = b"q1 Q0 p1 1 12.5 ours\nq1 Q0 p2 2 11.25 ours\nq2 Q0 p2 1 3e-1 ours\n"
    wanted = {"q1": ("p1", "p2"), "q2": ("p2",)}
    return [
        Target(
            "questions",
            {"q.jsonl": questions},
            lambda folder: list(read_questions(folder / "q.jsonl", Tally())),
        ),
        Target(
            "passages",
            {"p.jsonl": passages},
            lambda folder: list(read_passages(folder / "p.jsonl", Tally())),
        ),
        Target(
            "passages, gzip",
            {"p.jsonl.gz": gzip.compress(passages, mtime=0)},
            lambda folder: list(read_passages(folder / "p.jsonl.gz", Tally())),
        ),
        Target(
            "ranking run", {"r.run": run}, lambda folder: read_ranking_run(folder / "r.run", wanted)
        ),
    ]


def _manifest_targets(scratch: Path) -> list[Target]:
    import torch

    from rlrag.retrieval.manifest import Manifest, check_manifest, write_manifest
    from rlrag.runs.checkpoints import CheckpointStore

    index = scratch / "index"
    index.mkdir()
    (index / "vectors.npy").write_bytes(b"123456")
    manifest = Manifest("vectors", "c" * 16, 3, parameters={"links": 4})
    write_manifest(index, manifest)
    store = CheckpointStore(scratch / "checkpoints")
    store.save(3, {"policy": {"weight": torch.ones(2, 3)}}, {"step": 3, "best": [1, 2]})
    return [
        Target(
            "index manifest",
            {f"i/{path.name}": path.read_bytes() for path in index.iterdir()},
            lambda folder: check_manifest(folder / "i", manifest),
        ),
        Target(
            "checkpoint",
            {f"c/step-000003/{p.name}": p.read_bytes() for p in store.path(3).iterdir()},
            lambda folder: CheckpointStore(folder / "c").load(3),
        ),
        Target(
            "checkpoint with fitting hashes",
            {
                f"s/step-000003/{path.name}": path.read_bytes()
                for path in store.path(3).iterdir()
                if path.name != "manifest.json"
            },
            lambda folder: CheckpointStore(folder / "s").load(3),
            lambda folder: _seal(folder / "s" / "step-000003"),
        ),
    ]


def _config_target() -> Target:
    from rlrag.config import RunConfig

    def read(folder: Path) -> RunConfig:
        text = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
        return RunConfig.from_json(text, "config.json")

    return Target("configuration", {"config.json": RunConfig().to_json().encode()}, read)


def _bundle_target(scratch: Path) -> Target:
    from rlrag.bundle import load_bundle
    from rlrag.config import GeneratorConfig
    from rlrag.models.directories import resolve_model

    bundle = make_bundle(scratch)
    # A configuration that names no generator means this one, which takes a while to unpack once;
    # one that names no cache means that of the user.
    resolve_model(GeneratorConfig().model, scratch / "cache")
    (scratch / ".cache").mkdir()
    (scratch / ".cache" / "rlrag").symlink_to(scratch / "cache")
    return Target(
        "bundle with fitting hashes",
        {
            f"b/{path.relative_to(bundle)}": path.read_bytes()
            for path in bundle.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        },
        lambda folder: load_bundle(folder / "b"),
        lambda folder: _seal(folder / "b"),
    )


def make_bundle(scratch: Path) -> Path:
    """A small bundle with golden questions and a comparison."""
    import torch
    from safetensors.torch import save_file

    from rlrag.bundle import add_evaluation, save_bundle
    from rlrag.bundle_files import Evaluated, GoldenQuestion
    from rlrag.config import RunConfig
    from rlrag.pipeline import open_evaluation_data, open_library, open_policy

    model = scratch / "model"
    model.mkdir()
    save_file({"weight": torch.ones(2, 2)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    (scratch / "p.jsonl").write_bytes(
        _lines(*({"id": f"p{n}", "contents": f"Title\nword{n} text"} for n in range(6)))
    )
    (scratch / "q.jsonl").write_bytes(
        _lines({"id": "q", "question": "which word1?", "golden_answers": ["text"]})
    )
    config = RunConfig.model_validate(
        {
            "cache_dir": str(scratch / "cache"),
            "data": {
                "corpus": str(scratch / "p.jsonl"),
                "train_questions": str(scratch / "q.jsonl"),
                "eval_questions": str(scratch / "q.jsonl"),
            },
            "retrieval": {"kind": "bm25", "encoder": None, "num_candidates": 3},
            "generator": {"model": str(model)},
        }
    )
    candidates, _ = open_evaluation_data(config, open_library(config))
    bundle = scratch / "bundle"
    save_bundle(bundle, config, open_policy(config, candidates), candidates, {"corpus": "c"}, 3)
    golden = (GoldenQuestion("q", "which word1?", "text", ("p1",), -0.5),)
    add_evaluation(bundle, Evaluated(golden, {"num_questions": 1, "systems": {}, "hashes": {}}))
    return bundle


def _seal(directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / "manifest.json"
    }
    (directory / "manifest.json").write_text(json.dumps({"files": files}))
