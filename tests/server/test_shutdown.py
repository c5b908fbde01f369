"""SIGTERM: what runs finishes, what is new is refused, streams end, and the process is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import httpx
import pytest
from conftest import KEY, NAME

from server.process import ServerProcess

pytestmark = pytest.mark.anyio

HEADERS = {"Authorization": f"Bearer {KEY}"}


async def test_sigterm_drains(guarded: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=guarded.url, headers=HEADERS, timeout=90) as client:

        async def generate(prompt: int, tokens: int) -> httpx.Response:
            body = {"model": NAME, "prompt": [prompt] * 9, "max_tokens": tokens, "ignore_eos": True}
            return await client.post("/v1/completions", json=body)

        async def follow() -> int:
            count = 0
            async with client.stream("GET", "/v1/kv_cache/stream") as answer:
                async for line in answer.aiter_lines():
                    count += line.startswith("data:")
            return count

        async with asyncio.timeout(100):
            long = [asyncio.create_task(generate(10 + i, 900)) for i in range(3)]
            stream = asyncio.create_task(follow())
            await asyncio.sleep(0.6)
            began = time.monotonic()
            os.kill(guarded.process.pid, signal.SIGTERM)
            await asyncio.sleep(0.3)
            late = asyncio.create_task(generate(99, 5))
            for answer in await asyncio.gather(*long):
                assert answer.status_code == 200
                assert answer.json()["usage"]["completion_tokens"] == 900
            assert await stream > 0
            with contextlib.suppress(httpx.TransportError):  # its door may be closed already
                assert (await late).status_code == 503
    status = await asyncio.to_thread(guarded.process.wait, 60)
    assert status == 0
    assert time.monotonic() - began < 90
