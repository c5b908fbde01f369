"""What the KV-cache routes answer; these models are the OpenAPI schema."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Blocks(_Answer):
    """Pages of the pool. One block an engine is kept back by vLLM, neither free nor used."""

    total: int = Field(ge=0, description="blocks in the pool")
    used: int = Field(ge=0, description="blocks held by running requests")


class Tokens(_Answer):
    """The pool counted in tokens."""

    capacity: int = Field(ge=0, description="tokens the pool can hold")
    used: int = Field(ge=0, description="tokens in used blocks, partly filled blocks counted full")


class LayerCache(_Answer):
    """One layer's share of the cache."""

    layer: str = Field(description="name of the attention layer in the model")
    rank_k: int = Field(ge=1, description="cached key elements a latent head and token")
    rank_v: int = Field(ge=1, description="cached value elements a latent head and token")
    bytes_per_token: int = Field(ge=1, description="bytes a token, over all ranks")


class Sample(_Answer):
    """Everything that changes while serving, at one moment."""

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


class Uncompressed(_Answer):
    """The same pool and the same traffic without compression."""

    tokens_capacity: int = Field(ge=0, description="tokens the pool would hold")
    used_bytes: int = Field(ge=0, description="bytes the tokens in use would need")


class Requests(_Answer):
    """The scheduler's queue."""

    running: int = Field(ge=0, description="requests being computed")
    waiting: int = Field(ge=0, description="requests queued")
    preemptions: int = Field(ge=0, description="preemptions since the server started")


class Concurrency(_Answer):
    """Sequences at once. Possible counts those of full length, `max_model_len` tokens."""

    now: int = Field(ge=0, description="sequences being computed")
    possible: float = Field(ge=0, description="full-length sequences the pool holds")
    possible_uncompressed: float = Field(ge=0, description="the same without compression")


class PrefixCache(_Answer):
    """Use of vLLM's prefix cache since the server started, in prompt tokens."""

    queries: int = Field(ge=0, description="tokens looked up")
    hits: int = Field(ge=0, description="tokens found")
    hit_rate: float = Field(ge=0, le=1, description="hits / queries, 0 before the first query")


class Throughput(_Answer):
    """Tokens a second, over the last second."""

    prompt_tokens_per_second: float = Field(ge=0)
    generation_tokens_per_second: float = Field(ge=0)


class KVCache(_Answer):
    """`GET /v1/kv_cache`: the KV cache as the engine allocated and uses it."""

    time: float = Field(description="Unix time of the live figures, seconds")
    pool_bytes: int = Field(ge=0, description="bytes of the whole pool, over all ranks")
    block_size: int = Field(ge=1, description="tokens a block")
    blocks: Blocks
    tokens: Tokens
    bytes_per_token: int = Field(ge=1, description="cached bytes a token, all layers")
    uncompressed_bytes_per_token: int = Field(
        ge=1, description="the same for the base model at its own element type"
    )
    kv_ratio: float = Field(gt=0, description="bytes_per_token / uncompressed_bytes_per_token")
    kv_cache_dtype: str = Field(description="element type of the cache")
    used_bytes: int = Field(ge=0, description="bytes of used blocks")
    saved_bytes: int = Field(description="bytes the tokens in use would need more, uncompressed")
    uncompressed: Uncompressed
    requests: Requests
    concurrency: Concurrency
    prefix_cache: PrefixCache
    throughput: Throughput
    engines: int = Field(ge=1, description="data-parallel engines this server feeds")
    max_model_len: int = Field(ge=1, description="tokens of the longest sequence served")
    layers: list[LayerCache]


class History(_Answer):
    """`GET /v1/kv_cache/history`: one sample a second, oldest first."""

    interval_seconds: int = Field(ge=1, description="time between samples")
    capacity_seconds: int = Field(ge=1, description="how far back the server remembers")
    pool_bytes: int = Field(ge=0, description="bytes of the whole pool")
    samples: list[Sample]


class ErrorInfo(_Answer):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None = None
    code: int | None = None


class KVCacheError(_Answer):
    """An error in OpenAI's shape."""

    error: ErrorInfo


class Unauthorized(_Answer):
    """vLLM's answer to a missing or wrong API key."""

    error: str
