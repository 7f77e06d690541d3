"""Configuration sections of training and evaluation."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator, model_validator

from rlrag.config.sections import Placement, Section, check_options, known_or_own

OBJECTIVES = ("dro", "sft", "jsa")


class DROConfig(Section):
    """Direct Retrieval-augmented Optimization (arXiv 2505.03075)."""

    num_samples: int = Field(default=8, ge=1)
    """Selections drawn for each question (m). With 1 the selector learns nothing, since a single
    sample always has weight 1."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """w = softmax(reward / temperature); 1 with `answer_logp` is the paper's weight."""
    weighting: Literal["self_normalised", "raw"] = "self_normalised"
    """`self_normalised`: the weights of a question sum to 1; `raw`: exp(reward / temperature) /
    m."""
    baseline: Literal["none", "mean", "leave_one_out"] = "mean"
    """Baseline subtracted from each weight. `mean`: the question's mean weight, so that samples are
    not reinforced merely for having been drawn; `leave_one_out`: the mean likelihood of the other
    samples, for `raw` weights."""
    replacement: bool = True
    """Draw samples independently. False draws m different selections by Gumbel top-k and corrects
    their weights (Kool et al., 2019, 2020)."""
    proposal_temperature: float = Field(default=1.0, gt=0)
    """Draw from p(z|x)^(1/T) and correct the weights; above 1 explores more."""
    passes: int = Field(default=1, ge=1)
    """Optimiser passes over the samples of an E-step; the paper's M-step takes several."""
    refresh_every: int | None = Field(default=1, ge=1)
    """Steps between updates of the policy and generator that the E-step draws and scores with. 1 is
    on-policy; unset updates once per epoch, as in the paper."""
    clip_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Clips the ratio p_now(z|x) / p_drawn(z|x) to 1 +- this, as PPO does; unset clips nothing, as
    in the paper."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Coefficient of the entropy bonus."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Coefficient of the penalty KL(policy || untrained policy), estimated again in every pass."""

    @property
    def on_policy(self) -> bool:
        """Whether every update uses samples of the policy that it changes."""
        return self.passes == 1 and self.refresh_every == 1

    @model_validator(mode="after")
    def _estimator_fits(self) -> Self:
        fitting = {"raw": ("none", "leave_one_out"), "self_normalised": ("none", "mean")}
        if self.baseline not in fitting[self.weighting]:
            raise ValueError(
                f"dro.baseline {self.baseline!r} does not fit dro.weighting {self.weighting!r}; "
                f"use one of {', '.join(map(repr, fitting[self.weighting]))}"
            )
        if self.baseline == "leave_one_out" and self.num_samples < 2:
            raise ValueError(
                "dro.baseline 'leave_one_out' needs another sample; raise dro.num_samples to 2"
            )
        if self.baseline == "leave_one_out" and not self.replacement:
            raise ValueError(
                "dro.baseline 'leave_one_out' needs independent samples; use dro.replacement True"
            )
        if self.baseline != "none" and not self.on_policy and self.clip_ratio is None:
            raise ValueError(
                f"dro.baseline {self.baseline!r} is unbiased on-policy only; with dro.passes "
                f"{self.passes} and dro.refresh_every {self.refresh_every} set dro.clip_ratio, or "
                "use baseline 'none'"
            )
        return self


class OffPolicyConfig(Section):
    """The selector's training on logged selections, see `training.experience`."""

    max_ratio: float = Field(default=20.0, ge=1)
    """Upper bound of the importance ratio p_now(z|x) / propensity in the gradient. A service that
    explores with probability e logs ratios of up to 1/e."""
    reward_range: tuple[float, float] = (-1.0, 1.0)
    """Lowest and highest feedback value. Values outside are clipped and counted; a log with more
    than 5 % of its values outside is refused."""
    num_epochs: int = Field(default=20, ge=1)
    """Passes over the logged selections."""
    held_back_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of the logged questions held out to choose the best checkpoint, which has the highest
    lower bound of its 95 % interval; 0 keeps the last one and gives no estimate."""

    @model_validator(mode="after")
    def _range_has_a_width(self) -> Self:
        low, high = self.reward_range
        if not math.isfinite(low) or not math.isfinite(high) or low >= high:
            raise ValueError(
                f"off_policy.reward_range is {low:g} to {high:g}; give two numbers, the lower first"
            )
        return self


class OpenRAGConfig(Section):
    """The retriever's training on what helped the generator (OpenRAG, arXiv 2503.08398).

    It trains the encoder of `retrieval.kind`, which is `dense` or `semi_parametric`; `training`
    holds what it shares with the other parts: batch size, warm-up, validation and checkpoints.
    """

    stages: tuple[Literal["offline", "online"], ...] = ("offline", "online")
    """`offline` trains on passages labelled before training, `online` on those that the retriever
    currently finds; either alone is an ablation in the paper."""
    labels: Literal["generator", "gold", "generator_else_gold"] = "generator"
    """Which passages are positive. `generator`: those with which the generator answers correctly;
    `gold`: the questions' gold passages, OpenRAG's baseline; `generator_else_gold`: gold passages
    only where the generator is correct with no passage."""
    num_offline: int = Field(default=100, ge=2)
    """Passages labelled for each question before training (k)."""
    num_online: int = Field(default=20, ge=2)
    """Passages that the fixed first stage retrieves and the current encoder reranks (m)."""
    first_stage: Literal["frozen", "bag_of_tokens", "bm25"] = "frozen"
    """First stage of online retrieval: the untrained encoder's vectors, a bag-of-tokens index
    (`semi_parametric` only, as in the paper), or BM25. It stays fixed during training."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Rebuild the passage index with the current encoder every N steps and use it as the
    first stage; unset never rebuilds it."""
    refresh_waits: bool = False
    """Wait for each rebuild, so that a run is reproducible; otherwise training goes on with the old
    index."""
    refresh_timeout_s: float = Field(default=3600, gt=0)
    """Longest wait for a rebuild."""
    offline_epochs: int = Field(default=40, ge=1)
    """Epochs of the offline stage."""
    online_epochs: int = Field(default=40, ge=1)
    """Epochs of the online stage."""
    offline_token_share: float = Field(default=0.8, gt=0, le=1)
    """Share of `training.max_generator_tokens` for labelling before the online stage; questions
    beyond it are skipped."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak AdamW step size."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW decoupled weight decay."""
    max_grad_norm: float = Field(default=2.0, gt=0)
    """Gradients are clipped to this global norm."""
    loss: Literal["contrastive", "kl"] = "contrastive"
    """`kl` distils the generator's likelihoods into the retriever's distribution over a question's
    passages (RePlug), an ablation in the paper."""
    vectors: Literal["sparse", "one_whole"] = "sparse"
    """Vectors in the contrastive loss of a `semi_parametric` retriever. `sparse`: as in search;
    `one_whole`: one side of each term is dense, as in VDR's code, so that all tokens of a passage
    get a gradient."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the inner products in the loss. The paper uses 1; unit vectors need less."""
    likelihood_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the log-likelihoods that `kl` distils."""
    micro_batch_texts: int = Field(default=32, ge=1)
    """Texts in one forward pass. Larger batches use gradient caching, with the same result."""
    tied: bool = True
    """Use one encoder for questions and passages; False trains one for each."""
    contribution_margin: float = Field(default=1.0, gt=0)
    """Labels from logged rewards: a passage is positive if the mean reward with it is higher by
    this much than without it, and negative if it is not higher and some selection with it was
    rewarded by this much less than the question's best."""


