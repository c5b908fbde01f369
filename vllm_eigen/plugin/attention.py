# SPDX-License-Identifier: Apache-2.0
"""The Eigen attention layer: vLLM's `Attention` with a KV-cache specification of its own ranks.

Once its weights are loaded, its kernels are prepared; `backend.EigenAttentionImpl` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.kernels import DownProjection, KeyReconstruction, LayerSpec
from vllm_eigen.plugin.backend import EigenAttentionBackend
from vllm_eigen.plugin.step_planner import StepPlanner
from vllm_eigen.plugin.vllm_api import (
    Attention,
    KVCacheSpec,
    VllmConfig,
    cached_attention,
    mixed_cache,
)


@dataclass(frozen=True)
class LayerBases:
    """What the kernels apply of a layer's bases; None is multiplied into a projection, or absent.

    reconstruction: how cached keys become full keys (pre-rope).
    down_projection: how keys and values become latents.
    """

    reconstruction: KeyReconstruction | None
    down_projection: DownProjection | None


@dataclass(frozen=True)
class Beside:
    """The other layers of a model in which some are kept.

    kept_layers: how many those are.
    compressed: ranks of all layers that are not.
    """

    kept_layers: int
    compressed: tuple[LayerRanks, ...]


class EigenAttention(Attention):
    """vLLM attention whose cache holds a latent key and value of each latent head and token.

    To vLLM `head_size` and `head_size_v` are what the key and the value take in the cache, from
    which it derives the KV-cache specification: rank_k and rank_v elements of the cache's type, or
    where they are coded, bytes of uint8. Queries are `query_size` wide and outputs rank_v.

    Args:
        ranks: of this layer, the scales of an fp8 cache, and the codes.
        bases: what the kernels apply; the tensors are filled when weights are loaded.
        query_size: width of a query head.
        full_elements: elements the uncompressed layer would cache a token on this rank.
        planner: the model's.
        beside: None where all layers are compressed.
        options: passed on to vLLM's `Attention`.
    """

    def __init__(
        self,
        ranks: LayerRanks,
        bases: LayerBases,
        *,
        query_size: int,
        full_elements: int,
        planner: StepPlanner,
        beside: Beside | None = None,
        **options: Any,
    ) -> None:
        # Of an element of one byte: with codes that is uint8, else elements are counted.
        super().__init__(
            head_size=ranks.key_bytes(1),
            head_size_v=ranks.value_bytes(1),
            attn_backend=EigenAttentionBackend,
            planner=planner,
            **options,
        )
        self.query_size = query_size
        self.full_elements = full_elements
        self._beside = beside
        self.ranks = ranks
        self._bases = bases

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """vLLM's, of bytes where the layer is coded.

        A page is block_size * num_kv_heads * (head_size + head_size_v) bytes, which is exact: the
        block size, a multiple of 16, aligns every head's part of a block. Beside layers that are
        kept it has the size of theirs, and all compressed layers have one specification, that of
        the largest, so that vLLM puts them into one group.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        if spec is not None and self._beside is not None:
            spec = self._beside_kept(spec, self._beside, vllm_config)
        return replace(spec, dtype=torch.uint8) if spec and self.ranks.coded else spec

    def _beside_kept(
        self, spec: KVCacheSpec, beside: Beside, vllm_config: VllmConfig
    ) -> KVCacheSpec:
        """The specification with its block size and padding beside layers that are kept."""
        element = self.kv_cache_torch_dtype.itemsize
        mixed = mixed_cache(
            vllm_config,
            compressed_layers=len(beside.compressed),
            kept_layers=beside.kept_layers,
            kept_bytes=self.full_elements * element,
        )
        if mixed is None:
            return spec
        largest = max(ranks.num_bytes(element) for ranks in beside.compressed)
        block_size = vllm_config.cache_config.block_size
        pages = mixed.pages(block_size, self.num_kv_heads * largest)
        return replace(
            spec,
            block_size=pages.block_size,
            head_size=largest,
            head_size_v=largest,
            state_content_bytes=largest,
            page_size_padded=pages.page_bytes,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Prepare the kernels, and set the scales of an fp8 cache, which vLLM resets to 1."""
        super().process_weights_after_loading(act_dtype)
        ranks = self.ranks
        self.impl.prepare(
            LayerSpec(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                rank_k=ranks.rank_k,
                rank_v=ranks.rank_v,
                dtype=act_dtype,
                cache_dtype=self._cache_dtype(),
                scores=self.impl.scores,
                k_scale=ranks.k_scale,
                v_scale=ranks.v_scale,
                reconstruction=self._bases.reconstruction,
                down_projection=self._bases.down_projection,
                key_code=ranks.key_code,
                value_code=ranks.value_code,
                peers=self.impl.planner.latents,
            )
        )
        self._k_scale_float, self._v_scale_float = ranks.k_scale, ranks.v_scale
        self._k_scale.fill_(ranks.k_scale)
        self._v_scale.fill_(ranks.v_scale)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend to the cache after adding this step's tokens.

        Args:
            query: [num_tokens, num_heads * query_size].
            key: [num_tokens, num_kv_heads * rank_k], or as wide as the down-projection takes them.
            value: [num_tokens, num_kv_heads * rank_v], or as wide.

        Returns:
            [num_tokens, num_heads * rank_v].
        """
        rank_v = self.ranks.rank_v
        output = query.new_empty(query.shape[0], self.num_heads * rank_v)
        cached_attention(
            self,
            query.view(-1, self.num_heads, self.query_size),
            key.view(-1, self.num_kv_heads, key.shape[1] // self.num_kv_heads),
            value.view(-1, self.num_kv_heads, value.shape[1] // self.num_kv_heads),
            output.view(-1, self.num_heads, rank_v),
        )
        return output

    def _cache_dtype(self) -> torch.dtype:
        """Element type of the cache; vLLM's own name for an fp8 cache's is uint8."""
        if self.ranks.coded:
            return torch.uint8
        dtype: torch.dtype = self.kv_cache_torch_dtype
        if dtype != torch.uint8:
            return dtype
        e5m2 = self.kv_cache_dtype == "fp8_e5m2"
        return torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
