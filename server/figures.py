"""The KV-cache figures of a running engine: its layout, and what the live counters mean in it.

The layout is read once from the workers' allocated tensors (`vllm_eigen.worker`), live use from
vLLM's metrics (`server.live`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.live import Live
from server.schemas import (
    Blocks,
    Concurrency,
    KVCache,
    LayerCache,
    PrefixCache,
    Requests,
    Sample,
    Throughput,
    Tokens,
    Uncompressed,
)
from vllm_eigen.errors import EngineError


class Figures:
    """Turns the engine's layout and live counters into answers.

    Args:
        ranks: `eigen_kv_layout` rows of every worker of one engine (see `vllm_eigen.worker`).
        full_element_size: bytes of an element in the uncompressed cache (the model's own type).
        max_model_len: tokens of the longest sequence served.
        pool_blocks: blocks over all data-parallel engines; those of one engine by default.
        block_size: the scheduler's tokens a block; the cache tensor's by default.
        num_engines: data-parallel engines, with equal shares of the pool.

    Raises:
        EngineError: the engine has no attention layer with a KV cache this project can read.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[Mapping[str, Any]]],
        full_element_size: int,
        max_model_len: int,
        pool_blocks: int | None = None,
        block_size: int | None = None,
        num_engines: int = 1,
    ) -> None:
        rows = [row for rank in ranks for row in rank]
        if not rows:
            raise EngineError("the engine reports no attention layer with a KV cache")
        self.layers = _add_ranks(rows)
        self.block_size = int(block_size or rows[0]["block_size"])
        self.num_blocks = int(pool_blocks or rows[0]["num_blocks"])
        self.bytes_per_token = sum(layer.bytes_per_token for layer in self.layers)
        self.full_bytes_per_token = full_element_size * sum(
            int(row["full_elements"]) for row in rows
        )
        self.max_model_len = max_model_len
        self.num_engines = num_engines
        self._dtype = str(rows[0]["torch_dtype"])

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool, over all ranks and engines."""
        return self.num_blocks * self.block_size * self.bytes_per_token

    @property
    def capacity(self) -> int:
        """Tokens the pool holds."""
        return self.num_blocks * self.block_size

    @property
    def uncompressed_capacity(self) -> int:
        """Tokens the same bytes would hold uncompressed, in whole blocks."""
        block_bytes = self.block_size * self.full_bytes_per_token
        return self.pool_bytes // block_bytes * self.block_size

    def sample(self, now: float, live: Live, before: tuple[float, Live] | None = None) -> Sample:
        """The counters at time `now`; token rates are those since `before`."""
        usage = min(live.usage / self.num_engines, 1.0)
        used = round(usage * max(0, self.num_blocks - self.num_engines))
        tokens = used * self.block_size
        prompt, generation = _rates(now, live, before)
        return Sample(
            time=now,
            used_blocks=used,
            used_tokens=tokens,
            used_bytes=tokens * self.bytes_per_token,
            uncompressed_bytes=tokens * self.full_bytes_per_token,
            saved_bytes=tokens * (self.full_bytes_per_token - self.bytes_per_token),
            running=live.running,
            waiting=live.waiting,
            preemptions=live.preemptions,
            prefix_hit_rate=_hit_rate(live),
            prompt_tokens_per_second=prompt,
            generation_tokens_per_second=generation,
        )

    def answer(self, sample: Sample, live: Live) -> KVCache:
        """Everything about the pool at the moment of `sample`, which was made from `live`."""
        per_sequence = -(-self.max_model_len // self.block_size) * self.block_size
        return KVCache(
            time=sample.time,
            pool_bytes=self.pool_bytes,
            block_size=self.block_size,
            blocks=Blocks(total=self.num_blocks, used=sample.used_blocks),
            tokens=Tokens(capacity=self.capacity, used=sample.used_tokens),
            bytes_per_token=self.bytes_per_token,
            uncompressed_bytes_per_token=self.full_bytes_per_token,
            kv_ratio=self.bytes_per_token / self.full_bytes_per_token,
            kv_cache_dtype=self._dtype,
            used_bytes=sample.used_bytes,
            saved_bytes=sample.saved_bytes,
            uncompressed=Uncompressed(
                tokens_capacity=self.uncompressed_capacity, used_bytes=sample.uncompressed_bytes
            ),
            requests=Requests(
                running=live.running, waiting=live.waiting, preemptions=live.preemptions
            ),
            concurrency=Concurrency(
                now=live.running,
                possible=self.capacity / per_sequence,
                possible_uncompressed=self.uncompressed_capacity / per_sequence,
            ),
            prefix_cache=PrefixCache(
                queries=live.prefix_queries, hits=live.prefix_hits, hit_rate=_hit_rate(live)
            ),
            throughput=Throughput(
                prompt_tokens_per_second=sample.prompt_tokens_per_second,
                generation_tokens_per_second=sample.generation_tokens_per_second,
            ),
            engines=self.num_engines,
            max_model_len=self.max_model_len,
            layers=self.layers,
        )


def _add_ranks(rows: Sequence[Mapping[str, Any]]) -> list[LayerCache]:
    """One entry a layer: its bytes over the tensor-parallel ranks that hold a share of it."""
    layers: dict[str, LayerCache] = {}
    for row in rows:
        name = str(row["name"])
        known = layers[name].bytes_per_token if name in layers else 0
        layers[name] = LayerCache(
            layer=name,
            rank_k=int(row["rank_k"]),
            rank_v=int(row["rank_v"]),
            bytes_per_token=known + int(row["bytes_per_token"]),
        )
    return list(layers.values())


def _hit_rate(live: Live) -> float:
    return min(1.0, live.prefix_hits / live.prefix_queries) if live.prefix_queries else 0.0


def _rates(now: float, live: Live, before: tuple[float, Live] | None) -> tuple[float, float]:
    """Prompt and generated tokens a second since `before`."""
    if before is None or now <= before[0]:
        return 0.0, 0.0
    seconds = now - before[0]
    earlier = before[1]
    return (
        max(0, live.prompt_tokens - earlier.prompt_tokens) / seconds,
        max(0, live.generation_tokens - earlier.generation_tokens) / seconds,
    )
