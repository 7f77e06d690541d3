"""Pushes new weights to the engines, and checks before training that their scores match.

Families of models differ in what their weights are called, tied to and packed into, and an engine
may take a set without a word and answer with another. So the learner's weights are moved a little,
pushed, and a few scores of engine and learner compared before the first step, of a resumed run too.
Nothing random is drawn, and learner and engines are left as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from rlrag.config import RunConfig
from rlrag.errors import ConfigError, GenerationError
from rlrag.generation.build import resolve_config
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.generation.weights import FollowsWeights, GeneratorWeights
from rlrag.models.causal_lm import differ
from rlrag.models.directories import resolve_dtype
from rlrag.records import Prompt
from rlrag.retrieval.candidates import CandidateTable
from rlrag.training.distributed.workers import Workers
from rlrag.training.learners.generator_model import TrainableGenerator

_NUM_QUESTIONS = 3
_MAX_ANSWER = 8
_ADVICE = (
    "this model cannot be trained with these engines: use generator.backend transformers, another "
    "generator_training.method or another generator.model"
)


def hand_over(weights: GeneratorWeights, generator: Generator, workers: Workers) -> None:
    """Give the engines new weights once no worker has a batch on its way.

    All workers call this together: one sends the weights, the others learn what to expect.
    """
    workers.barrier()
    if workers.rank == 0:
        generator.load_weights(weights)
    workers.barrier()
    if workers.rank != 0 and isinstance(generator, FollowsWeights):
        generator.expect_weights(weights.version, weights.digest)


def check_engines(
    config: RunConfig,
    model: TrainableGenerator | None,
    engines: Generator,
    candidates: CandidateTable,
    prompts: PromptBuilder,
    workers: Workers,
) -> None:
    """Push weights that differ from the first ones, compare scores, and push the first ones again.

    All workers call this together, before any of them trains.

    Args:
        config: The run.
        model: The generator as it was loaded; nothing is checked where none is trained.
        engines: What answers for it.
        candidates: The first few of its questions are asked, without passages.
        prompts: Builds what is asked.
        workers: Whom the engines are shared with.

    Raises:
        ConfigError: when a score of the engines differs from the learner's by more than rounding.
        GenerationError: when the engines cannot take the weights.
    """
    if model is None:
        return
    number_format = resolve_config(config.generator, config.training.launcher).dtype
    engine_dtype: torch.dtype = getattr(torch, number_format)
    precision = resolve_dtype(config.generator_training.precision, model.device.type)
    asked, answers = _requests(candidates, prompts)
    first = model.trainable_tensors()
    model.load_trainable(_moved(first))
    try:
        with torch.no_grad():
            expected = model.answer_logp([p.token_ids for p in asked], answers).tolist()
        hand_over(model.published_weights(0, engine_dtype), engines, workers)
    except GenerationError as error:
        raise type(error)(f"check before training: {error}") from error
    finally:
        model.load_trainable(first)
    if workers.rank == 0:
        # What an earlier run kept of the same weights would hide what the engines say now.
        asked_now = engines.inner if isinstance(engines, CachedGenerator) else engines
        found = asked_now.score(asked, answers)
        for score, logp, answer in zip(found, expected, answers, strict=True):
            if isinstance(score, GenerationError):
                raise score
            if differ(score.logp, logp, len(answer), engine_dtype, getattr(torch, precision)):
                raise ConfigError(
                    "check before training: with the same weights the engines give an answer of "
                    f"{len(answer)} tokens log-probability {score.logp:.4f} and the learner "
                    f"{logp:.4f}, which is more than the rounding error of {number_format}; "
                    f"{_ADVICE}"
                )
    untrained = model.published_weights(0, engine_dtype)
    hand_over(replace(untrained, digest=None), engines, workers)


def _requests(
    candidates: CandidateTable, prompts: PromptBuilder
) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """Short prompts, and an answer to each: a golden one where there is one."""
    asked, answers = [], []
    for question in candidates.questions[:_NUM_QUESTIONS]:
        golden = [text for text in question.golden_answers if text.strip()]
        asked.append(prompts.build(question, []))
        answers.append(prompts.encode_answer((golden or [question.question])[0])[:_MAX_ANSWER])
    return asked, answers


def _moved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with a tenth of their size added and taken away in turns.

    An adapter's B starts at zero, and moves by a tenth of 1, which the scores show all the same.
    """
    moved = {}
    for name, tensor in tensors.items():
        wave = torch.cos(1.7 * torch.arange(tensor.numel())).reshape(tensor.shape)
        size = max(float(tensor.square().mean().sqrt()), 1.0 if ".lora_B." in name else 0.0)
        moved[name] = tensor if ".lora_A." in name else tensor + 0.1 * size * wave
    return moved
