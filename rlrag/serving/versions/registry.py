"""Decides which bundle versions replicas must load and which one answers a request.

A bundle enters as a candidate: all replicas load it beside what serves. Once all have, and its
golden questions are answered as recorded, it takes a role, and requests that begin from then on
follow the new routing. A version without a role is given up when every HTTP replica follows the new
routing and works on no request of that version any more. So each request is answered by one version
throughout, and none fails because of a change.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from rlrag.errors import CheckpointError, RequestError
from rlrag.files.text import write_whole
from rlrag.serving.records import Routing

PARTS = ("retriever", "selector", "generator")
ROLES = ("active", "canary", "shadow")
Kind = Literal["ingress", "retriever", "selector", "generator"]

SILENT_AFTER_S = 10.0
"""A replica that has not reported for so long counts as gone."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica tells of itself.

    `loaded`, `failed` and `proposal` are those of a part: what it holds, what it could not load,
    and the newest proposal that it follows. The last two fields are those of an HTTP replica: the
    routing that it follows, and the requests it works on by version.
    """

    replica: str
    kind: Kind
    loaded: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    proposal: str = ""
    epoch: int = -1
    in_flight: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a replica is told.

    `bundles` are those to hold, by version; `proposal` names the change that brought the newest of
    them; `down` names the parts that have no living replica with the active version; `checked` says
    whether that version answered its golden questions since this registry started.
    """

    bundles: Mapping[str, str]
    routing: Routing
    proposal: str = ""
    down: tuple[str, ...] = ()
    checked: bool = True


@dataclass(frozen=True, slots=True)
class _Heard:
    report: Report
    time_s: float


