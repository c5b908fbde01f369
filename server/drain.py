"""An orderly end: refuse what is new, let what runs finish, and do not wait for ever.

vLLM finishes running requests after SIGTERM (`--shutdown-timeout`), but answers new ones with
status 200 and no text, and then waits without limit for connections that stay open.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response

CLOSE_SECONDS = 10
"""For answers still being written once the engine has drained."""
_START_SECONDS = 600
_READING = ("GET", "HEAD", "OPTIONS")


class RefuseWhileDraining:
    """ASGI middleware that answers 503 to new work once the engine has begun to drain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, unless it is new work for an engine that takes none."""
        app: ASGIApp = self._app
        new_work = scope["type"] == "http" and scope["method"] not in _READING
        if new_work and getattr(scope["app"].state, "eigen_draining", False):
            headers = {"Connection": "close", "Retry-After": "1"}
            app = error_response(503, "the server is shutting down", headers)
        await app(scope, receive, send)


def watch(engine_client: Any, state: Any) -> None:
    """Note in `state` when vLLM tells its engine to drain; it offers no event for that."""
    shutdown = engine_client.shutdown

    def noted(*args: Any, **options: Any) -> Any:
        state.eigen_draining = True
        return shutdown(*args, **options)

    engine_client.shutdown = noted


async def bound_shutdown(state: Any, seconds: int = CLOSE_SECONDS) -> None:
    """Set uvicorn's time limit as soon as vLLM has made its server, which it keeps in `state`.

    vLLM's command line has no flag for it.
    """
    for _ in range(_START_SECONDS):
        server = getattr(state, "server", None)
        if server is not None:
            if server.config.timeout_graceful_shutdown is None:
                server.config.timeout_graceful_shutdown = seconds
            return
        await asyncio.sleep(1.0)
