"""The sections that say how a pipeline is trained and what it is compared with."""

from __future__ import annotations

import math
import re
from typing import Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator, model_validator

from rlrag.config.sections import Placement, Section


class DROConfig(Section):
    """Direct Retrieval-augmented Optimization (arXiv 2505.03075)."""

    num_samples: int = Field(default=8, ge=1)
    """Permutations drawn a question (m). One sample has weight 1 whatever its reward: the selector
    then learns nothing."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """w = softmax(reward / temperature); 1 with `answer_logp` is the paper's weight."""
    weighting: Literal["self_normalised", "raw"] = "self_normalised"
    """`self_normalised`: weights of a question sum to 1; `raw`: exp(reward / temperature) / m."""
    baseline: Literal["none", "mean", "leave_one_out"] = "mean"
    """What is subtracted from a weight. `mean`: the mean weight of the question, which removes the
    pull towards whatever was drawn; `leave_one_out`: the mean of the other samples' likelihoods,
    for `raw` weights."""
    replacement: bool = True
    """Draw samples independently. False draws m different selections by Gumbel top-k and corrects
    their weights (Kool et al., 2019, 2020)."""
    proposal_temperature: float = Field(default=1.0, gt=0)
    """Draw from p(z|x)^(1/T) and correct the weights; above 1 explores more."""
    passes: int = Field(default=1, ge=1)
    """Optimiser passes over the samples of an E-step; the paper's M-step takes several."""
    refresh_every: int | None = Field(default=1, ge=1)
    """Steps between refreshes of the policy and the generator that an E-step draws and scores with;
    1 is on-policy, unset is once a pass over the questions, the paper's EM."""
    clip_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Off-policy guard: bounds p_now(z|x) / p_drawn(z|x) to 1 +- this, as PPO does; unset is the
    paper's weighted likelihood."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Adds this times the policy's entropy to the objective."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Subtracts this times KL(policy || untrained policy) from the objective, estimated anew in
    every pass over the samples."""

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
    """Bound on p_now(z|x) / propensity in the gradient; a service that draws a share e of its
    selections logs ratios of 1/e."""
    reward_range: tuple[float, float] = (-1.0, 1.0)
    """Lowest and highest value of the feedback's scale, by default what the service takes. The few
    values outside are clipped to it and counted, so that none can move an estimate far; a log with
    more than 5 % outside is refused."""
    num_epochs: int = Field(default=20, ge=1)
    """Passes over the logged selections."""
    held_back_share: float = Field(default=0.3, ge=0, lt=1)
    """Part of the logged questions that is not trained on and chooses the best checkpoint; 0 keeps
    the last one, without an estimate."""
    min_ess: float = Field(default=10.0, ge=2)
    """Effective sample size of the held-back selections below which an estimate is not trusted: a
    run does not start there, and chooses no such checkpoint."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals; the checkpoint with the highest lower end is the best."""

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
    """`offline` trains on the pools of the first retrieval, `online` on what the retriever in
    training finds; either alone is an ablation of the paper."""
    labels: Literal["generator", "gold", "generator_else_gold"] = "generator"
    """A passage is positive when the generator answers right with it; `gold` takes the passages
    that the questions name, the relevance training that OpenRAG is compared with;
    `generator_else_gold` takes these where the generator is right with none, which a small
    generator is for most questions."""
    num_offline: int = Field(default=100, ge=2)
    """Passages a question that are labelled before training (k)."""
    num_online: int = Field(default=20, ge=2)
    """Passages that the fixed first stage finds and the current weights rank again (m)."""
    first_stage: Literal["frozen", "bag_of_tokens", "bm25"] = "frozen"
    """What finds passages online: the vectors before training, the passages' plain tokens
    (`semi_parametric` alone, the paper's), or BM25. None of them changes."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Steps between refreshes of an index of all passages' vectors, which then is the first stage
    in place of `first_stage`; unset never encodes the corpus in training."""
    refresh_waits: bool = False
    """Training waits until a refresh is done, so that a seed repeats a run exactly; otherwise it
    goes on with the older index."""
    refresh_timeout_s: float = Field(default=3600, gt=0)
    """Longest wait for a refresh."""
    offline_epochs: int = Field(default=40, ge=1)
    """Passes over the questions in the offline stage."""
    online_epochs: int = Field(default=40, ge=1)
    """Passes over the questions in the online stage."""
    offline_token_share: float = Field(default=0.8, gt=0, le=1)
    """Where `training.max_generator_tokens` is set and the online stage follows, the share of them
    that judgements before it may take; questions that they do not suffice for are left out."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak AdamW step size."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW decoupled weight decay."""
    max_grad_norm: float = Field(default=2.0, gt=0)
    """Gradients are clipped to this global norm."""
    loss: Literal["contrastive", "kl"] = "contrastive"
    """`kl` draws the retriever's distribution over a question's passages to the generator's
    likelihoods (RePlug), the paper's ablation."""
    vectors: Literal["sparse", "one_whole"] = "sparse"
    """What the contrastive loss of a `semi_parametric` retriever compares: vectors as they are
    searched, or one side of each term with all its entries (VDR's code), so that all tokens of a
    passage get a gradient."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the inner products of the loss; the paper has 1, vectors of length 1 want less."""
    likelihood_temperature: float = Field(default=1.0, gt=0)
    """Divides the log-likelihoods that `kl` distils."""
    micro_batch_texts: int = Field(default=32, ge=1)
    """Texts that are embedded at once; vectors of a larger batch are cached and their gradients
    fed back piece by piece, with the same result."""
    tied: bool = True
    """One encoder for questions and passages, or one each that start alike."""
    contribution_margin: float = Field(default=1.0, gt=0)
    """Where selections were rewarded before, a passage counts as positive without being judged when
    the mean reward with it is higher than without it by this much, and as negative when it is no
    higher and some selection with it was rewarded by this much less than the question's best."""
    min_auc: float = Field(default=0.6, ge=0, le=1)
    """A warning is recorded when the generator's score tells right from wrong answers worse than
    this, as the area under the ROC curve within questions."""


