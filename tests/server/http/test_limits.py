# SPDX-License-Identifier: Apache-2.0
"""Body limits and draining, on a small app of their own; and the monitoring files."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException

from vllm_eigen.server.http.drain import (
    CLOSE_SECONDS,
    DrainingEngineClient,
    DrainMiddleware,
    DrainState,
)
from vllm_eigen.server.http.errors import http_exception_handler
from vllm_eigen.server.http.limits import BodyLimitMiddleware
from vllm_eigen.server.plugin import KVCacheEndpoints
from vllm_eigen.server.stats.gauges import GAUGES

pytestmark = pytest.mark.anyio
MONITORING = Path(__file__).resolve().parents[3] / "docker" / "monitoring"


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimitMiddleware, max_bytes=1 << 20, seconds=0.2)
    app.state.drain = DrainState()
    app.add_middleware(DrainMiddleware, drain=app.state.drain)
    app.add_exception_handler(HTTPException, http_exception_handler)

    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.get("/")
    async def root() -> str:
        return "up"

    return app


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_bodies_up_to_the_limit(app: FastAPI) -> None:
    async def pieces(count: int):  # type: ignore[no-untyped-def]
        for _ in range(count):
            yield b"x" * (1 << 18)

    async with client(app) as http:
        assert (await http.post("/size", content=b"x" * (1 << 20))).json() == 1 << 20
        assert (await http.post("/size", content=pieces(4))).json() == 1 << 20
        for content in (b"x" * ((1 << 20) + 1), pieces(5)):
            answer = await http.post("/size", content=content)
            assert answer.status_code == 413
            assert "1.0 MiB" in answer.json()["error"]["message"]


async def test_a_body_that_does_not_arrive(app: FastAPI) -> None:
    async def stalls():  # type: ignore[no-untyped-def]
        yield b"x"
        await asyncio.sleep(5)
        yield b"x"

    async with client(app) as http:
        answer = await http.post("/size", content=stalls())
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == 408


async def test_running_work_is_awaited_and_new_work_refused(app: FastAPI) -> None:
    class Engine:
        left: float | None = None

        def shutdown(self, timeout: float | None = None) -> None:
            self.left = timeout

    async def slow():  # type: ignore[no-untyped-def]
        yield b"x"
        await asyncio.sleep(0.15)
        yield b"x"

    engine = Engine()
    client_of_vllm = DrainingEngineClient(engine, app.state.drain)
    async with client(app) as http:
        running = asyncio.create_task(http.post("/size", content=slow()))
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(asyncio.to_thread(client_of_vllm.shutdown, timeout=5))
        await asyncio.sleep(0.05)
        assert engine.left is None
        assert (await http.post("/size")).status_code == 503
        assert (await http.get("/")).status_code == 200
        assert (await running).json() == 2
        await stopping
        assert engine.left is not None
        assert 0 < engine.left < 5


def serving_app() -> FastAPI:
    app = FastAPI()
    KVCacheEndpoints().attach_router(app)
    app.state.server = SimpleNamespace(
        config=SimpleNamespace(timeout_graceful_shutdown=None), should_exit=False
    )
    return app


async def test_open_connections_are_bounded_before_serving() -> None:
    app = serving_app()
    async with app.router.lifespan_context(app):
        assert app.state.server.config.timeout_graceful_shutdown == CLOSE_SECONDS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_draining_begins_in_the_handler_of_the_signal(number: signal.Signals) -> None:
    """Before the event loop has its next turn, and vLLM's own handler still runs in that."""
    app = serving_app()
    drain = app.state.eigen_drain
    drain.serving = True
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(number, told.set)  # as vLLM does before the lifespan begins
    try:
        theirs = signal.getsignal(number)
        async with app.router.lifespan_context(app), client(app) as http:
            assert (await http.get("/ready")).status_code == 200
            signal.raise_signal(number)
            assert drain.draining
            assert not told.is_set()
            await asyncio.wait_for(told.wait(), 10)
            answer = await http.get("/ready")
            assert answer.status_code == 503
            assert re.search(r"began to shut down \d+\.\d+ s ago", answer.text)
        assert signal.getsignal(number) == theirs
    finally:
        loop.remove_signal_handler(number)


def test_waiting_is_bounded() -> None:
    drain = DrainState()
    drain.running = 1
    assert drain.wait_idle(0.1) == 0.0


def test_grafana_asks_only_for_gauges_there_are() -> None:
    text = (MONITORING / "grafana-dashboard.json").read_text()
    json.loads(text)
    ours = {name for name, _, _ in GAUGES} | {"layer_rank", "layer_bytes_per_token"}
    assert set(re.findall(r"vllm_eigen:(\w+)", text)) <= ours
    readme = (MONITORING / "README.md").read_text()
    assert ours <= set(re.findall(r"vllm_eigen:(\w+)", readme))
