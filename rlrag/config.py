"""What a person decides about a run: typed, frozen, checked, importable without torch.

A recipe returns one `RunConfig`. Every field is a command-line flag (`--dro.num-samples 8`) and a
key of the saved `config.json`, which loads back to an equal object. Nothing that a run finds out is
written here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlrag.errors import ConfigError

DATA_DIR_VARIABLE = "RLRAG_DATA_DIR"
BUILTIN_GENERATOR = "smollm2-135m-instruct"
BUILTIN_ENCODER = "all-minilm-l6-v2"
BUILTIN_CORPUS = "factbook"


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(_Section):
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


class RetrievalConfig(_Section):
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


class EnvironmentConfig(_Section):
    """The Gymnasium environment that turns selections into rewards."""

    id: str = "envs:rlrag/DocumentSelection-v1"
    """Gymnasium id, with the module that registers it."""
    num_selected: int = Field(default=1, ge=1)
    """Passages picked in one episode (K)."""


class SelectorConfig(_Section):
    """The selection policy."""

    kind: Literal["features", "bi_encoder", "cross_encoder"] = "features"
    """Small network on frozen features, or a trained encoder that reads the texts."""
    hidden_size: int = Field(default=64, ge=1)
    """Width of the feature network."""
    projection_size: int = Field(default=32, ge=1)
    """Length to which frozen question and passage embeddings are projected."""
    prior_scale: float = Field(default=0.5, gt=0)
    """Logit lost per retriever rank before training; larger means less exploration."""
    model: str = BUILTIN_ENCODER
    """Encoder that `bi_encoder` and `cross_encoder` start from."""
    max_tokens: int = Field(default=160, ge=8)
    """Tokens of a text that a trained encoder reads."""


class FewShotExample(_Section):
    """One worked example shown before the question."""

    title: str
    """Title of the example's passage."""
    text: str
    """Text of the example's passage."""
    question: str
    """The example's question."""
    answer: str
    """The example's answer."""


class PromptConfig(_Section):
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


class GeneratorConfig(_Section):
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


class RewardConfig(_Section):
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


class DROConfig(_Section):
    """Direct Retrieval-augmented Optimization (arXiv 2505.03075)."""

    num_samples: int = Field(default=8, ge=2)
    """Permutations drawn a question (m); one sample carries no signal after normalisation."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """w = softmax(reward / temperature); 1 with `answer_logp` is the paper's weight."""
    weighting: Literal["self_normalised", "raw"] = "self_normalised"
    """`self_normalised`: weights of a question sum to 1; `raw`: exp(reward / temperature) / m."""
    baseline: Literal["none", "mean"] = "mean"
    """`mean` subtracts 1/m from each weight: the same mean gradient, less variance."""

    @model_validator(mode="after")
    def _baseline_fits(self) -> Self:
        if self.weighting == "raw" and self.baseline == "mean":
            raise ValueError(
                "dro.baseline 'mean' subtracts 1/m, the mean of self-normalised weights; "
                "with dro.weighting 'raw' use baseline 'none'"
            )
        return self


class TrainingConfig(_Section):
    """The loop, its optimiser and its records."""

    launcher: Literal["ray", "local"] = "ray"
    """`ray`: Ray Train workers and generator actors; `local`: this process alone."""
    num_workers: int = Field(default=1, ge=1)
    """Ray Train workers; each takes a shard of every batch."""
    worker_cpus: float = Field(default=0.5, gt=0)
    """Ray CPU reservation of a worker."""
    worker_gpus: float = Field(default=0, ge=0)
    """Ray GPU reservation of a worker."""
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
    "trained",
    "oracle",
]


class EvaluationConfig(_Section):
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


class RunConfig(_Section):
    """One run, completely."""

    recipe: str = "custom"
    """Name of the recipe that this came from."""
    seed: int = Field(default=0, ge=0)
    """All randomness derives from it."""
    cache_dir: str = "~/.cache/rlrag"
    """Models, indexes, candidates and generations that runs share."""
    data: DataConfig = DataConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    selector: SelectorConfig = SelectorConfig()
    generator: GeneratorConfig = GeneratorConfig()
    reward: RewardConfig = RewardConfig()
    dro: DROConfig = DROConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        k, n = self.environment.num_selected, self.retrieval.num_candidates
        if k > n:
            raise ValueError(
                f"environment.num_selected is {k} but retrieval.num_candidates only {n}; "
                "pick at most as many passages as are retrieved"
            )
        if self.training.batch_size % self.training.num_workers:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} does not divide among "
                f"training.num_workers {self.training.num_workers}; make it a multiple"
            )
        if self.training.launcher == "local" and self.training.num_workers != 1:
            raise ValueError(
                "training.launcher 'local' is one process; set training.num_workers to 1"
            )
        if self.training.launcher == "local" and self.generator.backend == "vllm":
            raise ValueError(
                "training.launcher 'local' runs without vLLM; use generator.backend transformers"
            )
        generator = self.generator
        if generator.max_model_len < generator.prompt.max_prompt_tokens + generator.max_new_tokens:
            raise ValueError(
                f"generator.max_model_len {generator.max_model_len} is shorter than "
                f"max_prompt_tokens {generator.prompt.max_prompt_tokens} plus max_new_tokens "
                f"{generator.max_new_tokens}"
            )
        return self

    @property
    def cache_path(self) -> Path:
        """`cache_dir` with `~` expanded."""
        return Path(self.cache_dir).expanduser()

    def to_json(self) -> str:
        """The whole configuration as indented JSON with a newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str, source: str = "config") -> RunConfig:
        """Parse `to_json`'s text.

        Raises:
            ConfigError: naming `source`, the field, and for an unknown field the nearest valid one.
        """
        try:
            return cls.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source} is not JSON: {error}") from error
        except ValidationError as error:
            raise ConfigError(f"{source}: {describe_validation_error(error)}") from error


def describe_validation_error(error: ValidationError) -> str:
    """One sentence for each problem that pydantic found, with a suggestion for unknown fields.

    Fields are named from the root of the configuration, whichever section was being read.
    """
    sections = {path: section for path, section in _sections(RunConfig)}
    places = {section.__name__: path for path, section in sections.items()}
    sentences = []
    for problem in error.errors():
        parts = (*places.get(error.title, ()), *problem["loc"])
        path = ".".join(map(str, parts)) or "the configuration"
        if problem["type"] == "extra_forbidden":
            names = sections[tuple(p for p in parts[:-1] if isinstance(p, str))].model_fields
            near = difflib.get_close_matches(str(parts[-1]), names, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"valid fields: {', '.join(sorted(names))}"
            )
            sentences.append(f"unknown field {path!r}; {hint}")
        elif problem["type"] == "value_error":
            sentences.append(str(problem["ctx"]["error"]))
        else:
            sentences.append(f"{path} = {problem['input']!r}: {problem['msg']}")
    return "; ".join(sentences)


def _sections(
    section: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """A section and all below it, also those that a tuple holds, with their paths."""
    yield path, section
    for name, field in section.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _sections(kind, (*path, name))
