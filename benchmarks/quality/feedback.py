"""Measures what a policy gains from training on a service's feedback log.

Run `python -m benchmarks.quality.feedback` for the built-in data, ranked by BM25. Another recipe
and its flags give other data: `RLRAG_DATA_DIR=... python -m benchmarks.quality.feedback --recipe nq
--events 5000`.

    log       a policy serves its best selection, and instead of it a share of draws; questions are
              drawn too, and the environment rewards: 1 if a picked passage contains the answer,
              less 0.1 a passage, so that no generator is needed
    train     as `python -m jobs.train RECIPE --algorithm.name feedback --algorithm.log LOG` does
    truth     the exact value of a policy on given questions, by listing every selection

The log has training questions; evaluation questions are unseen by it. What a second log, of the
unseen questions, says about the trained policy is an estimate that has chosen nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rlrag.algorithms.off_policy import Estimate
    from rlrag.config import RunConfig
    from rlrag.pipeline import Library
    from rlrag.retrieval.candidates import CandidateTable
    from rlrag.rewards.protocol import SelectionReward
    from rlrag.selection.protocol import Policy
    from rlrag.training.feedback.selections import LoggedPart

RESULTS = Path(__file__).parents[1] / "results" / "feedback.md"
_MOST_SELECTIONS = 5000
_CHUNK = 64


@dataclass(frozen=True)
class Values:
    """What a policy is worth on given questions, exactly: what it draws, and its best selection."""

    drawn: float
    greedy: float

    def served(self, explore_share: float) -> float:
        """Of a service that draws this share of its selections."""
        return explore_share * self.drawn + (1 - explore_share) * self.greedy


class Enumeration:
    """Every selection of K passages for each question, with its reward."""

    def __init__(
        self, candidates: CandidateTable, reward: SelectionReward, num_selected: int
    ) -> None:
        num_selections = math.perm(candidates.num_candidates, num_selected)
        if num_selections > _MOST_SELECTIONS:
            raise SystemExit(
                f"{num_selections:,} possible selections per question are too many to "
                "enumerate; select fewer passages"
            )
        self.candidates = candidates
        picks = itertools.permutations(range(candidates.num_candidates), num_selected)
        self.picks_ZK = np.array(list(picks))
        rewards = []
        for row, question in enumerate(candidates.questions):
            passages = candidates.passages(row)
            selections = [[passages[n] for n in picks] for picks in self.picks_ZK]
            results = reward([question] * len(selections), selections)
            rewards.append([result.total for result in results])
        self.rewards_QZ = np.array(rewards)

    def probabilities(self, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
        """Of each selection when the policy draws, (Q, Z), and its best selection, (Q,)."""
        import torch

        from rlrag.config import EnvironmentConfig
        from rlrag.environment.rollout import play_greedy, replay

        found, (num_selections, num_selected) = [], self.picks_ZK.shape
        environment = EnvironmentConfig(num_selected=num_selected)
        for start in range(0, len(self.candidates), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(self.candidates)))
            picks_EK = np.tile(self.picks_ZK, (len(rows), 1))
            each = np.repeat(rows, num_selections)
            trajectories = replay(environment, self.candidates, each, picks_EK)
            with torch.no_grad():
                logp_E = policy.log_prob(trajectories).sum(dim=1)
            logp_BZ = logp_E.cpu().double().view(len(rows), -1)
            found.append(logp_BZ.softmax(dim=1).numpy())
        greedy_QK = play_greedy(environment, policy, self.candidates).actions_ET
        best_Q = (greedy_QK[:, None] == self.picks_ZK).all(axis=2).argmax(axis=1)
        return np.concatenate(found), best_Q

    def values(self, policy: Policy, weights_Q: np.ndarray | None = None) -> Values:
        """The policy's exact value; `weights_Q` says how often each question is asked."""
        drawn_QZ, best_Q = self.probabilities(policy)
        per_question = (drawn_QZ * self.rewards_QZ).sum(axis=1)
        greedy_Q = self.rewards_QZ[np.arange(len(best_Q)), best_Q]
        return Values(
            float(np.average(per_question, weights=weights_Q)),
            float(np.average(greedy_Q, weights=weights_Q)),
        )


