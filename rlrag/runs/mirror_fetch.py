"""Downloads from remote storage the files that a run needs to continue.

Fetched is what lies there beyond the newest checkpoint that is usable here: all of it where the
directory here is empty, nothing where the run here is as far.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, RunDirectoryError
from rlrag.files.directories import MANIFEST, check_whole, find_whole, leads_outside
from rlrag.files.remote import RemoteDirectory
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory, check_same_run

_CHECKPOINT = re.compile(r"((?:rounds/[^/]+/)?checkpoints/step-(\d{6,}))/.+")
_TURN = re.compile(r"(rounds/[^/.][^/]*/).+")
_SINGLE_FILES = re.compile(
    r"config\.json|metrics\.jsonl|sources\.json|evaluation(\.questions\.jsonl|\.json)|feedback\.sqlite"
    r"|experience/[^/.][^/]*\.jsonl|indexes/step-\d+/.+"
)


def checkpoint_names(names: Iterable[str]) -> dict[str, int]:
    """Names of directories of checkpoints, whole or not, with their steps."""
    found = filter(None, map(_CHECKPOINT.fullmatch, names))
    return {match[1]: int(match[2]) for match in found}


def fetch_run(
    config: RunConfig, run_dir: RunDirectory, remote: RemoteDirectory, say: Callable[[str], None]
) -> None:
    """Fetch what the run continues from, where there is more of it there than here.

    Args:
        config: The run.
        run_dir: Its claimed directory.
        remote: Where it is mirrored.
        say: Tells people what was fetched or is damaged.

    Raises:
        RunDirectoryError: when another run lies there, or something else.
        SetupError: when the storage does not answer in time.
    """
    names = remote.files()
    if not names:
        return
    content = remote.read("config.json")
    if content is None:
        raise RunDirectoryError(
            f"{remote.uri} contains files but no config.json, so it is not a run; choose another "
            "mirror.uri"
        )
    kept = RunConfig.from_json(content.decode(errors="replace"), f"{remote.uri}/config.json")
    check_same_run(kept, config, remote.uri, "mirror.uri")
    turns = sorted({match[1] for match in map(_TURN.fullmatch, names) if match})
    _Fetch(run_dir, "", {n for n in names if not n.startswith("rounds/")}, remote, say).fetch()
    for prefix in turns:
        if not leads_outside(prefix):
            below = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
            _Fetch(RunDirectory(run_dir.path / prefix), prefix, below, remote, say).fetch()


class _Fetch:
    """What is fetched of one run, or of one turn of it."""

    def __init__(
        self,
        run_dir: RunDirectory,
        prefix: str,
        names: set[str],
        remote: RemoteDirectory,
        say: Callable[[str], None],
    ) -> None:
        self._run_dir = run_dir
        self._prefix = prefix
        self._names = names
        self._remote = remote
        self._say = say
        self._store = CheckpointStore(run_dir.checkpoints)

    def fetch(self) -> None:
        there = {
            step
            for name, step in checkpoint_names(self._names).items()
            if f"{name}/{MANIFEST}" in self._names
        }
        here = self._store.newest_usable()
        newer = [step for step in sorted(there, reverse=True) if here is None or step > here]
        if here is not None and not newer:
            return
        self._fetch_others(replace=bool(newer))
        for step in newer:
            try:
                self._fetch_checkpoint(step)
            except CheckpointError as error:
                self._say(f"checkpoint {step} in {self._remote.uri} is left out: {error}")
            else:
                self._say(f"fetched checkpoint {step} from {self._remote.uri}/{self._prefix}")
                return

    def _fetch_others(self, replace: bool) -> None:
        """Single files, and the whole directories besides checkpoints."""
        for name in sorted(self._names):
            hidden = any(part.startswith(".") for part in name.split("/"))
            if hidden or leads_outside(name) or not _SINGLE_FILES.fullmatch(name):
                continue
            place = self._run_dir.path / name
            if replace or not place.exists():
                self._remote.download(self._prefix + name, place)
        for place in (self._run_dir.pools, self._run_dir.bundle):
            is_there = f"{place.name}/{MANIFEST}" in self._names
            if is_there and (replace or not find_whole(place).exists()):
                try:
                    self._remote.download_whole(self._prefix + place.name, place)
                except CheckpointError as error:  # the run makes them anew
                    self._say(f"{place.name} in {self._remote.uri} is left out: {error}")

    def _fetch_checkpoint(self, step: int) -> None:
        """A checkpoint after those that it is continued with, so that a kill leaves no half.

        Raises:
            CheckpointError: when one of them is not whole there, or the records end before it.
        """
        last = max((int(line["step"]) for line in self._run_dir.read_metrics()), default=-1)
        if last < step:
            raise CheckpointError(f"metrics.jsonl ends at step {last}; it was truncated")
        for needed in dict.fromkeys((0, self._best_of(step), step)):
            place = self._store.path(needed)
            if needed in self._store.steps():
                if self._is_whole(place):
                    continue
                self._say(f"{place} is damaged and set aside as {self._store.set_aside(needed)}")
            self._remote.download_whole(f"{self._prefix}checkpoints/{place.name}", place)

    def _best_of(self, step: int) -> int:
        name = f"{self._prefix}checkpoints/{self._store.path(step).name}/state.json"
        try:
            return int(json.loads(self._remote.read(name) or "")["best_step"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{name} is missing or unreadable; upload it again") from error

    def _is_whole(self, place: Path) -> bool:
        try:
            check_whole(find_whole(place))
        except CheckpointError:
            return False
        return True
