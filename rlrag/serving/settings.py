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
    """Replicas at the start, and the fewest."""
    max_replicas: int = Field(default=0, ge=0)
    """Replicas that autoscaling may reach; 0 keeps their number."""
    num_cpus: float = Field(default=0.1, gt=0)
    """Ray CPU reservation of a replica."""
    num_gpus: float = Field(default=0, ge=0)
    """Ray GPU reservation of a replica."""
    max_batch_size: int = Field(default=16, ge=1)
    """Questions computed at once, when as many wait."""
    batch_wait_ms: float = Field(default=0, ge=0)
    """How long a question waits for others to be computed with it."""


class LimitSettings(Section):
    """Bounds of a request and of what is taken in at once."""

    max_in_flight: int = Field(default=64, ge=1)
    """Requests that an HTTP replica works on at once; the next ones wait."""
    max_waiting: int = Field(default=64, ge=0)
    """Requests that may wait; one more gets 503 with `Retry-After`."""
    retry_after_s: int = Field(default=1, ge=1)
    """What `Retry-After` says."""
    timeout_s: float = Field(default=60, gt=0)
    """Longest time of a request; one may ask for less."""
    max_body_bytes: int = Field(default=4_194_304, ge=1024)
    """Size of a request body."""
    max_question_chars: int = Field(default=4000, ge=1)
    """Length of a question."""
    max_questions: int = Field(default=64, ge=1)
    """Questions of one batch request."""
    max_queries: int = Field(default=4096, ge=1)
    """Queries of one request to `/retrieve`."""
    max_candidates: int = Field(default=100, ge=1)
    """Candidates of a question."""
    max_filtered: int = Field(default=5_000, ge=1)
    """Passages, best first, that a question with filters looks through for its candidates; those
    that `filters.ids` names are found wherever they stand."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Length of an answer in tokens."""
    max_shadow_runs: int = Field(default=8, ge=0)
    """Questions that the shadow answers at once; more are left out of the comparison."""


class AccessSettings(Section):
    """Who may ask."""

    keys_file: str | None = None
    """File with one API key a line; unset asks for none."""
    keys_variable: str | None = None
    """Environment variable with API keys, split by white space; they add to those of the file."""
    admin_keys_file: str | None = None
    """File with one key a line for `/admin`; unset closes `/admin`."""
    admin_keys_variable: str | None = None
    """Environment variable with keys for `/admin`, split by white space."""
    hosts: Words = ()
    """Names under which clients may ask, besides `localhost` and addresses; `*` takes any. A page
    elsewhere could otherwise have its own name point here, and its visitors' browsers ask."""
    cors_origins: Words = ()
    """Web origins whose pages may call the service."""


class CacheSettings(Section):
    """Entries kept in memory, each cache by its own bound; 0 turns one off."""

    candidates: int = Field(default=2048, ge=0)
    """Candidates by question and version."""
    answers: int = Field(default=2048, ge=0)
    """Greedy answers by question, settings and version."""
    max_mib: int = Field(default=128, ge=1)
    """Memory of each cache, in MiB, about."""


class FeedbackSettings(Section):
    """The record of selections and of what their answers were worth. Off by default."""

    path: str | None = None
    """SQLite file of selections and feedback; unset stores nothing."""
    explore_share: float = Field(default=0, ge=0, le=1)
    """Part of the requests whose selection is drawn from the policy in place of its best one; what
    a log must have to be trained on."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Oldest selections beyond this many are deleted."""
    max_days: float = Field(default=90, gt=0)
    """Selections older than this are deleted."""


class ServeSettings(Section):
    """Everything that `serve.app:build` takes."""

    bundle: str
    """Bundle directory to serve."""
    host: str | None = None
    """Address to listen on; 127.0.0.1 when unset. For `rlrag serve` and `serve run` alone, as is
    `port`: a file for `serve deploy` names both under `http_options`."""
    port: int | None = Field(default=None, ge=1, le=65_535)
    """Port to listen on; 8000 when unset."""
    corpus: str | None = None
    """Corpus in any form that `data.corpus` takes; that of the bundle when unset."""
    allow_code: Words = ()
    """Environments `module:namespace/Name-v0`, and retrievers, policies and generators
    `package.module:name`, that bundles name and that may run here; a bundle that names another is
    refused. Reward functions are never run."""
    state_dir: str | None = None
    """Folder that keeps which bundles serve over a restart; beside the caches when unset."""
    ingress: PartSettings = PartSettings()
    """The HTTP side."""
    retriever: PartSettings = PartSettings()
    """Finds candidates."""
    selector: PartSettings = PartSettings()
    """Picks among them."""
    generator: PartSettings = PartSettings(num_cpus=0.5, max_batch_size=16)
    """Answers from the picks. `max_batch_size` bounds the sequences that an engine decodes at once;
    `num_cpus` and `num_gpus` are reserved for each engine, of which a replica has one for each set
    of weights in use."""
    generator_backend: Literal["auto", "vllm", "transformers"] = "auto"
    """`vllm`, `transformers`, or `auto`: vLLM where it is installed."""
    threads: int = Field(default=1, ge=1)
    """Compute threads of an engine on a CPU."""
    start_timeout_s: float = Field(default=600, gt=0)
    """Longest wait for all parts to load a bundle."""
    limits: LimitSettings = LimitSettings()
    """Bounds of a request."""
    access: AccessSettings = AccessSettings()
    """Keys and origins."""
    caches: CacheSettings = CacheSettings()
    """Caches of the HTTP side."""
    feedback: FeedbackSettings = FeedbackSettings()
    """The record of selections."""


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
            f"service setting {name!r}: {first['msg']}; the settings are those of "
            "rlrag/serving/settings.py, such as bundle=DIR limits.timeout_s=5"
        ) from error