class JSAConfig(Section):
    """Retriever and generator by joint stochastic approximation (JSA-RAG, arXiv 2508.18168).

    It trains the encoder of questions of `retrieval.kind`, which is `dense` or `semi_parametric`;
    passages keep their vectors. `training` holds passes, batch size, warm-up and checkpoints,
    `generator_training` how the generator learns where it is a part.
    """

    mis_steps: int = Field(default=50, ge=1)
    """Steps of the Metropolis chain for each question (m); a passage that is proposed again is not
    scored again."""
    weights: Literal["posterior", "visits"] = "posterior"
    """`posterior`: the exact posterior over the scored passages; `visits`: how often the Metropolis
    chain visits each, as in the paper."""
    num_prior: int = Field(default=10, ge=1)
    """Top passages of the retriever among the proposals."""
    num_posterior: int = Field(default=10, ge=1)
    """Top passages of the posterior retriever, which also reads the answer, among the proposals."""
    temperature: float = Field(default=0.1, gt=0)
    """Temperature of both retrievers' inner products; 0.1 is that of the released code, for unit
    vectors."""
    likelihood: Literal["product", "mean"] = "product"
    """Likelihood of the answer in the posterior. `product`: over all tokens; `mean`: the geometric
    mean per token, as in the released code."""
    likelihood_temperature: float = Field(default=1.0, gt=0)
    """Temperature of the log-likelihood in the posterior; above 1 flattens it."""
    answer: Literal["first", "likeliest"] = "first"
    """Which of several golden answers is scored: the first, which the posterior retriever reads and
    the generator learns, or the likeliest given the passage."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak AdamW step size of both retrievers."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of both retrievers together are clipped to this global norm."""
    micro_batch_texts: int = Field(default=32, ge=1)
    """Questions in one forward pass; gradients accumulate."""

    @model_validator(mode="after")
    def _mean_has_one_answer(self) -> Self:
        if self.likelihood == "mean" and self.answer == "likeliest":
            raise ValueError(
                "jsa.likelihood 'mean' divides by the tokens of one answer; set jsa.answer to "
                "'first', or use likelihood 'product'"
            )
        return self


