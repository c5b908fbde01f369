"""The attention layers of an Eigen model: project to low rank, cache, attend, project back.

`EigenSelfAttention` stands where the stock model has its attention module; `EigenAttention` is
vLLM's `Attention` inside it, whose KV-cache specification has the layer's own ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_eigen.checkpoint import EigenConfig
from vllm_eigen.kernels import Rebuild
from vllm_eigen.projections import EigenQKVLinear
from vllm_eigen.vllm_internals import (
    Attention,
    RowParallelLinear,
    VllmConfig,
    cached_attention,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    rotary_cos_sin,
    set_weight_attrs,
)


class EigenAttention(Attention):
    """vLLM attention whose cache holds `rank_k + rank_v` elements a latent head and token.

    The base class derives the KV-cache specification from `head_size = rank_k` and
    `head_size_v = rank_v`; only the query may be wider (`query_size`).
    """

    rebuild: Rebuild | None = None
    """How cached keys become full keys; None where they are used as they are."""

    full_elements: int
    """Elements the uncompressed layer would cache a token on this rank."""

    def __init__(
        self, query_size: int, rank_k: int, rank_v: int, full_elements: int, **options: Any
    ) -> None:
        from vllm_eigen.backend import EigenAttentionBackend

        super().__init__(
            head_size=rank_k, head_size_v=rank_v, attn_backend=EigenAttentionBackend, **options
        )
        self.query_size = query_size
        self.full_elements = full_elements

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend to the cache after adding this step's tokens.

        Args:
            query: [num_tokens, num_heads * query_size].
            key: [num_tokens, num_kv_heads * rank_k].
            value: [num_tokens, num_kv_heads * rank_v].

        Returns:
            [num_tokens, num_heads * rank_v].
        """
        output = query.new_empty(query.shape[0], self.num_heads * self.head_size_v)
        cached_attention(
            self,
            query.view(-1, self.num_heads, self.query_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size_v),
            output.view(-1, self.num_heads, self.head_size_v),
        )
        return output


class EigenSelfAttention(nn.Module):
    """Replacement of a stock model's attention module, of any family.

    Args:
        stock: the module to stand in for; its rotary embedding, masks and biases carry over.
        o_proj: attribute name of the output projection, in `stock` and here.
    """

    def __init__(
        self,
        stock: nn.Module,
        o_proj: str,
        eigen: EigenConfig,
        layer: int,
        hidden_size: int,
        vllm_config: VllmConfig,
    ) -> None:
        super().__init__()
        ranks = eigen.layers[layer]
        attention: Attention = stock.attn
        prefix = attention.layer_name.rpartition(".")[0]
        query_size = ranks.rank_k if eigen.key_mode == "folded" else eigen.head_size
        stock_output: RowParallelLinear = getattr(stock, o_proj)
        num_kv_heads = max(1, eigen.num_kv_heads // get_tensor_model_parallel_world_size())
        self.qkv_proj = EigenQKVLinear(
            hidden_size,
            query_size,
            ranks.rank_k,
            ranks.rank_v,
            eigen.num_heads,
            eigen.num_latent_heads,
            bias=stock.qkv_proj.bias is not None,
            prefix=f"{prefix}.qkv_proj",
        )
        output = RowParallelLinear(
            eigen.num_heads * ranks.rank_v,
            hidden_size,
            bias=stock_output.bias is not None,
            prefix=f"{prefix}.{o_proj}",
        )
        self.add_module(o_proj, output)
        self._output = o_proj
        self.rotary_emb: nn.Module | None = getattr(stock, "rotary_emb", None)
        self.attn = EigenAttention(
            query_size,
            ranks.rank_k,
            ranks.rank_v,
            full_elements=2 * eigen.head_size * num_kv_heads,
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            scale=eigen.head_size**-0.5,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=attention.sliding_window,
            prefix=attention.layer_name,
        )
        if eigen.key_mode == "pre-rope":
            self._add_key_basis(eigen, ranks.rank_k)

    def _add_key_basis(self, eigen: EigenConfig, rank_k: int) -> None:
        """Create the parameter `key_basis` [num_kv_heads, rank_k, head_size], sharded by head."""
        tp_size = get_tensor_model_parallel_world_size()
        num_kv_heads = max(1, eigen.num_kv_heads // tp_size)
        replicas = max(1, tp_size // eigen.num_kv_heads)
        first = get_tensor_model_parallel_rank() // replicas * num_kv_heads

        def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            parameter.data.copy_(loaded.narrow(0, first, num_kv_heads))

        basis = torch.empty(num_kv_heads, rank_k, eigen.head_size)
        self.key_basis = nn.Parameter(basis, requires_grad=False)
        set_weight_attrs(self.key_basis, {"weight_loader": load})
        self.attn.rebuild = Rebuild(key_basis=self.key_basis, **rotary_cos_sin(self.rotary_emb))

    def forward(
        self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of a decoder layer, [num_tokens, hidden] to [num_tokens, hidden]."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(list(self.qkv_proj.sizes.values()), dim=-1)
        if self.rotary_emb is not None:
            query, _ = self.rotary_emb(positions, query, None)
        output, _ = getattr(self, self._output)(self.attn(query, key, value))
        return output
