"""Write a bundle from any checkpoint of a run.

    rlrag export --checkpoint runs/nq/checkpoints/step-000040 --output bundles/nq-40
    rlrag export --run-dir runs/nq --output bundles/nq --hub

`--run-dir` takes the checkpoint that was best on the held-back questions. What the run's final
evaluation found goes along where it was of the same checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlrag.cli.command_line import parse, program_name
from rlrag.cli.opened_bundle import only_writer
from rlrag.cli.single_run import best_step, bundle_checkpoint, data_of_log
from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, ConfigError
from rlrag.runs.directory import RunDirectory
from rlrag.submitted_job import check_outlives_job

if TYPE_CHECKING:  # these bring torch, which a refused command line does without
    import torch

    from rlrag.bundle_files import Evaluated
    from rlrag.pipeline import TrainingData
    from rlrag.runs.checkpoints import CheckpointStore

_STEP = re.compile(r"step-(\d+)")
_LORA_NAME = re.compile(r"(.+)\.lora_([AB])\.default\.weight")


@dataclass(frozen=True)
class ExportArguments:
    """Flags of `rlrag export`."""

    output: Path
    """Directory to write, which must not exist."""
    checkpoint: Path | None = None
    """A checkpoint of a run, `RUN_DIR/checkpoints/step-N`."""
    run_dir: Path | None = None
    """Directory of a run, to export its best checkpoint; instead of --checkpoint."""
    adapter: Literal["merged", "apart"] = "merged"
    """How to export the generator's LoRA adapter. `merged`: merged into the model; `apart`:
    additionally as a separate adapter in peft's format under `adapter/`."""
    index: bool = False
    """Add the indexes of the corpus, so that a service does not have to encode it. The texts are
    not copied."""
    hub: bool = False
    """Add a model card, README.md, so that the directory can be uploaded to a model hub."""


def main(argv: Sequence[str]) -> None:
    """Check, load, write."""
    arguments = parse(ExportArguments, None, argv, program_name("export"))
    run_dir, step = _place(arguments)
    check_outlives_job("--output", arguments.output)
    if arguments.output.exists():
        raise ConfigError(f"--output {arguments.output} exists; choose another, or delete it")
    if not run_dir.config.is_file():
        raise ConfigError(
            f"{run_dir.path} is not a run: it has no config.json; give the directory that rlrag "
            "train wrote to, or a checkpoint in it"
        )
    config = run_dir.read_config()
    _check_adapter(config, arguments)
    if arguments.index and config.data.corpus is None:
        raise ConfigError(
            "--index adds the indexes of the corpus, but data.corpus of the run is None; leave the "
            "flag out"
        )
    with only_writer(arguments.output):
        if config.trains_in_turns:
            _export_rounds(config, run_dir, arguments)
        else:
            _export_checkpoint(config, run_dir, step, arguments)
    print(f"written to {arguments.output}")


def _place(arguments: ExportArguments) -> tuple[RunDirectory, int | None]:
    """The run, and the step that is asked for by name."""
    checkpoint, run_dir = arguments.checkpoint, arguments.run_dir
    if (checkpoint is None) == (run_dir is None):
        raise ConfigError("give either --checkpoint RUN_DIR/checkpoints/step-N or --run-dir DIR")
    if run_dir is not None:
        return RunDirectory(run_dir), None
    assert checkpoint is not None
    checkpoint = checkpoint.expanduser().absolute()
    named = _STEP.fullmatch(checkpoint.name)
    if named is None or checkpoint.parent.name != "checkpoints":
        raise ConfigError(
            f"--checkpoint {checkpoint} is not a checkpoint of a run; give "
            "RUN_DIR/checkpoints/step-N, or --run-dir RUN_DIR for the best"
        )
    return RunDirectory(checkpoint.parent.parent), int(named[1])


def _check_adapter(config: RunConfig, arguments: ExportArguments) -> None:
    if arguments.adapter == "merged":
        return
    if not config.trains_generator or config.generator_training.method != "lora":
        raise ConfigError(
            "--adapter apart needs a run that trains a LoRA adapter for the generator, but "
            f"this one trains {' and '.join(config.algorithm.parts)} by generator_training.method "
            f"{config.generator_training.method!r}; leave the flag out"
        )
    if config.trains_in_turns:
        raise ConfigError(
            "--adapter apart needs the checkpoint of a single turn, because each turn starts "
            "from the merged model of the turn before; give --run-dir DIR/rounds/N-selection"
        )


def _export_checkpoint(
    config: RunConfig, run_dir: RunDirectory, step: int | None, arguments: ExportArguments
) -> None:
    from rlrag.bundle_files import ADAPTER
    from rlrag.runs.checkpoints import CheckpointStore
    from rlrag.runs.reporting import private_library_chatter

    store = CheckpointStore(run_dir.checkpoints)
    step = best_step(store) if step is None else _existing(store, step)
    print(f"checkpoint {step} of {run_dir.path}", file=sys.stderr, flush=True)
    files, _ = store.load(step)
    evaluated = _evaluated(run_dir, step)

    def finish(staging: Path) -> None:
        if arguments.adapter == "apart":
            save_adapter(staging / ADAPTER, files["generator"], config)
        if arguments.hub:
            write_card(staging)

    with private_library_chatter("rlrag-export"):
        data = _open_data(config, run_dir)
        bundle_checkpoint(arguments.output, config, data, step, files, evaluated, finish)
        if arguments.index:
            _add_index(arguments.output, config)


