"""The weighted sum of rewards: its arithmetic, its terms, and custom functions that misbehave."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrag.config import RewardConfig
from rlrag.errors import ConfigError, RewardError
from rlrag.records import Passage, Question, RewardResult
from rlrag.rewards.composite import RewardModel, Rollout

SOURCE = """
import asyncio
import threading
import time

import numpy as np

release = threading.Event()
together = 0
most_together = 0
threads = set()

def length(answer):
    threads.add(threading.get_ident())
    return len(answer)

def parts(answer):
    return {"length": len(answer), "bonus": np.float32(0.5)}

def given(question, answer, golden_answers, selection, passages, metadata):
    return {
        "question": question == "Where?", "answer": answer == "Paris",
        "golden": golden_answers == ("Paris",), "ids": selection == ("p1", "p2"),
        "titles": [p.title for p in passages] == ["", "T"], "split": metadata["split"] == "test",
    }

def returns(metadata):
    return metadata["returned"]

def raises(answer):
    if answer == "bad":
        raise KeyError("no such thing")
    return 1.0

def exits(answer):
    raise SystemExit(3)

def hangs(answer):
    if answer == "hang":
        release.wait(60)
    return 1.0

barrier = threading.Barrier(3)
active = 0
most_at_once = 0
counting = threading.Lock()

def meets(answer):
    global active, most_at_once
    with counting:
        active += 1
        most_at_once = max(most_at_once, active)
    barrier.wait(20)
    with counting:
        active -= 1
    barrier.wait(20)
    return 1.0

async_barrier = None

async def meets_async(answer):
    global active, most_at_once, async_barrier
    if async_barrier is None:
        async_barrier = asyncio.Barrier(3)
    active += 1
    most_at_once = max(most_at_once, active)
    await async_barrier.wait()
    active -= 1
    await async_barrier.wait()
    return 1.0

def naps(answer):
    time.sleep(0.15)
    return 1.0

async def naps_async(answer):
    await asyncio.sleep(0.15)
    return 1.0

async def aware(answer):
    global together, most_together
    together += 1
    most_together = max(most_together, together)
    await asyncio.sleep(0.02)
    together -= 1
    if answer == "bad":
        raise ValueError("too bad")
    return {"length": len(answer)}

async def slow(answer):
    await asyncio.sleep(60 if answer == "hang" else 0)
    return 1.0

async def stubborn(answer):
    while not release.is_set():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass
    return 1.0

async def blocks(answer):
    release.wait(60)
    return 1.0

