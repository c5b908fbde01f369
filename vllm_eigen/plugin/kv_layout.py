# SPDX-License-Identifier: Apache-2.0
"""A vLLM worker extension that reports the layout of the KV cache on its device.

vLLM mixes it into its worker by `--worker-extension-cls
vllm_eigen.plugin.kv_layout.KVLayoutWorker`. Bytes come from the allocated cache tensors, not from
the model's config. The API process calls `collective_rpc("eigen_kv_layout")`; rows are plain
dictionaries because executors serialize them in different ways.
"""

from __future__ import annotations

from typing import Any


class KVLayoutWorker:
    """Adds `eigen_kv_layout` to vLLM's worker."""

    def eigen_kv_layout(self) -> list[dict[str, Any]]:
        """One row a cached attention layer on this rank, in layer order.

        `num_blocks`, `block_size` (tokens) and `bytes_per_token` describe the cache tensor, which
        vLLM shapes [num_blocks, head slots, block_size, content] on every device; `rank_k` and
        `rank_v` the heads in it, `bits_k` and `bits_v` the mean bits of their elements, token
        scales included; `full_elements` is what the uncompressed layer would cache a token on this
        rank, in elements. The type of a cache of codes is `coded`. `compressed` says whether the
        layer is an Eigen layer, `windowed` whether it has a sliding window; `pool_bytes` are those
        of the rank's whole pool.
        """
        context = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        pool: dict[int, int] = {}
        rows: list[dict[str, Any]] = []
        for name, layer in context.items():
            cache: Any = getattr(layer, "kv_cache", None)
            if getattr(cache, "ndim", 0) != 4 or not hasattr(layer, "head_size"):
                continue
            storage = cache.untyped_storage()
            pool[storage.data_ptr()] = storage.nbytes()
            num_blocks, head_slots, block_size, content = cache.shape
            key = int(layer.head_size)
            value = int(getattr(layer, "head_size_v", key))
            ranks: Any = getattr(layer, "ranks", None)
            if ranks:
                content = key + value  # a page may have room for wider rows, and padding
            rank_k, rank_v = (ranks.rank_k, ranks.rank_v) if ranks else (key, value)
            bits = 8 * cache.element_size()
            # Backends pack keys and values side by side or in head slots of their own.
            plain = int(layer.num_kv_heads) * (rank_k + rank_v)
            rows.append(
                {
                    "name": name,
                    "num_blocks": int(num_blocks),
                    "block_size": int(block_size),
                    "bytes_per_token": int(head_slots * content * cache.element_size()),
                    "rank_k": rank_k,
                    "rank_v": rank_v,
                    "bits_k": bits * key / rank_k,
                    "bits_v": bits * value / rank_v,
                    "compressed": ranks is not None,
                    "windowed": getattr(layer, "sliding_window", None) is not None,
                    "full_elements": int(getattr(layer, "full_elements", plain)),
                    "torch_dtype": "coded"
                    if ranks and ranks.coded
                    else str(cache.dtype).removeprefix("torch."),
                }
            )
        return [{**row, "pool_bytes": sum(pool.values())} for row in rows]
