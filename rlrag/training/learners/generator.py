"""The generator's M-step: weighted supervised fine-tuning.

L_G = - sum_i w_i log p(y | x, d_{z_i}; theta_g), w constant (DRO, arXiv 2505.03075, Eq. 11): the
generator is trained on the golden answer after the passages of each selection, most where it finds
the answer likely already. It is a weighted likelihood, so no baseline is subtracted.

Shape letters: B questions, M samples, S sequences of one forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rlrag.algorithms import dro
from rlrag.algorithms.resampling import resample
from rlrag.config import GeneratorTrainingConfig, TrainingConfig
from rlrag.errors import GenerationError, PromptTooLongError
from rlrag.generation.prompts import PromptBuilder, PromptCounts
from rlrag.records import Question
from rlrag.rewards.answering import distinct_answers
from rlrag.training.distributed.sharding import local
from rlrag.training.distributed.workers import Workers
from rlrag.training.dro.batch import RewardedBatch
from rlrag.training.learners.generator_model import TrainableGenerator
from rlrag.training.learners.optimiser import MAX_GRAD_NORM, WEIGHT_DECAY, Optimiser


@dataclass(frozen=True, slots=True)
class WeightedExample:
    """A prompt with the answer to train on, its end included; `weight` multiplies its log p."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    weight: float


