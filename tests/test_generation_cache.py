"""The cache on disk: equal results, what survives failures and kills, and the token counts."""

from __future__ import annotations

import math
import pickle
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlrag.errors import GenerationError, SetupError
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.protocol import Generator, Sampling, TokenCount
from rlrag.generation.weights import GeneratorWeights
from rlrag.records import Generation, Prompt, Score


class Arithmetic:
    """Answers from the token ids alone; remembers what it was asked and fails on token 99999."""

    def __init__(self) -> None:
        self.identity, self.version = "arithmetic-1", 0
        self.tokens = TokenCount()
        self.asked: list[int] = []

    def load_weights(self, weights) -> None:
        self.identity, self.version = f"arithmetic-{weights.digest}", weights.version

    def generate(self, prompts, sampling) -> list[Generation]:
        self._note(prompts)
        # A draw that differs at every call, as an engine's rounding may.
        return [
            Generation(
                f"é{sum(p.token_ids)}",
                -math.pi * len(self.asked),
                3,
                len(p.token_ids),
                self.version,
            )
            for p in prompts
        ]

    def score(self, prompts, answers) -> list[Score]:
        self._note(prompts)
        return [
            Score(
                -sum(a) / 3 - p.token_ids[0] - len(self.asked) / 7,
                len(a),
                len(p.token_ids),
                self.version,
            )
            for p, a in zip(prompts, answers, strict=True)
        ]

    def close(self) -> None:
        self.asked.append(-1)

    def _note(self, prompts) -> None:
        for p in prompts:
            if 99_999 in p.token_ids:
                raise GenerationError("the engine died on token 99999")
        self.asked += [p.token_ids[0] for p in prompts]


def prompt(*ids: int, text: str = "") -> Prompt:
    return Prompt(token_ids=ids, text=text, num_passages=0)


def test_results_are_identical_in_and_out_of_the_cache(tmp_path):
    inner = Arithmetic()
    first, second = CachedGenerator(inner, tmp_path), CachedGenerator(inner, tmp_path)
    assert isinstance(first, Generator)
    prompts, answers = [prompt(1, 2), prompt(3), prompt(4)], [(5,), (6, 7), (8,)]
    assert first.score(prompts, answers) == second.score(prompts, answers)
    assert first.generate(prompts, Sampling()) == second.generate(prompts, Sampling())
    assert inner.asked == [1, 3, 4] * 2
    assert first.identity == second.identity == "arithmetic-1"


def test_equal_requests_in_one_call_are_computed_once_and_keep_their_order(tmp_path):
    inner = Arithmetic()
    cached = CachedGenerator(inner, tmp_path)
    prompts = [prompt(1), prompt(2), prompt(1, text="the text is not part of the key"), prompt(1)]
    scores = cached.score(prompts, [(5,), (5,), (5,), (6,)])
    assert inner.asked == [1, 2, 1]
    assert scores[0] == scores[2]
    assert len({s.logp for s in scores}) == 3


def test_everything_that_decides_a_result_is_in_its_key(tmp_path):
    inner = Arithmetic()
    cached = CachedGenerator(inner, tmp_path)
    cached.generate([prompt(1)], Sampling())
    for sampling in (
        Sampling(max_new_tokens=3),
        Sampling(stop=("a",)),
        Sampling(temperature=0.5),
        Sampling(temperature=0.5, seed=1),
    ):
        cached.generate([prompt(1)], sampling)
    cached.score([prompt(1)], [(2,)])
    other = Arithmetic()
    other.identity = "arithmetic-2"
    CachedGenerator(other, tmp_path).generate([prompt(1)], Sampling())
    assert (len(inner.asked), len(other.asked)) == (6, 1)


def test_greedy_answers_serve_every_seed(tmp_path):
    inner = Arithmetic()
    cached = CachedGenerator(inner, tmp_path)
    cached.generate([prompt(1)], Sampling(seed=0, stop=("a", "b")))
    cached.generate([prompt(1)], Sampling(seed=7, stop=("b", "a")))
    assert inner.asked == [1]


def test_token_counts_tell_spent_from_saved(tmp_path):
    cached = CachedGenerator(Arithmetic(), tmp_path)
    cached.score([prompt(1, 2), prompt(1, 2), prompt(3)], [(5,), (5,), (6, 7)])
    assert cached.tokens == TokenCount(spent=3 + 3, saved=3, num_requests=3, num_cached=1)
    cached.score([prompt(3)], [(6, 7)])
    assert cached.tokens == TokenCount(spent=6, saved=6, num_requests=4, num_cached=2)