async def exits_async(answer):
    if answer == "bad":
        raise SystemExit(3)
    return 1.0
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    (tmp_path / "composite_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import composite_rewards

    yield composite_rewards
    composite_rewards.release.set()
    del sys.modules["composite_rewards"]


def model(
    *names: str,
    weights: tuple[float, ...] | None = None,
    timeout_s: float = 20.0,
    max_concurrent: int = 1,
):
    functions = tuple(name if name in BUILT_IN else f"composite_rewards:{name}" for name in names)
    weights = weights or (1.0,) * len(names)
    return RewardModel(
        RewardConfig(
            functions=functions,
            weights=weights,
            timeout_s=timeout_s,
            max_concurrent=max_concurrent,
        )
    )


BUILT_IN = ("exact_match", "token_f1", "selection_cost", "selection_recall", "answer_logp")


def rollout(answer: str | None = "Paris", id_: str = "q1", **metadata: object) -> Rollout:
    question = Question(id=id_, question="Where?", golden_answers=("Paris",), metadata=metadata)
    passages = (Passage(id="p1", title="", text="x"), Passage(id="p2", title="T", text="y"))
    return Rollout(question, passages, answer=answer, answer_logp=-2.5, num_answer_tokens=2)


def message(result: RewardResult | RewardError) -> str:
    assert isinstance(result, RewardError), result
    return str(result)


def test_total_is_the_weighted_sum_and_terms_are_unweighted(custom) -> None:
    rewards = model("token_f1", "parts", "selection_cost", weights=(2.0, 10.0, 0.25))
    [result] = rewards([rollout("Paris France")])
    # F1 = 2*1/3; parts = 12 + 0.5; two passages.
    assert result.total == pytest.approx(2 * 2 / 3 + 10 * 12.5 - 0.25 * 2)
    assert result.terms == {
        "token_f1": pytest.approx(2 / 3),
        "composite_rewards:parts/length": 12.0,
        "composite_rewards:parts/bonus": 0.5,
        "selection_cost": -2.0,
    }
    assert all(type(term) is float for term in result.terms.values())
    assert (result.answer, result.answer_logp) == ("Paris France", -2.5)


def test_weight_zero_is_recorded_and_does_not_count() -> None:
    [result] = model("exact_match", "selection_cost", weights=(0.0, 1.0))([rollout()])
    assert result.total == -2.0
    assert result.terms["exact_match"] == 1.0


@given(
    st.lists(st.sampled_from(["Paris", "paris the", "Rome", "Paris Rome", ""]), max_size=6),
    st.tuples(*[st.floats(-3, 3).filter(bool)] * 3),
)
def test_a_batch_equals_its_rollouts_one_by_one(answers, weights) -> None:
    rewards = model("exact_match", "token_f1", "selection_cost", weights=weights)
    batch = [rollout(answer, id_=str(i)) for i, answer in enumerate(answers)]
    together = rewards(batch)
    assert together == [rewards([one])[0] for one in batch]
    for result in together:
        terms = result.terms.values()
        assert result.total == pytest.approx(
            sum(w * t for w, t in zip(weights, terms, strict=True))
        )


def test_functions_say_what_they_need() -> None:
    assert model("selection_cost").wants == {"selection"}
    assert not model("selection_cost").needs_answer
    assert not model("selection_cost").needs_score
    assert model("exact_match").needs_answer
    assert model("answer_logp").needs_score
    assert not model("answer_logp").needs_answer


def test_a_custom_function_gets_what_it_asked_for(custom) -> None:
    [result] = model("given")([rollout(split="test")])
    assert set(result.terms.values()) == {1.0}
    assert len(result.terms) == 6


@pytest.mark.parametrize(
    ("returned", "cause"),
    [
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        ({"a": 1.0, "b": -math.inf}, "returned -inf as 'composite_rewards:returns/b'"),
        (None, "returned None of type NoneType"),
        ("1.0", "of type str"),
        ([1.0], "of type list"),
        ({}, "empty dict"),
        ({"a": {"b": 1.0}}, "of type dict as 'composite_rewards:returns/a'"),
        (10**400, "returned 1000.* not a finite number"),
        (-(10**400), "not a finite number"),
        (np.float32("inf"), "not a finite number"),
        (np.float16("nan"), "not a finite number"),
    ],
)
def test_anything_but_finite_numbers_is_an_error(custom, returned, cause) -> None:
    good, bad = model("returns")([rollout(returned=2), rollout(id_="q9", returned=returned)])
    assert good.total == 2.0
    with pytest.raises(RewardError, match=cause):
        raise bad
    assert "reward 'composite_rewards:returns' for question 'q9': " in message(bad)


def test_numbers_of_other_types_are_taken(custom) -> None:
    values = [True, 3, np.float32(0.5), np.int64(2), np.bool_(True)]
    results = model("returns")([rollout(returned=value) for value in values])
    assert [result.total for result in results] == [1.0, 3.0, 0.5, 2.0, 1.0]


def test_an_exception_names_function_question_and_cause(custom) -> None:
    results = model("raises")([rollout("good"), rollout("bad", id_="q7"), rollout("good")])
    assert [getattr(result, "total", None) for result in results] == [1.0, None, 1.0]
    text = message(results[1])
    assert "'composite_rewards:raises' for question 'q7': KeyError: 'no such thing'" in text
    assert "composite_rewards.py:" in text


def test_an_exit_inside_a_function_is_an_error_of_that_rollout(custom) -> None:
    assert "SystemExit: 3" in message(model("exits")([rollout()])[0])
    bad, good = model("exits_async")([rollout("bad"), rollout("good")])
    assert "SystemExit" in message(bad)
    assert good.total == 1.0


def test_after_a_failure_the_other_functions_are_spared(custom) -> None:
    bad, good = model("raises", "length")([rollout("bad"), rollout("good")])
    assert "raises" in message(bad)
    assert good.total == 5.0


def test_a_built_in_failure_names_function_and_question() -> None:
    good, bad = model("selection_recall")([rollout(gold_ids=["p2", "p3"]), rollout(id_="q5")])
    assert good.total == 0.5
    assert "reward 'selection_recall' for question 'q5': " in message(bad)


def test_a_hung_function_is_named_and_not_called_again(custom) -> None:
    rewards = model("hangs", "exact_match", timeout_s=0.2)
    batch = [rollout("good"), rollout("hang", id_="q3"), rollout("good", id_="q4")]
    good, hung, after = rewards(batch)
    assert good.total == 1.0
    assert "'composite_rewards:hangs' for question 'q3': ran past its limit of 0.2 s" in str(hung)
    assert "for question 'q4': earlier calls ran past their limit" in message(after)
    assert "earlier calls ran" in message(rewards([rollout("good", id_="q8")])[0])
    custom.release.set()  # the call ends after all, and with it what kept the thread
    assert rewards([rollout("good")])[0].total == 1.0


def test_a_function_that_was_slow_once_goes_on(custom) -> None:
    rewards = model("hangs", timeout_s=0.2)
    late = threading.Timer(0.3, custom.release.set)
    late.start()
    slow, after = rewards([rollout("hang"), rollout("good")])
    late.join()
    assert "ran past its limit of 0.2 s" in message(slow)
    assert after.total == 1.0
    assert rewards([rollout("good")])[0].total == 1.0


def test_a_hung_function_does_not_keep_the_process_alive(custom, tmp_path: Path) -> None:
    script = (
        "from rlrag.config import RewardConfig\n"
        "from rlrag.records import Question\n"
        "from rlrag.rewards.composite import RewardModel, Rollout\n"
        "for name in ('hangs', 'slow', 'blocks'):\n"
        "    functions = ('composite_rewards:' + name,)\n"
        "    config = RewardConfig(functions=functions, weights=(1.0,), timeout_s=0.2)\n"
        "    question = Question(id='q1', question='?', golden_answers=())\n"
        "    print(RewardModel(config)([Rollout(question, (), answer='hang')])[0])\n"
    )
    root = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("limit of 0.2 s") == 3


def test_calls_of_one_synchronous_function_share_one_thread(custom) -> None:
    rewards = model("length")
    results = rewards([rollout("x" * i) for i in range(8)])
    assert [result.total for result in results] == list(range(8))
    assert len(custom.threads) == 1
    assert threading.get_ident() not in custom.threads


@pytest.mark.parametrize("name", ["meets", "meets_async"])
def test_calls_run_side_by_side_up_to_the_bound(custom, name) -> None:
    """Each call waits until three are under way; a fourth at the same time would be counted."""
    rewards = model(name, max_concurrent=3)
    assert [result.total for result in rewards([rollout("x") for _ in range(9)])] == [1.0] * 9
    assert custom.most_at_once == 3


@pytest.mark.parametrize("name", ["naps", "naps_async"])
def test_the_time_limit_is_that_of_a_call_and_not_of_its_queueing(custom, name) -> None:
    results = model(name, timeout_s=0.5, max_concurrent=2)([rollout("x") for _ in range(12)])
    assert [result.total for result in results] == [1.0] * 12


def test_other_threads_go_on_beside_a_hung_call(custom) -> None:
    rewards = model("hangs", timeout_s=0.2, max_concurrent=2)
    results = rewards([rollout("hang"), *(rollout("good") for _ in range(4))])
    assert "ran past its limit" in message(results[0])
    assert [result.total for result in results[1:]] == [1.0] * 4
    custom.release.set()


def test_threads_end_with_their_model(custom) -> None:
    before = set(threading.enumerate())
    rewards = model("length", "aware")
    rewards([rollout()])
    mine = set(threading.enumerate()) - before
    assert len(mine) == 2
    del rewards
    for thread in mine:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in mine)


