"""Configuration sections of training and evaluation."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator

from rlrag.config.sections import Placement, Section


class GeneratorTrainingConfig(Section):
    """The generator's M-step: L_G = - sum w log p(y | x, d_z)."""

    method: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak AdamW step size."""
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


class TrainingConfig(Section):
    """The loop, its optimiser and its records."""

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
    num_epochs: int = Field(default=3, ge=1)
    """Epochs over the training questions."""
    batch_size: int = Field(default=32, ge=1)
    """Questions per step, over all workers."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak AdamW step size."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up, followed by linear decay to zero."""
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
    log_experience: bool = False
    """Log every selection and reward in the run directory; training in rounds always does."""
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
    """Time limit for the download at the start of a run, and for the last upload at its end."""

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
    "hop_text",
    "hop_title",
    "hop_both",
    "gold_passages",
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
