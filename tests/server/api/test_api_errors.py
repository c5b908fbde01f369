# SPDX-License-Identifier: Apache-2.0
"""Bad requests get errors in OpenAI's shape, and the server keeps serving."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from tests.server.conftest import NAME
from vllm_eigen.server.http.limits import MAX_BODY_BYTES
from vllm_eigen.server.launch.process import ServerProcess

pytestmark = pytest.mark.anyio


def error(answer: httpx.Response, status: int) -> dict:
    """The error of an answer with that status."""
    assert answer.status_code == status, answer.text[:500]
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["code"] == status
    assert found["message"]
    return found


@pytest.fixture(autouse=True)
def _serves_afterwards(http: httpx.Client):  # type: ignore[no-untyped-def]
    yield
    body = {"model": NAME, "prompt": "x", "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_unknown_model(http: httpx.Client) -> None:
    body = {"model": "unknown", "prompt": "x"}
    assert "unknown" in error(http.post("/v1/completions", json=body), 404)["message"]


def test_prompt_too_long(http: httpx.Client) -> None:
    body = {"model": NAME, "prompt": [5] * 5000}
    assert "context length" in error(http.post("/v1/completions", json=body), 400)["message"]


@pytest.mark.parametrize("content", [b'{"model": "tiny", "pro', b"", b"\xff\xfe", b"[1, 2]"])
def test_malformed_json(http: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    error(http.post("/v1/completions", content=content, headers=headers), 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/no_such_thing", 404),
        ("GET", "/dashboard/secret.py", 404),
        ("POST", "/v1/kv_cache", 405),
        ("GET", "/v1/kv_cache/history?seconds=0", 400),
        ("GET", "/v1/kv_cache/history?seconds=many", 400),
        ("GET", "/v1/kv_cache/stream?interval=-1", 400),
    ],
)
def test_routing_and_query(http: httpx.Client, method: str, path: str, status: int) -> None:
    error(http.request(method, path), status)


def test_huge_body(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    content = b" " * (MAX_BODY_BYTES + 1)
    error(http.post("/v1/completions", content=content, headers=headers), 413)


def test_huge_chunked_body(http: httpx.Client) -> None:
    def pieces():  # type: ignore[no-untyped-def]
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 1):
            yield b" " * (1 << 20)

    headers = {"Content-Type": "application/json"}
    error(http.post("/v1/completions", content=pieces(), headers=headers), 413)


def test_slow_clients_hold_nobody_up(plain: ServerProcess) -> None:
    """Half-sent requests stay open while others are served."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
    starts = (b"POST /v1/comp", head, head + b'Content-Type: application/json\r\n\r\n{"model"')
    slow = []
    try:
        for start in starts * 10:
            slow.append(socket.create_connection(("127.0.0.1", plain.port), timeout=10))
            slow[-1].sendall(start)
        body = {"model": NAME, "prompt": "x", "max_tokens": 2}
        answer = httpx.post(f"{plain.url}/v1/completions", json=body, timeout=20)
        assert answer.status_code == 200
    finally:
        for connection in slow:
            connection.close()


async def test_500_connections_at_once(plain: ServerProcess) -> None:
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=0)
    body = {"model": NAME, "prompt": "x", "max_tokens": 1}
    async with httpx.AsyncClient(base_url=plain.url, timeout=120, limits=limits) as client:
        requests = [
            client.post("/v1/completions", json=body) if i % 2 else client.get("/v1/kv_cache")
            for i in range(500)
        ]
        answers = await asyncio.gather(*requests)
    assert {answer.status_code for answer in answers} == {200}
