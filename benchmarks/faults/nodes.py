"""A Ray cluster of two network namespaces on one machine: nodes join, die and lose the network.

Run `python -m benchmarks.faults.nodes` as root on Linux. Two network namespaces, joined by a bridge
that leads nowhere else, each hold a Ray node, started by `ray start` as on two machines. On them,
by the commands that users type:

    submit        `ray job submit` of a training with one actor of the generator on each node
    evaluate      `jobs.evaluate` of the bundle, joined to the cluster
    serve         `serve run` on the cluster, and a question to it
    node killed   a training; in its middle the second node loses every process, and another one
                  joins in its place
    node lost     a training on two workers; in its middle the second node loses every process, and
                  none joins: the run ends, and its command goes on with half of everything
    partition     a training; in its middle the second node's link goes down for some seconds

What a program outlives loses nothing when the last checkpoint equals that of an undisturbed run: to
the last bit, or with another number of workers up to rounding. All files are shared, as on a
cluster with NFS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.faults.programs import ROOT, Family, copy_indexes, quiet_environment, read_metrics

RESULTS_FILE = Path(__file__).parents[1] / "results" / "nodes.md"
_BRIDGE, _INSIDE = "rlragbr", "eth0"
_BIN = Path(sys.executable).parent
_HEAD = "10.77.0.1"
_TIMEOUT_S = 900.0
_DOWN_S = 15.0
_POLL_S = 0.2
_FLAGS = (
    *("--training.loggers", "--training.launcher", "ray", "--training.worker-cpus", "1"),
    *("--generator.backend", "transformers", "--generator.dtype", "float32"),
    *("--generator.num-actors", "2", "--generator.cpus-per-actor", "1"),
    *("--generator.request-timeout-s", "60", "--data.max-train-questions", "60"),
    *("--data.max-eval-questions", "4", "--data.num-validation-questions", "4"),
    *("--evaluation.systems", "retriever_order", "trained"),
    *("--training.batch-size", "6", "--training.num-epochs", "2"),
    *("--training.validate-every", "6", "--training.checkpoint-every", "2"),
)


_WIDE = ("--training.num-workers", "2", "--training.max-failures", "0")
_NARROW = ("--generator.num-actors", "1")


@dataclass(frozen=True)
class Row:
    """What was done, whether it ended as it should, and what was seen."""

    what: str
    seconds: float
    seen: str


class Machine:
    """A network namespace with one address, and the Ray node in it."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = f"rlragm{number}", f"10.77.0.{number}"
        self._link = f"rlragv{number}"
        self._folder = folder
        self._node: subprocess.Popen[bytes] | None = None
        self.family: Family | None = None
        for words in (
            f"netns add {self.name}",
            f"link add {self._link} type veth peer name {_INSIDE} netns {self.name}",
            f"link set {self._link} master {_BRIDGE} up",
            f"-n {self.name} addr add {self.address}/24 dev {_INSIDE}",
            f"-n {self.name} link set {_INSIDE} up",
            f"-n {self.name} link set lo up",
        ):
            _ip(words)

    def command(self, *words: str) -> list[str]:
        """Words to run in this machine's network."""
        return ["ip", "netns", "exec", self.name, *words]

    def start_node(self, num_cpus: int) -> None:
        """Start Ray here: the head on the first machine, a further node on any other."""
        options = {
            "node-ip-address": self.address,
            "num-cpus": num_cpus,
            "object-store-memory": 256 * 2**20,
            "min-worker-port": 0,
            "max-worker-port": 0,
            # A node waits no more than 15 s for its agents to tell a port that they chose.
            "dashboard-agent-grpc-port": 52366,
            "runtime-env-agent-port": 52367,
            "metrics-export-port": 52368,
        }
        if self.address == _HEAD:
            options |= {"port": 6379, "dashboard-host": _HEAD, "temp-dir": self._folder / "ray"}
            role = ["--head", "--include-dashboard=true"]
        else:
            role = [f"--address={_HEAD}:6379"]
        flags = [f"--{name}={value}" for name, value in options.items()]
        with (self._folder / f"{self.name}.said").open("ab") as said:
            self._node = subprocess.Popen(
                self.command(str(_BIN / "ray"), "start", "--block", *role, *flags),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.family = Family(self._node.pid)

    def kill_node(self) -> None:
        """As a power cut does: every process of the node at once."""
        assert self.family is not None
        assert self._node is not None
        self.family.end()
        self._node.wait()

    def set_link(self, state: str) -> None:
        """Cut this machine off, or join it again: `down` or `up`."""
        _ip(f"link set {self._link} {state}")

    def remove(self) -> None:
        """End what runs here and take the network away."""
        if self._node is not None:
            self.kill_node()
        _ip(f"netns del {self.name}")


def _ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, timeout=30)
    if done.returncode:
        sys.exit(f"error: ip {words}: {done.stderr.strip()}; namespaces need root on Linux")