def _add_index(bundle: Path, config: RunConfig) -> None:
    """Put what the bundle searches into it, built where it is missing.

    After the rest is written, because a trained encoder is read from there.
    """
    from rlrag.bundle import copy_bundle
    from rlrag.bundle_files import INDEX, read_bundle
    from rlrag.data.load import corpus_of
    from rlrag.pipeline import retrievers_of

    retrieval = replace(read_bundle(bundle), config=config).searching_config.retrieval
    if retrieval.num_shards > 1:
        retrieval = retrieval.model_copy(update={"num_shards": 1})
    places = retrievers_of(corpus_of(config), retrieval, config.cache_path).index_dirs

    def finish(staging: Path) -> None:
        for place in places:
            shutil.copytree(place, staging / INDEX / place.name)

    copy_bundle(bundle, bundle, finish)


def _open_data(config: RunConfig, run_dir: RunDirectory) -> TrainingData:
    """What the run trained on; a bundle keeps its shapes and hashes."""
    from rlrag.pipeline import open_library, open_training_data
    from rlrag.training.feedback.selections import open_logged_data

    library = open_library(config)
    if config.feedback is None:
        return open_training_data(config, library)
    return data_of_log(library, open_logged_data(config, library, run_dir.feedback))


def _export_rounds(config: RunConfig, run_dir: RunDirectory, arguments: ExportArguments) -> None:
    """A run in turns has no checkpoints of all parts together, but the bundle that it ended with.

    Raises:
        CheckpointError: when the run has not ended, or a single checkpoint is asked for, which a
            run in turns has only of its turns.
    """
    from rlrag.bundle import copy_bundle
    from rlrag.files.directories import find_whole

    if arguments.checkpoint is not None or not find_whole(run_dir.bundle).is_dir():
        raise CheckpointError(
            f"{run_dir.path} trains {' and '.join(config.algorithm.parts)} in turns and can be "
            "exported only when it is finished; give a finished run with --run-dir, or one of "
            f"its turns, such as {run_dir.rounds / '1-retriever'}"
        )
    if arguments.hub:
        copy_bundle(run_dir.bundle, arguments.output, write_card)
    else:
        copy_bundle(run_dir.bundle, arguments.output)
    if arguments.index:
        _add_index(arguments.output, config)


def _existing(store: CheckpointStore, step: int) -> int:
    steps = store.steps()
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise CheckpointError(
            f"{store.path(step)} does not exist or was never finished; {there}: give an existing "
            "one, or --run-dir for the best"
        )
    return step


def _evaluated(run_dir: RunDirectory, step: int) -> Evaluated | None:
    """What the run's final evaluation found, where it was of this checkpoint."""
    from rlrag.bundle_files import GOLDEN, Evaluated, read_bundle
    from rlrag.files.directories import find_whole

    table = run_dir.read_evaluation()
    if table is None or table.get("bundle_step") != step:
        return None
    # A run of an earlier version has a bundle of an earlier format, without golden questions.
    if not (find_whole(run_dir.bundle) / GOLDEN).is_file():
        return Evaluated((), table)
    return Evaluated(read_bundle(run_dir.bundle).golden, table)


def save_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], config: RunConfig) -> None:
    """Write a generator's adapter as peft does, from the tensors that a checkpoint keeps of it.

    Raises:
        CheckpointError: when a tensor is no half of an adapter.
    """
    from peft import LoraConfig, TaskType
    from safetensors.torch import save_file

    from rlrag.files.directories import contiguous
    from rlrag.training.learners.generator_model import LORA_ALPHA

    named, layers = {}, set()
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"the checkpoint's generator has {name!r}, which does not belong to a LoRA "
                "adapter; export it with --adapter merged"
            )
        layers.add(match[1])
        named[f"base_model.model.{match[1]}.lora_{match[2]}.weight"] = tensor
    training = config.generator_training
    directory.mkdir(parents=True)
    LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=config.generator.model,
        r=training.lora_rank,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=sorted(layers),
        inference_mode=True,
    ).save_pretrained(str(directory))
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"].sort()  # peft keeps a set, whose order changes with the process
    path.write_text(json.dumps(settings, indent=2) + "\n")
    save_file(contiguous(named), directory / "adapter_model.safetensors")


def write_card(staging: Path) -> None:
    """Describe a bundle that is being written in its README.md."""
    from rlrag.bundle_files import CARD, parse_bundle
    from rlrag.cli.model_card import model_card

    (staging / CARD).write_text(model_card(parse_bundle(staging)))
