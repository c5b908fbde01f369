"""The engine's live counters, from vLLM's own Prometheus metrics.

vLLM hands the scheduler's statistics to one API process a step and shares them between its API
processes through Prometheus; reading them there, any process answers for the whole server. Only
the few metrics needed are collected: the histograms beside them would cost milliseconds.
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
NAMES = (
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
class Live:
    """Sums over the engines; counters run from the start of the server."""

    usage: float = 0.0
    """Pool use, 0 to 1 for each engine."""
    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


def read_live() -> Live:
    """The current counters, of all API processes together."""
    return from_families(_collect(os.environ.get("PROMETHEUS_MULTIPROC_DIR")))


def from_families(families: Iterable[Any]) -> Live:
    """Add up collected Prometheus metric families; metrics without a sample count as 0."""
    sums: dict[str, float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            if sample.name in NAMES:
                sums[sample.name] += sample.value
    return Live(
        usage=max(sums[USAGE], 0.0),
        running=round(sums[RUNNING]),
        waiting=round(sums[WAITING]),
        preemptions=round(sums[PREEMPTIONS]),
        prefix_queries=round(sums[PREFIX_QUERIES]),
        prefix_hits=round(sums[PREFIX_HITS]),
        prompt_tokens=round(sums[PROMPT_TOKENS]),
        generation_tokens=round(sums[GENERATION_TOKENS]),
    )


def _collect(shared: str | None) -> Iterable[Any]:
    """Metric families of this process, or of all that share a folder."""
    from prometheus_client import REGISTRY, multiprocess

    if shared is None:
        return REGISTRY.restricted_registry(NAMES).collect()
    files = [
        path
        for pattern in ("gauge_mostrecent_*.db", "counter_*.db")
        for path in glob.glob(os.path.join(glob.escape(shared), pattern))
    ]
    merged: Iterable[Any] = multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    return merged
