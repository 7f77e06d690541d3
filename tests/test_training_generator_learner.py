"""One M-step of the generator against explicit enumeration, and the same step split up."""

from __future__ import annotations

import math
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_llama

from rlrag.config import GeneratorTrainingConfig, TrainingConfig
from rlrag.errors import CheckpointError, NonFiniteLossError
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker, TorchWorkers
from rlrag.training.learners.generator import GeneratorLearner, WeightedExample
from rlrag.training.learners.generator_model import TrainableGenerator
from rlrag.training.learners.optimiser import WEIGHT_DECAY

BETA1 = 0.9  # AdamW's default; its first moment after one step is (1 - BETA1) * gradient
EXAMPLES = [
    WeightedExample(tuple(range(10 + i, 20 + 5 * i)), tuple(range(60, 61 + i % 3)), 0.1 + 0.2 * i)
    for i in range(6)
]
NUM_QUESTIONS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("generator"))


def make(
    model_dir: Path,
    workers=None,
    warmup_steps: int = 0,
    num_steps: int = 10,
    weight_decay: float = WEIGHT_DECAY,
    max_grad_norm: float = 1e6,
    **settings,
) -> tuple[TrainableGenerator, GeneratorLearner]:
    usual = {"precision": "float32", "lora_rank": 4, "learning_rate": 1e-3}
    config = GeneratorTrainingConfig(**usual | settings)
    model = TrainableGenerator(model_dir, config, "cpu", seed=0)
    training = TrainingConfig(warmup_steps=warmup_steps)
    workers = workers or SingleWorker()
    return model, GeneratorLearner(
        model, config, training, num_steps, workers, weight_decay, max_grad_norm
    )


def first_moments(learner: GeneratorLearner) -> dict[str, torch.Tensor]:
    """The gradient of a learner's only step."""
    return {
        name.removesuffix(":exp_avg"): tensor / (1 - BETA1)
        for name, tensor in learner.optimiser.tensors().items()
        if name.endswith(":exp_avg")
    }


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol=1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-4, atol=atol), name