def serve(
    policy: Policy,
    truth: Enumeration,
    reward: SelectionReward,
    log: Path,
    num_events: int,
    explore_share: float,
    seed: int,
) -> None:
    """Answer random questions through the environment, and log selections with their rewards."""
    import gymnasium

    from rlrag.data.feedback import FeedbackStore, SelectionEvent

    candidates = truth.candidates
    env = gymnasium.make(
        "rlrag/DocumentSelection-v1",
        candidates=candidates,
        reward=reward,
        num_selected=truth.picks_ZK.shape[1],
    )
    store = FeedbackStore(log)
    rng = np.random.default_rng(seed)
    drawn_QZ, best_Q = truth.probabilities(policy)
    for number in range(num_events):
        row = int(rng.integers(len(candidates)))
        explored = bool(rng.random() < explore_share)
        chosen = int(rng.choice(drawn_QZ.shape[1], p=drawn_QZ[row]) if explored else best_Q[row])
        propensity = explore_share * drawn_QZ[row, chosen]
        propensity += (1 - explore_share) * (chosen == best_Q[row])
        positions = tuple(truth.picks_ZK[chosen].tolist())
        env.reset(options={"question_row": row})
        for position in positions:
            _, value, *_ = env.step(position)
        store.record_selection(
            SelectionEvent(
                request_id=f"request-{number}",
                time_s=time.time(),
                version="simulated",
                question=candidates.questions[row].question,
                candidate_ids=tuple(passage.id for passage in candidates.passages(row)),
                actions=positions,
                propensity_logp=math.log(propensity),
                explored=explored,
                answer="",
                answer_logp=0.0,
            )
        )
        store.record_feedback(f"request-{number}", reward=float(value))
    env.close()


@dataclass(frozen=True)
class Found:
    """What a run made of the log, and the truth of it.

    The values are of the policy that served and of the trained one: on the questions that were
    asked, on those of the held-back selections, as often as these ask them, and on unseen ones.
    """

    before: dict[str, Values]
    after: dict[str, Values]
    held_back_start: tuple[Estimate, float]
    held_back: tuple[Estimate, float]
    second_log: tuple[Estimate, float]
    num_train: int
    num_held_back: int
    best_step: int


def measure(
    config: RunConfig,
    library: Library,
    asked: CandidateTable,
    unseen: CandidateTable,
    folder: Path,
    num_events: int,
    explore_share: float,
) -> Found:
    """Log, train on the log, and compare with the truth.

    Args:
        config: A run that trains the selector on a log.
        library: The corpus and its retrievers.
        asked: Questions that are logged.
        unseen: Other questions.
        folder: An empty folder.
        num_events: Selections in each log.
        explore_share: Part of the selections that are drawn.
    """
    from rlrag.pipeline import open_policy
    from rlrag.rewards.answering import PassageReward
    from rlrag.runs.directory import RunDirectory
    from rlrag.training.distributed.workers import SingleWorker
    from rlrag.training.feedback.selections import open_logged_data
    from rlrag.training.feedback.trainer import LoggedTrainer
    from rlrag.training.loop import TrainingLoop

    reward, num_selected = PassageReward(), config.environment.num_selected
    truths = {
        name: Enumeration(table, reward, num_selected)
        for name, table in (("asked", asked), ("unseen", unseen))
    }
    served = open_policy(config, asked)
    for seed, name in enumerate(truths):
        log = folder / f"{name}.sqlite"
        serve(served, truths[name], reward, log, num_events, explore_share, config.seed + seed)
    data = open_logged_data(config, library, folder / "asked.sqlite")
    run_dir, workers = RunDirectory(folder / "run"), SingleWorker()
    run_dir.claim(config)
    loop = TrainingLoop(config, LoggedTrainer(config, data, workers), run_dir, workers)
    trained = loop.run().policy
    assert data.held_back is not None
    times = _times_asked(data.held_back, asked)
    values = [
        {name: truth.values(policy) for name, truth in truths.items()}
        | {"held_back": truths["asked"].values(policy, times)}
        for policy in (served, trained)
    ]
    unseen_config = config.model_copy(
        update={"algorithm": config.algorithm.model_copy(update={"held_back_share": 0.0})}
    )
    second = open_logged_data(unseen_config, library, folder / "unseen.sqlite").train
    return Found(
        before=values[0],
        after=values[1],
        held_back_start=estimate(served, data.held_back),
        held_back=estimate(trained, data.held_back),
        second_log=estimate(trained, second),
        num_train=len(data.train),
        num_held_back=len(data.held_back),
        best_step=loop.progress.best_step,
    )


