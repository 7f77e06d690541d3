"""Times inner loops on synthetic data; prints seconds per call as JSON.

Run `python -m benchmarks.speed.kernels`, or let `benchmarks.speed.baseline` run it on two trees in
turns. Every call does the same work each time, from the same seeds.
"""

from __future__ import annotations

import json
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

_NUM_REPEATS = 5

Kernel = Callable[[], object]


def seconds_a_call(kernel: Kernel) -> float:
    """The fastest of a few repeats, each of as many calls as take a fifth of a second."""
    timer = timeit.Timer(kernel)
    num_calls, _ = timer.autorange()  # calls that take at least 0.2 s together
    return min(timer.repeat(_NUM_REPEATS, num_calls)) / num_calls


def kernels(folder: Path) -> dict[str, Kernel]:
    """What is timed, by name; indexes are built in the folder."""
    return {
        "sample 8 ordered selections of 20 candidates for 64 questions": _sampling(),
        "their log-probabilities, forward and backward": _log_prob(),
        "DRO's weights and coefficients of 64 questions by 8 samples": _objective(),
        "features of 20 candidates of 32 questions": _features(),
        "symmetric InfoNCE of 32 questions and 64 passages": _contrastive(),
        "exact match, F1 and contained answer of 256 answers": _rewards(),
        "BM25 search of 64 questions in 5,000 passages": _search(folder),
        "10,000 bootstrap resamples of 300 questions": _bootstrap(),
        "64 episodes of the environment": _episodes(),
    }


def _positions() -> tuple[np.ndarray, np.ndarray]:
    from rlrag.selection.plackett_luce import sample

    logits_BN = np.random.default_rng(0).normal(size=(64, 20))
    return logits_BN, sample(logits_BN, 8, 3, range(64))


def _sampling() -> Kernel:
    from rlrag.selection.plackett_luce import sample

    logits_BN, _ = _positions()
    return lambda: sample(logits_BN, 8, 3, range(64))


def _log_prob() -> Kernel:
    from rlrag.selection.plackett_luce import action_logp

    logits_EA = torch.tensor(np.repeat(_positions()[0], 8, axis=0), requires_grad=True)
    allowed_EA = torch.ones(logits_EA.shape, dtype=torch.bool)
    return lambda: action_logp(logits_EA, allowed_EA)[:, 0].sum().backward()


def _objective() -> Kernel:
    from rlrag.algorithms.dro import coefficients, importance_weights, valid_samples

    generator = torch.Generator().manual_seed(0)
    rewards_BM = torch.rand((64, 8), generator=generator, dtype=torch.float64)
    log_weights_BM = torch.full_like(rewards_BM, -np.log(8))

    def objective() -> object:
        valid_BM = valid_samples(rewards_BM, log_weights_BM)
        weights_BM = importance_weights(rewards_BM, log_weights_BM, 0.5, "self_normalised")
        return coefficients(weights_BM, log_weights_BM, valid_BM, "mean")

    return objective


def _sample_texts() -> tuple[list[str], list[str], list[tuple[str, ...]]]:
    from rlrag.data.sample import sample_corpus, sample_questions

    passages = [passage.contents for passage in sample_corpus()]
    questions = sample_questions()
    return [q.question for q in questions], passages, [q.golden_answers for q in questions]


def _features() -> Kernel:
    from rlrag.retrieval.candidates import CandidateBatch
    from rlrag.selection.features import candidate_features

    questions, passages, _ = _sample_texts()
    scores_BNC = -np.sort(-np.random.default_rng(0).normal(size=(32, 20, 3)), axis=1)
    batch = CandidateBatch(
        tuple(questions[i % len(questions)] for i in range(32)),
        tuple(tuple(passages[(i + j) % len(passages)] for j in range(20)) for i in range(32)),
        scores_BNC,
        np.zeros((32, 0)),
        np.zeros((32, 20, 0)),
    )
    return lambda: candidate_features(batch)


def _contrastive() -> Kernel:
    from rlrag.algorithms.contrastive import symmetric_info_nce

    generator = torch.Generator().manual_seed(0)
    question_ND = torch.randn((32, 384), generator=generator, requires_grad=True)
    passage_PD = torch.randn((64, 384), generator=generator, requires_grad=True)
    return lambda: symmetric_info_nce(question_ND, passage_PD, 1.0).sum().backward()


def _rewards() -> Kernel:
    from rlrag.rewards.answer_match import answer_contained, exact_match, token_f1

    _, passages, golden = _sample_texts()
    pairs = [
        (" ".join(passages[i % len(passages)].split()[:8]), golden[i % len(golden)])
        for i in range(256)
    ]
    measures = (exact_match, token_f1, answer_contained)
    return lambda: [measure(*pair) for measure in measures for pair in pairs]


def _search(folder: Path) -> Kernel:
    from rlrag.config import RetrievalConfig
    from rlrag.data.corpus import MemoryCorpus
    from rlrag.records import Passage
    from rlrag.retrieval.build import open_retrievers

    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(4000)])
    rows_PW = (rng.pareto(1.1, size=(5000, 60)) * 10).astype(int) % len(words)
    corpus = MemoryCorpus(
        [Passage(str(i), f"title {i}", " ".join(words[row])) for i, row in enumerate(rows_PW)]
    )
    config = RetrievalConfig(kind="bm25", encoder=None, num_candidates=20)
    retriever = open_retrievers(corpus, config, folder).primary
    questions = [" ".join(words[row[:6]]) for row in rows_PW[:64]]
    return lambda: retriever.search(questions, 20)


def _bootstrap() -> Kernel:
    from rlrag.evaluation.significance import bootstrap_ci

    values_Q = np.random.default_rng(0).random(300)
    return lambda: bootstrap_ci(values_Q)


def _episodes() -> Kernel:
    import gymnasium as gym

    import envs  # noqa: F401  registers the environment

    env = gym.make("rlrag/DocumentSelection-v1")

    def play() -> None:
        for seed in range(64):
            observation, _ = env.reset(seed=seed)
            ended = False
            while not ended:
                action = int(np.flatnonzero(observation["action_mask"])[0])
                observation, _, ended, _, _ = env.step(action)

    return play


def main() -> None:
    """Time every kernel and print the seconds by name."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        timed = {name: seconds_a_call(kernel) for name, kernel in kernels(Path(folder)).items()}
    print(json.dumps(timed))


if __name__ == "__main__":
    main()
