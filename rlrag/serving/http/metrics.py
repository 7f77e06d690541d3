"""Prometheus metrics of the HTTP interface.

Each application has a registry of its own, so that several can live in one process.
"""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from rlrag.serving.records import Routing

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)

Shadowing = Literal["equal", "different", "failed", "dropped"]


class Metrics:
    """The measured quantities of one HTTP replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._stage = Histogram(
            "rlrag_stage_seconds",
            "Time of a stage of an answer, where it was computed; `total` includes waiting.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._request = Histogram(
            "rlrag_request_seconds",
            "Time from a request's arrival to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._requests = Counter(
            "rlrag_requests",
            "Requests; status 499 where the client left.",
            ["route", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "rlrag_in_flight", "Questions being worked on.", registry=self._registry
        )
        self.waiting = Gauge(
            "rlrag_waiting", "Questions that wait for room.", registry=self._registry
        )
        self._rejected = Counter(
            "rlrag_rejected", "Requests refused because too many waited.", registry=registry
        )
        self._lookups = Counter(
            "rlrag_cache_lookups", "Lookups in a cache.", ["cache", "result"], registry=registry
        )
        self._tokens = Counter("rlrag_tokens", "Tokens computed.", ["kind"], registry=registry)
        self._cut_tokens = Counter(
            "rlrag_cut_tokens", "Passage tokens that prompts had no room for.", registry=registry
        )
        self._passages = Counter(
            "rlrag_passages",
            "Passages picked: shown in the prompt, or dropped because it had no room for any of "
            "their text.",
            ["prompt"],
            registry=registry,
        )
        self._answers = Counter(
            "rlrag_answers", "Answers by bundle version.", ["version"], registry=registry
        )
        self._shadow = Counter(
            "rlrag_shadow", "Questions offered to the shadow.", ["result"], registry=registry
        )
        self._feedback = Counter(
            "rlrag_feedback", "Feedback received.", ["kind"], registry=registry
        )
        self._unlogged = Counter(
            "rlrag_selections_unlogged",
            "Selections left out of the record: too many waited, one could not be written, or its "
            "request id was taken.",
            registry=registry,
        )
        self._versions = Gauge(
            "rlrag_version", "1 for each bundle version in use.", ["version", "role"],
            registry=registry,
        )  # fmt: skip

    def finished(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(route, str(status)).inc()
        self._request.labels(route).observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        """A stage has ended."""
        self._stage.labels(name).observe(seconds)

    def rejected(self) -> None:
        """A request found the service full."""
        self._rejected.inc()

    def lookup(self, cache: str, hit: bool) -> None:
        """A cache was asked."""
        self._lookups.labels(cache, "hit" if hit else "miss").inc()

    def computed(self, num_prompt_tokens: int, num_answer_tokens: int) -> None:
        """A generator has answered."""
        self._tokens.labels("prompt").inc(num_prompt_tokens)
        self._tokens.labels("answer").inc(num_answer_tokens)

    def prompted(self, num_shown: int, num_picked: int, num_cut_tokens: int) -> None:
        """A prompt showed so many of the passages picked, without some of their tokens."""
        self._passages.labels("shown").inc(num_shown)
        self._passages.labels("dropped").inc(num_picked - num_shown)
        self._cut_tokens.inc(num_cut_tokens)

    def answered(self, version: str) -> None:
        """A question was answered by a version."""
        self._answers.labels(version).inc()

    def shadowed(self, result: Shadowing) -> None:
        """A question was offered to the shadow."""
        self._shadow.labels(result).inc()

    def fed_back(self, kind: str) -> None:
        """Feedback was recorded."""
        self._feedback.labels(kind).inc()

    def unlogged(self) -> None:
        """A selection could not be recorded."""
        self._unlogged.inc()

    def text(self, routing: Routing | None) -> bytes:
        """All of it in Prometheus's text format."""
        self._versions.clear()
        if routing is not None:
            roles = {"active": routing.active, "canary": routing.canary, "shadow": routing.shadow}
            for role, version in roles.items():
                if version is not None:
                    self._versions.labels(version, role).set(1)
        return generate_latest(self._registry)
