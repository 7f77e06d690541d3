"""Pools of helpful and unhelpful passages for each training question.

The offline stage of OpenRAG (arXiv 2503.08398, section 3.2). The candidates of a question fall into
a pool of positives and a pool of negatives. A question with an empty pool teaches nothing and is
left out. Thresholds that tell new passages right from wrong by their score come from the pools.

Shape letters: Q questions, N candidates.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rlrag.algorithms.rag_labels import Label, Thresholds, score_auc
from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, DataError, GenerationError, RlragError
from rlrag.files.directories import (
    check_whole,
    contiguous,
    find_whole,
    load_tensors,
    whole_directory,
)
from rlrag.pipeline import sampling_of
from rlrag.retrieval.candidates import CandidateTable
from rlrag.training.openrag.passage_judge import PassageJudge

logger = logging.getLogger(__name__)

FAILED = -1
LEFT_OUT = -2
_CHUNK_QUESTIONS = 16


@dataclass(frozen=True)
class Pools:
    """What was found out about the candidates of every question.

    `rows_QN` are rows of the corpus, best first for the retriever. `labels_QN` holds 1 for a
    passage with which the generator is right, 0 for one with which it is wrong, -1 where that could
    not be found out, and -2 for all passages of a question that the tokens did not suffice for.
    `logp_QN` is log P(y | q, d) in nats, NaN where unknown. `source` says what they were made
    from.
    """

    rows_QN: np.ndarray
    labels_QN: np.ndarray
    logp_QN: np.ndarray
    source: str
    num_tokens: int = 0
    """Generator tokens that the judgements asked for, computed or cached."""
    seconds: float = 0.0
    """How long that took; of a stage that was stopped, since it went on."""
    failures: tuple[str, ...] = ()
    """Why passages could not be judged, each reason once."""
    prompts: Mapping[str, float] = field(default_factory=dict)
    """What the prompts of the judgements left out, by `PromptCounts.shares`; empty without any."""

    @property
    def usable(self) -> np.ndarray:
        """Questions with a positive and a negative passage, ascending."""
        has_both = (self.labels_QN == 1).any(axis=1) & (self.labels_QN == 0).any(axis=1)
        return np.flatnonzero(has_both)

    @property
    def judged(self) -> np.ndarray:
        """Questions that the tokens sufficed for, ascending."""
        return np.flatnonzero((self.labels_QN != LEFT_OUT).all(axis=1))

    def of_label(self, question: int, label: Label) -> list[int]:
        """Corpus rows of a question's positive (1) or negative (0) passages."""
        rows: list[int] = self.rows_QN[question][self.labels_QN[question] == label].tolist()
        return rows

    def known(self, question: int) -> dict[int, Label]:
        """Label of every corpus row that was judged."""
        found: dict[int, Label] = dict.fromkeys(self.of_label(question, 0), 0)
        return found | dict.fromkeys(self.of_label(question, 1), 1)

    def known_logp(self, question: int) -> dict[int, float]:
        """Log P(y | q, d) of every corpus row that has one."""
        scored = ~np.isnan(self.logp_QN[question])
        rows, logp = self.rows_QN[question][scored], self.logp_QN[question][scored]
        return dict(zip(rows.tolist(), logp.tolist(), strict=True))

    def thresholds(self, question: int) -> Thresholds:
        """Scores beyond which a passage that was not judged counts as positive or negative."""
        logp, labels = self.logp_QN[question], self.labels_QN[question]
        return Thresholds.of_pools(logp[labels == 1], logp[labels == 0])

    def auc_of(self, questions: np.ndarray) -> float:
        """How well scores tell right from wrong within these questions; NaN without scores."""
        labels_QN, logp_QN = self.labels_QN[questions], self.logp_QN[questions]
        judged = [
            (labels >= 0) & np.isfinite(logp)
            for labels, logp in zip(labels_QN, logp_QN, strict=True)
        ]
        return score_auc(
            [logp[known] for logp, known in zip(logp_QN, judged, strict=True)],
            [labels[known] for labels, known in zip(labels_QN, judged, strict=True)],
        )

    def save(self, directory: Path, description: Mapping[str, Any]) -> None:
        """Write a directory that is whole or absent, with a description for people."""
        tensors = {
            "rows": torch.from_numpy(self.rows_QN.astype(np.int64)),
            "labels": torch.from_numpy(self.labels_QN),
            "logp": torch.from_numpy(self.logp_QN),
        }
        with whole_directory(directory) as staging:
            save_file(contiguous(tensors), staging / "pools.safetensors")
            (staging / "source.json").write_text(
                json.dumps(
                    {
                        "source": self.source,
                        "num_tokens": self.num_tokens,
                        "seconds": self.seconds,
                        "failures": self.failures,
                        "prompts": self.prompts,
                    }
                )
                + "\n"
            )
            (staging / "summary.json").write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, source: str) -> Pools | None:
        """Read what `save` wrote; None where nothing was.

        Raises:
            CheckpointError: when a file is damaged or was made from something else.
        """
        directory = find_whole(directory)
        if not directory.is_dir():
            return None
        check_whole(directory)
        facts = json.loads((directory / "source.json").read_text())
        if facts.keys() != {"source", "num_tokens", "seconds", "failures", "prompts"}:
            raise CheckpointError(
                f"{directory} was written by another version of rlrag; delete it and run the "
                "same command, which rebuilds it and reuses cached judgements"
            )
        if facts["source"] != source:
            raise CheckpointError(
                f"{directory} was built from {facts['source']} and not from {source}; delete it, "
                "or use another --run-dir"
            )
        tensors = load_tensors(directory / "pools.safetensors")
        rows_QN, labels_QN, logp_QN = (tensors[n].numpy() for n in ("rows", "labels", "logp"))
        asked = facts["num_tokens"], facts["seconds"], tuple(facts["failures"]), facts["prompts"]
        return cls(rows_QN, labels_QN, logp_QN, source, *asked)


