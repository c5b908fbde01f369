# SPDX-License-Identifier: Apache-2.0
"""`/v1/kv_cache` against a load of known size."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server import served_model
from tests.server.conftest import MAX_MODEL_LEN, NAME, POOL_BYTES
from tests.server.load import observe, running
from vllm_eigen.server.launch.process import ServerProcess

pytestmark = pytest.mark.anyio


def idle(client: httpx.Client, seconds: float = 20.0) -> dict:
    """The statistics once nothing runs any more."""
    end = time.monotonic() + seconds
    while True:
        cache = client.get("/v1/kv_cache").json()
        if cache["requests"]["running"] == 0 and cache["tokens"]["used"] == 0:
            return cache
        assert time.monotonic() < end, cache
        time.sleep(0.2)


def test_layout_is_that_of_the_checkpoint(http: httpx.Client) -> None:
    cache = http.get("/v1/kv_cache").json()
    assert cache["bytes_per_token"] == served_model.BYTES_PER_TOKEN
    assert cache["uncompressed_bytes_per_token"] == served_model.FULL_BYTES_PER_TOKEN
    assert [(x["rank_k"], x["rank_v"]) for x in cache["layers"]] == list(served_model.LAYERS)
    assert {(x["bits_k"], x["bits_v"]) for x in cache["layers"]} == {(16, 16)}
    assert sum(x["bytes_per_token"] for x in cache["layers"]) == cache["bytes_per_token"]
    block_bytes = cache["block_size"] * cache["bytes_per_token"]
    assert POOL_BYTES - block_bytes < cache["pool_bytes"] <= POOL_BYTES
    assert cache["tokens"]["capacity"] == cache["blocks"]["total"] * cache["block_size"]
    assert cache["max_model_len"] == MAX_MODEL_LEN
    without = cache["uncompressed"]["tokens_capacity"]
    assert abs(without - POOL_BYTES / served_model.FULL_BYTES_PER_TOKEN) <= cache["block_size"]
    assert cache["engines"] == 1


async def test_used_tokens_are_those_sent(plain: ServerProcess) -> None:
    prompts = (41, 130, 257, 300)
    async with httpx.AsyncClient(base_url=plain.url, timeout=60) as client:
        seen = await observe(client, prompts, lambda: client.get("/v1/kv_cache"))
    for answer, before, after in seen:
        cache = answer.json()
        slack = cache["block_size"] * len(prompts)
        assert cache["requests"]["running"] == len(prompts)
        used = cache["tokens"]["used"]
        assert before - slack <= used <= after + slack
        assert cache["used_bytes"] == used * served_model.BYTES_PER_TOKEN
        assert cache["uncompressed"]["used_bytes"] == used * served_model.FULL_BYTES_PER_TOKEN
        saved = cache["uncompressed"]["used_bytes"] - cache["used_bytes"]
        assert cache["saved_bytes"] == saved > 0
    with httpx.Client(base_url=plain.url) as http:
        idle(http)


async def test_history_and_stream_show_the_load(plain: ServerProcess) -> None:
    async with (
        httpx.AsyncClient(base_url=plain.url, timeout=60) as client,
        # More than fits at once, so that the load outlasts three samples a second apart.
        running(client, (100,) * 24, limit=900, seed=9, started=2),
    ):
        answer = await client.get("/v1/kv_cache/stream", params={"limit": 3})
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [x for x in answer.text.splitlines() if x.startswith("data: ")]
        samples = [json.loads(x.removeprefix("data: ")) for x in lines]
        assert len(samples) == 3
        assert max(x["running"] for x in samples[1:]) >= 2
        assert max(x["generation_tokens_per_second"] for x in samples) > 0
        history = (await client.get("/v1/kv_cache/history?seconds=60")).json()
    times = [x["time"] for x in history["samples"]]
    assert times == sorted(set(times))
    assert len(times) <= 61
    assert max(x["used_tokens"] for x in history["samples"]) > 0
    short = httpx.get(f"{plain.url}/v1/kv_cache/history?seconds=1").json()
    assert len(short["samples"]) <= 1
    with httpx.Client(base_url=plain.url) as http:
        idle(http)


async def test_a_full_pool_shows_waiting_requests(plain: ServerProcess) -> None:
    """More than fits: the pool fills, the rest waits or is preempted, and all of it ends."""
    async with httpx.AsyncClient(base_url=plain.url, timeout=120) as client:
        async with running(client, (700,) * 10, limit=300, seed=50, started=4):
            seen = []
            for _ in range(8):
                cache = (await client.get("/v1/kv_cache")).json()
                seen.append(cache)
                await asyncio.sleep(0.1)
        assert max(x["requests"]["waiting"] for x in seen) > 0
        fullest = max(x["blocks"]["used"] for x in seen)
        assert fullest <= seen[0]["blocks"]["total"] - 1
        assert fullest >= 0.6 * seen[0]["blocks"]["total"]


def test_prefix_cache_hits_are_counted(http: httpx.Client) -> None:
    idle(http)
    before = http.get("/v1/kv_cache").json()["prefix_cache"]
    body = {"model": NAME, "prompt": "an often repeated beginning " * 20, "max_tokens": 1}
    for _ in range(2):
        assert http.post("/v1/completions", json=body).status_code == 200
    time.sleep(0.2)
    after = http.get("/v1/kv_cache").json()["prefix_cache"]
    assert after["queries"] - before["queries"] == 2 * len(body["prompt"])
    assert after["hits"] - before["hits"] == len(body["prompt"]) // 128 * 128
    assert 0 < after["hit_rate"] <= 1


def test_gauges_agree_with_the_api(http: httpx.Client) -> None:
    cache = idle(http)
    time.sleep(1.2)
    found = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("vllm_eigen:"):
                assert sample.labels["model_name"] == NAME
                found.setdefault(sample.name.removeprefix("vllm_eigen:"), []).append(sample.value)
    assert found["pool_bytes"] == [cache["pool_bytes"]]
    assert found["capacity_tokens"] == [cache["tokens"]["capacity"]]
    assert found["used_bytes"] == [0]
    assert found["kv_ratio"] == [cache["kv_ratio"]]
    assert len(found["layer_rank"]) == 2 * len(cache["layers"])
    assert len(found["layer_bits"]) == 2 * len(cache["layers"])


def test_start_explains_the_pool(plain: ServerProcess) -> None:
    lines = [line for line in plain.log.read_text().splitlines() if "KV pool" in line]
    assert len(lines) == 1
    assert "15.8 MiB = 5.0k tokens; uncompressed it would hold 2.7k" in lines[0]