def _environment(**variables: str) -> dict[str, str]:
    path = f"{_BIN}{os.pathsep}{os.environ['PATH']}"
    return quiet_environment(
        RAY_AUTH_MODE="disabled",
        RAY_worker_niceness="0",
        GLOO_SOCKET_IFNAME=_INSIDE,  # the machines share a host name, which Gloo would look up
        PATH=path,
        **variables,
    )


@contextmanager
def machines(folder: Path, cpus: Sequence[int]) -> Iterator[list[Machine]]:
    """Joined machines with a Ray node each; all is taken away after the block."""
    with ExitStack() as stack:
        _ip(f"link add {_BRIDGE} type bridge")
        stack.callback(_ip, f"link del {_BRIDGE}")
        _ip(f"link set {_BRIDGE} up")
        found = []
        for number, num_cpus in enumerate(cpus, start=1):
            machine = Machine(number, folder)
            stack.callback(machine.remove)
            found.append(machine)
            machine.start_node(num_cpus)
            if number == 1:
                _wait_for_nodes(machine, 1)
        _wait_for_nodes(found[0], len(cpus))
        yield found


def _wait_for_nodes(head: Machine, number: int) -> None:
    """Wait until so many nodes are alive."""
    code = (
        "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False); "
        "print('ALIVE', sum(n['Alive'] for n in ray.nodes()))"
    )
    deadline = time.monotonic() + _TIMEOUT_S
    while f"ALIVE {number}" not in _run(head, [sys.executable, "-c", code], 240.0)[1]:
        if time.monotonic() > deadline:
            sys.exit(f"error: no {number} nodes within {_TIMEOUT_S:g} s")
        time.sleep(2.0)


