"""What the KV-cache routes answer; these models are the OpenAPI schema."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Blocks(BaseModel):
    """Pages of the pool. One block is kept back by vLLM and counts as neither free nor used."""

    model_config = ConfigDict(frozen=True)

    total: int = Field(ge=0, description="blocks in the pool")
    used: int = Field(ge=0, description="blocks held by running requests")


class Tokens(BaseModel):
    """The pool counted in tokens."""

    model_config = ConfigDict(frozen=True)

    capacity: int = Field(ge=0, description="tokens the pool can hold")
    used: int = Field(ge=0, description="tokens in used blocks, partly filled blocks counted full")


class LayerCache(BaseModel):
    """One layer's share of the cache."""

    model_config = ConfigDict(frozen=True)

    layer: str = Field(description="name of the attention layer in the model")
    rank_k: int = Field(ge=1, description="cached key elements a latent head and token")
    rank_v: int = Field(ge=1, description="cached value elements a latent head and token")
    bytes_per_token: int = Field(ge=1, description="bytes a token, over all ranks")


class KVCache(BaseModel):
    """`GET /v1/kv_cache`: the KV cache as the engine allocated and uses it."""

    model_config = ConfigDict(frozen=True)

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
    layers: list[LayerCache]
