"""Layout, counters, samples and history, without an engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from server.figures import Figures
from server.live import Live, from_families
from server.monitor import HISTORY_SECONDS, Monitor
from vllm_eigen.errors import EngineError

ROW = {
    "name": "layers.0", "num_blocks": 11, "block_size": 16, "bytes_per_token": 60, "rank_k": 20,
    "rank_v": 10, "full_elements": 64, "torch_dtype": "bfloat16",
}  # fmt: skip


def figures(ranks: int = 1, **options: int) -> Figures:
    rows = [[ROW, {**ROW, "name": "layers.1", "bytes_per_token": 40}] for _ in range(ranks)]
    return Figures(rows, full_element_size=2, max_model_len=100, **options)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_ranks_add_up() -> None:
    one, two = figures(), figures(ranks=2)
    assert (one.bytes_per_token, one.full_bytes_per_token) == (100, 256)
    assert (two.bytes_per_token, two.full_bytes_per_token) == (200, 512)
    assert [layer.bytes_per_token for layer in two.layers] == [120, 80]
    assert one.pool_bytes == 11 * 16 * 100
    assert one.uncompressed_capacity == 11 * 16 * 100 // (16 * 256) * 16


def test_engines_share_the_pool() -> None:
    pool = figures(pool_blocks=22, num_engines=2)
    live = Live(usage=1.0, running=3)  # one engine full, or both half full
    sample = pool.sample(1.0, live)
    assert sample.used_blocks == 10  # of 20: each engine keeps one block back
    cache = pool.answer(sample, live)
    assert cache.blocks.total == 22
    assert cache.engines == 2
    assert cache.saved_bytes == 160 * (256 - 100)
    assert cache.concurrency.possible == 22 * 16 / 112


def test_no_cache_is_an_error() -> None:
    with pytest.raises(EngineError, match="no attention layer"):
        Figures([[]], full_element_size=2, max_model_len=100)


def test_counters_of_several_engines() -> None:
    registry = CollectorRegistry()
    usage = Gauge("vllm:kv_cache_usage_perc", "", ["engine"], registry=registry)
    running = Gauge("vllm:num_requests_running", "", ["engine"], registry=registry)
    preempted = Counter("vllm:num_preemptions", "", ["engine"], registry=registry)
    for engine, share in (("0", 0.25), ("1", 0.75)):
        usage.labels(engine).set(share)
        running.labels(engine).set(2)
        preempted.labels(engine).inc(3)
    live = from_families(registry.collect())
    assert live == Live(usage=1.0, running=4, preemptions=6)
    assert from_families([]) == Live()


def test_history_keeps_an_hour_and_rates_are_per_second() -> None:
    clock, live = Clock(), [Live()]
    monitor = Monitor(figures(), read=lambda: live[0], clock=clock)
    for _ in range(HISTORY_SECONDS + 10):
        clock.now += 2.0
        live[0] = replace(live[0], generation_tokens=live[0].generation_tokens + 30)
        monitor.tick()
    history = monitor.history(HISTORY_SECONDS)
    assert len(history.samples) == HISTORY_SECONDS // 2 + 1
    assert history.samples[-1].time == clock.now
    assert history.samples[-1].generation_tokens_per_second == 15.0
    assert len(monitor.history(10).samples) == 6
    assert monitor.now().throughput.generation_tokens_per_second == 15.0


def test_a_failing_sample_does_not_end_the_monitor() -> None:
    calls = 0

    def read() -> Live:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("gone")
        return Live(running=calls)

    async def run() -> int:
        monitor = Monitor(figures(), read=read)
        monitor.start()
        async with asyncio.timeout(10):
            while not monitor.history(60).samples:
                await asyncio.sleep(0.05)
        return (await monitor.next_sample()).running

    assert asyncio.run(run()) >= 2
