# SPDX-License-Identifier: Apache-2.0
"""The statistics of one API process: one sample per second, its history, and waiting for the next.

Every API process of a server runs a monitor of its own over the shared metrics, on whole
seconds, so their histories agree and any of them can answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from vllm_eigen.server.stats.engine_metrics import EngineMetrics, read_engine_metrics
from vllm_eigen.server.stats.kv_stats import kv_cache, kv_sample
from vllm_eigen.server.stats.layout import KVLayout
from vllm_eigen.server.stats.schemas import History, KVCache, Sample

logger = logging.getLogger("vllm.eigen")

INTERVAL_SECONDS = 1
HISTORY_SECONDS = 3600


class Monitor:
    """Samples the engine's metrics, keeps the last hour, and wakes the event streams.

    Args:
        layout: the engine's KV cache.
        publish: called with the statistics of every sample; sets the Prometheus gauges.
        read_metrics: where the engine's metrics come from.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        layout: KVLayout,
        publish: Callable[[KVCache], None] = lambda cache: None,
        read_metrics: Callable[[], EngineMetrics] = read_engine_metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._layout = layout
        self._publish = publish
        self._read_metrics = read_metrics
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=HISTORY_SECONDS // INTERVAL_SECONDS)
        self._previous: tuple[float, EngineMetrics] | None = None
        self._sampled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sample, on the running event loop; its end ends the task."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="eigen-monitor")

    def take_sample(self) -> Sample:
        """Sample now, keep the sample, publish it and wake who waits."""
        now, metrics = self._clock(), self._read_metrics()
        sample = kv_sample(self._layout, now, metrics, self._previous)
        self._previous = (now, metrics)
        self._samples.append(sample)
        self._publish(kv_cache(self._layout, sample, metrics))
        sampled, self._sampled = self._sampled, asyncio.Event()
        sampled.set()
        return sample

    def snapshot(self) -> KVCache:
        """The statistics of this moment, token rates those of the last whole second."""
        metrics = self._read_metrics()
        sample = kv_sample(self._layout, self._clock(), metrics)
        if self._samples:
            last = self._samples[-1]
            rates = ("prompt_tokens_per_second", "generation_tokens_per_second")
            sample = sample.model_copy(update={name: getattr(last, name) for name in rates})
        return kv_cache(self._layout, sample, metrics)

    def latest(self) -> Sample:
        """The newest sample; takes one if there is none yet."""
        return self._samples[-1] if self._samples else self.take_sample()

    def history(self, seconds: int) -> History:
        """The samples of the last `seconds`, oldest first."""
        since = self._clock() - seconds
        recent = islice(reversed(self._samples), -(-seconds // INTERVAL_SECONDS))
        samples = [sample for sample in recent if sample.time >= since]
        return History(
            interval_seconds=INTERVAL_SECONDS,
            capacity_seconds=HISTORY_SECONDS,
            pool_bytes=self._layout.pool_bytes,
            samples=samples[::-1],
        )

    async def next_sample(self, timeout: float = 2.0 * INTERVAL_SECONDS) -> Sample:
        """Wait for the next sample; after `timeout` seconds without one, the newest again."""
        try:
            await asyncio.wait_for(self._sampled.wait(), timeout)
        except TimeoutError:
            logger.debug("no sample of the KV cache in %.1f s", timeout)
        return self.latest()

    async def _run(self) -> None:
        """Sample on every whole second, until cancelled; a failed sample is logged."""
        due = 0
        while True:
            # Timers may fire a little early: without `due + 1` that second would be sampled twice.
            now = self._clock()
            next_second = int(now) + INTERVAL_SECONDS
            due = due + 1 if due == next_second - INTERVAL_SECONDS else next_second
            await asyncio.sleep(due - now)
            try:
                self.take_sample()
            except Exception:  # the statistics must never take the server down
                logger.warning("a sample of the KV cache failed", exc_info=True)
