# SPDX-License-Identifier: Apache-2.0
"""The KV-cache statistics as pydantic models: built in `stats`, answered by `api`.

The same models are the OpenAPI schema of `/v1/kv_cache`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Stats(BaseModel):
    model_config = ConfigDict(frozen=True)


class Blocks(_Stats):
    """Blocks of the pool. vLLM reserves one per engine as its null block, neither free nor used."""

    total: int = Field(ge=0, description="blocks in the pool")
    used: int = Field(ge=0, description="blocks held by running requests")


class Tokens(_Stats):
    """The pool counted in tokens."""

    capacity: int = Field(ge=0, description="tokens the pool can hold")
    used: int = Field(ge=0, description="tokens in used blocks; partly filled blocks count as full")


class LayerCache(_Stats):
    """The KV cache of one layer."""

    layer: str = Field(description="name of the attention layer in the model")
    rank_k: int = Field(ge=1, description="cached key elements per latent head and token")
    rank_v: int = Field(ge=1, description="cached value elements per latent head and token")
    bits_k: float = Field(gt=0, description="mean bits of a cached key element, scales included")
    bits_v: float = Field(gt=0, description="mean bits of a cached value element, scales included")
    bytes_per_token: int = Field(ge=1, description="bytes per token, over all workers")
    compressed: bool = Field(description="whether it is compressed; others are the base model's")


class CompressedLayers(_Stats):
    """The layers that are compressed, without the others."""

    count: int = Field(ge=0, description="layers that are compressed")
    kept: int = Field(ge=0, description="layers that are as the base model has them")
    bytes_per_token: int = Field(ge=0, description="cached bytes per token")
    uncompressed_bytes_per_token: int = Field(ge=0, description="the same of the base model")
    kv_ratio: float = Field(ge=0, description="bytes_per_token / uncompressed_bytes_per_token")


class Sample(_Stats):
    """Everything that changes while serving, at one time."""

    time: float = Field(description="Unix time, seconds")
    used_blocks: int = Field(ge=0, description="blocks held by running requests")
    used_tokens: int = Field(ge=0, description="tokens in used blocks")
    used_bytes: int = Field(ge=0, description="bytes of used blocks")
    uncompressed_bytes: int = Field(ge=0, description="bytes the same tokens need uncompressed")
    saved_bytes: int = Field(description="uncompressed_bytes - used_bytes")
    running: int = Field(ge=0, description="requests being computed")
    waiting: int = Field(ge=0, description="requests queued, e.g. for lack of free blocks")
    preemptions: int = Field(ge=0, description="preemptions since the server started")
    prefix_hit_rate: float = Field(
        ge=0, le=1, description="prompt tokens found in the prefix cache / tokens looked up"
    )
    prompt_tokens_per_second: float = Field(ge=0, description="over the second before `time`")
    generation_tokens_per_second: float = Field(ge=0, description="over the second before `time`")


class Uncompressed(_Stats):
    """The same pool and the same traffic without compression."""

    tokens_capacity: int = Field(ge=0, description="tokens the pool would hold")
    used_bytes: int = Field(ge=0, description="bytes the tokens in use would need")


class Requests(_Stats):
    """The scheduler's queue."""

    running: int = Field(ge=0, description="requests being computed")
    waiting: int = Field(ge=0, description="requests queued")
    preemptions: int = Field(ge=0, description="preemptions since the server started")


class Concurrency(_Stats):
    """Sequences at once; `possible` assumes `max_model_len` tokens each."""

    now: int = Field(ge=0, description="sequences being computed")
    possible: float = Field(ge=0, description="full-length sequences the pool holds")
    possible_uncompressed: float = Field(ge=0, description="the same without compression")


class PrefixCache(_Stats):
    """Use of vLLM's prefix cache since the server started, in prompt tokens."""

    queries: int = Field(ge=0, description="tokens looked up")
    hits: int = Field(ge=0, description="tokens found")
    hit_rate: float = Field(ge=0, le=1, description="hits / queries, 0 before the first query")


class Throughput(_Stats):
    """Tokens per second, over the last second."""

    prompt_tokens_per_second: float = Field(ge=0)
    generation_tokens_per_second: float = Field(ge=0)


class KVCache(_Stats):
    """`GET /v1/kv_cache`: the KV cache as the engine allocated and uses it."""

    time: float = Field(description="Unix time of the statistics, seconds")
    pool_bytes: int = Field(ge=0, description="bytes of the whole pool, over all ranks and engines")
    block_size: int = Field(ge=1, description="tokens per block")
    blocks: Blocks
    tokens: Tokens
    bytes_per_token: int = Field(
        ge=1,
        description="cached bytes per token, all layers; of a model with sliding windows, what a "
        "sequence of max_model_len takes of the pool, by its tokens",
    )
    uncompressed_bytes_per_token: int = Field(
        ge=1, description="the same for the base model at its own element type"
    )
    kv_ratio: float = Field(gt=0, description="bytes_per_token / uncompressed_bytes_per_token")
    kv_cache_dtype: str = Field(description="element type of the cache, `coded` for codes")
    used_bytes: int = Field(ge=0, description="bytes of used blocks")
    saved_bytes: int = Field(description="uncompressed.used_bytes - used_bytes")
    uncompressed: Uncompressed
    requests: Requests
    concurrency: Concurrency
    prefix_cache: PrefixCache
    throughput: Throughput
    engines: int = Field(ge=1, description="data-parallel engines behind this server")
    max_model_len: int = Field(ge=1, description="tokens of the longest sequence served")
    compressed_layers: CompressedLayers
    layers: list[LayerCache]


class History(_Stats):
    """`GET /v1/kv_cache/history`: one sample per second, oldest first."""

    interval_seconds: int = Field(ge=1, description="time between samples")
    capacity_seconds: int = Field(ge=1, description="longest time the server keeps")
    pool_bytes: int = Field(ge=0, description="bytes of the whole pool")
    samples: list[Sample]
