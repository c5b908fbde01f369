# SPDX-License-Identifier: Apache-2.0
"""The KV cache as the engine allocated it: read once from the workers, before serving.

First step of the statistics: `plugin.kv_layout` reports each worker's cache tensors, `KVLayout`
adds them up, `kv_stats` combines it with the engine's metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_eigen.checkpoint.pages import MixedCache, Pages
from vllm_eigen.common.errors import EngineError
from vllm_eigen.common.sizes import format_bytes, format_count
from vllm_eigen.server.stats.schemas import CompressedLayers, LayerCache

RPC_SECONDS = 30.0
"""How long to wait for the workers."""


@dataclass(frozen=True)
class MixedPool:
    """The pool of a model in which some layers have sliding windows.

    Attributes:
        block_bytes: of a block, over all ranks.
        pages, base_pages: of one rank, of the model and of its base.
    """

    block_bytes: int
    pages: Pages
    base_pages: Pages


@dataclass(frozen=True)
class Windows:
    """What vLLM plans sliding windows by, see `checkpoint.pages.MixedCache`."""

    window: int
    in_flight: int


@dataclass(frozen=True)
class KVLayout:
    """Block pool and bytes per token, summed over all tensor-parallel ranks and engines."""

    layers: tuple[LayerCache, ...]
    block_size: int
    """Tokens per block; of a mixed model, of those of its kept layers."""
    num_blocks: int
    layer_bytes_per_token: int
    """Of all layers, whether they keep the token or not."""
    compressed_layers: CompressedLayers
    max_model_len: int
    num_engines: int
    """Data-parallel engines, with equal shares of the pool."""
    dtype: str
    kept_uncompressed_bytes: int = 0
    """Bytes per token of the base model's, in the layers that are kept."""
    mixed: MixedPool | None = None

    @property
    def bytes_per_token(self) -> int:
        """Cached bytes a token; of a mixed model, of the pool and a full-length sequence."""
        if self.mixed is None:
            return self.layer_bytes_per_token
        return -(-self.pool_bytes // max(1, self.capacity))

    @property
    def uncompressed_bytes_per_token(self) -> int:
        """The same for the base model at its own element type."""
        if self.mixed is None:
            return (
                self.compressed_layers.uncompressed_bytes_per_token + self.kept_uncompressed_bytes
            )
        return -(-self.pool_bytes // max(1, self.uncompressed_capacity))

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool."""
        if self.mixed is None:
            return self.capacity * self.bytes_per_token
        return self.num_blocks * self.mixed.block_bytes

    @property
    def capacity(self) -> int:
        """Tokens the pool holds; of a mixed model, of full-length sequences."""
        if self.mixed is None:
            return self.num_blocks * self.block_size
        return int(self.num_blocks / self.mixed.pages.sequence_blocks * self.max_model_len)

    @property
    def uncompressed_capacity(self) -> int:
        """Tokens the same bytes would hold uncompressed, in whole blocks."""
        if self.mixed is None:
            block_bytes = self.block_size * self.uncompressed_bytes_per_token
            return self.pool_bytes // block_bytes * self.block_size
        pages, base = self.mixed.pages, self.mixed.base_pages
        blocks = self.num_blocks * pages.block_bytes // base.block_bytes
        return int(blocks / base.sequence_blocks * self.max_model_len)

    def tokens_of(self, blocks: int) -> int:
        """Tokens in so many blocks; of a mixed model, a share of the capacity."""
        if self.mixed is None:
            return blocks * self.block_size
        return round(blocks / max(1, self.num_blocks) * self.capacity)

    def bytes_of(self, blocks: int) -> int:
        """Bytes of so many blocks."""
        if self.mixed is None:
            return self.tokens_of(blocks) * self.bytes_per_token
        return blocks * self.mixed.block_bytes

    @property
    def kv_ratio(self) -> float:
        """Bytes per token relative to the uncompressed model."""
        return self.bytes_per_token / self.uncompressed_bytes_per_token


def layout_of_workers(
    workers: Sequence[Sequence[Mapping[str, Any]]],
    *,
    element_size: int,
    max_model_len: int,
    num_blocks: int | None = None,
    block_size: int | None = None,
    num_engines: int = 1,
    windows: Windows | None = None,
) -> KVLayout:
    """Add up what the workers report.

    Args:
        workers: `eigen_kv_layout` rows of every worker of one engine (see `plugin.kv_layout`).
        element_size: bytes of an element in the uncompressed cache (the model's own type).
        max_model_len: tokens of the longest sequence served.
        num_blocks: blocks over all data-parallel engines; those of one engine by default.
        block_size: the scheduler's tokens per block; the cache tensor's by default.
        num_engines: data-parallel engines, with equal shares of the pool.
        windows: of a model with sliding windows that vLLM keeps apart.

    Raises:
        EngineError: the engine has no attention layer with a KV cache this project can read.
    """
    rows = [row for worker in workers for row in worker]
    if not rows:
        raise EngineError("the engine reports no attention layer with a KV cache")
    layers = _sum_ranks(rows)
    eigen = [row for row in rows if row["compressed"]]
    full = element_size * sum(int(row["full_elements"]) for row in eigen)
    found = [layer for layer in layers if layer.compressed]
    cached = sum(layer.bytes_per_token for layer in found)
    layout = KVLayout(
        layers=layers,
        block_size=int(block_size or rows[0]["block_size"]),
        num_blocks=int(num_blocks or rows[0]["num_blocks"]),
        layer_bytes_per_token=sum(layer.bytes_per_token for layer in layers),
        compressed_layers=CompressedLayers(
            count=len(found),
            kept=len(layers) - len(found),
            bytes_per_token=cached,
            uncompressed_bytes_per_token=full,
            kv_ratio=cached / full if full else 1.0,
        ),
        max_model_len=max_model_len,
        num_engines=num_engines,
        dtype=str((eigen or rows)[0]["torch_dtype"]),
        kept_uncompressed_bytes=element_size
        * sum(int(row["full_elements"]) for row in rows if not row["compressed"]),
    )
    windowed = {bool(row["windowed"]) for row in rows}
    if windows is None or len(windowed) == 1:
        return layout
    return replace(layout, mixed=_mixed_pool(workers, layout, element_size, windows))


def _mixed_pool(
    workers: Sequence[Sequence[Mapping[str, Any]]],
    layout: KVLayout,
    element_size: int,
    windows: Windows,
) -> MixedPool:
    """The pool of a model in which some layers have windows, planned as vLLM does."""
    names = {str(row["name"]): row for worker in workers for row in worker}
    kept = [row for row in names.values() if row["windowed"]]
    others = [int(row["bytes_per_token"]) for row in names.values() if not row["windowed"]]
    first = kept[0]

    def cache(kept_bytes: int) -> MixedCache:
        return MixedCache(
            compressed_layers=len(others),
            kept_layers=len(kept),
            kept_bytes=kept_bytes,
            window=windows.window,
            in_flight=windows.in_flight,
            max_model_len=layout.max_model_len,
        )

    pages = cache(int(first["bytes_per_token"])).pages(layout.block_size, max(others))
    base = cache(element_size * int(first["full_elements"])).base_pages(layout.block_size)
    # The device may cut a block in several, of as many bytes each.
    cut = pages.kept_block_size // int(first["block_size"])
    blocks = max(1, int(first["num_blocks"]) // max(1, cut))
    return MixedPool(sum(int(rows[0]["pool_bytes"]) for rows in workers) // blocks, pages, base)


async def read_layout(engine_client: Any) -> KVLayout:
    """Ask the engine's workers for their cache tensors.

    Raises:
        EngineError: there is no engine, it keeps no statistics, or its workers do not answer.
    """
    if engine_client is None:
        raise EngineError("this server has no engine")
    if not getattr(engine_client, "log_stats", True):
        raise EngineError("statistics are switched off; start without --disable-log-stats")
    try:
        workers = await asyncio.wait_for(
            engine_client.collective_rpc("eigen_kv_layout"), timeout=RPC_SECONDS
        )
    except TimeoutError as error:
        raise EngineError("the engine did not report its KV cache in time") from error
    except Exception as error:
        raise EngineError(
            "the workers cannot report their KV cache; start with `vllm-eigen serve`, which adds "
            f"the worker extension ({type(error).__name__})"
        ) from error
    config = engine_client.vllm_config
    parallel = config.parallel_config
    return layout_of_workers(
        workers,
        element_size=config.model_config.dtype.itemsize,
        max_model_len=config.model_config.max_model_len,
        num_blocks=config.cache_config.num_gpu_blocks,
        block_size=config.cache_config.block_size,
        num_engines=parallel.data_parallel_size_local
        if parallel.local_engines_only
        else parallel.data_parallel_size,
        windows=_windows(config),
    )


def _windows(config: Any) -> Windows | None:
    """Of a vLLM configuration; None where all layers have the same blocks."""
    window = getattr(config.model_config.hf_text_config, "sliding_window", None)
    if not window or config.scheduler_config.disable_hybrid_kv_cache_manager:
        return None
    return Windows(int(window), config.max_in_flight_tokens)


def summary(layout: KVLayout) -> str:
    """What the pool holds, in one line for the log."""
    line = f"KV pool {format_bytes(layout.pool_bytes)} = {format_count(layout.capacity)} tokens"
    if layout.bytes_per_token == layout.uncompressed_bytes_per_token:
        return f"{line}, uncompressed"
    uncompressed = format_count(layout.uncompressed_capacity)
    return f"{line}; uncompressed it would hold {uncompressed} (KV ratio {layout.kv_ratio:.2f})"


def _sum_ranks(rows: Sequence[Mapping[str, Any]]) -> tuple[LayerCache, ...]:
    """One entry per layer: its bytes over the tensor-parallel ranks that hold its heads."""
    layers: dict[str, LayerCache] = {}
    for row in rows:
        name = str(row["name"])
        other_ranks = layers[name].bytes_per_token if name in layers else 0
        layers[name] = LayerCache(
            layer=name,
            rank_k=int(row["rank_k"]),
            rank_v=int(row["rank_v"]),
            bits_k=float(row["bits_k"]),
            bits_v=float(row["bits_v"]),
            bytes_per_token=other_ranks + int(row["bytes_per_token"]),
            compressed=bool(row["compressed"]),
        )
    return tuple(layers.values())
