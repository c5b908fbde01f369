"""A vLLM worker extension that reports how the KV cache is really laid out on its device.

Bytes come from the allocated cache tensors, not from the model's config. Served to the API
process by `collective_rpc("eigen_kv_layout")`; plain dictionaries survive every transport.
"""

from __future__ import annotations

from typing import Any


class KVLayoutWorker:
    """Mixed into vLLM's worker by `--worker-extension-cls vllm_eigen.worker.KVLayoutWorker`."""

    def eigen_kv_layout(self) -> list[dict[str, Any]]:
        """One row a cached attention layer on this rank, in layer order.

        `num_blocks`, `block_size` (tokens) and `bytes_per_token` describe the cache tensor, which
        vLLM shapes [num_blocks, head slots, block_size, content] on every device; `rank_k` and
        `rank_v` the heads in it; `full_elements` is what the uncompressed layer would cache a
        token on this rank, in elements.
        """
        context = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        rows = []
        for name, layer in context.items():
            cache: Any = getattr(layer, "kv_cache", None)
            if getattr(cache, "ndim", 0) != 4 or not hasattr(layer, "head_size"):
                continue
            num_blocks, head_slots, block_size, content = cache.shape
            rank_k = int(layer.head_size)
            rank_v = int(getattr(layer, "head_size_v", rank_k))
            # Back ends pack keys and values side by side or in head slots of their own.
            plain = int(layer.num_kv_heads) * (rank_k + rank_v)
            rows.append(
                {
                    "name": name,
                    "num_blocks": int(num_blocks),
                    "block_size": int(block_size),
                    "bytes_per_token": int(head_slots * content * cache.element_size()),
                    "rank_k": rank_k,
                    "rank_v": rank_v,
                    "full_elements": int(getattr(layer, "full_elements", plain)),
                    "torch_dtype": str(cache.dtype).removeprefix("torch."),
                }
            )
        return rows
