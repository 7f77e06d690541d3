"""An application without models, which `serve run` starts: not ready at first, then ready."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from rlrag.serving.http.listening import listen, running_command, say_when_ready


@ray_serve.deployment(ray_actor_options={"num_cpus": 0.1})
class SoonReady:
    """Is ready when it has been asked three times; says elsewhere which cluster it runs on."""

    def __init__(self) -> None:
        self._asked = 0

    async def __call__(self, request: Request) -> PlainTextResponse:
        if not request.url.path.endswith("/readyz"):
            return PlainTextResponse(f"{ray.get_runtime_context().gcs_address} {self._asked}")
        self._asked += 1
        return PlainTextResponse("", 200 if self._asked >= 3 else 503)


def build(arguments: dict[str, Any]) -> Application:
    """The application, listening at the port that `arguments` name."""
    command = running_command()
    assert command is not None
    say_when_ready(command, listen(command, None, int(arguments["port"])), "none")
    application: Application = SoonReady.bind()  # type: ignore[attr-defined]
    return application
