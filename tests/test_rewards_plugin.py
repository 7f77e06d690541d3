"""Rewards found by name: built-in ones, a module's functions, and every way to get it wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlrag.errors import ConfigError
from rlrag.rewards.plugin import KEYWORDS, load_reward

SOURCE = """
from functools import partial

def brevity(answer):
    return -len(answer)

async def judge(*, question, answer):
    return {"style": 1.0}

def everything(answer, **everything):
    return 0.0

def nothing():
    return 0.5

def misspelt(golden_answer):
    return 0.0

def with_default(answer, scale=2.0):
    return 0.0

def positional(answer, /):
    return 0.0

class Length:
    def __call__(self, answer):
        return len(answer)

class AsyncLength:
    async def __call__(self, answer):
        return len(answer)

length = Length()
async_length = AsyncLength()
number = 3
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "plugin_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("raise ValueError('no licence')\n")
    (tmp_path / "hungry_rewards.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("plugin_rewards", "broken_rewards", "hungry_rewards", "leaving_rewards"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("attribute", "wants", "is_async"),
    [
        ("brevity", {"answer"}, False),
        ("judge", {"question", "answer"}, True),
        ("everything", set(KEYWORDS), False),
        ("nothing", set(), False),
        ("length", {"answer"}, False),
        ("async_length", {"answer"}, True),
    ],
)
def test_a_function_of_ones_own(attribute: str, wants: set[str], is_async: bool) -> None:
    reward = load_reward(f"plugin_rewards:{attribute}")
    assert reward.name == f"plugin_rewards:{attribute}"
    assert reward.wants == wants
    assert reward.is_async is is_async
    assert not reward.is_builtin


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_mach", "did you mean 'exact_match'"),
        ("zzz", "built-in rewards: exact_match, token_f1"),
        ("", "unknown reward ''"),
        ("plugin_rewards:", "package.module:name"),
        (":brevity", "package.module:name"),
        ("plugin_rewards:a:b", "package.module:name"),
        ("plugin_rewards:brevitty", "has no 'brevitty'; did you mean 'brevity'"),
        ("plugin_rewards:number", "is a int, not a function"),
        ("plugin_rewards:Length", "is a type, not a function"),
        (
            "plugin_rewards:misspelt",
            "'golden_answer'; did you mean 'golden_answers'.*available: qu",
        ),
        ("plugin_rewards:with_default", "no keyword fills the parameter 'scale'"),
        ("plugin_rewards:positional", "'answer' is positional-only"),
        ("absent_rewards:f", "no module 'absent_rewards'"),
        ("absent_package.module:f", "no module 'absent_package'"),
        ("plugin_rewards.deeper:f", "'plugin_rewards.deeper'"),
        ("broken_rewards:f", "failed with ValueError: no licence"),
        ("leaving_rewards:f", "failed with SystemExit: 0"),
        ("hungry_rewards:f", "failed with ModuleNotFoundError.*a_package_that_nobody_has"),
    ],
)
def test_a_wrong_name_is_refused_with_a_way_out(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(name)