class JSAConfig(Section):
    """Retriever and generator by joint stochastic approximation (JSA-RAG, arXiv 2508.18168).

    It trains the encoder of questions of `retrieval.kind`, which is `dense` or `semi_parametric`;
    passages keep their vectors. `training` holds passes, batch size, warm-up and checkpoints,
    `generator_training` how the generator learns where it is a part.
    """

    mis_steps: int = Field(default=50, ge=1)
    """Passages that the posterior retriever proposes for a question, with repetitions (m): the
    steps of a Metropolis chain. Passages that are proposed again are scored once."""
    weights: Literal["posterior", "visits"] = "posterior"
    """What the parts learn from: the exact posterior over the passages that were scored, or how
    often the Metropolis chain visits each, the paper's form, with the chain's noise."""
    num_prior: int = Field(default=10, ge=1)
    """Passages that the retriever ranks first and that may be proposed."""
    num_posterior: int = Field(default=10, ge=1)
    """Passages that the posterior retriever, which also reads the answer, ranks first; proposals
    are from both together."""
    temperature: float = Field(default=0.1, gt=0)
    """Divides the inner products of both retrievers; 0.1 is the released code's, for vectors of
    length 1."""
    likelihood: Literal["product", "mean"] = "product"
    """`product`: the posterior has the probability of the whole answer; `mean`: its geometric
    mean over the tokens, as in the released code."""
    likelihood_temperature: float = Field(default=1.0, gt=0)
    """Divides the log-likelihood in the posterior; above 1 flattens it."""
    answer: Literal["first", "likeliest"] = "first"
    """What is scored where a question has several golden answers: the first, which the posterior
    reads and the generator learns too, or whichever is likeliest behind the passage."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak AdamW step size of both retrievers."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of both retrievers together are clipped to this global norm."""
    micro_batch_texts: int = Field(default=32, ge=1)
    """Questions that are embedded at once; more of them have the same gradient, piece by piece."""

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
    """Train a low-rank adapter or all weights."""
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
    """Padded tokens in one forward pass; gradients accumulate over a step's passes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sequences_per_question: int | None = Field(default=None, ge=1)
    """Selections a question that the step trains on: unset takes all m with their weights; a number
    draws that many by weight, which has the same mean gradient and costs less."""
    sharding: Literal["replicated", "fsdp2"] = "replicated"
    """`fsdp2` shards weights, gradients and optimiser over the workers, for a generator larger than
    one device."""
    share_base: bool = False
    """Selector and generator train their adapters on one copy of the base model; both must name the
    same model."""
    max_staleness: int = Field(default=0, ge=0)
    """A batch that was rewarded by weights older than this many published versions is collected
    again and counted; only `training.overlap` can make one."""


class TrainingConfig(Section):
    """The loop, its optimiser and its records."""

    parts: tuple[Literal["retriever", "selector", "generator"], ...] = ("selector",)
    """What is trained; the rest stays as it is."""
    experience: str | None = None
    """A service's log of feedback (`feedback.path`) to train the selector on in place of questions,
    without a generator."""
    objective: Literal["dro", "sft", "jsa"] = "dro"
    """`sft` trains the generator alone on the untrained policy's own order, one selection a
    question with weight 1: the baseline that DRO is compared with. `jsa` trains the retriever, and
    the generator where it is a part, together; by the others a retriever is trained by OpenRAG."""
    launcher: Literal["ray", "local"] = "ray"
    """`ray`: Ray Train workers and generator actors; `local`: this process alone."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers; each takes a shard of every batch."""
    worker_cpus: float = Field(default=0.5, gt=0)
    """Ray CPU reservation of a worker."""
    worker_gpus: float = Field(default=0, ge=0)
    """Ray GPU reservation of a worker."""
    worker_placement: Placement = "pack"
    """Nodes of the workers, as `generator.placement`; their gradients travel fastest within one."""
    worker_threads: int = Field(default=1, ge=1)
    """Compute threads of a worker on a CPU; the engines rest while the M-step runs."""
    collective_timeout_s: float = Field(default=1800, gt=0)
    """Longest time that workers wait for each other."""
    num_epochs: int = Field(default=3, ge=1)
    """Passes over the training questions."""
    batch_size: int = Field(default=32, ge=1)
    """Questions a step, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak AdamW step size."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up; then linear decay to zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    validate_every: int = Field(default=20, ge=1)
    """Steps between validations."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints; the first and last step are always kept."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept, besides the first, the best, and what each of the newest counts as
    the best."""
    keep_every: int | None = Field(default=None, ge=1)
    """Besides, the first checkpoint of every so many steps is kept for good; unset keeps none."""
    start_from: str | None = None
    """Checkpoint directory of another run of the same parts, whose weights training starts from, in
    place of untrained ones and of `selector.imitation_steps`. Optimiser and step begin anew."""
    max_failures: int = Field(default=3, ge=0)
    """Times that Ray Train restarts a broken worker group."""
    patience: int | None = Field(default=None, ge=1)
    """Training ends early after this many validations in a row without a better score
    (the one that chooses the best checkpoint)."""
    rounds: int = Field(default=1, ge=1)
    """Where the retriever and another part are trained: turns of training the retriever and then
    the others on what it finds."""
    log_experience: bool = False
    """Keep every selection and reward in the run directory, which training in turns needs."""
    overlap: bool = False
    """Collect the next batch while the present one trains, with a policy and a generator that are
    one update old; drained before every checkpoint."""
    max_failed_share: float = Field(default=0.05, ge=0, lt=1)
    """The run ends when a larger share of a batch's rewards could not be computed."""
    max_generator_tokens: int | None = Field(default=None, ge=1)
    """Training stops and evaluates once it asked for this many prompt and answer tokens, computed
    or cached, so that a run and its repetition stop at the same step; steps that ask for none go
    on. Of several turns each may take an equal share of what is left to it and those after it."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow", "prometheus"], ...] = ("tensorboard",)
    """Besides `metrics.jsonl`, which is always written. `prometheus` serves the newest metrics over
    HTTP while steps run."""
    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    """Address that `prometheus` listens on. Whoever reaches it may read the metrics, so that any
    but this machine's own wants a network to trust; `0.0.0.0` is all of them."""
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    """Port that `prometheus` listens on; 0 takes a free one, which is said on stderr."""
    stall_report_s: float | None = Field(default=300, ge=0)
    """A warning says what is under way, and the log gets the stacks of all threads, when there was
    no progress for so long, and again after each further such time; 0 or unset never. It ends
    nothing."""
    profile_steps: str | None = None
    """First and last step that are profiled, such as `10:13`, each into a trace for Chrome's viewer
    in the run's `profile/`; with `launcher` ray Ray's timeline of the whole run follows at the end.
    Those steps take longer."""

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

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile_steps` names; empty where it is unset."""
        if self.profile_steps is None:
            return range(0)
        first, last = map(int, self.profile_steps.split(":"))
        return range(first, last + 1)


class MirrorConfig(Section):
    """A second place for what a run keeps, which it continues from where the first one is lost."""

    uri: str | None = None
    """A directory for this run alone: `s3://bucket/prefix`, `gs://bucket/prefix` or
    `file:///nfs/directory`. Credentials come from the storage's own environment variables and
    files; `?region=`, `?scheme=` and `?endpoint_override=` may follow an S3 address."""
    timeout_s: float = Field(default=60, gt=0)
    """Longest silence of the storage within one request."""
    wait_s: float = Field(default=1800, gt=0)
    """Longest time that the beginning of a run fetches, and its end waits for the last upload."""
    max_attempts: int = Field(default=3, ge=1)
    """Times that an upload is tried before it waits for the next checkpoint."""

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
    """Systems in the table. Unset: those that fit what is trained; an empty list leaves the
    comparison out."""
    num_bootstrap: int = Field(default=10_000, ge=100)
    """Resamples for intervals and the paired test."""