class GeneratorTrainingConfig(Section):
    """The generator's M-step: L_G = - sum w log p(y | x, d_z)."""

    method: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    lora_alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak AdamW step size."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the forward pass; weights and optimiser stay in float32."""
    micro_batch_tokens: int = Field(default=4096, ge=64)
    """Padded tokens in one forward pass; gradients accumulate over a step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and takes about a third more
    time."""
    sequences_per_question: int | None = Field(default=None, ge=1)
    """Train on this many selections per question, drawn in proportion to their weights, which has
    the same expected gradient and costs less; unset trains on all m, weighted."""
    sharding: Literal["replicated", "fsdp2"] = "replicated"
    """`fsdp2` shards weights, gradients and optimiser state over the workers, for a generator that
    does not fit on one device."""
    share_base: bool = False
    """Selector and generator share one copy of the base model, which both must name, and each train
    an adapter."""
    max_staleness: int = Field(default=0, ge=0)
    """Collect a batch again if its rewards come from weights older than this many published
    versions; happens only with `training.overlap`."""


class TrainingConfig(Section):
    """The loop, its optimiser and its records."""

    parts: tuple[Literal["retriever", "selector", "generator"], ...] = ("selector",)
    """What is trained; the rest stays as it is."""
    experience: str | None = None
    """A service's log of feedback (`feedback.path`) to train the selector on in place of questions,
    without a generator."""
    objective: Annotated[str, known_or_own("training.objective", OBJECTIVES)] = "dro"
    """`dro`; `sft` trains the generator alone on the untrained policy's own order, one selection a
    question with weight 1: the baseline that DRO is compared with. `jsa` trains the retriever, and
    the generator where it is a part, together; by `dro` a retriever is trained by OpenRAG. Or
    `package.module:name` of a trainer of your own, for all parts that are trained."""
    options: tuple[str, ...] = ()
    """Options of a trainer of your own, each `name=value`."""
    launcher: Literal["ray", "local"] = "ray"
    """`ray`: Ray Train workers and generator actors; `local`: this process alone."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers; each processes a shard of every batch."""
    worker_cpus: float = Field(default=0.5, gt=0)
    """Ray CPU reservation of a worker."""
    worker_gpus: float = Field(default=0, ge=0)
    """Ray GPU reservation of a worker."""
    worker_placement: Placement = "pack"
    """Placement of the workers on nodes, as in `generator.placement`."""
    worker_threads: int = Field(default=1, ge=1)
    """Compute threads of a worker on a CPU."""
    collective_timeout_s: float = Field(default=1800, gt=0)
    """Timeout of collective operations."""
    num_epochs: int = Field(default=3, ge=1)
    """Epochs over the training questions."""
    batch_size: int = Field(default=32, ge=1)
    """Questions per step, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak AdamW step size."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up, followed by linear decay to zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    validate_every: int = Field(default=20, ge=1)
    """Steps between validations."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints; the first and last step are always kept."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, besides the first and the best ones."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep one checkpoint permanently every N steps; off by default."""
    start_from: str | None = None
    """Start from the weights of another run's checkpoint directory (same parts), instead of
    untrained ones; `selector.imitation_steps` is skipped. Optimiser state and step count are not
    taken."""
    max_failures: int = Field(default=3, ge=0)
    """How often Ray Train restarts a failed worker group."""
    patience: int | None = Field(default=None, ge=1)
    """Stop early after this many validations in a row without improvement; off by default."""
    rounds: int = Field(default=1, ge=1)
    """Rounds of training the retriever and then the other parts on what it finds."""
    log_experience: bool = False
    """Log every selection and reward in the run directory, which training in rounds needs."""
    overlap: bool = False
    """Collect the next batch while the current one trains, with a policy and generator that are one
    update old. No batch is in flight at a checkpoint."""
    max_failed_share: float = Field(default=0.05, ge=0, lt=1)
    """End the run if a larger share of a batch's rewards could not be computed."""
    max_generator_tokens: int | None = Field(default=None, ge=1)
    """Stop training and evaluate after this many prompt and answer tokens. Cached results count, so
    that a repeated run stops at the same step. Rounds share the budget equally."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow", "prometheus"], ...] = ("tensorboard",)
    """Trackers besides `metrics.jsonl`, which is always written. `prometheus` serves the newest
    metrics over HTTP during training."""
    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    """Bind address of the metrics endpoint. It has no authentication: expose it only on trusted
    networks; `0.0.0.0` binds all interfaces."""
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    """Port of the metrics endpoint; 0 takes a free one and prints it."""
    stall_report_s: float | None = Field(default=300, ge=0)
    """Log a warning and the stacks of all threads whenever there was no progress for this long; 0
    or unset never does. Logs only, never aborts."""
    profile_steps: str | None = None
    """First and last step to profile, such as `10:13`; traces for Chrome's viewer go to the run's
    `profile/`, and with launcher `ray` Ray's timeline of the whole run. Profiled steps are
    slower."""

    @field_validator("profile_steps")
    @classmethod
    def _steps_are_a_range(cls, profile_steps: str | None) -> str | None:
        if profile_steps is None:
            return None
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", profile_steps, re.ASCII)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(
                f"training.profile_steps is {profile_steps!r}; give the first and the last step, "
                "which count from 1, such as 10:13"
            )
        return profile_steps

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        check_options("training.objective", self.objective, self.options)
        return self

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile_steps` names; empty where it is unset."""
        if self.profile_steps is None:
            return range(0)
        first, last = map(int, self.profile_steps.split(":"))
        return range(first, last + 1)


