"""A tiny model behind an address that speaks OpenAI's completions, with faults on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from json_server import Answer, json_server
from transformers import AutoModelForCausalLM, AutoTokenizer

KEY = "sk-secret-0815"
MODEL = "tiny"
VLLM = frozenset({"token_ids", "logprobs", "prompt_logprobs"})
"""What vLLM's server can."""
LEGACY = frozenset({"token_ids", "logprobs", "echo"})
"""What OpenAI's first models could."""
PLAIN = frozenset[str]()
"""Texts in, texts out."""


class EndpointServer:
    """`fault` gets a request and how often the same was asked before; None has it answered.

    Otherwise it returns a status with headers and a value, or a value alone. `can` says what the
    server knows: a field that it does not know is left unread, token ids are refused.
    """

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._lock = threading.Lock()
        self.url = ""
        self.reset()

    def reset(self) -> None:
        """As if it had just started."""
        self.can = VLLM
        self.key: str | None = None
        self.fault: Callable[[dict[str, Any], int], Any] = lambda body, before: None
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.num_tokens = 0
        self.at_once = self.most_at_once = 0

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> Answer:
        with self._lock:
            before = self.bodies.count(body)
            self.bodies.append(body)
            self.keys.add(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if path != "/v1/completions" or body["model"] != MODEL:
                return refusal(404, f"no {path} of {body['model']}")
            if self.key is not None and key != f"Bearer {self.key}":
                return refusal(401, f"Incorrect API key provided: {key}")
            said = self.fault(body, before)
            if isinstance(said, tuple):
                return said
            if said is None and isinstance(body["prompt"], list) and "token_ids" not in self.can:
                return refusal(400, "prompt must be a string")
            return 200, {}, self._complete(body) if said is None else said
        finally:
            with self._lock:
                self.at_once -= 1

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self._tokenizer(prompt)["input_ids"]
        with self._lock, torch.inference_mode():
            text, logps = self._decode(ids, body)
            of_prompt = [None, *self._logps(ids)]
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None}
        if "logprobs" in body and "logprobs" in self.can:
            echoed = of_prompt if body.get("echo") and "echo" in self.can else []
            choice["logprobs"] = {"token_logprobs": [*echoed, *logps]}
        if "prompt_logprobs" in body and "prompt_logprobs" in self.can:
            choice["prompt_logprobs"] = [
                None if logp is None else {str(token): {"logprob": logp}}
                for token, logp in zip(ids, of_prompt, strict=True)
            ]
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(logps)}
        with self._lock:
            self.num_tokens += sum(usage.values())
        return {"object": "text_completion", "model": MODEL, "choices": [choice], "usage": usage}

    def _logps(self, ids: Sequence[int]) -> list[float]:
        """Of each token but the first."""
        logp_TV = self._model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        return [float(logp_TV[t, token]) for t, token in enumerate(ids[1:])]

    def _decode(self, ids: Sequence[int], body: dict[str, Any]) -> tuple[str, list[float]]:
        """The answer before its stop string, and a log-probability for each decoded token."""
        decoded: list[int] = []
        logps: list[float] = []
        draw = torch.Generator().manual_seed(body.get("seed", 0))
        while len(decoded) < body["max_tokens"]:
            logp_V = self._model(torch.tensor([[*ids, *decoded]])).logits[0, -1].log_softmax(-1)
            token = logp_V.argmax()
            if body["temperature"]:
                chances_V = (logp_V / body["temperature"]).softmax(-1)
                token = torch.multinomial(chances_V, 1, generator=draw)[0]
            decoded.append(int(token))
            logps.append(float(logp_V[token]))
            text = self._tokenizer.decode(decoded, skip_special_tokens=True)
            ends = [text.find(mark) for mark in body.get("stop", ()) if mark in text]
            if ends:
                return text[: min(ends)], logps
            if decoded[-1] == self._tokenizer.eos_token_id:
                break
        return self._tokenizer.decode(decoded, skip_special_tokens=True), logps


def refusal(status: int, message: str, code: str | None = None) -> Answer:
    return status, {}, {"error": {"message": message, "code": code}}


@contextmanager
def endpoint_server(model_dir: Path) -> Iterator[EndpointServer]:
    """The server, while the block runs."""
    served = EndpointServer(model_dir)
    with json_server(served.answer) as served.url:
        yield served
