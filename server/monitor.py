"""The statistics of one API process: a sample a second, its history, and who waits for the next.

Every API process of a server runs a monitor of its own over the shared counters, on whole
seconds, so their histories agree and any of them can answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from server.figures import Figures
from server.live import Live, read_live
from server.schemas import History, KVCache, Sample

logger = logging.getLogger("vllm.eigen")

INTERVAL_SECONDS = 1
HISTORY_SECONDS = 3600


class Monitor:
    """Samples the engine's counters, remembers the last hour, and wakes the event streams.

    Args:
        figures: the engine's layout.
        publish: called with every answer, once a second; feeds the Prometheus gauges.
        read: where the counters come from.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        figures: Figures,
        publish: Callable[[KVCache], None] = lambda cache: None,
        read: Callable[[], Live] = read_live,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.figures = figures
        self._publish = publish
        self._read = read
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=HISTORY_SECONDS // INTERVAL_SECONDS)
        self._before: tuple[float, Live] | None = None
        self._ticked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sample, on the running event loop; its end ends the task."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="eigen-monitor")

    def tick(self) -> Sample:
        """Take one sample now and remember it."""
        now, live = self._clock(), self._read()
        sample = self.figures.sample(now, live, self._before)
        self._before = (now, live)
        self._samples.append(sample)
        self._publish(self.figures.answer(sample, live))
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()
        return sample

    def now(self) -> KVCache:
        """The figures of this moment, token rates those of the last whole second."""
        live = self._read()
        sample = self.figures.sample(self._clock(), live)
        if self._samples:
            last = self._samples[-1]
            rates = ("prompt_tokens_per_second", "generation_tokens_per_second")
            sample = sample.model_copy(update={name: getattr(last, name) for name in rates})
        return self.figures.answer(sample, live)

    def latest(self) -> Sample:
        """The newest sample; takes one if there is none yet."""
        return self._samples[-1] if self._samples else self.tick()

    def history(self, seconds: int) -> History:
        """The samples of the last `seconds`, oldest first."""
        since = self._clock() - seconds
        recent = islice(reversed(self._samples), -(-seconds // INTERVAL_SECONDS))
        samples = [sample for sample in recent if sample.time >= since]
        return History(
            interval_seconds=INTERVAL_SECONDS,
            capacity_seconds=HISTORY_SECONDS,
            pool_bytes=self.figures.pool_bytes,
            samples=samples[::-1],
        )

    async def next_sample(self, timeout: float = 2.0 * INTERVAL_SECONDS) -> Sample:
        """Wait for the next sample; after `timeout` seconds without one, the newest again."""
        try:
            await asyncio.wait_for(self._ticked.wait(), timeout)
        except TimeoutError:
            logger.debug("no sample of the KV cache in %.1f s", timeout)
        return self.latest()

    async def _run(self) -> None:
        """Sample on every whole second, until cancelled; one failure is no end."""
        due = 0
        while True:
            # Timers may fire a little early: without `due + 1` that second would count twice.
            now = self._clock()
            following = int(now) + INTERVAL_SECONDS
            due = due + 1 if due == following - INTERVAL_SECONDS else following
            await asyncio.sleep(due - now)
            try:
                self.tick()
            except Exception:  # the statistics must never take the server down
                logger.warning("a sample of the KV cache failed", exc_info=True)
