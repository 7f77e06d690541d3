"""Copies a run directory to remote storage during training.

One thread of the process that launched the run looks for what training has finished and uploads it,
so that a step waits for its own files on disk and for nothing else. What goes there:

    files         configuration, metrics, evaluation, a log of feedback, experience, indexes
    pools/        as a whole
    checkpoints/  as wholes, the newest first; what retention dropped is deleted
    bundle/       as a whole

Files go with every whole directory and before it, so that they reach at least as far as any
checkpoint there. Of checkpoints that wait the newest is taken; one that retention drops before its
turn is left out. Hard links keep the one on its way. Turns of a run, `rounds/N-part`, are treated
alike.

`mirror_fetch` brings back what was lost here.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlrag.config import RunConfig
from rlrag.errors import RlragError, SetupError
from rlrag.files.directories import MANIFEST, find_whole
from rlrag.files.remote import RemoteDirectory, open_remote
from rlrag.runs.checkpoints import CheckpointStore, kept_steps
from rlrag.runs.directory import RunDirectory
from rlrag.runs.mirror_fetch import checkpoint_names, fetch_run

logger = logging.getLogger(__name__)

_POLL_S = 1.0
# Storage that is silent for longer within one request does not answer it any more.
TIMEOUT_S = 60.0
# After these the next checkpoint tries again, so that more would only keep the others waiting.
MAX_ATTEMPTS = 3
_FIRST_RETRY_S = 1.0


@contextmanager
def mirrored(
    config: RunConfig, run_dir: RunDirectory, say: Callable[[str], None]
) -> Iterator[None]:
    """Keep `mirror.uri` up to date during the block; without one nothing happens.

    Before the block, what is newer there is fetched. After it, the last uploads are waited for.

    Args:
        config: The run.
        run_dir: Its claimed directory.
        say: Tells people what was fetched, and after a failed block what could not be uploaded.

    Raises:
        RunDirectoryError: when another run lies there.
        SetupError: when the storage cannot be used; after a block that succeeded also when not
            everything is there, which is then named.
    """
    uri = config.mirror.uri
    if uri is None:
        yield
        return
    remote = open_remote(uri, TIMEOUT_S)
    with remote.until(config.mirror.wait_s):
        fetch_run(config, run_dir, remote, say)
        mirror = Mirror(config, run_dir, remote)
    mirror.start()
    try:
        yield
    except BaseException:
        left = mirror.finish()
        if left:
            say(f"error: {left}")
        raise
    left = mirror.finish()
    if left:
        raise SetupError(left)


@dataclass(frozen=True)
class _Whole:
    """A version of a whole directory here: whose it is, its name there, its place, its manifest."""

    run_dir: Path
    name: str
    place: Path
    manifest: bytes


class Mirror:
    """Uploads of one run; `mirrored` opens it."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDirectory,
        remote: RemoteDirectory,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        """Look what is there already.

        Raises:
            SetupError: when the storage does not answer.
        """
        self._settings = config.mirror
        self._max_attempts = max_attempts
        self._training = config.training
        self._run_dir = run_dir
        self._remote = remote
        self._links = run_dir.logs / "mirroring"
        self._there: dict[str, bytes] = {}
        names = remote.files()
        for name in names:
            whole = name.removesuffix(f"/{MANIFEST}")
            if whole != name and (content := remote.read(name)) is not None:
                self._there[whole] = content
        self._begun = checkpoint_names(names)
        self._files: dict[str, tuple[int, int]] = {}
        self._seen: set[_Whole] = set()
        self._given_up: set[_Whole] = set()
        self._reasons: dict[str, str] = {}
        self._works = True
        self._num_failures = 0
        self._ending = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        """Begin to look for what is finished."""
        shutil.rmtree(self._links, ignore_errors=True)  # of a process that was killed
        self._thread.start()

    def finish(self) -> str:
        """Upload what there is, for at most `mirror.wait_s`.

        Returns:
            What is not there in the end and why; empty when everything is.
        """
        self._ending.set()
        self._thread.join(self._settings.wait_s)
        self._abandoned.set()
        reason = "not tried, as another failed"
        if self._thread.is_alive():
            reason = f"not uploaded within mirror.wait_s {self._settings.wait_s:g}"
        left = [f"{name} ({self._reasons.get(name, reason)})" for name in self._missing()]
        if not left:
            return ""
        return (
            f"{len(left)} parts of the run are not in {self._remote.uri}, after "
            f"{self._num_failures} failed attempts: {'; '.join(left)}. All of them are in "
            f"{self._run_dir.path}; run the same command to try again"
        )

    def _run(self) -> None:
        """What the thread does: one round after another, the last after training has ended."""
        while True:
            ending = self._ending.is_set()
            try:
                self._round(ending)
            except Exception:
                logger.exception("the mirror failed unexpectedly; trying again")
            if ending:
                return
            self._ending.wait(_POLL_S)

    def _round(self, ending: bool) -> None:
        run_dirs = self._run_dirs()
        if not any(each.metrics.exists() for each in run_dirs):
            return  # a run that fails before its first record leaves no claim
        if ending:
            self._given_up.clear()
        self._upload_wholes()
        for run_dir in run_dirs if ending else ():
            self._upload_files(run_dir)

    def _run_dirs(self) -> list[RunDirectory]:
        """The run, and the turns that it is made of."""
        turns = sorted(self._run_dir.rounds.glob("*-*"))
        return [self._run_dir, *map(RunDirectory, turns)]

    def _upload_wholes(self) -> None:
        """Upload whole directories until none is new, looking for newer ones after each."""
        while not self._abandoned.is_set():
            wanted = self._wanted()
            if not self._seen.issuperset(wanted):
                self._given_up.clear()  # by now the storage may work again
            self._seen = set(wanted)
            whole = next((each for each in wanted if each not in self._given_up), None)
            if whole is None:
                return
            self._given_up.add(whole)  # until it is there, or something new is here
            if self._hold(whole):
                run_dir = RunDirectory(whole.run_dir)
                if not self._upload_files(run_dir):
                    self._given_up.update(wanted)  # what fails for all is not tried for each
                elif self._upload_whole(whole):
                    self._drop_old(run_dir)
                shutil.rmtree(self._links, ignore_errors=True)

    def _wanted(self) -> list[_Whole]:
        """Whole directories here that are not there in the same version, the first to go first."""
        found = []
        for run_dir in self._run_dirs():
            store = CheckpointStore(run_dir.checkpoints)
            places = [run_dir.pools, *map(store.path, reversed(store.steps())), run_dir.bundle]
            for place in places:
                with suppress(OSError):  # not there, or dropped since it was listed
                    manifest = (find_whole(place) / MANIFEST).read_bytes()
                    found.append(_Whole(run_dir.path, self._name(place), place, manifest))
        return [whole for whole in found if self._there.get(whole.name) != whole.manifest]

    def _hold(self, whole: _Whole) -> bool:
        """Hard links that keep a directory while training replaces or deletes it; else a copy."""
        try:
            shutil.rmtree(self._links, ignore_errors=True)
            shutil.copytree(find_whole(whole.place), self._links, copy_function=_link_or_copy)
        except (OSError, shutil.Error) as error:  # also where training was faster
            self._reasons[whole.name] = f"it cannot be read: {error}"
            return False
        return True

    def _upload_whole(self, whole: _Whole) -> bool:
        self._there.pop(whole.name, None)
        self._begun |= checkpoint_names({f"{whole.name}/{MANIFEST}"})
        upload = partial(self._remote.upload_whole, whole.name, self._links)
        if not self._attempt(whole.name, upload):
            return False
        self._there[whole.name] = whole.manifest
        return True

    def _upload_files(self, run_dir: RunDirectory) -> bool:
        """Upload single files that changed since this process did; False when one failed."""
        return all(
            self._attempt(self._name(path), partial(self._upload_file, path, now))
            for path, now in self._changed_files(run_dir)
        )

    def _upload_file(self, path: Path, now: tuple[int, int]) -> None:
        self._remote.upload(self._name(path), path)
        self._files[self._name(path)] = now

    def _changed_files(self, run_dir: RunDirectory) -> Iterator[tuple[Path, tuple[int, int]]]:
        """Files with their size and time; the first says whose run this is."""
        paths = [self._run_dir.config, run_dir.config, run_dir.feedback, run_dir.metrics]
        paths += [run_dir.sources, run_dir.questions, run_dir.evaluation]
        paths += sorted(run_dir.experience.glob("*.jsonl"))
        for done in sorted(run_dir.indexes.glob("step-*/done.json")):
            paths += sorted(path for path in done.parent.rglob("*") if path.is_file())
        for path in paths:
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            now = found.st_size, found.st_mtime_ns
            if self._files.get(self._name(path)) != now:
                yield path, now

    def _drop_old(self, run_dir: RunDirectory) -> None:
        """Delete there the checkpoints and indexes that the run keeps no more."""
        store = CheckpointStore(run_dir.checkpoints)
        here = store.steps()
        begun = {
            step: name for name, step in self._begun.items() if name == self._name(store.path(step))
        }
        there = [step for step, name in begun.items() if name in self._there]
        newest = sorted(there)[-self._training.keep_checkpoints :]
        bests = {self._best_of(store, step, begun[step]) for step in newest}
        kept = kept_steps(there, self._training.keep_checkpoints, bests, self._training.keep_every)
        dropped = [
            step for step in begun if step not in kept and (step in there or step not in here)
        ]
        for name in [begun[step] for step in dropped]:
            if self._attempt(name, partial(self._remote.delete_whole, name)):
                self._there.pop(name, None)
                del self._begun[name]
        for name in [name for name in self._files if not (self._run_dir.path / name).exists()]:
            if self._attempt(name, partial(self._remote.delete, name)):
                del self._files[name]

    def _best_of(self, store: CheckpointStore, step: int, name: str) -> int | None:
        best = store.best_of(step)
        if best is None:  # dropped here
            with suppress(RlragError, ValueError):
                best = json.loads(self._remote.read(f"{name}/state.json") or "{}").get("best_step")
        return best

    def _missing(self) -> list[str]:
        """Names of what is here and not there."""
        names = []
        run_dirs = self._run_dirs()
        if any(each.metrics.exists() for each in run_dirs):
            names += [whole.name for whole in self._wanted()]
            for run_dir in run_dirs:
                names += [self._name(path) for path, _ in self._changed_files(run_dir)]
        return list(dict.fromkeys(names))

    def _attempt(self, name: str, work: Callable[[], None]) -> bool:
        """Try a few times; what failed is said once, until something succeeds again."""
        for number in range(self._max_attempts):
            if number and self._abandoned.wait(_FIRST_RETRY_S * 2 ** (number - 1)):
                break
            try:
                work()
            except RlragError as error:
                self._num_failures += 1
                self._reasons[name] = str(error)
            else:
                self._reasons.pop(name, None)
                self._works = True
                return True
        if self._works:
            logger.warning(
                "%s was not mirrored: %s; training continues, and the next checkpoint is "
                "tried again",
                name,
                self._reasons.get(name),
            )
        self._works = False
        return False

    def _name(self, path: Path) -> str:
        return path.relative_to(self._run_dir.path).as_posix()


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, target)
    return target