def load_pools(
    config: RunConfig, candidates: CandidateTable, generator_identity: str, directory: Path
) -> Pools:
    """The pools that the offline stage of this run left.

    Raises:
        CheckpointError: when there are none, or they are damaged or another run's.
    """
    pools = Pools.load(directory, pools_source(config, candidates, generator_identity))
    if pools is None:
        raise CheckpointError(
            f"{directory} does not exist; run the offline stage before the training loop"
        )
    return pools


def pools_source(config: RunConfig, candidates: CandidateTable, generator_identity: str) -> str:
    """What pools of these candidates are made from, as a text that changes when they would."""
    labels = config.openrag.labels
    digest = hashlib.sha256(np.ascontiguousarray(candidates.rows_QN).tobytes())
    digest.update(candidates.corpus.content_hash.encode())
    for question in candidates.questions:
        right = question.gold_ids if labels == "gold" else question.golden_answers
        choices = list(question.metadata.get("choices", ()))
        facts = [question.id, question.question, right, choices]
        facts += [question.gold_ids] if labels == "generator_else_gold" else []
        digest.update(json.dumps(facts).encode())
    found = f"candidates {digest.hexdigest()[:16]}, labelled by "
    if labels == "gold":
        return f"{found}gold passages"
    asked = [config.generator.prompt.model_dump(mode="json"), asdict(sampling_of(config))]
    prompt = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    found = f"{found}{generator_identity} with prompt {prompt}"
    limit = offline_token_limit(config)
    if limit is not None:
        found = f"{found} for at most {limit} tokens in the order of seed {config.seed}"
    return found if labels == "generator" else f"{found}, else gold passages"


def offline_token_limit(config: RunConfig) -> int | None:
    """Generator tokens that judgements before training may take; None without a limit."""
    limit = config.training.max_generator_tokens
    if limit is None or "online" not in config.openrag.stages:
        return limit
    return int(limit * config.openrag.offline_token_share)


def judging_order(
    num_questions: int,
    limit: int | None = None,
    seed: int = 0,
    spent: Callable[[], int] = lambda: 0,
) -> Iterator[list[int]]:
    """Questions that are judged together, one group after another, until the tokens are spent.

    Without a limit they come in their order, with one in a random order, so that those left out are
    no kind of their own. What a question costs is known from those before it, so that the first
    comes alone and in the end the limit is met give or take a question.

    Args:
        num_questions: All of them.
        limit: Tokens, if there is a limit.
        seed: Of the random order.
        spent: Tokens spent by now; asked when the questions before are judged.
    """
    numbers = np.arange(num_questions)
    if limit is not None:
        numbers = np.random.default_rng([seed, 2]).permutation(num_questions)
    before, done = spent(), 0
    while done < num_questions:
        size = _CHUNK_QUESTIONS
        if limit is not None:
            used = spent() - before
            affordable = round((limit - used) * done / max(1, used)) if done else 1
            size = min(size, affordable)
        if size < 1:
            return
        yield numbers[done : done + size].tolist()
        done += size


