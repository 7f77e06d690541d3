"""Settings of the service, from `serve run` arguments or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from rlrag.config.sections import Section
from rlrag.errors import ConfigError

Words = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: tuple(value.split()) if isinstance(value, str) else value),
]
"""A list in YAML; on the command line, where all is text, words between white space."""


class PartSettings(Section):
    """Replicas of one part of the pipeline."""

    num_replicas: int = Field(default=1, ge=1)
    """Initial and minimum number of replicas."""
    max_replicas: int = Field(default=0, ge=0)
    """Maximum number of replicas for autoscaling; 0 turns autoscaling off."""
    num_cpus: float = Field(default=0.1, gt=0)
    """Ray CPU reservation of a replica."""
    num_gpus: float = Field(default=0, ge=0)
    """Ray GPU reservation of a replica."""
    max_batch_size: int = Field(default=16, ge=1)
    """Maximum number of questions processed in one batch."""
    batch_wait_ms: float = Field(default=0, ge=0)
    """How long a question waits for others to form a batch."""


class LimitSettings(Section):
    """Limits of a request and of concurrent requests."""

    max_in_flight: int = Field(default=64, ge=1)
    """Questions that an HTTP replica processes at once; further ones wait."""
    max_waiting: int = Field(default=64, ge=0)
    """Questions that may wait; one more is rejected with status 503 and `Retry-After`."""
    retry_after_s: int = Field(default=1, ge=1)
    """Value of `Retry-After` in seconds."""
    timeout_s: float = Field(default=60, gt=0)
    """Time limit of a request; a request may set a shorter one."""
    max_body_bytes: int = Field(default=4_194_304, ge=1024)
    """Maximum size of a request body."""
    max_question_chars: int = Field(default=4000, ge=1)
    """Maximum length of a question."""
    max_questions: int = Field(default=64, ge=1)
    """Maximum number of questions in a batch request."""
    max_queries: int = Field(default=4096, ge=1)
    """Maximum number of queries in a request to `/retrieve`."""
    max_candidates: int = Field(default=100, ge=1)
    """Maximum number of candidates per question."""
    max_filtered: int = Field(default=5_000, ge=1)
    """Number of best passages that a question with filters searches for its candidates; passages in
    `filters.ids` are always found, whatever their rank."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum length of an answer in tokens."""
    max_shadow_runs: int = Field(default=8, ge=0)
    """Questions that the shadow version answers at once; further ones are left out of the
    comparison."""


class AccessSettings(Section):
    """Who may ask."""

    keys_file: str | None = None
    """File with one API key per line; when unset, no key is required."""
    keys_variable: str | None = None
    """Environment variable with API keys, separated by white space, in addition to those of the
    file."""
    admin_keys_file: str | None = None
    """File with one key per line for `/admin`; when unset, `/admin` is disabled."""
    admin_keys_variable: str | None = None
    """Environment variable with keys for `/admin`, separated by white space."""
    hosts: Words = ()
    """Host names that clients may use, in addition to `localhost` and IP addresses; `*` allows any.
    This protects against DNS rebinding."""
    cors_origins: Words = ()
    """Web origins that may call the service from a browser (CORS)."""


class CacheSettings(Section):
    """Entries kept in memory, each cache by its own bound; 0 turns one off."""

    candidates: int = Field(default=2048, ge=0)
    """Cache of candidates, by question and version."""
    answers: int = Field(default=2048, ge=0)
    """Cache of greedy answers, by question, settings and version."""
    max_mib: int = Field(default=128, ge=1)
    """Approximate memory of each cache in MiB."""


class FeedbackSettings(Section):
    """The record of selections and of what their answers were worth. Off by default."""

    path: str | None = None
    """SQLite file for selections and feedback; when unset, nothing is stored."""
    explore_share: float = Field(default=0, ge=0, le=1)
    """Share of requests whose selection is sampled from the policy instead of taking its best one.
    Training on the log needs such requests."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Maximum number of stored selections; the oldest are deleted first."""
    max_days: float = Field(default=90, gt=0)
    """Selections older than this are deleted."""


class ServeSettings(Section):
    """Everything that `serve.app:build` takes."""

    bundle: str
    """Bundle directory to serve."""
    host: str | None = None
    """Address to listen on; 127.0.0.1 when unset. Only for `rlrag serve` and `serve run`, as is
    `port`; for `serve deploy` set both under `http_options`."""
    port: int | None = Field(default=None, ge=1, le=65_535)
    """Port to listen on; 8000 when unset."""
    corpus: str | None = None
    """Corpus in any form that `data.corpus` takes; that of the bundle when unset."""
    allow_code: Words = ()
    """Custom code of bundles that may run: environments `module:namespace/Name-v0`, and retrievers,
    policies and generators `package.module:name`. A bundle with other custom code is refused.
    Reward functions never run."""
    state_dir: str | None = None
    """Folder that stores which bundles are served, so that they are served again after a restart;
    next to the caches when unset."""
    ingress: PartSettings = PartSettings()
    """The HTTP replicas."""
    retriever: PartSettings = PartSettings()
    """The retriever, which finds candidates."""
    selector: PartSettings = PartSettings()
    """The selector, which picks passages among the candidates."""
    generator: PartSettings = PartSettings(num_cpus=0.5, max_batch_size=16)
    """The generator, which answers from the picked passages. `max_batch_size` limits the sequences
    that an engine decodes at once; `num_cpus` and `num_gpus` are per engine, and a replica has one
    engine for each set of weights in use."""
    generator_backend: Literal["auto", "vllm", "transformers"] = "auto"
    """`vllm`, `transformers`, or `auto`: vLLM where it is installed."""
    threads: int = Field(default=1, ge=1)
    """Compute threads of an engine on a CPU."""
    start_timeout_s: float = Field(default=600, gt=0)
    """Time limit for all parts to load a bundle."""
    limits: LimitSettings = LimitSettings()
    """Limits of a request."""
    access: AccessSettings = AccessSettings()
    """API keys, host names and origins."""
    caches: CacheSettings = CacheSettings()
    """Caches of the HTTP replicas."""
    feedback: FeedbackSettings = FeedbackSettings()
    """The log of selections and feedback."""


def parse_settings(arguments: Mapping[str, Any]) -> ServeSettings:
    """Settings from `serve run` arguments; `limits.timeout_s=5` names a nested field.

    Raises:
        ConfigError: naming the first field that is unknown, missing or impossible.

    Example:
        >>> parse_settings({"bundle": "b", "limits.timeout_s": "5"}).limits.timeout_s
        5.0
    """
    nested: dict[str, Any] = {}
    for name, value in arguments.items():
        *sections, field = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    try:
        return ServeSettings.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"service setting {name!r}: {first['msg']}; all settings are in "
            "rlrag/serving/settings.py, such as bundle=DIR limits.timeout_s=5"
        ) from error
