"""Contract tests for your own parts.

Each raises `AssertionError` with what of the contract is broken. The built-in parts pass them.

Shape letters: B questions, M episodes of one question, K hits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlrag.config import EnvironmentConfig, RewardConfig
from rlrag.data.corpus import Corpus, ExtendedCorpus
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play
from rlrag.environment.sample_task import sample_candidates
from rlrag.errors import ConfigError, GenerationError, RewardError
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator, Sampling
from rlrag.records import Generation, Passage, Prompt, Score, Trajectories
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.protocol import Hits, Retriever
from rlrag.rewards.composite import RewardModel, Rollout
from rlrag.selection.protocol import Draws
from rlrag.testing.query_writers import check_query_writer as check_query_writer
from rlrag.testing.trainers import check_trainer as check_trainer
from rlrag.testing.trainers import sample_context as sample_context

_NUM_EPISODES = 4
_NUM_QUESTIONS = 4
_TOLERANCE = 1e-4  # nats
_ROUNDING = 1e-2
"""Nats by which a score may change with what else is in its batch."""


def check_policy(
    policy: Any, num_selected: int = 2, candidates: CandidateTable | None = None
) -> None:
    """Whether a policy can be trained, drawn from again and served.

    Its log-probabilities of drawn actions are those that `log_prob` gives, and have a gradient; the
    seeds of a question alone decide what is drawn for it; its most probable actions stay the same.

    Args:
        policy: A `torch.nn.Module` with the methods of `rlrag.selection.protocol.Policy`.
        num_selected: Passages that it was made to pick (K).
        candidates: What it picks from; `sample_candidates()` when unset.

    Raises:
        AssertionError: what is broken.
        EpisodeError: when it chooses what the environment does not allow.
    """
    table = sample_candidates() if candidates is None else candidates
    assert list(policy.parameters()), "the policy has no parameter that could be trained"
    rows_B = np.arange(min(3, len(table)))
    drawn = _drawn(policy, table, num_selected, rows_B)
    logp_ET = policy.log_prob(drawn)
    assert tuple(logp_ET.shape) == drawn.actions_ET.shape, (
        f"log_prob has the shape {tuple(logp_ET.shape)} for actions of {drawn.actions_ET.shape}"
    )
    assert not logp_ET[~torch.from_numpy(drawn.acts_ET)].any(), (
        "log_prob is not 0 beyond the end of an episode"
    )
    difference = np.abs(logp_ET.detach().cpu().double().numpy() - drawn.logp_ET).max()
    assert difference < _TOLERANCE, (
        f"act and log_prob differ by {difference:.2g} nats about the same actions"
    )
    policy.zero_grad()
    logp_ET.sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.requires_grad and p.grad is not None]
    assert gradients, "log_prob has no gradient in any parameter"
    assert all(g.isfinite().all() for g in gradients), "the gradient of log_prob is not finite"
    policy.zero_grad()
    again = _drawn(policy, table, num_selected, rows_B)
    assert np.array_equal(again.actions_ET, drawn.actions_ET), "equal seeds draw other actions"
    alone = _drawn(policy, table, num_selected, rows_B[-1:])
    assert [_picks(alone, e) for e in range(_NUM_EPISODES)] == [
        _picks(drawn, e) for e in range(len(drawn) - _NUM_EPISODES, len(drawn))
    ], "what is drawn for a question depends on the other questions of the batch"
    best = [_drawn(policy, table, num_selected, rows_B, greedy=True) for _ in range(2)]
    assert np.array_equal(best[0].actions_ET, best[1].actions_ET), (
        "the most probable actions change from call to call"
    )


def check_retriever(
    retriever: Retriever, corpus: Corpus, questions: Sequence[str], num_hits: int = 5
) -> None:
    """Whether a retriever ranks passages: distinct ones, falling scores, the same each time.

    A retriever of your own is checked as `rlrag.retrieval.plugin.PluginRetriever`.

    Args:
        retriever: The retriever of this corpus.
        corpus: At least two passages, or `rlrag.data.corpus.NO_CORPUS` for a retriever that brings
            its passages with their texts.
        questions: At least two.
        num_hits: How many passages are asked for, at most; not more than the corpus has.

    Raises:
        AssertionError: what is broken.
    """
    assert retriever.name, "the retriever has no name"
    num_hits = min(num_hits, len(corpus)) if corpus else num_hits
    hits = retriever.search(questions, num_hits)
    shape = (len(questions), num_hits)
    assert hits.rows_BK.shape == hits.scores_BK.shape == shape, (
        f"search gave shapes {hits.rows_BK.shape} and {hits.scores_BK.shape}, not {shape}"
    )
    assert hits.rows_BK.dtype == np.int64, f"rows are {hits.rows_BK.dtype}, not int64"
    assert hits.scores_BK.dtype == np.float32, f"scores are {hits.scores_BK.dtype}, not float32"
    assert hits.rows_BK.min() >= 0, "a row is negative"
    num_passages = len(corpus) + len(hits.brought)
    assert hits.rows_BK.max() < num_passages, "a row is beyond the corpus and what was brought"
    assert all(len(set(rows.tolist())) == num_hits for rows in hits.rows_BK), "a row comes twice"
    assert np.isfinite(hits.scores_BK).all(), "a score is not finite"
    assert (np.diff(hits.scores_BK, axis=1) <= 0).all(), "scores rise within a ranking"
    ranked = _ranked(hits, corpus)
    assert _ranked(retriever.search(questions[:1], num_hits), corpus) == ranked[:1], (
        "a question is ranked otherwise, or has other texts, when it is asked alone"
    )
    assert _ranked(retriever.search(questions, 1), corpus) == [best[:1] for best in ranked], (
        "the best passage changes with the number that is asked for"
    )


def _ranked(hits: Hits, corpus: Corpus) -> list[list[Passage]]:
    """The passages of each question, with the texts that it has them with."""
    whole = ExtendedCorpus(corpus, hits.brought)
    return [[whole[row] for row in rows] for rows in hits.rows_BK.tolist()]


def check_generator(generator: Generator, prompts: PromptBuilder) -> None:
    """Whether a generator can answer in training, evaluation and service.

    It gives an answer a prompt, in their order, whatever else is asked with it; without a
    temperature the same each time, and with one the same for the same seed. Where it scores
    answers, it gives a log-probability each. A prompt that cannot be answered takes no other
    prompt's answer away.

    A generator of your own is opened, with its prompts, by `rlrag.generation.build.open_generator`;
    its member `inner` is what to check, without the cache in front of it.

    Args:
        generator: The generator.
        prompts: Builds what it is asked, with the tokenizer of its model.

    Raises:
        AssertionError: what is broken.
    """
    table = sample_candidates()
    questions = enumerate(table.questions[:_NUM_QUESTIONS])
    asked = [prompts.build(question, table.passages(row)[:1]) for row, question in questions]
    identity, before = generator.identity, generator.tokens.spent
    assert identity, "the generator has no identity"
    greedy = Sampling(max_new_tokens=4)
    assert list(generator.generate([], greedy)) == [], "no prompts have answers"
    texts = _texts(generator, asked, greedy)
    assert generator.tokens.spent > before, "tokens.spent counts no tokens of the answers"
    for sampling in (greedy, replace(greedy, temperature=1.0, seed=3)):
        first = texts if sampling is greedy else _texts(generator, asked, sampling)
        assert _texts(generator, asked, sampling) == first, (
            f"equal prompts get other answers with temperature {sampling.temperature:g} and "
            f"seed {sampling.seed}"
        )
        assert _texts(generator, asked[::-1], sampling)[::-1] == first, (
            "answers do not keep the order of their prompts, or depend on it"
        )
        assert _texts(generator, asked[:1], sampling) == first[:1], (
            "a prompt is answered otherwise when it is asked alone"
        )
    nothing = replace(asked[0], token_ids=())
    found = generator.generate([nothing, *asked[1:]], greedy)
    assert isinstance(found[0], GenerationError), "a prompt without tokens has an answer"
    assert [_text(one) for one in found[1:]] == texts[1:], (
        "a prompt that cannot be answered changes the answers of the others"
    )
    _check_scores(generator, prompts, asked)
    assert generator.identity == identity, "the identity changes though no weights were loaded"


def check_reward(name: str, rollouts: Sequence[Rollout] = ()) -> None:
    """Whether a reward can be trained on: finite numbers, under the same names, the same each time.

    Args:
        name: A built-in one, or `package.module:function` of your own.
        rollouts: What it rewards, at least two; some with right, wrong and empty answers and
            without passages when unset. Give them where it reads metadata of your own.

    Raises:
        AssertionError: what is broken.
        ConfigError: when there is no such reward, or it asks for what no rollout has.
    """
    rollouts = list(rollouts) or _rollouts()
    kept = copy.deepcopy(rollouts)
    model = RewardModel(RewardConfig(functions=(name,)))
    results = model(rollouts)
    for result in results:
        assert not isinstance(result, RewardError), str(result)
    terms = [result.terms for result in results if not isinstance(result, RewardError)]
    for found in terms:
        assert found.keys() == terms[0].keys(), (
            f"reward {name!r} gives {sorted(found)} for one rollout and {sorted(terms[0])} for "
            "another"
        )
    assert rollouts == kept, f"reward {name!r} changes what it is given"
    assert model(rollouts) == results, f"reward {name!r} gives the same rollout another number"
    assert [model([rollout])[0] for rollout in rollouts] == results, (
        f"reward {name!r} depends on what else is rewarded, or on calls that run beside it"
    )


def _text(answer: Generation | GenerationError) -> str:
    assert not isinstance(answer, GenerationError), f"a prompt has no answer: {answer}"
    return answer.text


def _texts(generator: Generator, asked: Sequence[Prompt], sampling: Sampling) -> list[str]:
    """The answers' texts, after what an answer must be was checked."""
    answers = generator.generate(asked, sampling)
    assert len(answers) == len(asked), f"{len(asked)} prompts have {len(answers)} answers"
    texts = [_text(answer) for answer in answers]
    for answer in answers:
        assert isinstance(answer, Generation), f"an answer is a {type(answer).__name__}"
        assert answer.text == answer.text.strip(), f"answer {answer.text!r} is not stripped"
        ends = [mark for mark in sampling.stop if mark in answer.text]
        assert not ends, f"answer {answer.text!r} goes on after the stop string {ends[0]!r}"
        assert answer.logp is None or (math.isfinite(answer.logp) and answer.logp < _ROUNDING), (
            f"the log-probability of an answer is {answer.logp}"
        )
        assert answer.num_prompt_tokens > 0, "an answer counts no tokens of its prompt"
        assert answer.version == generator.version, "an answer is of another version"
    return texts


