# SPDX-License-Identifier: Apache-2.0
"""KV-cache statistics: the engine's metrics applied to its cache layout.

The only place that turns vLLM's numbers (a share of the pool, counters) into tokens, bytes and
rates.
"""

from __future__ import annotations

from vllm_eigen.server.stats.engine_metrics import EngineMetrics
from vllm_eigen.server.stats.layout import KVLayout
from vllm_eigen.server.stats.schemas import (
    Blocks,
    Concurrency,
    KVCache,
    PrefixCache,
    Requests,
    Sample,
    Throughput,
    Tokens,
    Uncompressed,
)


def kv_sample(
    layout: KVLayout,
    now: float,
    metrics: EngineMetrics,
    previous: tuple[float, EngineMetrics] | None = None,
) -> Sample:
    """The statistics at Unix time `now`; token rates are those since `previous`."""
    usage = min(metrics.usage / layout.num_engines, 1.0)
    # vLLM counts use without the null block of each engine.
    used = round(usage * max(0, layout.num_blocks - layout.num_engines))
    tokens = layout.tokens_of(used)
    used_bytes = layout.bytes_of(used)
    uncompressed_bytes = tokens * layout.uncompressed_bytes_per_token
    prompt, generation = _token_rates(now, metrics, previous)
    return Sample(
        time=now,
        used_blocks=used,
        used_tokens=tokens,
        used_bytes=used_bytes,
        uncompressed_bytes=uncompressed_bytes,
        saved_bytes=uncompressed_bytes - used_bytes,
        running=metrics.running,
        waiting=metrics.waiting,
        preemptions=metrics.preemptions,
        prefix_hit_rate=metrics.prefix_hit_rate,
        prompt_tokens_per_second=prompt,
        generation_tokens_per_second=generation,
    )


def kv_cache(layout: KVLayout, sample: Sample, metrics: EngineMetrics) -> KVCache:
    """Everything about the pool at the time of `sample`, which was made from `metrics`."""
    sequence_tokens = -(-layout.max_model_len // layout.block_size) * layout.block_size
    return KVCache(
        time=sample.time,
        pool_bytes=layout.pool_bytes,
        block_size=layout.block_size,
        blocks=Blocks(total=layout.num_blocks, used=sample.used_blocks),
        tokens=Tokens(capacity=layout.capacity, used=sample.used_tokens),
        bytes_per_token=layout.bytes_per_token,
        uncompressed_bytes_per_token=layout.uncompressed_bytes_per_token,
        kv_ratio=layout.kv_ratio,
        kv_cache_dtype=layout.dtype,
        used_bytes=sample.used_bytes,
        saved_bytes=sample.saved_bytes,
        uncompressed=Uncompressed(
            tokens_capacity=layout.uncompressed_capacity, used_bytes=sample.uncompressed_bytes
        ),
        requests=Requests(
            running=sample.running, waiting=sample.waiting, preemptions=sample.preemptions
        ),
        concurrency=Concurrency(
            now=sample.running,
            possible=layout.capacity / sequence_tokens,
            possible_uncompressed=layout.uncompressed_capacity / sequence_tokens,
        ),
        prefix_cache=PrefixCache(
            queries=metrics.prefix_queries,
            hits=metrics.prefix_hits,
            hit_rate=sample.prefix_hit_rate,
        ),
        throughput=Throughput(
            prompt_tokens_per_second=sample.prompt_tokens_per_second,
            generation_tokens_per_second=sample.generation_tokens_per_second,
        ),
        engines=layout.num_engines,
        max_model_len=layout.max_model_len,
        compressed_layers=layout.compressed_layers,
        layers=list(layout.layers),
    )


def _token_rates(
    now: float, metrics: EngineMetrics, previous: tuple[float, EngineMetrics] | None
) -> tuple[float, float]:
    """Prompt and generated tokens per second since `previous`."""
    if previous is None or now <= previous[0]:
        return 0.0, 0.0
    time, earlier = previous
    return (
        max(0, metrics.prompt_tokens - earlier.prompt_tokens) / (now - time),
        max(0, metrics.generation_tokens - earlier.generation_tokens) / (now - time),
    )
