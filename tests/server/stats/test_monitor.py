# SPDX-License-Identifier: Apache-2.0
"""Layout, engine metrics, samples and history, without an engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from vllm_eigen.common.errors import EngineError
from vllm_eigen.server.stats.engine_metrics import EngineMetrics, sum_families
from vllm_eigen.server.stats.kv_stats import kv_cache, kv_sample
from vllm_eigen.server.stats.layout import KVLayout, Windows, layout_of_workers
from vllm_eigen.server.stats.monitor import HISTORY_SECONDS, Monitor

ROW = {
    "name": "layers.0", "num_blocks": 11, "block_size": 16, "bytes_per_token": 60, "rank_k": 20,
    "rank_v": 10, "bits_k": 16.0, "bits_v": 16.0, "full_elements": 64, "torch_dtype": "bfloat16",
    "compressed": True, "windowed": False, "pool_bytes": 11 * 16 * 100,
}  # fmt: skip


def layout(ranks: int = 1, **options: int) -> KVLayout:
    rows = [[ROW, {**ROW, "name": "layers.1", "bytes_per_token": 40}] for _ in range(ranks)]
    return layout_of_workers(rows, element_size=2, max_model_len=100, **options)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_ranks_add_up() -> None:
    one, two = layout(), layout(ranks=2)
    assert (one.bytes_per_token, one.uncompressed_bytes_per_token) == (100, 256)
    assert (two.bytes_per_token, two.uncompressed_bytes_per_token) == (200, 512)
    assert [layer.bytes_per_token for layer in two.layers] == [120, 80]
    assert one.pool_bytes == 11 * 16 * 100
    assert one.uncompressed_capacity == 11 * 16 * 100 // (16 * 256) * 16


def test_engines_share_the_pool() -> None:
    pool = layout(num_blocks=22, num_engines=2)
    metrics = EngineMetrics(usage=1.0, running=3)  # one engine full, or both half full
    sample = kv_sample(pool, 1.0, metrics)
    assert sample.used_blocks == 10  # of 20: each engine has a null block
    cache = kv_cache(pool, sample, metrics)
    assert cache.blocks.total == 22
    assert cache.engines == 2
    assert cache.saved_bytes == 160 * (256 - 100)
    assert cache.concurrency.possible == 22 * 16 / 112


def test_layers_that_are_kept_count_apart() -> None:
    """Two layers at a quarter of the bytes beside two with windows of 32: pages of one size."""
    small = {**ROW, "num_blocks": 40, "block_size": 64, "bytes_per_token": 32}
    kept = {**ROW, "num_blocks": 40, "bytes_per_token": 128, "compressed": False, "windowed": True}
    rows = [{**small, "name": "layers.1"}, {**small, "name": "layers.3"}]
    rows += [{**kept, "name": "layers.0"}, {**kept, "name": "layers.2"}]
    pool_bytes = 40 * 2 * 16 * 128
    rows = [{**row, "pool_bytes": pool_bytes} for row in rows]
    options: dict[str, Any] = {
        "element_size": 2,
        "max_model_len": 640,
        "num_blocks": 40,
        "block_size": 16,
        "windows": Windows(window=32, in_flight=16),
    }
    pool = layout_of_workers([rows], **options)
    cache = kv_cache(pool, kv_sample(pool, 1.0, EngineMetrics(usage=1.0)), EngineMetrics())
    assert cache.compressed_layers.kv_ratio == 0.25
    assert (cache.compressed_layers.count, cache.compressed_layers.kept) == (2, 2)
    # A sequence: 640 / 64 blocks, and 47 tokens in blocks of 16 and one block more; 640 / 16.
    assert cache.pool_bytes == pool_bytes
    assert cache.tokens.capacity == int(40 / (10 + 4) * 640)
    assert cache.uncompressed.tokens_capacity == int(40 / (40 + 4) * 640)
    assert cache.kv_ratio == pytest.approx(14 / 44, rel=0.01)
    assert cache.used_bytes == 39 * 2 * 16 * 128
    base = [{**row, "block_size": 16, "bytes_per_token": 128, "compressed": False} for row in rows]
    plain = layout_of_workers([base], **options)
    assert plain.capacity == plain.uncompressed_capacity == int(40 / (40 + 4) * 640)


def test_no_cache_is_an_error() -> None:
    with pytest.raises(EngineError, match="no attention layer"):
        layout_of_workers([[]], element_size=2, max_model_len=100)


def test_metrics_of_several_engines() -> None:
    registry = CollectorRegistry()
    usage = Gauge("vllm:kv_cache_usage_perc", "", ["engine"], registry=registry)
    running = Gauge("vllm:num_requests_running", "", ["engine"], registry=registry)
    preempted = Counter("vllm:num_preemptions", "", ["engine"], registry=registry)
    for engine, share in (("0", 0.25), ("1", 0.75)):
        usage.labels(engine).set(share)
        running.labels(engine).set(2)
        preempted.labels(engine).inc(3)
    metrics = sum_families(registry.collect())
    assert metrics == EngineMetrics(usage=1.0, running=4, preemptions=6)
    assert sum_families([]) == EngineMetrics()


def test_history_keeps_an_hour_and_rates_are_per_second() -> None:
    clock, metrics = Clock(), [EngineMetrics()]
    monitor = Monitor(layout(), read_metrics=lambda: metrics[0], clock=clock)
    for _ in range(HISTORY_SECONDS + 10):
        clock.now += 2.0
        metrics[0] = replace(metrics[0], generation_tokens=metrics[0].generation_tokens + 30)
        monitor.take_sample()
    history = monitor.history(HISTORY_SECONDS)
    assert len(history.samples) == HISTORY_SECONDS // 2 + 1
    assert history.samples[-1].time == clock.now
    assert history.samples[-1].generation_tokens_per_second == 15.0
    assert len(monitor.history(10).samples) == 6
    assert monitor.snapshot().throughput.generation_tokens_per_second == 15.0


def test_a_failing_sample_does_not_end_the_monitor() -> None:
    calls = 0

    def read() -> EngineMetrics:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("gone")
        return EngineMetrics(running=calls)

    async def run() -> int:
        monitor = Monitor(layout(), read_metrics=read)
        monitor.start()
        async with asyncio.timeout(10):
            while not monitor.history(60).samples:
                await asyncio.sleep(0.05)
        return (await monitor.next_sample()).running

    assert asyncio.run(run()) >= 2
