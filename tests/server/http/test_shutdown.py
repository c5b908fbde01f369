# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: what runs finishes, what is new is refused, streams end, and the process is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal

import httpx
import pytest

from tests.server.conftest import DRAIN_SECONDS, KEY, NAME
from vllm_eigen.server.launch.process import ServerProcess

pytestmark = pytest.mark.anyio

HEADERS = {"Authorization": f"Bearer {KEY}"}
STREAMED = {
    "stream": True,
    "ignore_eos": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
TOKENS = 600
"""Enough to be generating still when the late request comes."""
READY_SECONDS = 60
"""Within which this process hears that `/ready` fails: it reads the long answers meanwhile, beside
other tests. `bench faults` measures it from a process that does nothing else."""


async def test_sigterm_drains(guarded: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=guarded.url, headers=HEADERS, timeout=120) as client:

        async def generate(prompt: int, running: asyncio.Event) -> int:
            """Follow a long answer; returns its tokens."""
            body = {"model": NAME, "prompt": [prompt] * 9, "max_tokens": TOKENS, **STREAMED}
            tokens = 0
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    running.set()
                    if line.startswith("data: {"):
                        usage = json.loads(line.removeprefix("data: "))["usage"]
                        tokens = usage["completion_tokens"]
            return tokens

        async def follow() -> int:
            count = 0
            async with client.stream("GET", "/v1/kv_cache/stream") as answer:
                async for line in answer.aiter_lines():
                    count += line.startswith("data:")
            return count

        async with asyncio.timeout(DRAIN_SECONDS + 60):
            running = [asyncio.Event() for _ in range(3)]
            long = [asyncio.create_task(generate(10 + n, event)) for n, event in enumerate(running)]
            stream = asyncio.create_task(follow())
            await asyncio.gather(*(event.wait() for event in running))
            assert (await client.get("/ready")).status_code == 200
            os.kill(guarded.process.pid, signal.SIGTERM)
            # Each process answers over connections of its own; a busy machine takes a while to tell
            # both.
            async with asyncio.timeout(READY_SECONDS):
                while await statuses(guarded, "/ready") != {503}:
                    await asyncio.sleep(0.1)
            assert await statuses(guarded, "/health") == {200}
            body = {"model": NAME, "prompt": [99] * 9, "max_tokens": 5}
            late = asyncio.create_task(client.post("/v1/completions", json=body))
            assert await asyncio.gather(*long) == [TOKENS] * 3
            assert await stream > 0
            with contextlib.suppress(httpx.TransportError):  # its door may be closed already
                assert (await late).status_code == 503
    assert await asyncio.to_thread(guarded.process.wait, 60) == 0


async def statuses(server: ServerProcess, path: str) -> set[int]:
    """Statuses of eight answers over as many new connections, without the key."""
    fresh = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=fresh) as client:
        return {
            answer.status_code
            for answer in await asyncio.gather(*(client.get(path) for _ in range(8)))
        }