def judge_candidates(
    candidates: CandidateTable,
    judge: PassageJudge,
    source: str,
    max_failed_share: float,
    known: Mapping[str, Mapping[int, Label]] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, of: None,
    order: Iterable[list[int]] | None = None,
) -> Pools:
    """Let the generator answer every question with each of its candidates alone.

    Judgements are cached by the generator's own cache, so that a stage that was stopped computes
    none of them twice.

    Args:
        candidates: The questions with their candidates.
        judge: Asks the generator.
        source: What `pools_source` gives.
        max_failed_share: The stage ends with an error when more passages cannot be judged.
        known: Labels by question id and corpus row of passages that need not be judged; they have
            no score.
        progress: Called with the questions done and their number.
        order: What `judging_order` gives; all questions in their order if it is not given.

    Raises:
        GenerationError: when too many judgements failed, with the first reason.
    """
    shape = candidates.rows_QN.shape
    labels_QN = np.full(shape, LEFT_OUT, dtype=np.int8)
    logp_QN = np.full(shape, np.nan)
    errors: list[RlragError] = []
    num_done = 0
    for chunk in judging_order(shape[0]) if order is None else order:
        labels_QN[chunk] = FAILED
        open_places = []
        for question in chunk:
            labels = known.get(candidates.questions[question].id, {})
            for column, row in enumerate(candidates.rows_QN[question].tolist()):
                if row in labels:
                    labels_QN[question, column] = labels[row]
                else:
                    open_places.append((question, column))
        judgements = judge(
            [candidates.questions[question] for question, _ in open_places],
            [candidates.corpus[int(candidates.rows_QN[place])] for place in open_places],
            with_labels=True,
        )
        for place, judgement in zip(open_places, judgements, strict=True):
            if isinstance(judgement, RlragError):
                logger.warning("no label for candidate %d: %s", place[1], judgement)
                errors.append(judgement)
                continue
            labels_QN[place] = bool(judgement.is_right)
            logp_QN[place] = judgement.logp
        num_done += len(chunk)
        progress(num_done, shape[0])
        if len(errors) > max_failed_share * labels_QN.size:
            raise GenerationError(
                f"{len(errors)} passages could not be judged, more than "
                f"training.max_failed_share {max_failed_share} allows; the first: {errors[0]}"
            )
    failures = tuple(sorted({str(error) for error in errors}))
    return Pools(candidates.rows_QN, labels_QN, logp_QN, source, failures=failures)


def gold_pools(candidates: CandidateTable, source: str) -> Pools:
    """Pools by relevance: positive is what a question names as gold, also when not retrieved.

    The worst candidate makes room for each gold passage that retrieval missed.

    Raises:
        DataError: when no question names gold passages.
    """
    gold = [set(question.gold_ids) for question in candidates.questions]
    if not any(gold):
        raise DataError(
            "algorithm.labels 'gold' and 'generator_else_gold' need questions with gold passages "
            "(metadata.gold_ids), but none has any; use algorithm.labels generator"
        )
    rows_QN = candidates.rows_QN.copy()
    labels_QN = np.zeros(rows_QN.shape, dtype=np.int8)
    for question, ids in enumerate(gold):
        rows = (candidates.corpus.row_of(passage_id) for passage_id in sorted(ids))
        wanted = [row for row in rows if row is not None][: rows_QN.shape[1]]
        retrieved = rows_QN[question].tolist()
        others = [row for row in retrieved if row not in wanted]
        dropped = set(others[rows_QN.shape[1] - len(wanted) :])
        kept = [row for row in retrieved if row not in dropped]
        rows_QN[question] = kept + [row for row in wanted if row not in kept]
        labels_QN[question] = np.isin(rows_QN[question], wanted)
    return Pools(rows_QN, labels_QN, np.full(rows_QN.shape, np.nan), source)


def filled_by_gold(pools: Pools, gold: Pools) -> tuple[Pools, int]:
    """The gold pools of each question judged without a positive passage, and how many these are.

    Such a question has no scores then: where the generator is right with nothing, they say little,
    and gold labels would be held against them.
    """
    filled_Q = ~(pools.labels_QN == 1).any(axis=1) & (gold.labels_QN == 1).any(axis=1)
    filled_Q[np.setdiff1d(np.arange(len(filled_Q)), pools.judged)] = False
    rows_QN, labels_QN, logp_QN = (
        np.where(filled_Q[:, None], of_gold, of_generator)
        for of_gold, of_generator in (
            (gold.rows_QN, pools.rows_QN),
            (gold.labels_QN, pools.labels_QN),
            (gold.logp_QN, pools.logp_QN),
        )
    )
    filled = replace(pools, rows_QN=rows_QN, labels_QN=labels_QN, logp_QN=logp_QN)
    return filled, int(filled_Q.sum())
