"""The systems that an evaluation compares, and their answers and metrics.

A system is a way to choose passages: nothing, the retriever's first K in its order, the same K in
reverse, its first alone, K at random, the trained policy's pick, or for each question the single
candidate that turns out best (the oracle). Where episodes look further there are also three rules
that hop (`rlrag.evaluation.hop_rules`), and `gold_passages`, those that the question names. `bm25`,
`dense`, `hybrid`, `original_retriever` and `tuned_retriever` are the first K of that retriever;
where a retriever was trained, `trained` picks from what it finds. All are answered by the generator
as training found it, but `trained` and the systems named after a trained generator:
`tuned_generator` (the retriever's order), `tuned_generator_first` and `tuned_generator_reversed`.

A question that the generator could not answer under some system is left out of all, and named, so
that the systems stay comparable.

Shape letters: Q questions, N candidates, K selected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from rlrag.config import RunConfig
from rlrag.environment.rollout import play_greedy
from rlrag.errors import ConfigError, RlragError
from rlrag.evaluation.baselines import (
    FIXED_CHOICES,
    FIXED_ORDER,
    TRAINED,
    Baseline,
    baselines_for,
    choose,
    contenders,
)
from rlrag.evaluation.choices import Choices
from rlrag.evaluation.hop_rules import HOP_RULES, hop_selections
from rlrag.evaluation.ranking import ndcg_at_k, recall_at_k
from rlrag.evaluation.table import EvaluationTable, SystemMetrics, build_table
from rlrag.records import EpisodePath, Generation, Passage, Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answer_match import answer_contained, exact_match, token_f1
from rlrag.rewards.answering import AnsweringReward
from rlrag.selection.protocol import Policy

_BY_TUNED_GENERATOR = (*FIXED_CHOICES[FIXED_ORDER], TRAINED)
_RETRIEVERS = ("bm25", "dense", "hybrid", "original_retriever", "tuned_retriever")


@dataclass(frozen=True)
class Answered:
    """What one system showed the generator and what it said, question by question.

    Selections are best first. An answer that could not be given is the error that says why.
    `candidates` is what was picked from, `retriever` the retriever that found it: `retriever` for
    that of the run; both are None where a system picks nothing. `rewards_Q` is NaN where there is
    no answer, and None where rewards are not asked for. `paths` tell how a policy that looks
    further came to its selections.
    """

    questions: Sequence[Question]
    selections: Sequence[Sequence[Passage]]
    answers: Sequence[Generation | RlragError]
    candidates: CandidateTable | None = None
    retriever: str | None = None
    rewards_Q: np.ndarray | None = None
    paths: Sequence[EpisodePath | None] = ()

    @property
    def texts(self) -> list[str | None]:
        """The answers' texts, None where there is none."""
        return [None if isinstance(a, RlragError) else a.text for a in self.answers]


@dataclass(frozen=True)
class HeldBack:
    """Validation questions, which choose what `trained` is compared with.

    `retrievers` are their candidates from other retrievers, by system.
    """

    candidates: CandidateTable
    retrievers: Mapping[str, Callable[[], CandidateTable]] = field(default_factory=dict)


