# SPDX-License-Identifier: Apache-2.0
"""The engine's metrics as numbers, read from vLLM's own Prometheus metrics.

vLLM hands the scheduler's statistics to one API process per step and shares them between its API
processes through Prometheus; reading them there, any process answers for the whole server. Only
the metrics needed are collected: the histograms beside them would cost milliseconds.
"""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

USAGE = "vllm:kv_cache_usage_perc"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
PREEMPTIONS = "vllm:num_preemptions_total"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
GENERATION_TOKENS = "vllm:generation_tokens_total"
METRIC_NAMES = (
    USAGE,
    RUNNING,
    WAITING,
    PREEMPTIONS,
    PREFIX_QUERIES,
    PREFIX_HITS,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
)


@dataclass(frozen=True)
class EngineMetrics:
    """Sums over the engines; counters run from the start of the server."""

    usage: float = 0.0
    """Use of the block pool: a sum of shares, each 0 to 1."""
    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Hits / queries, at most 1; 0 before the first query."""
        return min(1.0, self.prefix_hits / self.prefix_queries) if self.prefix_queries else 0.0


def read_engine_metrics() -> EngineMetrics:
    """The current metrics, of all API processes together."""
    return sum_families(_collect(os.environ.get("PROMETHEUS_MULTIPROC_DIR")))


def sum_families(families: Iterable[Any]) -> EngineMetrics:
    """Add up collected Prometheus metric families; a metric without a sample is 0."""
    sums: dict[str, float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            if sample.name in METRIC_NAMES:
                sums[sample.name] += sample.value
    return EngineMetrics(
        usage=max(sums[USAGE], 0.0),
        running=round(sums[RUNNING]),
        waiting=round(sums[WAITING]),
        preemptions=round(sums[PREEMPTIONS]),
        prefix_queries=round(sums[PREFIX_QUERIES]),
        prefix_hits=round(sums[PREFIX_HITS]),
        prompt_tokens=round(sums[PROMPT_TOKENS]),
        generation_tokens=round(sums[GENERATION_TOKENS]),
    )


def _collect(shared_folder: str | None) -> Iterable[Any]:
    """Metric families of this process, or of all that share a multiprocess folder."""
    from prometheus_client import REGISTRY, multiprocess

    if shared_folder is None:
        return REGISTRY.restricted_registry(METRIC_NAMES).collect()
    files = [
        path
        for pattern in ("gauge_mostrecent_*.db", "counter_*.db")
        for path in glob.glob(os.path.join(glob.escape(shared_folder), pattern))
    ]
    merged: Iterable[Any] = multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    return merged
