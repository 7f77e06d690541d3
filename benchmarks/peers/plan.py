"""The work folder that every compared library reads: questions, passages and prompts as JSON.

The folder holds plain JSON, so that a peer needs nothing of this project to read it:

- `plan.json`: paths of the models, the number of passages in context, how answers are decoded, the
  generator tokens that may be spent, the seed.
- `train.json`: questions with golden answers, gold passages, candidates and prompts.
- `dev.json`: questions with their candidates, without answers and without gold passages.
- `config.json`: the configuration, for a peer that uses this project's environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrag.config import BUILTIN_ENCODER, RunConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import RunDirectoryError
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.models.directories import resolve_model
from rlrag.pipeline import Library, open_evaluation_data, open_library, open_training_data
from rlrag.records import Passage
from rlrag.retrieval.candidates import CandidateTable


@dataclass(frozen=True)
class Prepared:
    """What is the same for all peers: the work folder, and the parts that measure their output.

    `hashes` name the corpus and the evaluation questions, as the record of an evaluation does.
    """

    folder: Path
    config: RunConfig
    library: Library
    dev: CandidateTable
    hashes: Mapping[str, str]


def prepare(config: RunConfig, folder: Path, token_budget: int) -> Prepared:
    """Write the work folder, or check that it was written for the same comparison.

    Raises:
        RunDirectoryError: when the folder belongs to another configuration or budget.
    """
    folder = folder.absolute()
    library = open_library(config)
    dev, questions_hash = open_evaluation_data(config, library)
    plan = _plan(config, token_budget)
    if (folder / "plan.json").exists():
        _check_same(folder, config, plan)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        prompts = PromptBuilder(
            config.generator.prompt,
            load_tokenizer(Path(plan["generator"])),
            config.generator.stop,
        )
        train = open_training_data(config, library).train
        write_json(folder / "train.json", training_records(train, prompts, plan["num_selected"]))
        write_json(folder / "dev.json", dev_records(dev))
        (folder / "config.json").write_text(config.to_json())
        write_json(folder / "plan.json", plan)  # last: with it the folder is complete
    hashes = {"corpus": library.corpus.content_hash, "questions": questions_hash}
    return Prepared(folder, config, library, dev, hashes)


def _plan(config: RunConfig, token_budget: int) -> dict[str, Any]:
    cache = config.cache_path
    return {
        "generator": str(resolve_model(config.generator.model, cache).absolute()),
        "encoder": str(
            resolve_model(config.retrieval.encoder or BUILTIN_ENCODER, cache).absolute()
        ),
        "encoder_max_tokens": config.retrieval.encoder_max_tokens,
        "num_selected": config.environment.num_selected,
        "max_new_tokens": config.generator.max_new_tokens,
        "stop": list(config.generator.stop),
        "token_budget": token_budget,
        "seed": config.seed,
    }


def _check_same(folder: Path, config: RunConfig, plan: Mapping[str, Any]) -> None:
    same = (folder / "config.json").read_text() == config.to_json()
    if not same or json.loads((folder / "plan.json").read_text()) != plan:
        raise RunDirectoryError(
            f"{folder} was prepared with another configuration or token budget; use the same "
            "flags as before, or another --folder"
        )


def training_records(
    table: CandidateTable, prompts: PromptBuilder, num_selected: int
) -> list[dict[str, Any]]:
    """A record for each question that may be trained on.

    `prompt` shows the retriever's first `num_selected` passages in its order, `candidate_prompts`
    each candidate alone.
    """
    records = []
    for row, question in enumerate(table.questions):
        passages = table.passages(row)
        records.append(
            {
                "id": question.id,
                "question": question.question,
                "golden_answers": list(question.golden_answers),
                "gold": [_passage(p) for p in _gold(table.corpus, question.gold_ids)],
                "candidates": _candidates(table, row),
                "prompt": prompts.build(question, passages[:num_selected]).text,
                "candidate_prompts": [prompts.build(question, [p]).text for p in passages],
            }
        )
    return records


def dev_records(table: CandidateTable) -> list[dict[str, Any]]:
    """A record for each question that is measured: nothing that tells its answer."""
    return [
        {
            "id": question.id,
            "question": question.question,
            "candidates": _candidates(table, row),
        }
        for row, question in enumerate(table.questions)
    ]


def _gold(corpus: Corpus, gold_ids: Sequence[str]) -> list[Passage]:
    rows = [corpus.row_of(gold_id) for gold_id in gold_ids]
    return [corpus[row] for row in rows if row is not None]


def _candidates(table: CandidateTable, row: int) -> list[dict[str, Any]]:
    """Passages in the retriever's order, with its score."""
    scores_N = table.scores_QNC[row, :, 0].tolist()
    return [
        _passage(passage) | {"score": score}
        for passage, score in zip(table.passages(row), scores_N, strict=True)
    ]


def _passage(passage: Passage) -> dict[str, Any]:
    return {"id": passage.id, "title": passage.title, "contents": passage.contents}


def write_json(path: Path, value: object) -> None:
    """Indented JSON, complete or not there at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)
