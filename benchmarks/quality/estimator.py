"""DRO's gradient estimate by number of samples m and baseline, on enumerated rewards.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.estimator nq --weights FILE`, where FILE is the
`bundle/selector.safetensors` of a run of `nq-dro-selector`. All ordered selections of some training
questions are rewarded once, so that every expectation but that over the draws of m is a sum. A
policy is then drawn from many times, and of the gradient estimate g of a batch, given as the mean
over its questions,

    signal-to-noise ratio = |E g|^2 / E|g - E g|^2        for a batch of 24 questions
    agreement = cosine of E g and the exact gradient of the mean of log E_{z~p}[p(y | x, d_z)]

are measured, beside the variance of the log-weights and the effective sample size as a share of m.
The noise is that of the draws alone; which questions are in the batch is fixed.

Shape letters: B questions, M samples, N candidates, K selected, S selections, P parameters, R
repeated draws.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.runs import own_cluster
from rlrag.algorithms import dro

if TYPE_CHECKING:
    from rlrag.config import RunConfig
    from rlrag.retrieval.candidates import CandidateTable
    from rlrag.selection.build import TrainablePolicy

RESULTS = Path(__file__).parents[1] / "results"
_SAMPLES = (1, 2, 4, 8)
_BASELINES: tuple[dro.Baseline, ...] = ("none", "mean")
_BATCH = 24


def main(arguments: Sequence[str] | None = None) -> int:
    """Reward, measure, print the table and write it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=("nq", "hotpotqa"))
    parser.add_argument(
        "--weights",
        type=Path,
        help="also measure this trained selector (bundle/selector.safetensors)",
    )
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--draws", type=int, default=400, help="number of draws for each m")
    parser.add_argument("--cache-dir", default="~/.cache/rlrag")
    options = parser.parse_args(arguments)

    from rlrag.files.directories import load_weights
    from rlrag.pipeline import open_library, open_policy, open_training_data
    from rlrag.recipes.selection import co_training, sampled_dro

    run = co_training(options.name, 2, sampled_dro("selector"))
    run = run.model_copy(update={"cache_dir": options.cache_dir})
    candidates = open_training_data(run, open_library(run)).train
    rows = np.arange(options.questions)
    selections_SK = np.array(list(itertools.permutations(range(candidates.num_candidates), 2)))
    with own_cluster(2):
        rewards_BS = _rewards(run, candidates, rows, selections_SK)
    policies = {"untrained": open_policy(run, candidates)}
    if options.weights:
        policies["trained"] = open_policy(run, candidates)
        load_weights(policies["trained"], options.weights)
    lines = []
    for name, policy in policies.items():
        logp_BS, jacobian_BSP = _derivatives(policy, candidates, rows, selections_SK)
        lines += _measure(name, logp_BS, jacobian_BSP, rewards_BS, options.draws)
    report = _report(options, len(selections_SK), lines)
    print(report)
    (RESULTS / f"estimator-{options.name}.md").write_text(report)
    return 0


def _rewards(
    run: RunConfig, candidates: CandidateTable, rows: np.ndarray, selections_SK: np.ndarray
) -> torch.Tensor:
    """Log p(golden answer | x, d_z) of all selections, (B, S) in nats."""
    from rlrag.generation.build import open_generator
    from rlrag.pipeline import open_reward

    generator, prompts = open_generator(run.generator, "ray", run.cache_path)
    try:
        reward = open_reward(run, generator, prompts)
        found = []
        for row in rows:
            passages = candidates.passages(int(row))
            picks = [[passages[n] for n in selection] for selection in selections_SK]
            results = reward([candidates.questions[row]] * len(picks), picks)
            failed = [result for result in results if isinstance(result, Exception)]
            if failed:
                raise failed[0]
            found.append([getattr(result, "total", np.nan) for result in results])
            print(f"rewarded question {len(found)} of {len(rows)}", file=sys.stderr, flush=True)
    finally:
        generator.close()
    return torch.tensor(found, dtype=torch.float64)


