# SPDX-License-Identifier: Apache-2.0
"""Orderly shutdown: refuse new requests, let running ones finish, within a time limit.

By itself vLLM, told to finish running requests after SIGTERM (`--shutdown-timeout`), does so only
with a single API process, answers new requests with status 200 and no text, and then waits without
limit for connections that stay open.

Draining begins in the signal's handler: vLLM's own shutdown passes through the event loop and a
thread, which take their turn behind the answers of a loaded server.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_eigen.server.http.errors import error_response

CLOSE_SECONDS = 5
"""Time for responses still being written once the engine has drained."""
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class DrainState:
    """How many requests run, and whether new ones are taken: not before `serving`, nor after."""

    def __init__(self) -> None:
        self.serving = False
        self.running = 0
        self._began: float | None = None

    @property
    def draining(self) -> bool:
        """Whether the server shuts down."""
        return self._began is not None

    @property
    def draining_seconds(self) -> float:
        """Since when it does; 0 if it does not."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def begin(self) -> None:
        """Take no new requests from here on; safe in a signal handler."""
        if self._began is None:
            self._began = time.monotonic()

    def wait_idle(self, seconds: float) -> float:
        """Block until nothing runs or the time is over; returns the seconds left."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self.running:
            time.sleep(0.05)
        return max(0.0, left)


class DrainMiddleware:
    """ASGI middleware that counts requests until they are answered, and refuses them on shutdown.

    Only requests that may occupy the engine count; reading statistics, health or metrics does not.
    """

    def __init__(self, app: ASGIApp, drain: DrainState) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 503."""
        if scope["type"] != "http" or scope["method"] in _SAFE_METHODS:
            await self._app(scope, receive, send)
            return
        if self._drain.draining:
            headers = {"Connection": "close", "Retry-After": "1"}
            response = error_response(503, "the server is shutting down", headers)
            await response(scope, receive, send)
            return
        self._drain.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.running -= 1


class DrainingEngineClient:
    """vLLM's engine client, whose `shutdown` first waits for running requests.

    Put where vLLM's server takes its client from, `app.state.engine_client`. vLLM offers no event
    for the beginning of its shutdown, and where several API processes share an engine each of them
    aborts its running requests at once. It calls `shutdown` in a thread, so waiting there does not
    hold up the responses.
    """

    def __init__(self, engine_client: Any, drain: DrainState) -> None:
        self._engine_client = engine_client
        self._drain = drain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine_client, name)

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new requests, wait up to `timeout` seconds for running ones, then shut down."""
        self._drain.begin()
        left = self._drain.wait_idle(timeout or 0.0)
        self._engine_client.shutdown(timeout=None if timeout is None else left)


@asynccontextmanager
async def bounded_shutdown(app: FastAPI) -> AsyncIterator[None]:
    """Lifespan that begins to drain at SIGTERM, and sets uvicorn's time limit for open connections.

    vLLM has no flag for that limit. It keeps its uvicorn server in `app.state.server`, and has
    installed its handlers of signals, from before the lifespan begins.
    """
    server = getattr(app.state, "server", None)
    if server is not None and server.config.timeout_graceful_shutdown is None:
        server.config.timeout_graceful_shutdown = CLOSE_SECONDS
    with on_stop_signal(app.state.eigen_drain.begin):
        yield


@contextmanager
def on_stop_signal(action: Callable[[], None]) -> Iterator[None]:
    """While open, SIGTERM and SIGINT run `action`, and then what handled them before.

    An event loop handles a signal in its next turn; `action` runs in the signal's own handler,
    between two instructions of whatever the main thread computes. Without effect in other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    installed = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        if callable(before):  # else nothing shuts down in order, and there is nothing to drain
            installed[number] = before, _acting_first(action, before)
            signal.signal(number, installed[number][1])
            signal.siginterrupt(number, False)  # as the event loop had it
    try:
        yield
    finally:
        for number, (before, ours) in installed.items():
            if signal.getsignal(number) is ours:
                signal.signal(number, before)


def _acting_first(
    action: Callable[[], None], handler: Callable[[int, FrameType | None], Any]
) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        action()
        handler(number, frame)

    return handle
