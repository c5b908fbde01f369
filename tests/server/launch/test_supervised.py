# SPDX-License-Identifier: Apache-2.0
"""Death of the engine or of the API process under load: clients learn of it, the server is back.

The plain server below a supervisor; each test kills one of its processes in the middle of streams.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import ENVIRONMENT, NAME, START_SECONDS, Fleet
from tests.server.supervisor import Supervisor, supervised
from vllm_eigen.benchmarks.lib.processes import session_processes

pytestmark = pytest.mark.anyio

NOTICE_SECONDS = 60.0
"""Within this time every client must know that its request is lost."""

LOST = {"error event", "RemoteProtocolError", "ReadError"}
"""How a client learns of it in the middle of an answer."""
REFUSED = {"ConnectError", "status 500", "status 503"}
"""How one does whose answer was complete just before, and who asked for the next."""


class Site:
    """The supervised server and where it listens."""

    def __init__(self, supervisor: Supervisor, url: str, log: Path) -> None:
        self.supervisor, self.url, self.log = supervisor, url, log

    async def ready(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                try:
                    if (await client.get("/health")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)
        pytest.fail(f"the server is not back: {self.log.read_text(errors='replace')[-2000:]}")

    def pid(self, part: str) -> int:
        leader = self.supervisor.process.pid
        if part == "api":
            return leader
        [found] = [pid for pid, name in session_processes(leader).items() if "Engine" in name]
        return found


@pytest.fixture(scope="module")
def supervised_site(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    server = fleet.get("plain")
    log = tmp_path_factory.mktemp("supervised") / "log"
    environment = {**os.environ, **ENVIRONMENT}
    with supervised(server.process, log, env=environment, cwd=fleet.folder) as supervisor:
        yield Site(supervisor, server.url, log)


async def load(client: httpx.AsyncClient, first: asyncio.Event) -> str:
    """Ask for long answers until one fails; returns how: `error event`, `cut` or an exception."""
    while (outcome := await stream(client, first)) == "whole":
        pass
    return outcome


async def stream(client: httpx.AsyncClient, first: asyncio.Event) -> str:
    """Follow a long answer; returns how it ended: `whole`, `error event`, `cut` or an exception."""
    body = {
        "model": NAME, "prompt": [9] * 20, "max_tokens": 1200, "ignore_eos": True, "stream": True,
        "temperature": 0,
    }  # fmt: skip
    seen = "cut"
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}"
            async for line in answer.aiter_lines():
                first.set()
                if line.startswith("data: [DONE]"):
                    return seen if seen == "error event" else "whole"
                if '"error"' in line:
                    seen = "error event"
    except httpx.TransportError as error:
        return type(error).__name__
    return seen


@pytest.mark.parametrize("part", ["engine", "api"])
@pytest.mark.slow
async def test_a_killed_process_is_noticed_and_replaced(supervised_site: Site, part: str) -> None:
    site = supervised_site
    await site.ready()
    ends = len(site.supervisor.statuses)
    async with httpx.AsyncClient(base_url=site.url, timeout=None) as client:
        starts = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(load(client, event)) for event in starts]
        async with asyncio.timeout(60):
            await asyncio.gather(*(event.wait() for event in starts))
        os.kill(site.pid(part), signal.SIGKILL)
        async with asyncio.timeout(NOTICE_SECONDS):
            outcomes = await asyncio.gather(*streams)
    assert set(outcomes) <= LOST | REFUSED, outcomes
    assert set(outcomes) & LOST, outcomes
    deadline = time.monotonic() + NOTICE_SECONDS
    while len(site.supervisor.statuses) == ends and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert len(site.supervisor.statuses) == ends + 1, "the dead server did not end"
    await site.ready()
    async with httpx.AsyncClient(base_url=site.url, timeout=60) as client:
        body = {"model": NAME, "prompt": [9] * 20, "max_tokens": 5, "ignore_eos": True}
        answer = await client.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert (await client.get("/v1/kv_cache")).json()["requests"]["preemptions"] == 0
    assert len(site.supervisor.statuses) == ends + 1