def estimate(policy: Policy, part: LoggedPart) -> tuple[Estimate, float]:
    """What logged selections say about a policy that draws, and their effective sample size."""
    import torch

    from rlrag.algorithms import off_policy
    from rlrag.config import EnvironmentConfig
    from rlrag.environment.rollout import replay
    from rlrag.training.feedback.trainer import CONFIDENCE

    logp = []
    for start in range(0, len(part), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(part)))
        with torch.no_grad():
            actions = part.actions_QT[rows]
            environment = EnvironmentConfig(num_selected=actions.shape[1])
            trajectories = replay(environment, part.candidates, rows, actions)
            logp.append(policy.log_prob(trajectories).sum(dim=1).cpu())
    ratios_Q = off_policy.importance_ratios(
        torch.cat(logp), torch.from_numpy(part.propensity_logp_Q)
    )
    rewards_Q = torch.from_numpy(part.rewards_Q)
    found = off_policy.snips(ratios_Q, rewards_Q, CONFIDENCE, part.questions_Q)
    return found, off_policy.effective_sample_size(ratios_Q)


def _times_asked(part: LoggedPart, asked: CandidateTable) -> np.ndarray:
    """How often a part of the log has each question."""
    texts = [question.question for question in part.candidates.questions]
    return np.array([texts.count(question.question) for question in asked.questions])


def report(name: str, found: Found, num_events: int, explore_share: float) -> str:
    """The results as Markdown."""
    before, after = found.before, found.after
    lines = [
        f"# Training on feedback: {name}",
        "",
        f"`python -m benchmarks.quality.feedback --recipe {name} --events {num_events} "
        "--explore-share "
        f"{explore_share:g}`. A service answered {num_events:,} questions, and drew its selection "
        f"for a share of {explore_share:g} of them; {found.num_train:,} selections were trained "
        f"on, {found.num_held_back:,} held back; best at step {found.best_step}. The reward is 1 "
        "if a picked passage contains the answer, less 0.1 a passage. The last column is the "
        "trained policy, served with as much exploration as before.",
        "",
        "| exact value on | service that logged | its policy, drawn | greedy | trained, drawn | "
        "trained, greedy | trained service |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, title in (("asked", "the logged questions"), ("unseen", "unseen questions")):
        old, new = before[place], after[place]
        cells = (
            *(old.served(explore_share), old.drawn, old.greedy),
            *(new.drawn, new.greedy, new.served(explore_share)),
        )
        lines.append(f"| {title} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    lines += [
        "",
        "| estimated from logged selections | estimate (95 %) | effective sample size | truth |",
        "|---|---|---|---|",
    ]
    rows = (
        ("policy before training, held back", found.held_back_start, before["held_back"]),
        ("trained policy, held back (chose the checkpoint)", found.held_back, after["held_back"]),
        ("trained policy, second log on unseen questions", found.second_log, after["unseen"]),
    )
    for title, (guess, ess), exact in rows:
        lines.append(
            f"| {title} | {guess.value:.3f} ({guess.low:.3f} to {guess.high:.3f}) | {ess:.1f} | "
            f"{exact.drawn:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _configured(name: str, flags: Sequence[str]) -> RunConfig:
    from rlrag.cli.command_line import parse_config
    from rlrag.config import RunConfig
    from rlrag.recipes import RECIPES

    values = RECIPES[name]().model_dump()
    values["training"] |= {
        "launcher": "local",
        "loggers": (),
        "validate_every": 10,
    }
    values["algorithm"] = {"name": "feedback", "log": "asked.sqlite"}
    values["data"]["num_validation_questions"] = 0
    if name == "factbook":  # words alone: no passage need be encoded
        values["retrieval"] |= {"kind": "bm25", "encoder": None, "num_candidates": 10}
        values["environment"]["num_selected"] = 1
    default = RunConfig.model_validate(values)
    return parse_config(default, list(flags), "python -m benchmarks.quality.feedback")


def main(argv: Iterable[str] | None = None) -> None:
    """Log, train and write the table."""
    from rlrag.pipeline import open_evaluation_data, open_library, open_training_data
    from rlrag.recipes import RECIPES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="factbook")
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--explore-share", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments, flags = parser.parse_known_args(argv if argv is None else list(argv))
    config = _configured(arguments.recipe, flags)
    library = open_library(config)
    asked = open_training_data(config, library).train
    unseen, _ = open_evaluation_data(config, library)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            config,
            library,
            asked,
            unseen,
            Path(folder),
            arguments.events,
            arguments.explore_share,
        )
    text = report(arguments.recipe, found, arguments.events, arguments.explore_share)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
