"""The KV-cache figures of a running engine.

The layout is read once from the workers' allocated tensors; live use comes from vLLM's own
metrics, which its API processes share, so any of them answers for the whole server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.schemas import Blocks, KVCache, LayerCache, Tokens
from vllm_eigen.errors import EngineError

USAGE_METRIC = "vllm:kv_cache_usage_perc"


class Figures:
    """Turns the engine's layout and current use into a `KVCache` answer.

    Args:
        ranks: `eigen_kv_layout` rows of every worker of one engine (see `vllm_eigen.worker`).
        full_element_size: bytes of an element in the uncompressed cache (the model's own type).
        num_engines: data-parallel engines, each with a pool like this one.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[Mapping[str, Any]]],
        full_element_size: int,
        num_engines: int = 1,
    ) -> None:
        rows = [row for rank in ranks for row in rank]
        if not rows:
            raise EngineError("the engine reports no attention layer with a KV cache")
        self._layers: dict[str, LayerCache] = {}
        for row in rows:
            layer = _layer(row)
            known = self._layers.get(layer.layer)
            if known is not None:
                total = known.bytes_per_token + layer.bytes_per_token
                layer = known.model_copy(update={"bytes_per_token": total})
            self._layers[layer.layer] = layer
        self._num_engines = num_engines
        self._block_size = int(rows[0]["block_size"])
        self._num_blocks = int(rows[0]["num_blocks"])
        self._bytes = sum(layer.bytes_per_token for layer in self._layers.values())
        self._full_bytes = sum(int(row["full_elements"]) for row in rows) * full_element_size
        self._dtype = str(rows[0]["torch_dtype"])

    def answer(self, usage: float) -> KVCache:
        """The figures at a pool use between 0 and 1, as vLLM's gauge reports it."""
        total = self._num_blocks * self._num_engines
        used = round(min(max(usage, 0.0), 1.0) * (self._num_blocks - 1) * self._num_engines)
        return KVCache(
            pool_bytes=total * self._block_size * self._bytes,
            block_size=self._block_size,
            blocks=Blocks(total=total, used=used),
            tokens=Tokens(capacity=total * self._block_size, used=used * self._block_size),
            bytes_per_token=self._bytes,
            uncompressed_bytes_per_token=self._full_bytes,
            kv_ratio=self._bytes / self._full_bytes,
            kv_cache_dtype=self._dtype,
            layers=list(self._layers.values()),
        )


def mean_usage(families: Iterable[Any]) -> float:
    """Pool use between 0 and 1 from collected Prometheus metric families, mean over engines.

    0 before the first scheduler step, when the gauge has no sample yet.
    """
    values = [
        float(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == USAGE_METRIC
    ]
    return sum(values) / len(values) if values else 0.0


def _layer(row: Mapping[str, Any]) -> LayerCache:
    width = int(row["rank_k"]) + int(row["rank_v"])
    return LayerCache(
        layer=str(row["name"]),
        rank_k=int(row["rank_k"]),
        rank_v=int(row["rank_v"]),
        bytes_per_token=int(row["num_heads"]) * width * int(row["element_size"]),
    )
