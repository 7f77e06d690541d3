"""A generator on an OpenAI-compatible server, through `/completions`.

Servers differ in what they take and give, so the first call tries it with requests of a token:

    prompts   as token ids, which is what other back ends read, or as text, which the server then
              splits into tokens as it likes
    scores    log-probabilities of a prompt's tokens by `prompt_logprobs`, as vLLM's server has
              them, or by `echo` with `logprobs`, as OpenAI's first models had; or not at all

Answers come with their own log-probabilities where the server gives them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from rlrag.config import GeneratorConfig
from rlrag.errors import ConfigError, GenerationError
from rlrag.generation.backends.endpoint_client import EndpointClient, RefusedError, Reply
from rlrag.generation.checks import answer_others, check_answers, refused_lengths
from rlrag.generation.decoding import cut_at_stop, draw_seed
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.generation.weights import KeepsItsWeights
from rlrag.openai_api import read_key
from rlrag.records import Generation, Prompt, Score

logger = logging.getLogger(__name__)

Result = TypeVar("Result", Generation, Score)

_SCORES: dict[str, dict[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": 0},
    "echo": {"echo": True, "logprobs": 0},
}
_LOGPROBS = {"logprobs": 0}
_ONE_TOKEN = {"max_tokens": 1, "temperature": 0}
_SEED_BITS = 31
"""Servers that keep seeds in 32 bits refuse longer ones."""


@dataclass(frozen=True)
class Abilities:
    """What a server was found to take and to give; None where it was not tried yet."""

    prompts: Literal["token_ids", "text"] | None = None
    logprobs: bool = True
    """Whether it may be asked for the log-probabilities of an answer."""
    scores: str | None = None


class EndpointGenerator(KeepsItsWeights):
    """A language model that a server has; implements `Generator`.

    Can be pickled: each copy asks by itself, with `generator.batch_size` requests at once, and
    reads the key from the environment of its own process.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        identity: str,
        abilities: Abilities | None = None,
        needs_key: bool = False,
    ) -> None:
        """Read the key; nothing is asked yet.

        Args:
            config: Address, names, concurrency and limits.
            identity: See `endpoint_identity`.
            abilities: What another copy found out about the server.
            needs_key: Whether that copy had a key.

        Raises:
            ConfigError: when the environment lacks the key.
            SetupError: when the package openai is not installed.
        """
        key = read_key(config.key_variable, "generator.key_variable")
        if needs_key and key is None:
            raise ConfigError(
                f"the environment variable {config.key_variable} with the API key is set where "
                "the run was started, but not on this node; set it on every node before you "
                "start Ray there"
            )
        self._who = f"the server at {config.url}"
        self._config = config
        self._identity = identity
        self._abilities = abilities or Abilities()
        self._has_key = key is not None
        self._client = EndpointClient(config, key)
        self._tokens = TokenCount()
        self._learning = threading.Lock()
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return EndpointGenerator, (self._config, self._identity, self._abilities, self._has_key)

    @property
    def identity(self) -> str:
        """Hash of the address, the server's name of the model, and the tokenizer."""
        return self._identity

    @property
    def tokens(self) -> TokenCount:
        """Tokens that the server counted for this object, those of useless replies included."""
        return self._tokens

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        """Decode one answer a prompt; one that gets no reply of use has the error in its place.

        With a temperature each prompt has a seed of its own, drawn from the sampling's. `logp` is
        None where the server gives none, `num_tokens` and `num_prompt_tokens` are its counts.

        Raises:
            ConfigError, SetupError: when the server refuses the key, the model or the account.
            GenerationError: when nothing can be learnt of the server, or the generator was closed.
        """
        return answer_others(
            len(prompts),
            self._refused(prompts, [sampling.max_new_tokens] * len(prompts)),
            lambda places: self._generate([prompts[i] for i in places], sampling),
        )

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        """Teacher-forced log p(answer | prompt); gives and raises errors as `generate` does.

        Raises:
            ConfigError: also when the server gives no log-probabilities of a prompt.
        """
        check_answers(prompts, answers)
        return answer_others(
            len(prompts),
            self._refused(prompts, [len(answer) for answer in answers]),
            lambda places: self._score([prompts[i] for i in places], [answers[i] for i in places]),
        )

    async def answer(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """`generate` for one prompt, in the caller's event loop; cancelling it ends the request.

        Raises:
            RlragError: as `generate` gives or raises it.
        """
        for error in self._refused([prompt], [sampling.max_new_tokens]).values():
            raise error
        abilities = await asyncio.to_thread(self._learn, prompt)
        body = self._body(abilities, prompt, sampling)
        reply = await asyncio.wrap_future(self._client.ask(body))
        found = self._used(reply, lambda reply: _generation(reply, sampling))
        if isinstance(found, GenerationError):
            raise found
        return found

    def close(self) -> None:
        """End what is under way."""
        self._client.close()

    def _refused(
        self, prompts: Sequence[Prompt], num_new: Sequence[int]
    ) -> dict[int, GenerationError]:
        return refused_lengths(prompts, num_new, self._config.max_model_len)

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        if not prompts:
            return []
        abilities = self._learn(prompts[0])
        bodies = [self._body(abilities, prompt, sampling) for prompt in prompts]
        return [
            self._used(reply, lambda reply: _generation(reply, sampling))
            for reply in self._client.ask_all(bodies)
        ]

    def _score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        if not prompts:
            return []
        form = self._learn_scores(prompts[0], answers[0])
        sequences = [(*p.token_ids, *answer) for p, answer in zip(prompts, answers, strict=True)]
        replies = self._client.ask_all([self._scoring(form, ids) for ids in sequences])
        scored = []
        for reply, ids, answer in zip(replies, sequences, answers, strict=True):
            read = partial(_score, form=form, ids=ids, num_answer=len(answer))
            scored.append(self._used(reply, read))
        return scored

    def _body(self, abilities: Abilities, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.answering_model,
            "prompt": prompt.text if abilities.prompts == "text" else list(prompt.token_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1,  # a server may have another default
        }
        if stop := [mark for mark in sampling.stop if mark]:
            body["stop"] = stop
        if sampling.temperature:
            body["seed"] = draw_seed(sampling.seed, prompt.token_ids) % 2**_SEED_BITS
        return body | (_LOGPROBS if abilities.logprobs else {})

    def _scoring(self, form: str, ids: Sequence[int]) -> dict[str, Any]:
        return {
            "model": self._config.answering_model,
            "prompt": list(ids),
            **_ONE_TOKEN,
            **_SCORES[form],
        }

    def _learn(self, prompt: Prompt) -> Abilities:
        """How the server takes prompts, tried with one token and one word in turn.

        Raises:
            GenerationError: when it does not answer.
            ConfigError: when it takes neither.
        """
        with self._learning:
            if self._abilities.prompts is not None:
                return self._abilities
            why: GenerationError | None = None
            for abilities in (
                Abilities("token_ids"),
                Abilities("token_ids", logprobs=False),
                Abilities("text"),
                Abilities("text", logprobs=False),
            ):
                tried = replace(prompt, token_ids=prompt.token_ids[:1], text="A")
                body = self._body(abilities, tried, Sampling(max_new_tokens=1, stop=()))
                (reply,) = self._client.ask_all([body])
                found = self._used(reply, lambda reply: _generation(reply, Sampling()))
                if not isinstance(found, GenerationError):
                    if abilities.prompts == "text":
                        logger.warning(
                            "the server at %s takes prompts only as text; it tokenizes them "
                            "itself and may add its own beginning-of-text token",
                            self._config.url,
                        )
                    self._abilities = abilities
                    return abilities
                if not isinstance(found, RefusedError):
                    raise found
                why = why or found
            raise ConfigError(
                "the server accepts prompts for /completions neither as token ids nor as "
                f"text: {why}"
            )

    def _learn_scores(self, prompt: Prompt, answer: Sequence[int]) -> str:
        """How the server gives log-probabilities of a prompt, tried with two tokens.

        Raises:
            GenerationError: when it does not answer.
            ConfigError: when it gives none.
        """
        abilities = self._learn(prompt)
        with self._learning:
            if self._abilities.scores is not None:
                return self._abilities.scores
            reasons = [] if abilities.prompts == "token_ids" else ["it takes no token ids"]
            ids = (prompt.token_ids[0], answer[0])
            for form in _SCORES if abilities.prompts == "token_ids" else ():
                (reply,) = self._client.ask_all([self._scoring(form, ids)])
                found = self._used(reply, partial(_score, form=form, ids=ids, num_answer=1))
                if not isinstance(found, GenerationError):
                    self._abilities = replace(abilities, scores=form)
                    return form
                if not isinstance(found, RefusedError | _UselessError):
                    raise found
                reasons.append(f"by {form}: {found}")
            raise ConfigError(
                f"the server at {self._config.url} does not return log-probabilities of prompt "
                f"tokens ({'; '.join(reasons)}), which answer_logp and labels of passages need; "
                "use reward.functions that need only the answer, such as exact_match or "
                "token_f1, or a server that returns them, such as vLLM's"
            )

    def _used(
        self,
        reply: Reply | GenerationError,
        read: Callable[[Reply], Result],
    ) -> Result | GenerationError:
        """What a reply says, or why it is of no use; its tokens are counted in either case."""
        if isinstance(reply, GenerationError):
            return reply
        with self._counting:
            self._tokens.num_requests += 1
            self._tokens.spent += sum(_counts(reply))
        try:
            return read(reply)
        except _UselessError as error:
            return _UselessError(f"the reply of {self._config.url} is invalid: {error}")


class _UselessError(GenerationError):
    """A reply came and does not hold what was asked for."""


def _generation(reply: Reply, sampling: Sampling) -> Generation:
    choice = _choice(reply)
    text = choice.get("text")
    if not isinstance(text, str):
        raise _UselessError(f"its text is {text!r}")
    num_prompt_tokens, num_tokens = _counts(reply)
    if not num_prompt_tokens:
        raise _UselessError(f"it does not count the prompt tokens: usage is {reply.get('usage')!r}")
    logprobs = choice.get("logprobs")
    found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    logp = _sum(found) if isinstance(found, list) else None
    answer, _ = cut_at_stop(text, sampling.stop)
    return Generation(answer.strip(), logp, num_tokens, num_prompt_tokens)


def _score(reply: Reply, form: str, ids: Sequence[int], num_answer: int) -> Score:
    """The log-probabilities of the last `num_answer` of the tokens that were sent."""
    choice = _choice(reply)
    if form == "prompt_logprobs":
        listed = choice.get("prompt_logprobs")
        surplus = 0
    else:
        logprobs = choice.get("logprobs")
        listed = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        surplus = 1  # the token that was decoded, unless it ended the text
    if not isinstance(listed, list):
        raise _UselessError("it has no log-probabilities of the prompt")
    if not len(ids) <= len(listed) <= len(ids) + surplus:
        raise _UselessError(f"it has log-probabilities of {len(listed)} tokens, not of {len(ids)}")
    places = range(len(ids) - num_answer, len(ids))
    if form == "prompt_logprobs":
        found = [_of_token(listed[place], ids[place]) for place in places]
    else:
        found = [listed[place] for place in places]
    return Score(_sum(found), num_answer, len(ids) - num_answer)


def _of_token(entry: object, token_id: int) -> object:
    """The log-probability of a token among those of its position."""
    said = entry.get(str(token_id)) if isinstance(entry, dict) else None
    if not isinstance(said, dict):
        raise _UselessError(f"where token {token_id} was sent it has {str(entry)[:80]}")
    return said.get("logprob")


def _sum(logps: Sequence[object]) -> float:
    numbers = [logp for logp in logps if isinstance(logp, int | float) and math.isfinite(logp)]
    if len(numbers) < len(logps):
        wrong = next(logp for logp in logps if logp not in numbers)
        raise _UselessError(f"one of its log-probabilities is {wrong!r}")
    return math.fsum(numbers)


def _choice(reply: Reply) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _UselessError(f"it has no choices; its fields are {sorted(reply)}")
    return choices[0]


def _counts(reply: Reply) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, as the server counts them."""
    usage = reply.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    prompt, answer = counts.get("prompt_tokens"), counts.get("completion_tokens")
    return (prompt if isinstance(prompt, int) else 0, answer if isinstance(answer, int) else 0)
