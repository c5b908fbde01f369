"""An orderly end: refuse what is new, let what runs finish, and do not wait for ever.

By itself vLLM, told to finish running requests after SIGTERM (`--shutdown-timeout`), does so only
with a single API process, answers new requests with status 200 and no text, and then waits without
limit for connections that stay open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
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
    """Refuse new work, and wait for what runs, before vLLM shuts its engine client down.

    vLLM offers no event for the beginning of its shutdown, and where several API processes share
    an engine each of them drops its running requests at once. It calls `shutdown` in a thread, so
    waiting there does not hold up the answers being waited for.
    """
    shutdown = engine_client.shutdown

    def drained(timeout: float | None = None) -> None:
        state.eigen_draining = True
        left = wait_idle(engine_client.get_num_unfinished_requests, timeout or 0.0)
        shutdown(timeout=None if timeout is None else left)

    engine_client.shutdown = drained


def wait_idle(unfinished: Callable[[], int], seconds: float) -> float:
    """Block until no request is unfinished or the time is over; returns the seconds left."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and unfinished():
        time.sleep(0.05)
    return max(0.0, left)


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