class GeneratorLearner:
    """Takes one weighted-likelihood step on a generator for each batch of examples.

    Every worker sees its share of the batch. Gradients and metrics are summed over the workers and
    divided by the questions of the whole batch: one worker and many do the same mathematics.
    """

    def __init__(
        self,
        model: TrainableGenerator,
        config: GeneratorTrainingConfig,
        training: TrainingConfig,
        num_steps: int,
        workers: Workers,
        weight_decay: float = WEIGHT_DECAY,
        max_grad_norm: float = MAX_GRAD_NORM,
    ) -> None:
        self._model = model
        self._config = config
        self._workers = workers
        self._sharded = config.sharding == "fsdp2"
        self.optimiser = Optimiser(
            model.trainable_parameters(),
            config.learning_rate,
            training.warmup_steps,
            num_steps,
            workers,
            "lower generator_training.learning_rate, or look for infinite rewards in metrics.jsonl",
            name="the generator's gradient",
            fused=model.device.type == "cuda",
            sharded=self._sharded,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
        )

    def update(
        self, examples: Sequence[WeightedExample], num_questions: int, step: int
    ) -> dict[str, float]:
        """One optimiser step on L = - sum_i w_i log p(y_i | prompt_i) / num_questions.

        Examples of weight 0 are left out; equal ones are computed once with the sum of their
        weights. A batch without examples has gradient 0, yet the optimiser's momentum and weight
        decay still act.

        Args:
            examples: This worker's share of the batch; it may be empty.
            num_questions: Questions of the whole batch, over all workers.
            step: Number of this step, from 0.

        Returns:
            Metrics over the whole batch, named `generator/...`. `mean_answer_logp` is the mean
            over the sequences in nats, each with its end, before the step. `grad_variance`, under
            LoRA, is the mean squared distance of the passes' gradients, each scaled to the whole
            batch, from the batch's gradient; 0 for a single pass.

        Raises:
            NonFiniteLossError: when the gradient is not finite; nothing was changed.
            GenerationError: when an example does not fit the model, or GPU memory runs out.
        """
        started = time.monotonic()
        self.optimiser.zero_grad()
        try:
            metrics, squares, num_passes = self._accumulate(_merged(examples), num_questions)
            norm, rate = self.optimiser.step(step)
        except torch.OutOfMemoryError as error:
            raise GenerationError(
                f"training the generator ran out of GPU memory ({error}); lower "
                f"generator_training.micro_batch_tokens {self._config.micro_batch_tokens}, or set "
                "generator_training.gradient_checkpointing"
            ) from error
        metrics["generator/grad_norm"] = norm
        if self._measures_variance:
            variance = num_passes * squares - norm**2 if num_passes > 1 else 0.0
            metrics["generator/grad_variance"] = max(0.0, variance)  # rounding can end below 0
        metrics["generator/learning_rate"] = rate
        metrics["generator/tokens_per_s"] = metrics["generator/num_tokens"] / (
            time.monotonic() - started
        )
        return metrics

    @property
    def _measures_variance(self) -> bool:
        """Costs one more copy of the gradient: little for an adapter, much for a whole model."""
        return self._config.method == "lora"

    def _accumulate(
        self, examples: Sequence[WeightedExample], num_questions: int
    ) -> tuple[dict[str, float], float, int]:
        """Leave the batch's gradient in the parameters, not yet summed over replicated workers.

        Returns metrics, the sum of the squared norms of the passes' gradients, and the number of
        passes; these over all workers.
        """
        lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in examples]
        batches = self._model.micro_batches(lengths)
        num_passes = self._num_passes(len(batches))
        gradient: list[torch.Tensor | None] = [None] * len(self.optimiser.parameters)
        device = self._model.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, log p, squared norms
        for number in range(num_passes):
            chosen = [examples[i] for i in batches[number]] if number < len(batches) else []
            loss, logp = self._backward(chosen, num_questions)
            sums[0] += loss
            sums[1] += logp
            if self._measures_variance:
                sums[2] += self._move_gradient(gradient)
        if self._measures_variance:
            for parameter, total in zip(self.optimiser.parameters.values(), gradient, strict=True):
                parameter.grad = total
        # Sharded workers take each pass together: it counts once.
        own_passes = num_passes / self._workers.size if self._sharded else num_passes
        counts = torch.tensor(
            [len(examples), sum(lengths), own_passes], dtype=torch.float64, device=device
        )
        loss, logp, squares, num_sequences, num_tokens, all_passes = self._workers.sum(
            torch.cat([sums, counts])
        ).tolist()
        metrics = {
            "generator/loss": loss,
            "generator/mean_answer_logp": logp / max(num_sequences, 1.0),
            "generator/num_sequences": num_sequences,
            "generator/num_tokens": num_tokens,
        }
        return metrics, squares, round(all_passes)

    def _num_passes(self, own: int) -> int:
        """Passes to take: workers that share every weight take as many as the busiest of them."""
        if not self._sharded:
            return own
        counts = torch.zeros(self._workers.size, device=self._model.device)
        counts[self._workers.rank] = own
        return int(self._workers.sum(counts).max().item())

    def _backward(
        self, examples: Sequence[WeightedExample], num_questions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one pass's gradient; returns its share of the loss and its summed log p.

        Without examples the pass reads a single token for nothing: the other workers, which have
        something to compute, need this one's slices of the weights.
        """
        idle = WeightedExample((0,), (0,), 0.0)
        read = examples or [idle]
        logp_S = self._model.answer_logp([e.prompt_ids for e in read], [e.answer_ids for e in read])
        weights_S = torch.tensor([e.weight for e in read], device=logp_S.device)
        loss = dro.generator_loss(logp_S[None], weights_S[None]).sum() / num_questions
        # FSDP2 averages gradients over the workers where the loss asks for their sum.
        (loss * self._workers.size if self._sharded else loss).backward()
        logp = logp_S.detach().sum() if examples else torch.zeros_like(loss)
        return loss.detach(), logp

    def _move_gradient(self, gradient: list[torch.Tensor | None]) -> torch.Tensor:
        """Add the parameters' gradients to `gradient`, clear them, return their squared norm."""
        square = torch.zeros((), device=self._model.device)
        for i, parameter in enumerate(self.optimiser.parameters.values()):
            found, parameter.grad = parameter.grad, None
            if found is None:
                continue
            square += local(found).square().sum()
            so_far = gradient[i]
            gradient[i] = found if so_far is None else so_far.add_(found)
        return square


def _merged(examples: Sequence[WeightedExample]) -> list[WeightedExample]:
    """Equal prompts with equal answers become one example with the sum of their weights."""
    weights: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for example in examples:
        key = (example.prompt_ids, example.answer_ids)
        weights[key] = weights.get(key, 0.0) + example.weight
    return [WeightedExample(*key, weight) for key, weight in weights.items() if weight != 0]


@dataclass
class BuiltExamples:
    """The examples of a batch, what their prompts left out, and why others could not be built."""

    examples: list[WeightedExample] = field(default_factory=list)
    prompt_counts: PromptCounts = field(default_factory=PromptCounts)
    errors: list[PromptTooLongError] = field(default_factory=list)


def weighted_examples(
    questions: Sequence[Question],
    prompts: PromptBuilder,
    batch: RewardedBatch,
    weights_BM: torch.Tensor,
) -> BuiltExamples:
    """One example for each episode of weight above 0, or for each of its golden answers.

    The target is a question's first golden answer and what ends it, behind the same prompt that the
    episode was rewarded with. With the log-likelihoods of the distinct golden answers behind each
    episode, every one of them is a target and shares the episode's weight in proportion to its
    likelihood. A question without a golden answer gives no example, nor does an episode whose
    prompt cannot be built.
    """
    built = BuiltExamples()
    trajectories, num_samples = batch.trajectories, batch.num_samples
    for place, row in enumerate(batch.question_rows.tolist()):
        question = questions[row]
        targets = [prompts.encode_target(text) for text in distinct_answers(prompts, question)]
        if not targets:
            continue
        for sample, weight in enumerate(weights_BM[place].tolist()):
            if weight == 0:
                continue
            episode = place * num_samples + sample
            try:
                prompt = prompts.build(question, trajectories.evidence[episode])
            except PromptTooLongError as error:
                built.errors.append(error)
                continue
            built.prompt_counts.add(prompt, len(trajectories.evidence[episode]))
            golden_logps = trajectories.golden_logps[episode]
            if golden_logps is None:
                built.examples.append(WeightedExample(prompt.token_ids, targets[0], weight))
                continue
            logps = torch.tensor(golden_logps, dtype=torch.float64)
            shares = (weight * logps.softmax(dim=0)).tolist()
            built.examples += [
                WeightedExample(prompt.token_ids, target, share)
                for target, share in zip(targets, shares, strict=True)
            ]
    return built


def thinned(
    weights_BM: torch.Tensor, num: int | None, seeds: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Weights of at most `num` samples a question with the same mean; all when unset."""
    if num is None:
        return weights_BM
    counts_BM = resample(weights_BM, num, seeds)
    return weights_BM.sum(dim=1, keepdim=True) * counts_BM / num