def plain_logp(model, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    total = torch.zeros(())
    for i, token in enumerate(answer):
        logits = model(torch.tensor([[*prompt, *answer[:i]]])).logits[0, -1]
        total = total + logits[token] - logits.logsumexp(dim=0)
    return total


def test_the_gradient_is_that_of_the_loss_enumerated_over_three_passages(model_dir):
    """K = 1 of n = 3 passages: L = - sum_z w_z log p(y | x, d_z), w_z = p(y|x,d_z) / sum, fixed."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts = [(5, 6, 90 + z, 91 + 2 * z, 7) for z in range(3)]
    answer = (33, 34)
    logps = torch.stack([plain_logp(plain, prompt, answer) for prompt in prompts])
    weights = (logps.exp() / logps.exp().sum()).tolist()
    loss = -sum(w * logp for w, logp in zip(weights, logps, strict=True))
    loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}

    _, learner = make(model_dir, method="full", weight_decay=0.0)
    examples = [WeightedExample(p, answer, w) for p, w in zip(prompts, weights, strict=True)]
    metrics = learner.update(examples, num_questions=1, step=0)
    assert_close(first_moments(learner), expected)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert metrics["generator/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["generator/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["generator/mean_answer_logp"] == pytest.approx(logps.mean().item(), rel=1e-5)
    assert metrics["generator/num_sequences"] == 3.0
    assert metrics["generator/num_tokens"] == 3 * 7
    assert metrics["generator/tokens_per_s"] > 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_size_of_micro_batches_changes_nothing(model_dir, method):
    model, learner = make(model_dir, method=method)
    split, split_learner = make(model_dir, method=method, micro_batch_tokens=64)
    lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in EXAMPLES]
    assert (len(model.micro_batches(lengths)), len(split.micro_batches(lengths))) == (1, 3)
    for step in range(2):
        whole = learner.update(EXAMPLES, NUM_QUESTIONS, step)
        parts = split_learner.update(EXAMPLES, NUM_QUESTIONS, step)
    assert_close(model.trainable_tensors(), split.trainable_tensors())
    for name in ("loss", "grad_norm", "mean_answer_logp", "num_sequences", "num_tokens"):
        assert parts[f"generator/{name}"] == pytest.approx(whole[f"generator/{name}"], rel=1e-4)


def test_the_variance_over_passes_is_that_of_their_gradients(model_dir):
    """Passes of one sequence each: their gradients, times 3, have the batch's as their mean."""
    lengthy = [WeightedExample(tuple(range(1, 61 + i)), (5,), 1.0 + i) for i in range(3)]
    alone = []
    for example in lengthy:
        _, learner = make(model_dir)
        metrics = learner.update([example], NUM_QUESTIONS, 0)
        assert metrics["generator/grad_variance"] == 0.0
        alone.append(torch.cat([g.flatten() for g in first_moments(learner).values()]))
    scaled = 3 * torch.stack(alone)
    expected = (scaled - scaled.mean(dim=0)).square().sum(dim=1).mean()
    _, learner = make(model_dir, micro_batch_tokens=64)
    metrics = learner.update(lengthy, NUM_QUESTIONS, 0)
    assert metrics["generator/grad_variance"] == pytest.approx(float(expected), rel=1e-3)
    _, full = make(model_dir, method="full")
    assert "generator/grad_variance" not in full.update(lengthy[:1], NUM_QUESTIONS, 0)


def test_equal_gradients_have_no_variance_and_none_below_zero(model_dir):
    """Two workers with the same example: what is left is rounding."""
    learners = [make(model_dir, workers=worker)[1] for worker in make_group(2)]
    for step, example in enumerate(EXAMPLES):
        one = partial(GeneratorLearner.update, examples=[example], num_questions=2, step=step)
        metrics, _ = run_together([partial(one, learner) for learner in learners])
        assert metrics["generator/grad_variance"] >= 0.0
        assert metrics["generator/grad_variance"] < 1e-5 * metrics["generator/grad_norm"] ** 2


def test_examples_without_weight_are_left_out_and_equal_ones_merged(model_dir):
    _, learner = make(model_dir)
    _, other = make(model_dir)
    first, second = EXAMPLES[:2]
    halves = [WeightedExample(first.prompt_ids, first.answer_ids, first.weight / 2)] * 2
    silent = WeightedExample(EXAMPLES[2].prompt_ids, EXAMPLES[2].answer_ids, 0.0)
    plain = learner.update([first, second], NUM_QUESTIONS, 0)
    found = other.update([halves[0], silent, second, halves[1]], NUM_QUESTIONS, 0)
    assert_close(first_moments(learner), first_moments(other))
    assert found["generator/num_sequences"] == 2.0
    assert found["generator/loss"] == pytest.approx(plain["generator/loss"], rel=1e-5)


def test_a_batch_without_examples_has_no_gradient(model_dir):
    model, learner = make(model_dir, weight_decay=0.0)
    before = model.trainable_tensors()
    metrics = learner.update([], NUM_QUESTIONS, 0)
    assert metrics["generator/grad_norm"] == metrics["generator/num_sequences"] == 0.0
    assert_close(model.trainable_tensors(), before, atol=0.0)


class OtherWorker(SingleWorker):
    """One of two in a group whose other member's contributions were recorded in their order."""

    size = 2

    def __init__(self, recorded: list[torch.Tensor]) -> None:
        self.sent: list[torch.Tensor] = []
        self._recorded = recorded

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent.append(tensor.clone())
        if not self._recorded:
            return tensor.clone()
        return tensor + self._recorded[len(self.sent) - 1]


def test_two_workers_with_halves_take_the_step_of_one_with_the_whole(model_dir):
    model, learner = make(model_dir)
    whole = learner.update(EXAMPLES, NUM_QUESTIONS, 0)
    second = OtherWorker([])
    make(model_dir, second)[1].update(EXAMPLES[3:], NUM_QUESTIONS, 0)
    share, share_learner = make(model_dir, OtherWorker(second.sent))
    metrics = share_learner.update(EXAMPLES[:3], NUM_QUESTIONS, 0)
    assert_close(first_moments(learner), first_moments(share_learner))
    assert_close(model.trainable_tensors(), share.trainable_tensors())
    for name in ("loss", "grad_norm", "mean_answer_logp", "num_sequences", "num_tokens"):
        assert metrics[f"generator/{name}"] == pytest.approx(whole[f"generator/{name}"], rel=1e-4)


def test_the_gradient_is_clipped_and_reported_unclipped(model_dir):
    _, plain = make(model_dir)
    _, clipped = make(model_dir, max_grad_norm=0.5)
    norm = plain.update(EXAMPLES, NUM_QUESTIONS, 0)["generator/grad_norm"]
    found = clipped.update(EXAMPLES, NUM_QUESTIONS, 0)["generator/grad_norm"]
    assert found == pytest.approx(norm)
    assert norm > 0.5
    expected = {name: g * (0.5 / norm) for name, g in first_moments(plain).items()}
    assert_close(first_moments(clipped), expected)


def test_the_rate_follows_the_schedule(model_dir):
    _, learner = make(model_dir, warmup_steps=2, learning_rate=0.1)
    rates = [learner.update([], 1, step)["generator/learning_rate"] for step in (0, 1, 6)]
    assert rates == pytest.approx([0.05, 0.1, 0.05])


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(model_dir):
    model, learner = make(model_dir)
    before = model.trainable_tensors()
    endless = WeightedExample((1, 2), (3,), float("inf"))
    with pytest.raises(NonFiniteLossError, match="gradient of step 4 is not finite; lower"):
        learner.update([endless], 1, 4)
    assert_close(model.trainable_tensors(), before, atol=0.0)
    assert learner.optimiser.tensors() == {}


def test_steps_on_one_example_raise_its_likelihood(model_dir):
    _, learner = make(model_dir, learning_rate=1e-2)
    logps = [
        learner.update(EXAMPLES[:1], 1, step)["generator/mean_answer_logp"] for step in range(5)
    ]
    assert logps == sorted(logps)
    assert logps[-1] > logps[0] + 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_restored_run_goes_on_bit_by_bit(model_dir, method):
    model, learner = make(model_dir, method=method)
    for step in range(2):
        learner.update(EXAMPLES, NUM_QUESTIONS, step)
    weights, moments = model.trainable_tensors(), learner.optimiser.tensors()
    assert len(moments) == 3 * len(weights)  # two moments and a count
    restored, restored_learner = make(model_dir, method=method)
    restored.load_trainable(weights)
    restored_learner.optimiser.load(moments)
    for step in range(2, 4):
        learner.update(EXAMPLES, NUM_QUESTIONS, step)
        restored_learner.update(EXAMPLES, NUM_QUESTIONS, step)
    for found, expected in (
        (restored.trainable_tensors(), model.trainable_tensors()),
        (restored_learner.optimiser.tensors(), learner.optimiser.tensors()),
    ):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_optimiser_of_other_weights_is_refused(model_dir):
    _, learner = make(model_dir)
    with pytest.raises(CheckpointError, match=r"state for 'elsewhere\.weight', which is not"):
        learner.optimiser.load({"elsewhere.weight:exp_avg": torch.zeros(1)})


SHARDED = {"sharding": "fsdp2", "micro_batch_tokens": 64}


def _work(rank: int, directory: str, port: int, out) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    share = EXAMPLES[:1] if rank == 0 else EXAMPLES[1:]  # one pass here, several there
    for settings in ({"method": "full"}, {"method": "lora", "gradient_checkpointing": True}):
        model, learner = make(Path(directory), TorchWorkers(), **SHARDED | settings)
        metrics = learner.update(share, NUM_QUESTIONS, 0)
        weights, moments = model.trainable_tensors(), learner.optimiser.tensors()
        restored, restored_learner = make(Path(directory), TorchWorkers(), **SHARDED | settings)
        restored.load_trainable(weights)
        restored_learner.optimiser.load(moments)
        learner.update(share, NUM_QUESTIONS, 1)
        restored_learner.update(share, NUM_QUESTIONS, 1)
        found = (
            model.merged_tensors(torch.float32),
            restored.merged_tensors(torch.float32),
            model.published_weights(1, torch.float32).tensors,
        )
        if rank == 0:
            out.put(
                (metrics, *({name: t.numpy() for name, t in tensors.items()} for tensors in found))
            )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_workers_do_what_one_does(model_dir, unused_port):
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [
        context.Process(target=_work, args=(rank, str(model_dir), unused_port, out))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for settings in ({"method": "full"}, {"method": "lora"}):
        model, learner = make(model_dir, **settings)
        alone = learner.update(EXAMPLES, NUM_QUESTIONS, 0)
        learner.update(EXAMPLES, NUM_QUESTIONS, 1)
        metrics, found, resumed, published = out.get(timeout=600)
        for name in ("loss", "grad_norm", "mean_answer_logp", "num_sequences", "num_tokens"):
            assert metrics[f"generator/{name}"] == pytest.approx(
                alone[f"generator/{name}"], rel=1e-4
            )
        expected = model.merged_tensors(torch.float32)
        assert_close({name: torch.from_numpy(t) for name, t in found.items()}, expected)
        assert all((found[name] == resumed[name]).all() for name in expected)
        assert_close(
            {name: torch.from_numpy(t) for name, t in published.items()},
            dict(model.published_weights(1, torch.float32).tensors),
        )
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