class MirrorConfig(Section):
    """A copy of the run directory in remote storage, from which a run can continue."""

    uri: str | None = None
    """A directory for this run alone: `s3://bucket/prefix`, `gs://bucket/prefix` or
    `file:///nfs/directory`. Credentials come from the storage's own environment variables and
    files; `?region=`, `?scheme=` and `?endpoint_override=` may follow an S3 address."""
    wait_s: float = Field(default=1800, gt=0)
    """Longest time for the download at the start of a run, and for the last upload at its end."""

    @field_validator("uri")
    @classmethod
    def _uri_is_whole(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise ValueError(f"mirror.uri is no address ({error}); correct it") from error
        if "@" in parts.netloc:
            raise ValueError(
                "mirror.uri holds credentials, which would be saved with the run; leave them out "
                "and set them in the storage's environment variables, such as AWS_ACCESS_KEY_ID"
            )
        is_whole = {
            "file": not parts.netloc and parts.path.startswith("/"),
            "gs": bool(parts.netloc),
            "s3": bool(parts.netloc),
        }
        options = {"region", "scheme", "endpoint_override"} if parts.scheme == "s3" else set()
        unknown = sorted(parse_qs(parts.query, keep_blank_values=True).keys() - options)
        if unknown or parts.fragment:
            raise ValueError(
                f"mirror.uri has the option {(unknown or [parts.fragment])[0]!r}; an S3 address "
                "takes region, scheme and endpoint_override, others none"
            )
        if not is_whole.get(parts.scheme):
            raise ValueError(
                f"mirror.uri is {uri!r}; give s3://bucket/prefix, gs://bucket/prefix or "
                "file:///directory"
            )
        return uri


System = Literal[
    "no_retrieval",
    "random_order",
    "retriever_first",
    "retriever_reversed",
    "retriever_order",
    "bm25",
    "dense",
    "hybrid",
    "original_retriever",
    "tuned_retriever",
    "tuned_selector",
    "tuned_generator",
    "tuned_generator_first",
    "tuned_generator_reversed",
    "trained",
    "oracle",
]


class EvaluationConfig(Section):
    """The final comparison."""

    systems: tuple[System, ...] | None = None
    """Systems in the table; unset chooses those that fit what is trained, an empty list skips the
    comparison."""
    num_bootstrap: int = Field(default=10_000, ge=100)
    """Bootstrap resamples for intervals and the paired test."""