class VersionRegistry:
    """The versions in use; not thread-safe.

    Args:
        version: The first active version.
        path: Its bundle.
        state: File that keeps roles over a restart; what it holds goes before `version`.
        clock: Seconds, monotonic.

    Raises:
        CheckpointError: when the state file is damaged or cannot be read.
    """

    def __init__(self, version: str, path: str, state: Path, clock: Callable[[], float]) -> None:
        self._state = state
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._bundles = {version: path}
        self._routing = Routing(version)
        self._candidate: str | None = None
        self._proposal = ""
        self.checked = False
        self._restore()

    @property
    def routing(self) -> Routing:
        """Which versions answer."""
        return self._routing

    @property
    def bundles(self) -> Mapping[str, str]:
        """Bundles that replicas hold or are to load, by version."""
        return self._bundles

    def hear(self, report: Report) -> Wanted:
        """Take a replica's report and say what it must hold."""
        self._heard[report.replica] = _Heard(report, self._clock())
        self._retire()
        return Wanted(self._bundles, self._routing, self._proposal, self._down(), self.checked)

    def propose(self, version: str, path: str) -> None:
        """Have all replicas load a bundle that does not answer yet.

        A replica may hold the same version from before and be about to drop it, so that only what
        it reports once it follows this proposal counts.

        Raises:
            RequestError: when another bundle is being loaded.
        """
        if self._candidate is not None:
            raise RequestError(
                f"version {self._candidate} is being loaded; wait until it is finished"
            )
        self._candidate, self._proposal = version, secrets.token_hex(8)
        self._bundles = {**self._bundles, version: path}

    def abandon(self) -> None:
        """Give the candidate up; what serves goes on."""
        self._candidate = None
        self._retire()

    def failure(self, version: str) -> str | None:
        """Why a replica could not load a version, if one could not."""
        for heard in self._alive():
            if version in heard.failed and heard.proposal == self._proposal:
                return f"{heard.kind} {heard.replica}: {heard.failed[version]}"
        return None

    def waiting_for(self, version: str) -> list[str]:
        """Who has not loaded a version yet; a part without a living replica counts."""
        alive = [report for report in self._alive() if report.kind != "ingress"]
        missing = [
            f"{report.kind} {report.replica}"
            for report in alive
            if version not in report.loaded or report.proposal != self._proposal
        ]
        kinds = {report.kind for report in alive}
        return missing + [f"a {kind}" for kind in PARTS if kind not in kinds]

    def assign(self, version: str, role: str, share: float) -> Routing:
        """Give the candidate its role; whoever had it is retired.

        A version that becomes active ends its canary or shadow.

        Raises:
            CheckpointError: when the state file cannot be written; all roles stay as they are.
        """
        old = self._routing
        if role == "active":
            routing = Routing(version, old.canary, old.canary_share, old.shadow)
            if old.canary == version:
                routing = replace(routing, canary=None, canary_share=0.0)
            if old.shadow == version:
                routing = replace(routing, shadow=None)
        elif role == "canary":
            routing = replace(old, canary=version, canary_share=share)
        else:
            routing = replace(old, shadow=version)
        routing = replace(routing, epoch=old.epoch + 1)
        self._save(routing)
        self._candidate = None
        self.checked = self.checked or role == "active"
        return self._follow(routing)

    def drop(self, role: str) -> Routing:
        """End the canary or the shadow; a candidate stays one.

        Raises:
            CheckpointError: when the state file cannot be written; all roles stay as they are.
        """
        old = self._routing
        if role == "canary":
            routing = replace(old, canary=None, canary_share=0.0)
        else:
            routing = replace(old, shadow=None)
        routing = replace(routing, epoch=old.epoch + 1)
        self._save(routing)
        return self._follow(routing)

    def _follow(self, routing: Routing) -> Routing:
        self._routing = routing
        self._retire()
        return routing

    def _down(self) -> tuple[str, ...]:
        active = self._routing.active
        up = {report.kind for report in self._alive() if active in report.loaded}
        return tuple(part for part in PARTS if part not in up)

    def _alive(self) -> list[Report]:
        now = self._clock()
        self._heard = {
            name: heard
            for name, heard in self._heard.items()
            if now - heard.time_s < SILENT_AFTER_S
        }
        return [heard.report for heard in self._heard.values()]

    def _retire(self) -> None:
        """Give up versions that nobody needs."""
        needed = {*self._routing.versions, self._candidate}
        ingresses = [report for report in self._alive() if report.kind == "ingress"]
        for version in [v for v in self._bundles if v not in needed]:
            if all(
                report.epoch >= self._routing.epoch and not report.in_flight.get(version)
                for report in ingresses
            ):
                self._bundles = {v: path for v, path in self._bundles.items() if v != version}

    def _save(self, routing: Routing) -> None:
        kept = {version: self._bundles[version] for version in sorted(routing.versions)}
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"routing": asdict(routing), "bundles": kept}) + "\n"
            write_whole(self._state, text)
        except OSError as error:
            raise CheckpointError(
                f"{self._state} cannot be written ({error.strerror or error}), so the change was "
                "not made, because a restart would lose it; free disk space, make the file "
                "writable, or set another state_dir"
            ) from error

    def _restore(self) -> None:
        try:
            content = self._state.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(
                f"{self._state}, the list of served bundles, cannot be read "
                f"({error.strerror or error}); make it readable, or set another state_dir to "
                "start with the configured bundle"
            ) from error
        try:
            known = json.loads(content)
            routing, bundles = Routing(**known["routing"]), dict(known["bundles"])
            if set(bundles) != routing.versions:
                raise ValueError("its roles name other versions than its bundles")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._state} is not a valid list of served bundles ({error}); delete it to "
                "start with the configured bundle"
            ) from error
        self._routing, self._bundles = routing, bundles


def check_version(version: str, found: str, directory: Path) -> None:
    """Refuse content under the name of another version.

    Raises:
        CheckpointError: naming both versions.
    """
    if found != version:
        raise CheckpointError(
            f"{directory} now contains version {found}, not {version}; restore {version} there, "
            f"or load {directory} into the service again, and keep each version in its own "
            "directory"
        )