def _check_scores(generator: Generator, prompts: PromptBuilder, asked: Sequence[Prompt]) -> None:
    texts = ("Harrowgate", "a slate house", "1871", "no")
    answers = [prompts.encode_answer(text) for text in texts[: len(asked)]]
    try:
        scores = generator.score(asked, answers)
    except ConfigError:  # it says that it cannot, which is allowed
        return
    assert list(generator.score([], [])) == [], "no prompts have scores"
    assert len(scores) == len(asked), f"{len(asked)} prompts have {len(scores)} scores"
    again = generator.score(asked[::-1], answers[::-1])[::-1]
    pairs = zip(asked, answers, strict=True)
    alone = [generator.score([prompt], [answer])[0] for prompt, answer in pairs]
    for score, answer, *others in zip(scores, answers, again, alone, strict=True):
        assert not isinstance(score, GenerationError), f"an answer has no score: {score}"
        assert isinstance(score, Score), f"a score is a {type(score).__name__}"
        assert score.num_tokens == len(answer), (
            f"a score is of {score.num_tokens} tokens, but its answer has {len(answer)}"
        )
        assert math.isfinite(score.logp), f"a log-probability is {score.logp}"
        assert score.logp < _ROUNDING, f"a log-probability is {score.logp}"
        assert score.version == generator.version, "a score is of another version"
        for other in others:
            assert isinstance(other, Score), (
                f"an answer has no score when it is asked again: {other}"
            )
            assert abs(other.logp - score.logp) < _ROUNDING, (
                f"an answer scores {score.logp:g}, and {other.logp:g} in another order or alone"
            )