def _run(head: Machine, words: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Exit code and output of a command on the head's machine."""
    try:
        done = subprocess.run(
            head.command(*words),
            cwd=ROOT,
            env=_environment(RAY_ADDRESS=f"{_HEAD}:6379"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        return 124, f"no end in {timeout_s:g} s: {error.output!r}"
    return done.returncode, done.stdout


class Training:
    """A training that was started on the cluster from the head's machine."""

    def __init__(self, head: Machine, folder: Path, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir = folder / "run"
        self._said = folder / "said"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                head.command(sys.executable, "-m", "jobs.train", *train_words(folder), *flags),
                cwd=ROOT,
                env=_environment(RAY_ADDRESS=f"{_HEAD}:6379"),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def last_step(self) -> int:
        """The last recorded step; -1 before the first."""
        records = read_metrics(self.run_dir)
        return int(records[-1]["step"]) if records else -1

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is recorded."""
        deadline = time.monotonic() + _TIMEOUT_S
        while self.last_step() < step:
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: no step {step}: {self._said.read_text()[-3000:]}")
            time.sleep(_POLL_S)

    def end(self) -> tuple[int, str]:
        """The exit code, and the last line that was said."""
        try:
            code = self._process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = 124
        return code, self._said.read_text().strip().rpartition("\n")[2]


def train_words(folder: Path) -> list[str]:
    """What follows `python -m jobs.train`."""
    places = ("--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache"))
    return ["factbook", *_FLAGS, *places]


def largest_difference(one: Path, other: Path) -> float:
    """Between the weights of two runs' last checkpoints."""
    left, right = (
        load_file(max((run_dir / "checkpoints").glob("step-*")) / "policy.safetensors")
        for run_dir in (one, other)
    )
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def submit(head: Machine, folder: Path) -> str:
    """A job by Ray's own command line; what it left."""
    words = ["job", "submit", "--address", f"http://{_HEAD}:8265", "--", sys.executable]
    folder.mkdir(parents=True, exist_ok=True)
    code, said = _run(
        head,
        [str(_BIN / "ray"), *words, "-m", "jobs.train", *train_words(folder)],
        _TIMEOUT_S,
    )
    if code or not (folder / "run" / "bundle").is_dir():
        sys.exit(f"error: the job ended with {code}: {said[-3000:]}")
    return f"{len(read_metrics(folder / 'run')) - 1} steps and a bundle"


def evaluate(head: Machine, folder: Path) -> str:
    """The bundle's comparison."""
    output = folder / "evaluation.json"
    data = json.loads((folder / "run" / "config.json").read_text())["data"]
    words = ["-m", "jobs.evaluate", "--bundle", str(folder / "run" / "bundle")]
    words += ["--corpus", data["corpus"], "--questions", data["eval_questions"], "--limit", "4"]
    code, said = _run(head, [sys.executable, *words, "--output", str(output)], _TIMEOUT_S)
    if code:
        sys.exit(f"error: jobs.evaluate ended with {code}: {said[-3000:]}")
    return f"{json.loads(output.read_text())['num_questions']} questions answered"


def serve(head: Machine, folder: Path) -> str:
    """A service on the cluster, and one answer of it."""
    words = ["run", "serve.app:build", f"bundle={folder / 'run' / 'bundle'}"]
    words.append("generator_backend=transformers")
    ask = ["curl", "-s", "-m", "60", "-H", "content-type: application/json"]
    ask += ["-d", json.dumps({"question": "Which bird is the emblem of Oskai?"})]
    ask.append("http://127.0.0.1:8000/v1/answer")
    with (folder / "serve.said").open("w") as said:
        service = subprocess.Popen(
            head.command(str(_BIN / "serve"), *words),
            cwd=ROOT,
            env=_environment(RAY_ADDRESS=f"{_HEAD}:6379"),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family = Family(service.pid)
    try:
        deadline = time.monotonic() + _TIMEOUT_S
        while '"answer"' not in (answered := _run(head, ask, 90.0)[1]):
            if service.poll() is not None or time.monotonic() > deadline:
                said_text = (folder / "serve.said").read_text()
                sys.exit(f"error: no answer ({answered!r}): {said_text[-3000:]}")
            time.sleep(2.0)
        return f"answered {json.loads(answered)['answer']!r}"
    finally:
        _run(head, [str(_BIN / "serve"), "shutdown", "-y"], 120.0)
        family.end()
        service.wait()


def node_lost(found: list[Machine], folder: Path, undisturbed: Path) -> str:
    """A training on two workers that loses a node for good."""
    training = Training(found[0], folder, *_WIDE)
    training.wait_for_step(6)
    found[1].kill_node()
    began, before = time.monotonic(), training.last_step()
    code, _ = training.end()
    seen = f"ended with {code} after {time.monotonic() - began:.0f} s"
    training = Training(found[0], folder, *_NARROW)
    training.wait_for_step(before + 1)
    return _outcome(training, undisturbed, f"{seen}; one worker and one actor went on")


def node_killed(found: list[Machine], folder: Path, undisturbed: Path) -> str:
    """A training that loses a node and gets another."""
    training = Training(found[0], folder)
    training.wait_for_step(6)
    found[1].kill_node()
    began, before = time.monotonic(), training.last_step()
    found[1].start_node(2)
    training.wait_for_step(before + 1)
    return _outcome(training, undisturbed, f"went on after {time.monotonic() - began:.0f} s")


def partition(found: list[Machine], folder: Path, undisturbed: Path) -> str:
    """A training whose second node cannot be reached for some seconds."""
    training = Training(found[0], folder)
    training.wait_for_step(6)
    found[1].set_link("down")
    time.sleep(_DOWN_S)
    found[1].set_link("up")
    began, before = time.monotonic(), training.last_step()
    training.wait_for_step(before + 1)
    seconds = time.monotonic() - began
    return _outcome(
        training, undisturbed, f"cut off for {_DOWN_S:g} s, went on {seconds:.0f} s after"
    )


def _outcome(training: Training, undisturbed: Path, seen: str) -> str:
    code, last = training.end()
    if code:
        return f"{seen}; ended with {code}: {last}"
    difference = largest_difference(training.run_dir, undisturbed / "run")
    equal = f"differs by up to {difference:.1g} from" if difference else "equals"
    return f"{seen}; the last checkpoint {equal} the undisturbed one"


def report(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Two nodes: submit, train, evaluate, serve, and losses",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores for both nodes, Python "
        f"{platform.python_version()}; made by `python -m benchmarks.faults.nodes`, whose module "
        "says "
        "what is done.",
        "",
        "| what | seconds | seen |",
        "|---|---|---|",
        *(f"| {row.what} | {row.seconds:.0f} | {row.seen} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do all of it and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    parser.add_argument(
        "--cache-dir", type=Path, help="existing cache of models and indexes to use"
    )
    arguments = parser.parse_args()
    rows: list[Row] = []

    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        folder = Path(directory)
        first = folder / "submitted"
        found = stack.enter_context(machines(folder, (2, 2)))

        def prepared(name: str) -> Path:
            copy_indexes(arguments.cache_dir or first / "cache", folder / name / "cache")
            return folder / name

        copy_indexes(arguments.cache_dir, first / "cache")
        for what, step in (
            ("submit and train", lambda: submit(found[0], first)),
            ("evaluate", lambda: evaluate(found[0], first)),
            ("node killed", lambda: node_killed(found, prepared("killed"), first)),
            ("partition", lambda: partition(found, prepared("partition"), first)),
            ("node lost", lambda: node_lost(found, prepared("lost"), first)),
            ("serve", lambda: serve(found[0], first)),
        ):
            began = time.monotonic()
            seen = step()
            rows.append(Row(what, time.monotonic() - began, seen))
            print(rows[-1], flush=True)
    text = report(rows)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
