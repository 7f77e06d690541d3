"""Adapts a generator of your own (`package.module:name`) to the generator protocol.

It is a class or function `package.module:name` with `model_dir`, if it wants that, and options of
its own, and has a method

    generate(prompts: Sequence[Prompt], sampling: Sampling) -> one answer a prompt, in their order

An answer is a text, a `Generation` where more is known of it, or a `GenerationError` that says why
this prompt has none. Where rewards of likelihoods, OpenRAG's labels or JSA are wanted, it also has

    score(prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]])
        -> log p(answer | prompt) of each pair, in nats

whose answers are the token ids that follow the prompts'. `model_dir` is the directory of
`generator.model`, whose tokenizer made all token ids. `generator.batch_size` prompts are asked at
once. A method `close`, where there is one, is called in the end.
"""

from __future__ import annotations

import itertools
import logging
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from rlrag import plugins
from rlrag.config import GeneratorConfig
from rlrag.errors import ConfigError, GenerationError, RlragError
from rlrag.generation.checks import answer_others, check_answers, refused_lengths
from rlrag.generation.decoding import cut_at_stop
from rlrag.generation.identity import own_identity
from rlrag.generation.prompts import load_tokenizer
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.generation.weights import KeepsItsWeights
from rlrag.records import Generation, Prompt, Score

logger = logging.getLogger(__name__)

Result = TypeVar("Result", Generation, Score)

_ROUNDING = 1e-3
"""Nats by which a log-probability may lie above 0."""