def test_async_calls_of_a_batch_run_together(custom) -> None:
    results = model("aware", max_concurrent=8)(
        [rollout("x" * i, id_=str(i)) for i in range(5)] + [rollout("bad")]
    )
    assert [result.total for result in results[:5]] == list(range(5))
    assert results[0].terms == {"composite_rewards:aware/length": 0.0}
    assert "ValueError: too bad" in message(results[5])
    assert custom.most_together == 6


def test_an_async_call_past_its_time_is_cancelled_and_the_function_lives_on(custom) -> None:
    rewards = model("slow", timeout_s=0.2)
    good, hung = rewards([rollout("good"), rollout("hang", id_="q3")])
    assert good.total == 1.0
    assert "'composite_rewards:slow' for question 'q3': ran past its limit of 0.2 s" in str(hung)
    assert rewards([rollout("good")])[0].total == 1.0


def test_an_async_call_that_refuses_to_be_cancelled_does_not_hold_the_batch(custom) -> None:
    assert "ran past its limit" in message(model("stubborn", timeout_s=0.2)([rollout()])[0])


def test_an_async_function_that_blocks_its_loop_counts_as_broken(custom) -> None:
    rewards = model("blocks", timeout_s=0.2)
    assert "blocked its event loop" in message(rewards([rollout()])[0])
    assert "earlier calls ran" in message(rewards([rollout()])[0])


def test_an_empty_batch(custom) -> None:
    assert model("exact_match", "length", "aware")([]) == []


def test_a_function_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="exact_match more than once"):
        model("exact_match", "exact_match")