def _derivatives(
    policy: TrainablePolicy, candidates: CandidateTable, rows: np.ndarray, selections_SK: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log p(z | x) of all selections, (B, S), and its derivatives by the parameters, (B, S, P)."""
    from rlrag.config import EnvironmentConfig
    from rlrag.environment.rollout import replay

    environment = EnvironmentConfig(num_selected=selections_SK.shape[1])
    parameters = [p for p in policy.parameters() if p.requires_grad]
    logp, jacobian = [], []
    for row in rows:
        environment = EnvironmentConfig(num_selected=selections_SK.shape[1])
        trajectories = replay(
            environment, candidates, np.repeat(row, len(selections_SK)), selections_SK
        )
        logp_S = policy.log_prob(trajectories).sum(dim=1)
        logp.append(logp_S.detach().double())
        gradients = [
            torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True)
            for one in logp_S
        ]
        flat = [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(gradient, parameters, strict=True)
                ]
            )
            for gradient in gradients
        ]
        jacobian.append(torch.stack(flat))
    return torch.stack(logp), torch.stack(jacobian)


def _measure(
    name: str,
    logp_BS: torch.Tensor,
    jacobian_BSP: torch.Tensor,
    rewards_BS: torch.Tensor,
    num_draws: int,
) -> list[str]:
    """Rows of the table for one policy."""
    posterior_BS = (logp_BS + rewards_BS).softmax(dim=1)
    exact_P = torch.einsum("bs,bsp->p", posterior_BS.float(), jacobian_BSP) / len(logp_BS)
    # Of a selection's derivative only its products with the others matter: (B, S, S) is small.
    gram_BSS = torch.einsum("bsp,btp->bst", jacobian_BSP, jacobian_BSP).double()
    rng = torch.Generator().manual_seed(0)
    lines = []
    for num_samples in _SAMPLES:
        drawn_BRM = torch.multinomial(
            logp_BS.exp(), num_draws * num_samples, replacement=True, generator=rng
        ).view(len(logp_BS), num_draws, num_samples)
        reward_XM = rewards_BS.gather(1, drawn_BRM.flatten(1)).view(-1, num_samples)
        share_XM = torch.full_like(reward_XM, 1 / num_samples).log()
        weights_XM = dro.importance_weights(reward_XM, share_XM, 1.0, "self_normalised")
        found = dro.diagnostics(weights_XM, reward_XM, drawn_BRM.view(-1, num_samples, 1))
        for baseline in _BASELINES:
            all_valid = torch.ones_like(reward_XM, dtype=torch.bool)
            coefficients_XM = dro.coefficients(weights_XM, share_XM, all_valid, baseline)
            spread_BRS = torch.zeros(*drawn_BRM.shape[:2], logp_BS.shape[1], dtype=torch.float64)
            spread_BRS.scatter_add_(2, drawn_BRM, coefficients_XM.view(drawn_BRM.shape))
            mean_BS = spread_BRS.mean(dim=1)
            mean_P = torch.einsum("bs,bsp->p", mean_BS.float(), jacobian_BSP) / len(logp_BS)
            off_BRS = spread_BRS - mean_BS.unsqueeze(1)
            noise_B = torch.einsum("brs,bst,brt->b", off_BRS, gram_BSS, off_BRS) / num_draws
            noise = noise_B.mean().item() / _BATCH
            # The mean over R draws still has 1/R of the noise in its square.
            signal = (
                mean_P.square().sum().item() - noise_B.sum().item() / num_draws / len(logp_BS) ** 2
            )
            cosine = torch.cosine_similarity(mean_P, exact_P, dim=0).item()
            lines.append(
                f"| {name} | {num_samples} | {baseline} | "
                f"{found.log_weight_variance.mean().item():.2f} | "
                f"{found.ess.mean().item() / num_samples:.2f} | "
                f"{_ratio(max(signal, 0.0), noise)} | {cosine:.2f} |"
            )
    return lines


def _ratio(signal: float, noise: float) -> str:
    return "-" if noise < 1e-12 else f"{signal / noise:.3f}"


def _report(options: argparse.Namespace, num_selections: int, lines: Sequence[str]) -> str:
    trained = ""
    if options.weights:
        trained = f"; trained is the selector of the run `{options.weights.parts[-3]}`"
    return "\n".join(
        [
            f"# {options.name}: the gradient estimate against m and the baseline",
            "",
            f"`python -m benchmarks.quality.estimator {options.name}`; {options.questions} "
            "training "
            f"questions, all {num_selections} selections of two passages rewarded once, "
            f"{options.draws} draws of each m{trained}. What the columns are is in the module.",
            "",
            "| policy | m | baseline | variance of log w | ESS / m | SNR | agreement |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