class PluginGenerator(KeepsItsWeights):
    """Answers and scores of a named generator, checked; implements `Generator`.

    A prompt that it fails on, or answers with what is no answer, has the error in the place of its
    result.

    Args:
        config: `backend` names the generator, `options` are its own.
        model_dir: Files of `generator.model`.

    Raises:
        ConfigError: when it cannot be made.
        ModelNotFoundError: when `model_dir` holds no tokenizer.
    """

    def __init__(self, config: GeneratorConfig, model_dir: Path) -> None:
        self._who = f"generator {config.backend!r}"
        self._config = config
        self._identity = own_identity(config, model_dir)
        self._tokenizer: Any = load_tokenizer(model_dir)
        self._part = plugins.make("generator", config.backend, config.options, model_dir=model_dir)
        self._tokens = TokenCount()

    @property
    def identity(self) -> str:
        """Hash of the name, the options, the module's text and the files of the model."""
        return self._identity

    @property
    def tokens(self) -> TokenCount:
        """Tokens of what was asked and answered since this object was made."""
        return self._tokens

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        """One answer a prompt, which ends before its first stop string and is stripped.

        A text counts as many tokens as the tokenizer makes of it.

        Raises:
            RlragError: what the generator raises of these, but for a `GenerationError`.
        """
        return self._answer(
            "generate",
            prompts,
            [sampling.max_new_tokens] * len(prompts),
            lambda places: self._part.generate([prompts[i] for i in places], sampling),
            lambda place, found: self._generation(prompts[place], found, sampling),
        )

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        """Log p(answer | prompt); gives and raises errors as `generate` does.

        Raises:
            ConfigError: when the generator cannot score.
        """
        check_answers(prompts, answers)
        if not callable(getattr(self._part, "score", None)):
            raise ConfigError(
                f"{self._who} has no method 'score', which answer_logp and labels of passages "
                "need; add it, or use reward.functions that need only the answer, such as "
                "exact_match or token_f1"
            )
        return self._answer(
            "score",
            prompts,
            [len(answer) for answer in answers],
            lambda places: self._part.score(
                [prompts[i] for i in places], [answers[i] for i in places]
            ),
            lambda place, found: _score(prompts[place], answers[place], found),
        )

    def check_prompt(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Refuse prompts that are empty or leave no room for the answer.

        Raises:
            GenerationError: with both lengths.
        """
        for error in self._refused([prompt], [max_new_tokens]).values():
            raise error

    def close(self) -> None:
        """Have the generator free what it holds, if it has a method for that."""
        if callable(close := getattr(self._part, "close", None)):
            close()

    def _refused(
        self, prompts: Sequence[Prompt], num_new: Sequence[int]
    ) -> dict[int, GenerationError]:
        return refused_lengths(prompts, num_new, self._config.max_model_len)

    def _answer(
        self,
        method: str,
        prompts: Sequence[Prompt],
        num_new: Sequence[int],
        ask: Callable[[list[int]], Any],
        read: Callable[[int, Any], Result],
    ) -> list[Result | GenerationError]:
        def answer(places: list[int]) -> list[Result | GenerationError]:
            size = self._config.batch_size
            batches = (places[start : start + size] for start in range(0, len(places), size))
            asked = (self._ask(method, prompts, batch, ask, read) for batch in batches)
            return list(itertools.chain.from_iterable(asked))

        results = answer_others(len(prompts), self._refused(prompts, num_new), answer)
        for result in results:
            if not isinstance(result, GenerationError):
                self._tokens.num_requests += 1
                self._tokens.spent += result.num_prompt_tokens + result.num_tokens
        return results

    def _ask(
        self,
        method: str,
        prompts: Sequence[Prompt],
        places: list[int],
        ask: Callable[[list[int]], Any],
        read: Callable[[int, Any], Result],
    ) -> list[Result | GenerationError]:
        """Results of one batch; where the call fails, of its prompts one by one."""
        try:
            found = _as_list(ask(places), len(places))
        except _UselessError as error:
            return [self._failed(method, prompts[place], str(error)) for place in places]
        except Exception as error:
            if isinstance(error, RlragError) and not isinstance(error, GenerationError):
                raise
            why = f"failed with {type(error).__name__}: {error}"
            if len(places) == 1:
                failed = self._failed(method, prompts[places[0]], why)
                failed.__cause__ = error
                return [failed]
            logger.warning(
                "%s: %s of %d prompts %s; sending them one by one",
                self._who,
                method,
                len(places),
                why,
            )
            alone = (self._ask(method, prompts, [place], ask, read) for place in places)
            return list(itertools.chain.from_iterable(alone))
        results: list[Result | GenerationError] = []
        for place, one in zip(places, found, strict=True):
            if isinstance(one, GenerationError):
                results.append(type(one)(f"{self._who}: {one}"))
                continue
            try:
                results.append(read(place, one))
            except _UselessError as error:
                results.append(self._failed(method, prompts[place], str(error)))
        return results

    def _failed(self, method: str, prompt: Prompt, why: str) -> GenerationError:
        return GenerationError(
            f"{self._who}: {method} {why} (the prompt ends with {prompt.text[-60:]!r}); fix it, "
            "then run the same command again"
        )

    def _generation(self, prompt: Prompt, found: Any, sampling: Sampling) -> Generation:
        if isinstance(found, str):
            num_tokens = len(self._tokenizer(found, add_special_tokens=False)["input_ids"])
            found = Generation(found, None, num_tokens, len(prompt.token_ids))
        if not isinstance(found, Generation):
            raise _UselessError(
                f"gave {_shown(found)} as an answer; return a str, a Generation or a "
                "GenerationError"
            )
        if not isinstance(found.text, str):
            raise _UselessError(f"gave {_shown(found.text)} as the text of an answer; return a str")
        return Generation(
            text=cut_at_stop(found.text, sampling.stop)[0].strip(),
            logp=None if found.logp is None else _logp(found.logp),
            num_tokens=_count(found.num_tokens),
            num_prompt_tokens=_count(found.num_prompt_tokens),
        )


class _UselessError(GenerationError):
    """A generator's method returned what it should not."""


def _as_list(found: Any, number: int) -> list[Any]:
    if isinstance(found, str | bytes) or not isinstance(found, Iterable):
        raise _UselessError(f"gave {_shown(found)}, not a list with one result per prompt")
    results = list(found)
    if len(results) != number:
        raise _UselessError(
            f"gave {len(results)} results for {number} prompts; return one result per "
            "prompt, in the same order"
        )
    return results


def _score(prompt: Prompt, answer: tuple[int, ...], found: Any) -> Score:
    logp = found.logp if isinstance(found, Score) else found
    return Score(_logp(logp), len(answer), len(prompt.token_ids))


def _logp(found: Any) -> float:
    if not isinstance(found, Real) or not -math.inf < float(found) <= _ROUNDING:
        raise _UselessError(
            f"gave {_shown(found)} as a log-probability; return a finite number of at most "
            "0, in nats"
        )
    return float(found)


def _count(found: Any) -> int:
    if not isinstance(found, Integral) or found < 0:
        raise _UselessError(
            f"gave {_shown(found)} as a number of tokens; return a non-negative integer"
        )
    return int(found)


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}"