def evaluate(
    config: RunConfig,
    policy: Policy,
    candidates: CandidateTable,
    answering: AnsweringReward,
    progress: Callable[[str], None] = lambda text: None,
    tune_generator: Callable[[], None] = lambda: None,
    retrievers: Mapping[str, Callable[[], CandidateTable]] = MappingProxyType({}),
    keep: Callable[[str, Answered], None] = lambda name, answered: None,
    held_back: HeldBack | None = None,
    baselines: Sequence[Baseline] = (),
) -> EvaluationTable:
    """Answer every question under every configured system and compare them.

    Args:
        config: Systems, resamples and K.
        policy: The trained selection policy.
        candidates: The questions, which must not have been trained on.
        answering: Builds prompts and asks the generator; equal requests are asked once.
        progress: Called with the name of each system before its answers are asked for.
        tune_generator: Gives the generator behind `answering` its trained weights; called once,
            before the systems that use them, which come last.
        retrievers: Candidates of the same questions from other retrievers, by system; fetched when
            that system's turn comes.
        keep: Called with the name and the answers of each system; those of the oracle are what its
            best candidates led to.
        held_back: Choose by these questions what `trained` is compared with.
        baselines: Without them, what an earlier evaluation of the same weights chose.

    Raises:
        ConfigError: a system is asked for whose retriever this run has not.
        RlragError: why, when no question was answered under all systems.
    """
    num_selected = config.environment.num_selected
    found: dict[str, SystemMetrics] = {}
    errors: dict[int, RlragError] = {}
    asked = config.systems
    missing = [name for name in asked if name in _RETRIEVERS and name not in retrievers]
    if missing:
        raise ConfigError(
            f"evaluation.systems asks for {', '.join(missing)}, but this run trained no "
            "retriever or has no index for it; leave it out"
        )
    tuned = [name for name in asked if name in _BY_TUNED_GENERATOR]
    rivals = contenders(asked) if held_back is not None else frozenset()
    by_reward = judged_by_reward(config, candidates)
    measured: dict[str, Sequence[np.ndarray]] = {}
    choices: Choices | None = None
    for name in [*(name for name in asked if name not in tuned), *tuned]:
        if name in tuned[:1]:
            tune_generator()
        progress(name)
        source = "tuned_retriever" if name == TRAINED else name
        table = retrievers[source]() if source in retrievers else candidates
        retriever = source if source in retrievers else "retriever"
        if name == "oracle":
            answered = _oracle(table, answering, by_reward)
            found[name] = _measure(answered, 0)
        else:
            shown, paths = _selections(name, config, policy, table)
            if name == TRAINED and config.trains_selector:
                choices = choices_of(shown, table, num_selected)
            answered = answered_with(answering, table.questions, shown, by_reward)
            answered = replace(answered, paths=paths)
            depth = 0 if name == "no_retrieval" else num_selected
            found[name] = _measure(answered, depth, config.environment.looks_further)
        if name != "no_retrieval":
            answered = replace(answered, candidates=table, retriever=retriever)
        keep(name, answered)
        errors |= {q: a for q, a in enumerate(answered.answers) if isinstance(a, RlragError)}
        if held_back is not None and name in rivals:
            others = held_back.retrievers
            table = others[source]() if source in others else held_back.candidates
            judged = judged_by_reward(config, held_back.candidates)
            shown, _ = _selections(name, config, policy, table)
            tried = _measure(answered_with(answering, table.questions, shown, judged), 0)
            values = (tried.reward,) if judged else (tried.em, tried.f1)
            measured[name] = [values_Q for values_Q in values if values_Q is not None]
    answered_Q = np.array([q not in errors for q in range(len(candidates))])
    if not answered_Q.any():
        raise next(iter(errors.values()))
    return build_table(
        {name: found[name].of(answered_Q) for name in asked},
        num_selected,
        seed=config.seed,
        left_out={candidates.questions[q].id: str(error) for q, error in sorted(errors.items())},
        baselines=baselines_for(
            asked, choose(measured, asked) if held_back is not None else baselines
        ),
        choices=choices,
    )


def judged_by_reward(config: RunConfig, candidates: CandidateTable) -> bool:
    """Whether answers to these questions are judged by the reward, and not by exact match and F1.

    So it is with a reward that wants something else than agreement with golden answers, and where
    there are no golden answers: silence would count as right.
    """
    return prefers_reward(config) or not candidates.has_golden_answers


def prefers_reward(config: RunConfig) -> bool:
    """Whether the run was trained to something else than agreement with golden answers."""
    by_answers = config.algorithm.name in ("sft", "jsa")
    return not config.reward.follows_golden_answers and not by_answers


def choices_of(
    evidence: Sequence[Sequence[Passage]], candidates: CandidateTable, num_selected: int
) -> Choices | None:
    """What a policy chose of the candidates; None where it ended with other passages."""
    picks = []
    for row, passages in enumerate(evidence):
        places = {passage.id: n for n, passage in enumerate(candidates.passages(row))}
        if any(passage.id not in places for passage in passages):
            return None
        picks.append(tuple(places[passage.id] for passage in passages))
    return Choices.of(picks, candidates.num_candidates, num_selected)


def _selections(
    name: str, config: RunConfig, policy: Policy, candidates: CandidateTable
) -> tuple[Sequence[Sequence[Passage]], Sequence[EpisodePath | None]]:
    """The passages that a system shows for each question, in order, and a policy's paths there."""
    if name in (TRAINED, "tuned_selector"):
        played = play_greedy(config.environment, policy, candidates)
        return played.evidence, played.paths
    return _fixed(name, config, candidates), ()


def _fixed(name: str, config: RunConfig, candidates: CandidateTable) -> Sequence[Sequence[Passage]]:
    """What a system that needs no policy shows."""
    num_selected, rows = config.environment.num_selected, range(len(candidates))
    if name == "no_retrieval":
        return [()] * len(candidates)
    if name in HOP_RULES:
        edges = config.environment.hops.edges
        return hop_selections(name, candidates, edges, num_selected)
    if name == "gold_passages":
        return [_gold(candidates, question)[:num_selected] for question in candidates.questions]
    if name in ("retriever_first", "tuned_generator_first"):
        num_selected = 1
    if name == "random_order":
        rng = np.random.default_rng(config.seed)
        orders = [rng.permutation(candidates.num_candidates)[:num_selected] for _ in rows]
        return [
            [candidates.passages(row)[n] for n in order]
            for row, order in zip(rows, orders, strict=True)
        ]
    step = -1 if name in ("retriever_reversed", "tuned_generator_reversed") else 1
    return [candidates.passages(row)[:num_selected][::step] for row in rows]


def _gold(candidates: CandidateTable, question: Question) -> list[Passage]:
    """The passages that a question names as gold, of those that the corpus has."""
    rows = [candidates.corpus.row_of(passage_id) for passage_id in question.gold_ids]
    return [candidates.corpus[row] for row in rows if row is not None]


