"""What trains the parts of a run: one algorithm, with its settings.

dro           selector, generator or both, by importance-weighted policy gradients
sft           the generator alone, fine-tuned on the untrained policy's own order
openrag       the retriever, on the passages that helped the generator
jsa           the retriever, alone or with the generator
feedback      the selector, on a service's log
alternating   the retriever by openrag, and the other parts by dro on what it finds, in rounds
package.module:name   a trainer of your own
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from rlrag.config.sections import Section
from rlrag.errors import nearest_name

Part = Literal["retriever", "selector", "generator"]
"""What a run can train."""


def check_parts(parts: Sequence[str]) -> None:
    """Refuse no parts, or the same part twice.

    Raises:
        ValueError: saying which.
    """
    if not parts:
        raise ValueError("algorithm.parts is empty; name what is to be trained")
    if len(set(parts)) < len(parts):
        raise ValueError(f"algorithm.parts is {list(parts)}; name each part once")


class DROConfig(Section):
    """Direct Retrieval-augmented Optimization (arXiv 2505.03075)."""

    name: Literal["dro"] = "dro"
    """What trains: dro, sft, openrag, jsa, feedback, alternating or `package.module:name`."""
    parts: tuple[Literal["selector", "generator"], ...] = ("selector",)
    """Parts to train; the others are not changed."""
    num_samples: int = Field(default=8, ge=1)
    """Selections drawn for each question (m). With 1 the selector learns nothing, since a single
    sample always has weight 1."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """w = softmax(reward / temperature); 1 with `answer_logp` is the paper's weight."""
    weighting: Literal["self_normalised", "raw"] = "self_normalised"
    """`self_normalised`: the weights of a question sum to 1; `raw`: exp(reward / temperature) /
    m."""
    baseline: Literal["none", "mean", "leave_one_out", "prefix"] = "mean"
    """Baseline subtracted from each weight. `mean`: the question's mean weight, so that samples are
    not reinforced merely for having been drawn; `leave_one_out`: the mean likelihood of the other
    samples, for `raw` weights; `prefix`: for each action the weight of stopping before it, which
    asks for one more reward an action."""
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
    """Clips the ratio p_now / p_drawn of each action to 1 +- this, as PPO does; unset clips
    nothing, as in the paper."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Coefficient of the entropy bonus."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Coefficient of the penalty KL(policy || untrained policy), estimated again in every pass."""

    overlap: bool = False
    """Collect the next batch while the current one trains, with a policy and generator that are one
    update old. No batch is in flight at a checkpoint."""

    @property
    def on_policy(self) -> bool:
        """Whether every update uses samples of the policy that it changes."""
        return self.passes == 1 and self.refresh_every == 1

    @model_validator(mode="after")
    def _estimator_fits(self) -> Self:
        check_parts(self.parts)
        fitting = {"raw": ("none", "leave_one_out"), "self_normalised": ("none", "mean", "prefix")}
        if self.baseline not in fitting[self.weighting]:
            raise ValueError(
                f"algorithm.baseline {self.baseline!r} does not fit algorithm.weighting "
                f"{self.weighting!r}; use one of {', '.join(map(repr, fitting[self.weighting]))}"
            )
        if self.baseline == "leave_one_out" and self.num_samples < 2:
            raise ValueError(
                "algorithm.baseline 'leave_one_out' needs another sample; raise "
                "algorithm.num_samples to 2"
            )
        if self.baseline == "leave_one_out" and not self.replacement:
            raise ValueError(
                "algorithm.baseline 'leave_one_out' needs independent samples; use "
                "algorithm.replacement True"
            )
        if self.baseline != "none" and not self.on_policy and self.clip_ratio is None:
            raise ValueError(
                f"algorithm.baseline {self.baseline!r} is unbiased on-policy only; with "
                f"algorithm.passes {self.passes} and algorithm.refresh_every {self.refresh_every} "
                "set algorithm.clip_ratio, or use baseline 'none'"
            )
        if self.overlap and self.passes > 1:
            raise ValueError(
                "algorithm.overlap draws across the end of an E-step, so that algorithm.passes "
                f"{self.passes} would not all see the same draws; use one pass, or no overlap"
            )
        if self.overlap and self.baseline != "none" and self.clip_ratio is None:
            raise ValueError(
                "algorithm.overlap draws with a policy that is one update old and "
                f"algorithm.baseline {self.baseline!r} is unbiased on-policy only; set "
                "algorithm.clip_ratio, or use baseline 'none'"
            )
        return self


class SFTConfig(Section):
    """Supervised fine-tuning of the generator on the untrained policy's own order.

    One selection a question with weight 1: the baseline that DRO is compared with.
    """

    name: Literal["sft"] = "sft"
    """What trains: dro, sft, openrag, jsa, feedback, alternating or `package.module:name`."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is trained."""
        return ("generator",)


