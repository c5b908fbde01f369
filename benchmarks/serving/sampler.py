# SPDX-License-Identifier: Apache-2.0
"""Reads `/v1/kv_cache` and `/metrics` of a server while a load runs on it."""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.common.errors import EngineError

INTERVAL_SECONDS = 0.25


@dataclass(frozen=True)
class ServerStats:
    """What the samples of one run come to.

    Attributes:
        samples: taken while requests ran.
        missed: times the server did not answer in time.
        peak_running, mean_running: sequences computed at once.
        peak_waiting: requests queued by the scheduler.
        peak_tokens: tokens in used blocks.
        peak_use: used share of the pool's blocks, 0 to 1.
        preemptions: sequences put back for lack of blocks, in this run.
        prefix_hits: prompt tokens found in the prefix cache, in this run.
        generation_tokens: tokens the engine made in this run, by its own count.
    """

    samples: int
    missed: int
    peak_running: int
    mean_running: float
    peak_waiting: int
    peak_tokens: int
    peak_use: float
    preemptions: int
    prefix_hits: int
    generation_tokens: int


class Sampler:
    """Samples from entering the block to leaving it; then `result`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sampler", daemon=True)
        self._found: list[dict[str, Any]] = []
        self._missed = 0
        self._before: dict[str, int] = {}
        self._after: dict[str, int] = {}

    def __enter__(self) -> Sampler:
        self._before = self._endpoint.counters()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self._after = self._endpoint.counters()

    def result(self) -> ServerStats:
        """Stats of the block that has ended.

        Raises:
            EngineError: no sample saw a request running, so the run was too short to measure.
        """
        busy = [item for item in self._found if item["requests"]["running"] > 0]
        if not busy:
            raise EngineError(
                "no sample saw a running request: the load was over at once; use more or longer "
                "requests (--num-prompts, --output-len)"
            )
        running = [int(item["requests"]["running"]) for item in busy]
        return ServerStats(
            samples=len(busy),
            missed=self._missed,
            peak_running=max(running),
            mean_running=statistics.fmean(running),
            peak_waiting=max(int(item["requests"]["waiting"]) for item in busy),
            peak_tokens=max(int(item["tokens"]["used"]) for item in busy),
            peak_use=max(item["blocks"]["used"] / item["blocks"]["total"] for item in busy),
            preemptions=self._after["preemptions"] - self._before["preemptions"],
            prefix_hits=self._after["prefix_hits"] - self._before["prefix_hits"],
            generation_tokens=(
                self._after["generation_tokens"] - self._before["generation_tokens"]
            ),
        )

    def _loop(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            try:
                self._found.append(self._endpoint.kv_cache())
            except EngineError:  # counted and reported, and the load goes on
                self._missed += 1
