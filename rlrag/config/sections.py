"""The sections of a configuration: typed, frozen, checked, importable without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUILTIN_GENERATOR = "smollm2-135m-instruct"
BUILTIN_ENCODER = "all-minilm-l6-v2"
BUILTIN_CORPUS = "factbook"


class Section(BaseModel):
    """Frozen values; unknown names, NaN and infinity are refused; docstrings become help texts."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    """Where passages and questions come from."""

    corpus: str = BUILTIN_CORPUS
    """`factbook`, a FlashRAG JSONL file, a BEIR folder, or `hub:ID[:SUBSET]`; plain or gzip."""
    train_questions: str = f"{BUILTIN_CORPUS}:train"
    """Questions to train on, in any of the same forms."""
    eval_questions: str = f"{BUILTIN_CORPUS}:test"
    """Questions that the final table is measured on; never trained on."""
    max_train_questions: int | None = Field(default=None, ge=1)
    """Use a seeded sample of this many training questions; all when unset."""
    max_eval_questions: int | None = Field(default=None, ge=1)
    """Use a seeded sample of this many evaluation questions; all when unset."""
    num_validation_questions: int = Field(default=100, ge=0)
    """Training questions held back to choose the best checkpoint; 0 keeps the last one."""
    passage_words: int = Field(default=100, ge=8)
    """Words of a passage that are indexed and shown to the generator."""


class RetrievalConfig(Section):
    """How candidates are found."""

    kind: Literal["bm25", "dense", "hybrid"] = "hybrid"
    """The order that the untrained selector reproduces."""
    num_candidates: int = Field(default=10, ge=1)
    """Candidates a question (n)."""
    encoder: str | None = BUILTIN_ENCODER
    """Sentence encoder: a Hugging Face id, a path or the built-in name; unset for BM25 alone."""
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` takes bfloat16 where the processor multiplies it natively, else float32."""
    encoder_max_tokens: int = Field(default=160, ge=8)
    """Tokens of a passage or question that the encoder reads."""
    encode_batch_size: int = Field(default=64, ge=1)
    """Passages encoded in one forward pass."""
    index: Literal["flat", "hnsw", "ivfpq"] = "flat"
    """FAISS index over the passage vectors."""
    hnsw_links: int = Field(default=32, ge=2)
    """Links a node of the HNSW graph keeps (M)."""
    hnsw_search_depth: int = Field(default=128, ge=1)
    """Candidates an HNSW search keeps open (efSearch)."""
    ivf_lists: int = Field(default=256, ge=1)
    """Cells of the IVF-PQ index."""
    ivf_probes: int = Field(default=32, ge=1)
    """Cells that an IVF-PQ search visits."""
    pq_bytes: int = Field(default=48, ge=1)
    """Bytes a vector takes in the IVF-PQ index; must divide the vector length."""
    bm25_scores: bool = False
    """Where dense retrieval ranks, give the selector the candidates' BM25 scores as well."""
    bm25_k1: float = Field(default=0.9, gt=0)
    """BM25 term-frequency saturation."""
    bm25_b: float = Field(default=0.4, ge=0, le=1)
    """BM25 length normalisation."""
    rrf_k: int = Field(default=60, ge=1)
    """Reciprocal rank fusion constant: score = sum of 1 / (k + rank)."""

    @model_validator(mode="after")
    def _encoder_present(self) -> Self:
        if self.encoder is None and self.kind != "bm25":
            raise ValueError(
                f"retrieval.kind {self.kind!r} needs retrieval.encoder; name one or use bm25"
            )
        return self


class EnvironmentConfig(Section):
    """The Gymnasium environment that turns selections into rewards."""

    id: str = "envs:rlrag/DocumentSelection-v1"
    """Gymnasium id, with the module that registers it."""
    num_selected: int = Field(default=1, ge=1)
    """Passages picked in one episode (K)."""


class SelectorConfig(Section):
    """The selection policy."""

    kind: Literal["features", "bi_encoder", "cross_encoder", "listwise_lm"] = "features"
    """Small network on frozen features, a trained encoder that reads the texts, or a language model
    that writes the order, as in the DRO paper."""
    hidden_size: int = Field(default=64, ge=1)
    """Width of the feature network."""
    projection_size: int = Field(default=32, ge=1)
    """Length to which frozen question and passage embeddings are projected."""
    prior_scale: float = Field(default=0.5, gt=0)
    """Logit lost per retriever rank before training; larger means less exploration."""
    model: str = BUILTIN_ENCODER
    """Encoder that `bi_encoder` and `cross_encoder` start from, or the causal language model of
    `listwise_lm`."""
    max_tokens: int = Field(default=160, ge=8)
    """Tokens of a text that a trained encoder reads; of one passage for `listwise_lm`."""
    adapter_rank: int | None = Field(default=16, ge=1)
    """Rank of the LoRA adapter that `listwise_lm` trains; unset trains all its weights."""
    imitation_steps: int = Field(default=0, ge=0)
    """Steps of supervised training before the first E-step, on orders drawn around the retriever's
    as `prior_scale` says: what lets a language model start from a ranker."""
    imitation_learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW step size of those steps."""

    @model_validator(mode="after")
    def _imitation_fits(self) -> Self:
        if self.imitation_steps and self.kind != "listwise_lm":
            raise ValueError(
                f"selector.imitation_steps is {self.imitation_steps}, but selector.kind "
                f"{self.kind!r} starts from the retriever's order by itself; set it to 0"
            )
        return self


class FewShotExample(Section):
    """One worked example shown before the question."""

    title: str
    """Title of the example's passage."""
    text: str
    """Text of the example's passage."""
    question: str
    """The example's question."""
    answer: str
    """The example's answer."""