def test_what_was_computed_before_a_failure_stays(tmp_path):
    inner = Arithmetic()
    prompts = [prompt(i) for i in range(10)]
    prompts[7] = prompt(99_999)
    cached = CachedGenerator(inner, tmp_path, chunk_size=3)
    with pytest.raises(GenerationError, match="died on token 99999"):
        cached.generate(prompts, Sampling())
    assert inner.asked == [0, 1, 2, 3, 4, 5]
    prompts[7] = prompt(7)
    CachedGenerator(inner, tmp_path, chunk_size=3).generate(prompts, Sampling())
    assert inner.asked == list(range(10))


def weights(version: int, digest: str) -> GeneratorWeights:
    return GeneratorWeights(version, digest, {})


def test_equal_weights_share_results_and_each_run_tags_them_with_its_version(tmp_path):
    first, second = Arithmetic(), Arithmetic()
    one, other = CachedGenerator(first, tmp_path), CachedGenerator(second, tmp_path)
    one.load_weights(weights(3, "same"))
    other.load_weights(weights(8, "same"))
    computed, stored = one.score([prompt(1)], [(2,)]), other.score([prompt(1)], [(2,)])
    assert second.asked == []
    assert (computed[0].version, stored[0].version) == (3, 8)
    assert stored[0].logp == computed[0].logp
    assert one.generate([prompt(1)], Sampling())[0].version == 3
    assert other.generate([prompt(1)] * 2, Sampling())[1].version == 8
    assert second.asked == []


def test_other_weights_share_nothing(tmp_path):
    inner = Arithmetic()
    cached = CachedGenerator(inner, tmp_path)
    for digest in ("a", "b", "a"):
        cached.score([prompt(1)], [(2,)])
        cached.load_weights(weights(inner.version + 1, digest))
    assert inner.asked == [1, 1, 1]  # on the first weights, on a, on b
    assert cached.score([prompt(1)], [(2,)])[0].version == cached.version == 3
    assert inner.asked == [1, 1, 1]  # a again


def test_a_result_of_another_version_is_refused_and_not_stored(tmp_path):
    class Untagged(Arithmetic):
        def score(self, prompts, answers):
            return [Score(-1.0, 1, 1) for _ in prompts]

    cached = CachedGenerator(Untagged(), tmp_path)
    cached.load_weights(weights(4, "a"))
    with pytest.raises(GenerationError, match="version 0 but version 4"):
        cached.score([prompt(1)], [(2,)])
    fresh = Arithmetic()
    again = CachedGenerator(fresh, tmp_path)
    again.load_weights(weights(4, "a"))
    again.score([prompt(1)], [(2,)])
    assert fresh.asked == [1]


def test_a_push_waits_for_the_calls_that_run(tmp_path):
    class Slow(Arithmetic):
        def score(self, prompts, answers):
            started.set()
            assert not loaded.wait(0.2)
            return super().score(prompts, answers)

        def load_weights(self, pushed):
            super().load_weights(pushed)
            loaded.set()

    started, loaded = threading.Event(), threading.Event()
    cached = CachedGenerator(Slow(), tmp_path, chunk_size=1)
    found: list[Score] = []
    call = threading.Thread(
        target=lambda: found.extend(cached.score([prompt(i) for i in range(3)], [(1,)] * 3))
    )
    call.start()
    started.wait(10)
    cached.load_weights(weights(1, "a"))
    call.join(10)
    assert [score.version for score in found] == [0, 0, 0]
    assert cached.version == 1


def test_only_a_client_of_shared_engines_follows_weights(tmp_path):
    class Client(Arithmetic):
        def expect_weights(self, version, digest):
            self.load_weights(weights(version, digest))

    cached = CachedGenerator(Client(), tmp_path)
    cached.expect_weights(5, "a")
    assert cached.score([prompt(1)], [(2,)])[0].version == 5
    with pytest.raises(GenerationError, match="Arithmetic does not share its engine"):
        CachedGenerator(Arithmetic(), tmp_path).expect_weights(5, "a")


def test_nan_is_refused_and_not_stored(tmp_path):
    class Broken(Arithmetic):
        def score(self, prompts, answers):
            return [Score(math.nan, 1, 1) for _ in prompts]

    with pytest.raises(GenerationError, match="NaN"):
        CachedGenerator(Broken(), tmp_path).score([prompt(1)], [(1,)])
    assert CachedGenerator(Arithmetic(), tmp_path).score([prompt(1)], [(1,)])[0].logp < 0


def test_extreme_numbers_come_back_exactly(tmp_path):
    values = [-0.1, -1 / 3, -5e-324, -1.7976931348623157e308, -math.inf, 0.0, -2.0]

    class Listed(Arithmetic):
        def score(self, prompts, answers):
            return [Score(values[p.token_ids[0]], 1, 1) for p in prompts]

    asked = [prompt(i) for i in range(len(values))], [(1,)] * len(values)
    CachedGenerator(Listed(), tmp_path).score(*asked)
    stored = CachedGenerator(Arithmetic(), tmp_path).score(*asked)
    assert [s.logp for s in stored] == values
    assert all(isinstance(s.logp, float) for s in stored)