def answered_with(
    answering: AnsweringReward,
    questions: Sequence[Question],
    selections: Sequence[Sequence[Passage]],
    with_reward: bool,
) -> Answered:
    """Answers behind selections, and their rewards where these are asked for.

    A reward that could not be computed is the error in place of its answer.
    """
    answers = list(answering.answer(questions, selections))
    if not with_reward:
        return Answered(questions, selections, answers)
    rewards_Q = np.full(len(questions), np.nan)
    for row, result in enumerate(answering(questions, selections)):
        if isinstance(result, RlragError):
            answers[row] = result
        elif not isinstance(answers[row], RlragError):
            rewards_Q[row] = result.total
    return Answered(questions, selections, answers, rewards_Q=rewards_Q)


def _measure(answered: Answered, depth: int, looks_further: bool = False) -> SystemMetrics:
    """Measures of one system, with those of a ranking to this depth; none at a depth of 0.

    Where episodes look further, also what of the gold passages is shown, and at what cost.
    """
    metrics = _answer_metrics(answered.questions, answered.texts)
    if looks_further:
        metrics |= _path_metrics(answered)
    if not depth:
        return SystemMetrics(**metrics, reward=answered.rewards_Q)
    ids = [[passage.id for passage in selection] for selection in answered.selections]
    return SystemMetrics(
        **metrics,
        recall=_ranking(recall_at_k, ids, answered.questions, depth),
        ndcg=_ranking(ndcg_at_k, ids, answered.questions, depth),
        reward=answered.rewards_Q,
    )


def _path_metrics(answered: Answered) -> dict[str, np.ndarray]:
    """All gold passages or not (NaN without gold ids), picks, searches and tokens of answers."""
    ids = [{passage.id for passage in selection} for selection in answered.selections]
    searches = [
        float(sum(turn.action == "search" for turn in path.turns()))
        for path in answered.paths
        if path is not None
    ]
    return {
        "all_gold": np.array(
            [
                float(set(question.gold_ids) <= shown) if question.gold_ids else np.nan
                for question, shown in zip(answered.questions, ids, strict=True)
            ]
        ),
        "picks": np.array([len(selection) for selection in answered.selections], np.float64),
        "searches": np.array(searches or [0.0] * len(ids)),
        "tokens": np.array(list(map(_num_tokens, answered.answers))),
    }


def _num_tokens(answer: Generation | RlragError) -> float:
    """Tokens of prompt and answer, NaN where there is none."""
    if isinstance(answer, RlragError):
        return math.nan
    return float(answer.num_prompt_tokens + answer.num_tokens)


def _ranking(
    measure: Callable[[Sequence[str], Collection[str], int], float],
    ids: Sequence[Sequence[str]],
    questions: Sequence[Question],
    depth: int,
) -> np.ndarray:
    """A ranking measure of every question at one depth; NaN without gold ids."""
    return np.array(
        [
            measure(picked, question.gold_ids, depth) if question.gold_ids else np.nan
            for picked, question in zip(ids, questions, strict=True)
        ]
    )


def _oracle(candidates: CandidateTable, answering: AnsweringReward, by_reward: bool) -> Answered:
    """The best answer that any single candidate leads to, by exact match and then F1, or reward.

    A question whose candidates all led to none has the error of the first.
    """
    num_questions, num_candidates = candidates.rows_QN.shape
    questions = [q for q in candidates.questions for _ in range(num_candidates)]
    passages = [passage for q in range(num_questions) for passage in candidates.passages(q)]
    tried = answered_with(answering, questions, [[passage] for passage in passages], by_reward)
    values = tried.rewards_Q
    if values is None:
        metrics = _answer_metrics(questions, tried.texts)
        assert metrics["em"] is not None
        assert metrics["f1"] is not None
        values = metrics["em"] * 2 + metrics["f1"]
    order_QN = np.nan_to_num(values, nan=-np.inf).reshape(num_questions, num_candidates)
    best_Q = order_QN.argmax(axis=1)
    flat = [q * num_candidates + n for q, n in enumerate(best_Q.tolist())]
    return Answered(
        candidates.questions,
        [[passages[i]] for i in flat],
        [tried.answers[i] for i in flat],
        rewards_Q=None if tried.rewards_Q is None else tried.rewards_Q[flat],
    )


def _answer_metrics(
    questions: Sequence[Question], answers: Sequence[str | None]
) -> dict[str, np.ndarray | None]:
    """Measures of each answer, NaN where there is none; None where no question has golden answers.

    Where some have, silence is right for the others.
    """
    measures = {"em": exact_match, "f1": token_f1, "accuracy": answer_contained}
    if not any(question.golden_answers for question in questions):
        return dict.fromkeys(measures)
    return {
        name: np.array(
            [
                np.nan
                if answer is None
                else measure(answer=answer, golden_answers=question.golden_answers)
                for question, answer in zip(questions, answers, strict=True)
            ]
        )
        for name, measure in measures.items()
    }
