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

        `num_blocks`, `block_size` (tokens) and `element_size` (bytes) describe the cache tensor;
        `num_heads`, `rank_k`, `rank_v` the heads in it; `full_elements` is what the uncompressed
        layer would cache a token on this rank, in elements.
        """
        context = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        rows = []
        for name, layer in context.items():
            cache = getattr(layer, "kv_cache", None)
            if cache is None or cache.dim() != 4:
                continue
            num_blocks, num_heads, block_size, width = cache.shape
            rank_k = int(layer.head_size)
            full = getattr(layer, "full_elements", num_heads * width)
            rows.append(
                {
                    "name": name,
                    "num_blocks": int(num_blocks),
                    "block_size": int(block_size),
                    "element_size": int(cache.element_size()),
                    "num_heads": int(num_heads),
                    "rank_k": rank_k,
                    "rank_v": int(width) - rank_k,
                    "full_elements": int(full),
                    "dtype": str(layer.kv_cache_dtype),
                    "torch_dtype": str(cache.dtype).removeprefix("torch."),
                }
            )
        return rows