def test_a_pickled_cache_works_on(tmp_path):
    cached = CachedGenerator(Arithmetic(), tmp_path)
    expected = cached.generate([prompt(1)], Sampling())
    copy = pickle.loads(pickle.dumps(cached))
    assert copy.generate([prompt(1)], Sampling()) == expected
    assert copy.inner.asked == [1]


def test_more_keys_than_one_query_holds(tmp_path):
    inner = Arithmetic()
    prompts = [prompt(i) for i in range(1203)]
    expected = CachedGenerator(inner, tmp_path).generate(prompts, Sampling())
    assert CachedGenerator(inner, tmp_path).generate(prompts, Sampling()) == expected
    assert len(inner.asked) == 1203


WRITER = """
import os, signal, sys
from pathlib import Path
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.records import Generation, Prompt

class Slow:
    identity, version = "slow", 0
    tokens = TokenCount()
    asked = 0
    def generate(self, prompts, sampling):
        self.asked += len(prompts)
        if self.asked > int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return [Generation(str(p.token_ids[0]), -1.5, 1, 1) for p in prompts]

start, stop = int(sys.argv[2]), int(sys.argv[3])
cached = CachedGenerator(Slow(), Path(sys.argv[1]), chunk_size=5)
prompts = [Prompt((i,), "", 0) for i in range(start, stop)]
texts = [g.text for g in cached.generate(prompts, Sampling())]
assert texts == [str(i) for i in range(start, stop)], texts
print(cached.inner.asked)
"""


def writer(folder: Path, start: int, stop: int, die_after: int = 10_000) -> subprocess.Popen:
    arguments = [str(folder), str(start), str(stop), str(die_after)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_loses_only_the_chunk_in_flight(tmp_path):
    killed = writer(tmp_path, 0, 100, die_after=40)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    again = writer(tmp_path, 0, 100)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert int(output) == 60


def test_two_processes_write_at_once(tmp_path):
    both = [writer(tmp_path, 0, 600), writer(tmp_path, 300, 900)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    last = writer(tmp_path, 0, 900)
    output, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert int(output) == 0


def test_a_damaged_file_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "generations.sqlite"
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(SetupError, match=rf"{path}.*delete it"):
        CachedGenerator(Arithmetic(), tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"generations\.sqlite cannot be used"):
        CachedGenerator(Arithmetic(), tmp_path / "file" / "cache")


def test_a_full_disk_is_said_and_what_was_stored_stays(tmp_path):
    inner = Arithmetic()
    cached = CachedGenerator(inner, tmp_path, chunk_size=50)
    cached.generate([prompt(i) for i in range(50)], Sampling())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a limit on file sizes stands in for the full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, hard))
        with pytest.raises(SetupError, match=r"generations\.sqlite.*free space"):
            cached.generate([prompt(i) for i in range(5000)], Sampling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    inner.asked.clear()
    cached.generate([prompt(i) for i in range(50)], Sampling())
    assert inner.asked == []


class Refusing(Arithmetic):
    """Gives prompts with token 7 an error in place of a result."""

    def generate(self, prompts, sampling):
        return [
            _refused(p, g)
            for p, g in zip(prompts, super().generate(prompts, sampling), strict=True)
        ]

    def score(self, prompts, answers):
        return [
            _refused(p, s) for p, s in zip(prompts, super().score(prompts, answers), strict=True)
        ]


def _refused(asked, result):
    return GenerationError("no engine survives 7") if 7 in asked.token_ids else result


def test_an_error_takes_its_place_and_is_not_stored(tmp_path):
    inner = Refusing()
    cached = CachedGenerator(inner, tmp_path, chunk_size=2)
    prompts = [prompt(1), prompt(7), prompt(2), prompt(7)]
    first = cached.generate(prompts, Sampling())
    assert [str(r) for r in (first[1], first[3])] == ["no engine survives 7"] * 2
    assert isinstance(first[1], GenerationError)
    assert inner.asked == [1, 7, 2]
    assert (cached.tokens.num_requests, cached.tokens.num_cached) == (2, 0)
    again = cached.generate(prompts, Sampling())
    assert again[0] == first[0]
    assert inner.asked == [1, 7, 2, 7]  # only the refused one is asked again
    assert cached.tokens.num_cached == 2
    scored = cached.score([prompt(7), prompt(3)], [(1,), (1,)])
    assert isinstance(scored[0], GenerationError)
    assert scored[1].num_tokens == 1
