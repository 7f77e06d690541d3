"""The reward `judge`: a server's verdicts are rewards, and its failures are failed rollouts."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from judge_server import KEY, JudgeServer, judge_server
from pydantic import ValidationError
from stand_ins import ReadingGenerator, WordPrompts

from rlrag.config import RewardConfig, RunConfig
from rlrag.errors import ConfigError, RewardError, SetupError
from rlrag.pipeline import open_reward
from rlrag.records import Passage, Question, RewardResult
from rlrag.rewards import llm_judge
from rlrag.rewards.composite import RewardModel, Rollout
from rlrag.rewards.llm_judge import Case, JudgeSettings, judge_answers
from rlrag.rewards.plugin import load_reward
from rlrag.rewards.verdict_store import VerdictStore

SOON = {"retry-after-ms": "1"}


@pytest.fixture(scope="module")
def running() -> Iterator[JudgeServer]:
    with judge_server() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch) -> JudgeServer:
    """The server, as if it had just started."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url = running.url
    running.__init__()
    running.url = url
    return running


def config(url: str, **changes) -> RewardConfig:
    named = {"functions": ("judge",), "weights": (1.0,), **changes}
    judge = {"url": url, "model": "m", **named.pop("judge", {})}
    return RewardConfig(**named, judge=judge)


def rollouts(*answers: str) -> list[Rollout]:
    question = Question("q1", "which river", ("Rhine", "the Rhine"))
    return [Rollout(question, (), answer=answer) for answer in answers]


def totals(results: list[RewardResult | RewardError]) -> list[float | str]:
    return [str(each) if isinstance(each, RewardError) else each.total for each in results]


def test_verdicts_are_rewards(server):
    server.reply = lambda case, before: (
        "Correct." if case["answer"] in case["accepted_answers"] else "incorrect"
    )
    both = config(server.url, functions=("judge", "token_f1"), weights=(2.0, 1.0))
    right, wrong = RewardModel(both)(rollouts("the Rhine", "Elbe"))
    assert (right.total, dict(right.terms)) == (3.0, {"judge": 1.0, "token_f1": 1.0})
    assert (wrong.total, dict(wrong.terms)) == (0.0, {"judge": 0.0, "token_f1": 0.0})
    assert server.bodies[0]["messages"][0]["content"] == llm_judge.INSTRUCTIONS
    assert RewardModel(both).needs_answer


def test_equal_answers_are_asked_for_once_and_never_again_where_verdicts_are_kept(server, tmp_path):
    cache = tmp_path / "new" / "cache"
    model = RewardModel(config(server.url), cache)
    assert totals(model(rollouts("a", "b", "a"))) == [1.0, 1.0, 1.0]
    assert server.asked == {"a": 1, "b": 1}
    assert totals(RewardModel(config(server.url), cache)(rollouts("b", "a"))) == [1.0, 1.0]
    assert server.asked == {"a": 1, "b": 1}
    # `rlrag judge` finds them too.
    case = Case("which river", ("Rhine", "the Rhine"), "a")
    store = VerdictStore(cache / "judge.sqlite")
    judged = judge_answers([case], JudgeSettings(server.url, "m"), None, store)
    assert (judged.num_stored, sum(server.asked.values())) == (1, 2)
    # Without a place for them they are asked for anew.
    RewardModel(config(server.url))(rollouts("a"))
    assert server.asked["a"] == 2


def test_refusals_for_now_are_repeated(server):
    refusals = [(429, SOON), (500, SOON), "correct"]
    server.reply = lambda case, before: refusals[before]
    assert totals(RewardModel(config(server.url))(rollouts("a"))) == [1.0]
    assert server.asked == {"a": 3}


def test_no_more_requests_at_once_than_are_allowed(server):
    together = threading.Barrier(3)

    def reply(case, before):
        together.wait(30)  # breaks where fewer come
        return "correct"

    server.reply = reply
    model = RewardModel(config(server.url, max_concurrent=3))
    assert totals(model(rollouts(*"abcdef"))) == [1.0] * 6
    assert server.most_at_once == 3


def test_a_reply_that_is_no_verdict_fails_its_rollout_alone(server):
    server.reply = lambda case, before: "It depends." if case["answer"] == "a" else "correct"
    first, second = totals(RewardModel(config(server.url))(rollouts("a", "b")))
    assert first == (
        "reward 'judge' for question 'q1': none of the judge's replies was a verdict; use another "
        "model"
    )
    assert second == 1.0
    assert server.asked["a"] == 3