class OpenRAGConfig(Section):
    """The retriever's training on what helped the generator (OpenRAG, arXiv 2503.08398).

    It trains the encoder of `retrieval.kind`, which is `dense` or `semi_parametric`; `training`
    holds what it shares with the other parts: batch size, warm-up, validation and checkpoints. The
    offline stage trains on passages that were labelled before training, the online stage on those
    that the retriever currently finds; either alone is an ablation in the paper.
    """

    name: Literal["openrag"] = "openrag"
    """What trains: dro, sft, openrag, jsa, feedback, alternating or `package.module:name`."""
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
    """Time limit for a rebuild."""
    offline_epochs: int = Field(default=40, ge=0)
    """Epochs of the offline stage; 0 leaves it out."""
    online_epochs: int = Field(default=40, ge=0)
    """Epochs of the online stage; 0 leaves it out."""
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

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is trained."""
        return ("retriever",)

    @property
    def stages(self) -> tuple[Literal["offline", "online"], ...]:
        """The stages that have epochs, in their order."""
        epochs: dict[Literal["offline", "online"], int] = {
            "offline": self.offline_epochs,
            "online": self.online_epochs,
        }
        return tuple(stage for stage, num_epochs in epochs.items() if num_epochs)

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        if not self.stages:
            raise ValueError(
                "algorithm.offline_epochs and algorithm.online_epochs are both 0, so that nothing "
                "is trained; raise one of them"
            )
        if self.labels == "gold" and self.loss == "kl":
            raise ValueError(
                "algorithm.loss 'kl' distils the generator's likelihoods, which algorithm.labels "
                "'gold' does without; use loss contrastive"
            )
        if self.vectors == "one_whole" and self.loss == "kl":
            raise ValueError(
                "algorithm.vectors 'one_whole' belongs to algorithm.loss 'contrastive'; leave it "
                "out"
            )
        return self


class JSAConfig(Section):
    """Retriever and generator by joint stochastic approximation (JSA-RAG, arXiv 2508.18168).

    It trains the encoder of questions of `retrieval.kind`, which is `dense` or `semi_parametric`;
    passages keep their vectors. `training` holds passes, batch size, warm-up and checkpoints,
    `generator_training` how the generator learns where it is trained.
    """

    name: Literal["jsa"] = "jsa"
    """What trains: dro, sft, openrag, jsa, feedback, alternating or `package.module:name`."""
    train_generator: bool = False
    """Also train the generator, as the paper does."""
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

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is trained."""
        return ("retriever", "generator") if self.train_generator else ("retriever",)

    @model_validator(mode="after")
    def _mean_has_one_answer(self) -> Self:
        if self.likelihood == "mean" and self.answer == "likeliest":
            raise ValueError(
                "algorithm.likelihood 'mean' divides by the tokens of one answer; set "
                "algorithm.answer to 'first', or use likelihood 'product'"
            )
        return self


class FeedbackConfig(Section):
    """The selector's training on a service's log of feedback, by inverse propensities.

    It needs neither questions nor a generator, and starts from `selector.weights`.
    """

    name: Literal["feedback"] = "feedback"
    """What trains: dro, sft, openrag, jsa, feedback, alternating or `package.module:name`."""
    log: str
    """The log of feedback that a service wrote (`feedback.path`)."""
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

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is trained."""
        return ("selector",)

    @model_validator(mode="after")
    def _range_has_a_width(self) -> Self:
        low, high = self.reward_range
        if not math.isfinite(low) or not math.isfinite(high) or low >= high:
            raise ValueError(
                f"algorithm.reward_range is {low:g} to {high:g}; give two numbers, the lower first"
            )
        return self


class AlternatingConfig(Section):
    """The retriever by OpenRAG, and then the other parts by DRO on what it finds, in rounds.

    `retriever` holds the settings of `openrag`, `selection` those of `dro`.
    """

    name: Literal["alternating"] = "alternating"
    """What trains: dro, sft, openrag, jsa, feedback, alternating or `package.module:name`."""
    rounds: int = Field(default=1, ge=1)
    """Rounds; each trains the retriever and then the other parts."""
    retriever: OpenRAGConfig = OpenRAGConfig()
    """How the retriever is trained."""
    selection: DROConfig = DROConfig()
    """How the other parts are trained."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is trained."""
        return ("retriever", *self.selection.parts)


def _known(name: str) -> str:
    algorithm_kind(name)
    return name


class OwnTrainerConfig(Section):
    """A trainer of your own."""

    name: Annotated[str, AfterValidator(_known)]
    """`package.module:name` of the trainer."""
    parts: tuple[Part, ...] = ("selector",)
    """Parts that it trains; the others are not changed."""
    options: tuple[str, ...] = ()
    """Its options, each `name=value`."""

    @model_validator(mode="after")
    def _parts_are_named(self) -> Self:
        check_parts(self.parts)
        return self


ALGORITHMS: Mapping[str, type[Section]] = {
    "dro": DROConfig,
    "sft": SFTConfig,
    "openrag": OpenRAGConfig,
    "jsa": JSAConfig,
    "feedback": FeedbackConfig,
    "alternating": AlternatingConfig,
}
"""The built-in algorithms by name."""

OWN = "own"
"""The tag of `OwnTrainerConfig`, whose name is anybody's."""


def algorithm_kind(name: Any) -> type[Section]:
    """The settings of the algorithm with this name.

    Raises:
        ValueError: when there is none.
    """
    if isinstance(name, str) and name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in str(name):
        return OwnTrainerConfig
    hint = nearest_name(str(name), ALGORITHMS, f"there are: {', '.join(ALGORITHMS)}")
    raise ValueError(
        f"algorithm.name {name!r} is unknown; {hint} (one of your own is package.module:name)"
    )


def _tag(value: Any) -> str:
    name = value.get("name", "dro") if isinstance(value, dict) else getattr(value, "name", "dro")
    return name if isinstance(name, str) and name in ALGORITHMS else OWN


Algorithm = Annotated[
    Annotated[DROConfig, Tag("dro")]
    | Annotated[SFTConfig, Tag("sft")]
    | Annotated[OpenRAGConfig, Tag("openrag")]
    | Annotated[JSAConfig, Tag("jsa")]
    | Annotated[FeedbackConfig, Tag("feedback")]
    | Annotated[AlternatingConfig, Tag("alternating")]
    | Annotated[OwnTrainerConfig, Tag(OWN)],
    Discriminator(_tag),
]
"""Exactly one of them, told by its name."""
