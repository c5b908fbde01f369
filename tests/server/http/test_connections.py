# SPDX-License-Identifier: Apache-2.0
"""Five hundred connections at once: slow ones, huge and malformed bodies, and plain requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import pytest

from tests.server.conftest import NAME
from vllm_eigen.server.http.limits import MAX_BODY_BYTES
from vllm_eigen.server.launch.process import ServerProcess

pytestmark = pytest.mark.anyio

EACH = 100
"""Connections of each of the five kinds."""
PAUSE = 0.2
ANSWER_SECONDS = 120
"""On an idle machine all is answered in a few."""
COMPLETION = json.dumps({"model": NAME, "prompt": [9] * 9, "max_tokens": 1}).encode()
MALFORMED = (
    b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe\x00", b"[" * 20_000, b'{"model": 1e999}',
    COMPLETION.replace(b"[9, 9", b'["a", 9'), COMPLETION.replace(b": 1}", b": -1}"),
)  # fmt: skip


@dataclass(frozen=True)
class Client:
    """What one connection sends, in pieces with pauses between, and which status it may get."""

    kind: str
    pieces: Sequence[bytes]
    expected: frozenset[int]


def post(body: bytes, length: int | None = None) -> bytes:
    """Head of a request to complete, with the length of `body` or another one."""
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode()


def clients() -> list[Client]:
    """Five kinds of as many."""
    whole = post(COMPLETION) + COMPLETION
    head = post(COMPLETION)
    fine, refused = frozenset({200}), frozenset(range(400, 500))
    found = []
    for number in range(EACH):
        broken = MALFORMED[number % len(MALFORMED)]
        found += [
            Client("plain", [whole], fine),
            Client("slow head", [*pieces(head, 16), COMPLETION], fine),
            Client("slow body", [head, *pieces(COMPLETION, 9)], fine),
            Client("huge body", [post(b"", MAX_BODY_BYTES + 1) + b"x" * 4096], frozenset({413})),
            Client("malformed body", [post(broken) + broken], refused),
        ]
    return found


def pieces(text: bytes, size: int) -> list[bytes]:
    """The text in pieces of `size` bytes, the last one shorter."""
    return [text[start : start + size] for start in range(0, len(text), size)]


async def test_no_connection_gets_in_the_way_of_another(plain: ServerProcess) -> None:
    everyone = clients()
    assert len(everyone) == 500
    open_now = 0
    all_open = asyncio.Event()

    async def status(client: Client) -> int:
        """Of the answer, once every connection is open."""
        nonlocal open_now
        reader, writer = await asyncio.open_connection("127.0.0.1", plain.port)
        try:
            open_now += 1
            if open_now == len(everyone):
                all_open.set()
            await all_open.wait()
            for piece in client.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(PAUSE if client.kind.startswith("slow") else 0)
            return int((await reader.readline()).split()[1])
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async with asyncio.timeout(ANSWER_SECONDS):
        statuses = await asyncio.gather(*map(status, everyone))
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for client, found in zip(everyone, statuses, strict=True):
        counts[client.kind][found] += 1
    print({kind: dict(found) for kind, found in counts.items()})
    assert all(
        found in client.expected for client, found in zip(everyone, statuses, strict=True)
    ), counts
    async with httpx.AsyncClient(base_url=plain.url, timeout=60) as http:
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/v1/kv_cache")).json()["blocks"]["used"] == 0
