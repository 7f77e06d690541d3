"""Finds reward functions by name: built-in ones or `package.module:function`.

A name is a built-in one or `package.module:function`. A custom function may be `def` or
`async def`, takes any of the keywords below by name (`**kwargs` asks for all of them) and returns
a number or a dict of named numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlrag import plugins
from rlrag.errors import ConfigError, nearest_name
from rlrag.rewards.builtin import BUILTIN_REWARDS
from rlrag.rewards.judged import JUDGE, JUDGE_WANTS, JudgeCalls

KEYWORDS: Mapping[str, str] = {
    "question": "the question's text",
    "answer": "the text that the generator answered",
    "golden_answers": "tuple of accepted answers; empty when the question has none",
    "selection": "tuple of the picked passages' ids, best first",
    "passages": "tuple of the picked passages (id, title, text), best first",
    "answer_logp": "log p(golden answer | prompt), summed over its tokens, in nats",
    "num_answer_tokens": "tokens of the golden answer that answer_logp belongs to",
    "metadata": "what the question file has under the question's `metadata`",
}
"""What a reward function may ask for.

`answer` makes the generator answer; `answer_logp` and `num_answer_tokens` make it score the golden
answers. What no function asks for is not computed.
"""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function that can be called; for `judge`, what makes one of the configuration.

    `name` is what the configuration calls it and `wants` the keywords that it is given.
    """

    name: str
    function: Callable[..., Any]
    wants: frozenset[str]
    is_async: bool
    is_builtin: bool


def load_reward(name: str) -> RewardFunction:
    """Find a reward function by name.

    Raises:
        ConfigError: an unknown built-in name (with the nearest valid one), a module that is missing
            or fails to import, an attribute that is missing or not a function, or a parameter that
            no keyword fills.

    Example:
        >>> sorted(load_reward("token_f1").wants)
        ['answer', 'golden_answers']
        >>> load_reward("token_f2")
        Traceback (most recent call last):
        rlrag.errors.ConfigError: unknown reward 'token_f2'; did you mean 'token_f1'?
    """
    if name == JUDGE:
        return RewardFunction(name, JudgeCalls, JUDGE_WANTS, False, True)
    if ":" not in name:
        if name not in BUILTIN_REWARDS:
            raise ConfigError(_unknown_builtin(name))
        function = BUILTIN_REWARDS[name]
        return RewardFunction(name, function, _wants(name, function), False, True)
    found = _function(name)
    is_async = inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(
        getattr(found, "__call__", None)  # noqa: B004 - an object with an async __call__
    )
    return RewardFunction(name, found, _wants(name, found), is_async, False)


def _unknown_builtin(name: str) -> str:
    names = (*BUILTIN_REWARDS, JUDGE)
    listing = (
        f"built-in rewards: {', '.join(names)}; "
        "a function of your own is named 'package.module:function'"
    )
    return f"unknown reward {name!r}; {nearest_name(name, names, listing)}"


def _function(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = plugins.load("reward", name)
    if not callable(found) or inspect.isclass(found):
        raise ConfigError(
            f"reward {name!r} is a {type(found).__name__}, not a function; name a function or a "
            "callable object"
        )
    return found


def _wants(name: str, function: Callable[..., Any]) -> frozenset[str]:
    """The keywords that fill the function's parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward {name!r} has no readable signature ({error}); wrap it in a Python function"
        ) from error
    wants = set()
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            return frozenset(KEYWORDS)
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.name not in KEYWORDS or parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(_unfillable(name, parameter))
        wants.add(parameter.name)
    return frozenset(wants)


def _unfillable(name: str, parameter: inspect.Parameter) -> str:
    if parameter.name in KEYWORDS:
        return (
            f"reward {name!r}: parameter {parameter.name!r} is positional-only; rewards are called "
            "with keywords"
        )
    return (
        f"reward {name!r}: no keyword fills the parameter {parameter.name!r}; "
        f"{nearest_name(parameter.name, KEYWORDS, 'rename it;')} available: {', '.join(KEYWORDS)}"
    )