@pytest.mark.parametrize("status", [500, 429, 400])
def test_a_refused_answer_fails_its_rollout_alone(server, status):
    server.reply = lambda case, before: (status, SOON) if case["answer"] == "a" else "correct"
    first, second = totals(RewardModel(config(server.url))(rollouts("a", "b")))
    assert "reward 'judge' for question 'q1': " in first
    assert "not now" in first
    assert second == 1.0
    assert server.asked["a"] == (1 if status == 400 else 5)


def test_a_judge_that_hangs_fails_the_rollout_in_time(server):
    gone = threading.Event()
    server.reply = lambda case, before: (case["answer"] == "a" and gone.wait(60)) or "correct"
    model = RewardModel(config(server.url, timeout_s=0.3))
    first, second = totals(model(rollouts("a", "b")))
    gone.set()
    assert "no reply within 0.3 s" in first
    assert second == 1.0


def test_a_judge_that_is_down_fails_all_rollouts_without_asking_for_each(server):
    server.reply = lambda case, before: (500, SOON)
    found = totals(
        RewardModel(config(server.url, max_concurrent=1))(rollouts(*map(str, range(40))))
    )
    assert all("got no reply" in each or "not now" in each for each in found)
    assert len(server.asked) < 10


def test_a_judge_that_cannot_be_reached_fails_all_rollouts(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        found = totals(RewardModel(config(url, max_concurrent=1))(rollouts("a", "b")))
    assert all(f"cannot reach the judge at {url}" in each for each in found)


def test_a_refused_key_ends_the_run_and_is_told_nowhere(server, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.key = "another"
    named = config(server.url, judge={"key_variable": "JUDGE_KEY"})
    with pytest.raises(ConfigError) as caught:
        RewardModel(named, tmp_path)(rollouts("a"))
    assert "refuses model 'm' with 401" in str(caught.value)
    assert "reward.judge.key_variable" in str(caught.value)
    server.key = KEY
    assert totals(RewardModel(named, tmp_path)(rollouts("a"))) == [1.0]
    assert server.keys == {f"Bearer {KEY}"}
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    written = [str(caught.value), caplog.text, RunConfig(reward=named).to_json()]
    assert KEY not in "".join(written)
    assert KEY.encode() not in kept


def test_a_key_that_is_named_and_not_set_is_missed_at_once(server):
    with pytest.raises(ConfigError, match=r"reward.judge.key_variable names JUDGE_KEY, which is"):
        RewardModel(config(server.url, judge={"key_variable": "JUDGE_KEY"}))


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"cannot create cache_dir .*file"):
        RewardModel(config(server.url), tmp_path / "file")(rollouts("a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"functions": ("judge",)}, "reward.functions and reward.judge belong together"),
        ({"judge": {"url": "http://h/v1", "model": "m"}}, "belong together"),
        ({"judge": {"url": "http://h/v1"}}, "reward.judge.model is unset; set url and model"),
        ({"judge": {"model": "m"}}, "reward.judge.url is unset; set url and model"),
        (
            {"judge": {"url": "http://u:sk-1@h/v1", "model": "m"}},
            "reward.judge.url contains a passw",
        ),
        ({"judge": {"url": "here", "model": "m"}}, "reward.judge.url 'here' is not a URL"),
        ({"judge": {"key_variable": "sk-1"}}, "reward.judge.key_variable is no name of an env"),
    ],
)
def test_a_judge_is_configured_whole(changes, message):
    with pytest.raises(ValidationError, match=message) as caught:
        RewardConfig(**changes)
    assert "sk-1" not in str(caught.value.errors(include_input=False, include_url=False))


def test_it_is_a_built_in_that_needs_golden_answers_and_is_what_quality_means(server):
    assert load_reward("judge").is_builtin
    with pytest.raises(ConfigError, match="did you mean 'judge'"):
        load_reward("jugde")
    judged = config(server.url)
    assert judged.needs_golden_answers
    assert not judged.follows_golden_answers


def test_a_run_keeps_its_verdicts_in_its_cache_and_asks_for_equal_answers_once(server, tmp_path):
    run = RunConfig(cache_dir=str(tmp_path), reward=config(server.url))
    reward = open_reward(run, ReadingGenerator(), WordPrompts())
    question = Question("q1", "which river", ("Rhine",))
    passage = Passage("p1", "River", "It is the Rhine")
    other = Passage("p2", "River", "It was the Rhine")
    answered, again = reward([question, question], [[passage], [other]])
    assert (answered.total, again.total) == (1.0, 1.0)
    assert sum(server.asked.values()) == len({answered.answer, again.answer})
    assert (tmp_path / "judge.sqlite").is_file()
