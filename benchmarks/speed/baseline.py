"""Compares the speed of inner loops with that of a pinned revision.

Run `python -m benchmarks.speed.baseline`. It checks out the revision that `results/baseline.json`
names beside this tree, and times `benchmarks.speed.kernels` on both in turns, in processes of their
own: a ratio measured side by side holds on any machine, seconds do not. It ends with 1 when a loop
takes more than `--tolerance` times as long as it did.

`--update` makes the present revision the baseline. Commit first: changes that are not committed are
timed, but no revision has them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASELINE_FILE = Path(__file__).parents[1] / "results" / "baseline.json"
_KERNELS = Path(__file__).with_name("kernels.py")
_TIMEOUT_S = 600.0

Seconds = dict[str, float]


def measure(tree: Path) -> Seconds:
    """Seconds a call of this tree's kernels with the package of another one."""
    done = subprocess.run(
        [sys.executable, "-P", str(_KERNELS)],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        sys.exit(f"error: the kernels failed on {tree}:\n{done.stderr}")
    found: Seconds = json.loads(done.stdout)
    return found


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A revision's files beside this tree, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        done = _git("worktree", "add", "--detach", str(tree), revision)
        if done.returncode:
            sys.exit(
                f"error: cannot check out {revision}: {done.stderr.strip()}; a shallow clone lacks "
                "it until `git fetch --unshallow`"
            )
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def ratios(ours: list[Seconds], theirs: list[Seconds]) -> dict[str, float]:
    """The median over turns of our seconds by theirs, for each kernel.

    Example:
        >>> ratios([{"a": 2.0}, {"a": 3.0}, {"a": 9.0}], [{"a": 1.0}, {"a": 2.0}, {"a": 1.0}])
        {'a': 2.0}
    """
    return {
        name: statistics.median(
            one[name] / other[name] for one, other in zip(ours, theirs, strict=True)
        )
        for name in ours[0]
    }


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=_TIMEOUT_S
    )


def _update() -> None:
    changed = _git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    if changed:
        sys.exit(f"error: no revision has these changes; commit them first:\n{changed}")
    revision = _git("rev-parse", "HEAD").stdout.strip()
    BASELINE_FILE.write_text(json.dumps({"revision": revision}, indent=2) + "\n")
    print(f"the baseline is {revision}")


def main() -> None:
    """Compare, or set the baseline."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="save this revision as the baseline")
    parser.add_argument(
        "--against", default=None, help="revision to compare with; default: the baseline"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1.25)
    arguments = parser.parse_args()
    if arguments.update:
        _update()
        return
    revision = arguments.against or json.loads(BASELINE_FILE.read_text())["revision"]
    ours, theirs = [], []
    with checkout(revision) as tree:
        for turn in range(arguments.turns):
            for is_ours in (turn % 2 == 0, turn % 2 != 0):
                (ours if is_ours else theirs).append(measure(ROOT if is_ours else tree))
    found = ratios(ours, theirs)
    print(f"| against {revision[:12]} | ms a call | times as long |\n|---|---|---|")
    for name, ratio in found.items():
        seconds = statistics.median(turn[name] for turn in ours)
        print(f"| {name} | {1000 * seconds:.3f} | {ratio:.2f} |")
    slower = [name for name, ratio in found.items() if ratio > arguments.tolerance]
    if slower:
        sys.exit(f"error: more than {arguments.tolerance} times as long: {'; '.join(slower)}")


if __name__ == "__main__":
    main()
