"""An orderly end: refuse what is new, let what runs finish, and do not wait for ever.

By itself vLLM, told to finish running requests after SIGTERM (`--shutdown-timeout`), does so only
with a single API process, answers new requests with status 200 and no text, and then waits without
limit for connections that stay open.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response

CLOSE_SECONDS = 10
"""For answers still being written once the engine has drained."""
_START_SECONDS = 600
_READING = ("GET", "HEAD", "OPTIONS")


class Drain:
    """What the server is still doing, and whether it may begin anything new."""

    def __init__(self) -> None:
        self.draining = False
        self.running = 0

    def wait_idle(self, seconds: float) -> float:
        """Block until nothing runs or the time is over; returns the seconds left."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self.running:
            time.sleep(0.05)
        return max(0.0, left)

    def watch(self, engine_client: Any) -> None:
        """Refuse new work, and wait for what runs, before vLLM shuts its engine client down.

        vLLM offers no event for the beginning of its shutdown, and where several API processes
        share an engine each of them drops its running requests at once. It calls `shutdown` in a
        thread, so waiting there does not hold up the answers being waited for.
        """
        shutdown = engine_client.shutdown

        def drained(timeout: float | None = None) -> None:
            self.draining = True
            left = self.wait_idle(timeout or 0.0)
            shutdown(timeout=None if timeout is None else left)

        engine_client.shutdown = drained


class Draining:
    """ASGI middleware that counts work until its answer is sent, and refuses it when draining.

    Only what may occupy the engine is work; reading figures, health or metrics is not.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 503."""
        if scope["type"] != "http" or scope["method"] in _READING:
            await self._app(scope, receive, send)
            return
        if self._drain.draining:
            headers = {"Connection": "close", "Retry-After": "1"}
            answer = error_response(503, "the server is shutting down", headers)
            await answer(scope, receive, send)
            return
        self._drain.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.running -= 1


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
