# SPDX-License-Identifier: Apache-2.0
"""A load of known size: streams of token ids whose lengths are counted as they arrive."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.server.conftest import NAME

_TOKENS = re.compile(rb'"token_ids":\[([^\]]+)\]')


class Sequence:
    """One running request: `prompt` tokens sent, `generated` received so far."""

    def __init__(self, seed: int, prompt: int, limit: int) -> None:
        numbers = random.Random(seed)
        self.tokens = [numbers.randrange(3, 259) for _ in range(prompt)]
        self.limit = limit
        self.generated = 0

    @property
    def length(self) -> int:
        return len(self.tokens) + self.generated

    async def run(self, client: httpx.AsyncClient) -> None:
        body = {
            "model": NAME, "prompt": self.tokens, "max_tokens": self.limit, "ignore_eos": True,
            "stream": True, "return_token_ids": True, "temperature": 1.0,
        }  # fmt: skip
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            rest = b""
            async for piece in answer.aiter_raw():
                events, separator, tail = (rest + piece).rpartition(b"\n\n")
                rest = tail if separator else rest + piece
                # Parsing a thousand events a second would make this client the slower side.
                for numbers in _TOKENS.findall(events):
                    self.generated += numbers.count(b",") + 1


@asynccontextmanager
async def running(
    client: httpx.AsyncClient,
    prompts: tuple[int, ...],
    limit: int,
    seed: int = 0,
    started: int | None = None,
) -> AsyncIterator[list[Sequence]]:
    """Send one request a prompt length; the block begins once `started` (all) of them generate."""
    enough = len(prompts) if started is None else started
    sequences = [Sequence(seed + i, prompt, limit) for i, prompt in enumerate(prompts)]
    tasks = [asyncio.create_task(one.run(client)) for one in sequences]
    try:
        for _ in range(600):
            failed = [task for task in tasks if task.done()]
            if failed or sum(one.generated > 4 for one in sequences) >= enough:
                break
            await asyncio.sleep(0.05)
        yield sequences
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def observe(
    client: httpx.AsyncClient, prompts: tuple[int, ...], ask: Callable[[], Awaitable[Any]]
) -> list[tuple[Any, int, int]]:
    """Three answers of `ask` while all requests generate, each with the tokens before and after it.

    On a busy machine the load can end before it was looked at; then it is sent again.
    """
    for _ in range(5):
        seen = []
        async with running(client, prompts, limit=900) as sequences:
            for _ in range(3):
                before = sum(one.length for one in sequences)
                answer = await ask()
                await asyncio.sleep(0.02)  # tokens computed by then arrive
                after = sum(one.length for one in sequences)
                if any(one.generated == one.limit for one in sequences):
                    break
                seen.append((answer, before, after))
            else:
                # A whole second, on which the server takes its sample of the history.
                await asyncio.sleep(1.1)
                return seen
    raise AssertionError(f"five loads ended before three answers, the last after {len(seen)}")