def _rollouts() -> list[Rollout]:
    """Of the built-in questions: right, wrong and empty answers, and none but the first picked."""
    table = sample_candidates()
    found = []
    for row, question in enumerate(table.questions[:_NUM_QUESTIONS]):
        right = question.golden_answers[0]
        for answer, num_picked in ((right, 2), (f"not {right}", 1), ("", 1), ("no", 0)):
            passages = tuple(table.passages(row)[:num_picked])
            found.append(Rollout(question, passages, answer, -1.5 - row, 2))
    return found


def _picks(played: Trajectories, episode: int) -> tuple[int, ...]:
    """The actions of one episode."""
    return tuple(played.actions_ET[episode][played.acts_ET[episode]].tolist())


def _drawn(
    policy: Any, table: CandidateTable, num_selected: int, rows_B: np.ndarray, greedy: bool = False
) -> Trajectories:
    seeds = [[7, int(row)] for row in rows_B]
    num_episodes = len(rows_B) * (1 if greedy else _NUM_EPISODES)
    config = EnvironmentConfig(num_selected=num_selected)
    episodes = open_episodes(config, num_episodes, table, Unrewarded())
    try:
        return play(episodes, policy, rows_B, None if greedy else Draws(seeds, _NUM_EPISODES))
    finally:
        episodes.close()
