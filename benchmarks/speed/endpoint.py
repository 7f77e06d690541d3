"""Utilisation of an OpenAI-compatible server with 16 concurrent requests.

Run `python -m benchmarks.speed.endpoint`. A server on loopback, in a process of its own, answers
each completion after a fixed time and works on at most 16 at once. It adds up for how long how many
were being worked on, from the first request to the last reply; the busy share is that sum over 16
times the duration. A tenth of the prompts are refused once with 429.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import platform
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

RESULTS_FILE = Path(__file__).parents[1] / "results" / "endpoint.md"
_AT_ONCE = 16
_REFUSED_SHARE = 0.1


def serve(port: int, answer_s: float) -> None:
    """Answer until the process is ended."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    asked: set[str] = set()
    busy = {"s": 0.0, "first": 0.0, "last": 0.0}

    async def complete(request: Any) -> JSONResponse:
        body = await request.json()
        key = str(body["prompt"])
        if hash(key) % 1000 < 1000 * _REFUSED_SHARE and key not in asked:
            asked.add(key)
            return JSONResponse({"error": {"message": "busy"}}, 429, {"retry-after": "0"})
        start = time.perf_counter()
        await asyncio.sleep(answer_s)
        end = time.perf_counter()
        busy["first"] = busy["first"] or start
        busy["last"] = end
        busy["s"] += end - start
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
        choice = {"text": " yes", "logprobs": {"token_logprobs": [-0.5]}}
        return JSONResponse({"choices": [choice], "usage": usage})

    async def share(request: Any) -> JSONResponse:
        found = busy["s"] / (_AT_ONCE * (busy["last"] - busy["first"]))
        busy.update(s=0.0, first=0.0, last=0.0)
        return JSONResponse(found)

    app = Starlette(
        routes=[Route("/v1/completions", complete, methods=["POST"]), Route("/busy", share)]
    )
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def busy_share(url: str, num_prompts: int) -> float:
    """The busy share while one call answers this many different prompts."""
    from rlrag.config import GeneratorConfig
    from rlrag.generation.backends.endpoint import EndpointGenerator
    from rlrag.generation.protocol import Sampling
    from rlrag.records import Prompt

    config = GeneratorConfig(backend="endpoint", url=f"{url}/v1", batch_size=_AT_ONCE)
    generator = EndpointGenerator(config, "benchmark")
    prompts = [
        Prompt(text=str(number), token_ids=(number, *range(200)), num_passages=1)
        for number in range(num_prompts)
    ]
    try:
        generator.generate(prompts[:1], Sampling())  # learns what the server takes
        urllib.request.urlopen(f"{url}/busy").read()
        generator.generate(prompts, Sampling())
        return float(urllib.request.urlopen(f"{url}/busy").read())
    finally:
        generator.close()


def main() -> None:
    """Measure at several answer times, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=640)
    parser.add_argument("--answer-s", type=float, nargs="+", default=[0.05, 0.2, 0.5])
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    arguments = parser.parse_args()
    lines = [
        "# A server behind an address, kept busy by 16 requests under way",
        "",
        f"{platform.machine()}, Python {platform.python_version()}, {arguments.prompts} prompts of "
        "201 tokens; made by `python -m benchmarks.speed.endpoint`, whose module says what is "
        "done.",
        "",
        "| seconds an answer takes | busy share |",
        "|---|---|",
    ]
    for answer_s in arguments.answer_s:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, answer_s))
        server.start()
        try:
            wait_for(port)
            share = busy_share(f"http://127.0.0.1:{port}", arguments.prompts)
        finally:
            server.terminate()
            server.join(10)
        lines.append(f"| {answer_s:g} | {share:.3f} |")
        print(lines[-1], flush=True)
    arguments.output.write_text("\n".join(lines) + "\n")


def wait_for(port: int, timeout_s: float = 60.0) -> None:
    """Until something listens there."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main()