class PromptConfig(Section):
    """How question and passages become a prompt."""

    style: Literal["plain", "chat"] = "plain"
    """`plain` continues a text (few-shot); `chat` wraps it in the tokenizer's chat template."""
    instruction: str = "Answer the question with a few words copied from the passage.\n\n"
    """Text before the examples; the system message of a chat."""
    passage_template: str = "[{number}] {title}: {text}\n"
    """One passage; fields: number, title, text."""
    question_template: str = "Question: {question}\nAnswer:"
    """What follows the passages; field: question. The answer continues it after one space."""
    few_shot: tuple[FewShotExample, ...] = ()
    """Worked examples in front of the question."""
    max_prompt_tokens: int = Field(default=1024, ge=16)
    """Passages are cut, the longest first, until the prompt fits; the question never is."""


class GeneratorConfig(Section):
    """The language model that answers, and the actors that run it."""

    model: str = BUILTIN_GENERATOR
    """Built-in name, Hugging Face id or path of a causal language model."""
    backend: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto`: vLLM under the ray launcher, transformers under the local one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the device multiplies it natively, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when torch sees one."""
    num_actors: int = Field(default=2, ge=1)
    """Ray actors, each with its own engine."""
    cpus_per_actor: float = Field(default=0.5, gt=0)
    """Ray CPU reservation of an actor."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """Ray GPU reservation of an actor."""
    threads_per_actor: int = Field(default=1, ge=1)
    """Compute threads of an actor's engine on a CPU."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences in one forward pass (transformers) or in flight (vLLM)."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Key-value cache of a vLLM engine on a CPU."""
    max_model_len: int = Field(default=2048, ge=32)
    """Prompt and answer tokens together."""
    max_new_tokens: int = Field(default=12, ge=1)
    """Answer tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    stop: tuple[str, ...] = ("\n",)
    """The answer ends before the first of these."""
    request_timeout_s: float = Field(default=300, gt=0)
    """Longest wait for one batch of one actor."""
    start_timeout_s: float = Field(default=300, gt=0)
    """Longest wait for an actor to load its model."""
    max_restarts: int = Field(default=3, ge=0)
    """Times a dead actor is replaced before the run gives up."""
    prompt: PromptConfig = PromptConfig()
    """The prompt; part of every cache key."""


class RewardConfig(Section):
    """What an answer is worth."""

    functions: tuple[str, ...] = ("answer_logp",)
    """Built-in names or `package.module:function`; the reward is their weighted sum."""
    weights: tuple[float, ...] = (1.0,)
    """One weight a function; weight 0 logs a term without training on it."""
    timeout_s: float = Field(default=30, gt=0)
    """Longest time that one call of a custom function may take."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if len(self.functions) != len(self.weights):
            raise ValueError(
                f"reward.functions has {len(self.functions)} entries and reward.weights "
                f"{len(self.weights)}; give one weight a function"
            )
        if not any(self.weights):
            raise ValueError("reward.weights are all zero; at least one term must count")
        return self


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
    """Subtracts this times KL(policy || untrained policy) from the objective."""

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
    max_staleness: int = Field(default=0, ge=0)
    """A batch that was rewarded by weights older than this many published versions is collected
    again and counted; only `training.overlap` can make one."""


class TrainingConfig(Section):
    """The loop, its optimiser and its records."""

    parts: tuple[Literal["selector", "generator"], ...] = ("selector",)
    """What is trained; the rest stays as it is."""
    objective: Literal["dro", "sft"] = "dro"
    """`sft` trains the generator alone on the untrained policy's own order, one selection a
    question with weight 1: the baseline that DRO is compared with."""
    launcher: Literal["ray", "local"] = "ray"
    """`ray`: Ray Train workers and generator actors; `local`: this process alone."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers; each takes a shard of every batch."""
    worker_cpus: float = Field(default=0.5, gt=0)
    """Ray CPU reservation of a worker."""
    worker_gpus: float = Field(default=0, ge=0)
    """Ray GPU reservation of a worker."""
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
    """Checkpoints kept besides the best."""
    max_failures: int = Field(default=3, ge=0)
    """Times that Ray Train restarts a broken worker group."""
    patience: int | None = Field(default=None, ge=1)
    """Training ends early after this many validations in a row without a better F1."""
    overlap: bool = False
    """Collect the next batch while the present one trains, with a policy and a generator that are
    one update old; drained before every checkpoint."""
    max_failed_share: float = Field(default=0.05, ge=0, lt=1)
    """The run ends when a larger share of a batch's rewards could not be computed."""
    max_generator_tokens: int | None = Field(default=None, ge=1)
    """Training stops and evaluates once it asked for this many prompt and answer tokens, computed
    or cached, so that a run and its repetition stop at the same step."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Besides `metrics.jsonl`, which is always written."""


System = Literal[
    "no_retrieval",
    "random_order",
    "retriever_first",
    "retriever_reversed",
    "retriever_order",
    "tuned_selector",
    "tuned_generator",
    "trained",
    "oracle",
]


class EvaluationConfig(Section):
    """The final comparison."""

    systems: tuple[System, ...] = (
        "no_retrieval",
        "random_order",
        "retriever_order",
        "trained",
        "oracle",
    )
    """Systems in the table."""
    num_bootstrap: int = Field(default=10_000, ge=100)
    """Resamples for intervals and the paired test."""
