"""Train a selector with sb3-contrib's MaskablePPO on this project's Gymnasium environment.

Run `python train.py WORK OUTPUT` in an environment with `requirements.txt`. Episodes are rewarded
by the real generator, as the configuration says. The stop is masked out, so that every system shows
the same number of passages. Training ends when the tokens asked of the generator reach the budget;
requests that repeat are answered from memory and count all the same, as in training by rlrag.

Hyper-parameters: `n_steps` 64 and `batch_size` 32 are those of rlrag's guide to the environment;
gamma 1 because an episode has one reward, at its end; all else is MaskablePPO's default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gymnasium
import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback

import envs  # noqa: F401  registers the environment
from rlrag.config import RunConfig
from rlrag.generation.build import open_generator
from rlrag.generation.cache import CachedGenerator
from rlrag.pipeline import open_evaluation_data, open_library, open_reward, open_training_data
from rlrag.retrieval.candidates import CandidateTable

STEPS_AT_MOST = 1_000_000
INVALID_REWARD = -100.0


class WholeSelection(gymnasium.Wrapper):
    """Never allows the stop, and keeps which questions were asked."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.question_ids: set[str] = set()

    def reset(self, **kwargs):
        """Start an episode."""
        observation, info = self.env.reset(**kwargs)
        self.question_ids.add(info["question_id"])
        return observation, info

    def action_masks(self) -> np.ndarray:
        """Allowed actions, which sb3-contrib asks for."""
        masks = np.array(self.env.get_wrapper_attr("action_masks")())
        masks[-1] = False
        return masks


class EndAtBudget(BaseCallback):
    """Ends training when the generator was asked for enough tokens, of prompts and answers."""

    def __init__(self, generator: CachedGenerator, token_budget: int) -> None:
        super().__init__()
        self._generator, self._token_budget = generator, token_budget

    def _on_step(self) -> bool:
        return tokens_asked(self._generator) < self._token_budget


def tokens_asked(generator: CachedGenerator) -> int:
    """Tokens of all requests, computed or answered from memory."""
    return generator.tokens.spent + generator.tokens.saved


def main() -> None:
    """Train, then pick for each question that is measured."""
    work, output = Path(sys.argv[1]), Path(sys.argv[2])
    plan = json.loads((work / "plan.json").read_text())
    config = RunConfig.from_json((work / "config.json").read_text())
    library = open_library(config)
    train = open_training_data(config, library).train
    dev, _ = open_evaluation_data(config, library)
    model = config.generator.model_copy(update={"model": plan["generator"]})
    # A cache of its own: answers that other runs paid for would cost it nothing.
    generator, prompts = open_generator(model, "local", output / "cache")

    def make(table, **arguments) -> WholeSelection:
        env = gymnasium.make(
            config.environment.id,
            candidates=table,
            num_selected=plan["num_selected"],
            invalid_reward=INVALID_REWARD,
            **arguments,
        )
        return WholeSelection(env)

    env = make(train, reward=open_reward(config, generator, prompts))
    agent = MaskablePPO(
        "MultiInputPolicy",
        env,
        n_steps=64,
        batch_size=32,
        gamma=1.0,
        seed=plan["seed"],
        device="cpu",
        verbose=1,
    )
    agent.learn(STEPS_AT_MOST, callback=EndAtBudget(generator, plan["token_budget"]))
    result = {
        "picks": picks(agent, make(dev), dev, plan["num_selected"]),
        "generator_tokens": tokens_asked(generator),
        "training_examples": len(env.question_ids),
    }
    generator.close()
    (output / "result.json").write_text(json.dumps(result, indent=1))


def picks(
    agent: MaskablePPO, env: WholeSelection, table: CandidateTable, num_selected: int
) -> dict[str, list[str]]:
    """The likeliest pick of each question; the last is not played, as its reward is not wanted."""
    found = {}
    for row, question in enumerate(table.questions):
        observation, _ = env.reset(options={"question_row": row})
        actions: list[int] = []
        while len(actions) < num_selected:
            if actions:
                observation, *_ = env.step(np.int64(actions[-1]))
            masks = env.action_masks()
            action, _ = agent.predict(observation, deterministic=True, action_masks=masks)
            actions.append(int(action))
        found[question.id] = [table.passages(row)[action].id for action in actions]
    return found


if __name__ == "__main__":
    main()
