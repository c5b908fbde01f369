# SPDX-License-Identifier: Apache-2.0
"""The load of `bench faults`: streams of completions, followed by a process of its own.

It has a lower priority than the server, and shares no thread with the probes, so that neither the
server nor a probe waits for the load generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

STARTED = "started"
NICENESS = 10


class Load:
    """Streams that another process follows; see `streaming`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def started(self) -> None:
        """Wait until every stream has brought its first token, or ended."""
        if await self._line() != STARTED:
            raise RuntimeError("the load generator ended early")

    async def outcomes(self) -> list[str]:
        """Wait for the end of all; how each ended, in the words of `follow`."""
        return list(json.loads(await self._line()))

    async def _line(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()


@asynccontextmanager
async def streaming(
    url: str, body: dict[str, Any], *, users: int, repeat: bool
) -> AsyncIterator[Load]:
    """Send `body` to the completions of a server from another process, ended with the block.

    Args:
        users: streams at once.
        repeat: a user whose answer is whole sends the next request, until one fails. Their answers
            then have different lengths, so that they do not all end at the same time.
    """
    job = json.dumps({"url": url, "body": body, "users": users, "repeat": repeat})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, job,
        stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield Load(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def follow(client: httpx.AsyncClient, body: dict[str, Any], first: asyncio.Event) -> str:
    """Follow a stream; returns how it ended: `whole`, `error event`, `cut` or an exception.

    Args:
        first: set at its first line.
    """
    import httpx

    seen = "cut"
    tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}"
            async for line in answer.aiter_lines():
                first.set()
                if line.startswith("data: [DONE]"):
                    whole = tokens == body["max_tokens"] and seen == "cut"
                    return "whole" if whole else seen
                if '"error"' in line:
                    seen = "error event"
                elif '"usage":{' in line.replace(" ", ""):
                    tokens = json.loads(line.removeprefix("data:"))["usage"]["completion_tokens"]
    except httpx.TransportError as error:
        return type(error).__name__
    return seen


async def _follow_all(url: str, body: dict[str, Any], users: int, repeat: bool) -> None:
    """Follow the streams; prints `STARTED`, and in the end all outcomes."""
    import httpx

    longest = body["max_tokens"]

    async def user(client: httpx.AsyncClient, number: int, first: asyncio.Event) -> str:
        shorter = longest * number // (2 * users) if repeat else 0
        own = body | {"max_tokens": longest - shorter}
        try:
            while (outcome := await follow(client, own, first)) == "whole" and repeat:
                pass
            return outcome
        finally:
            first.set()

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        starts = [asyncio.Event() for _ in range(users)]
        streams = [
            asyncio.create_task(user(client, number, event)) for number, event in enumerate(starts)
        ]
        await asyncio.gather(*(event.wait() for event in starts))
        print(STARTED, flush=True)
        print(json.dumps(await asyncio.gather(*streams)), flush=True)


def _lower_priority() -> None:
    """Below the server's, also where Linux shares the processor by session first (autogroups)."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")


if __name__ == "__main__":
    _lower_priority()
    asyncio.run(_follow_all(**json.loads(sys.argv[1])))
