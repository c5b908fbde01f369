"""The attention layers of an Eigen model: project to low rank, cache, attend, project back.

`EigenAttention` is vLLM's `Attention` with a KV-cache specification of the layer's own ranks.
`EigenSelfAttention` stands around it, in the place of the stock model's attention module: with
projections that have bases multiplied in, and the others applied beside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vllm_eigen.checkpoint import (
    KEY_BASIS,
    KEY_ENCODER,
    VALUE_BASIS,
    VALUE_ENCODER,
    EigenConfig,
    LayerRanks,
    basis_shapes,
    projected_sizes,
)
from vllm_eigen.families import Family
from vllm_eigen.kernels import Encode, Rebuild
from vllm_eigen.projections import EigenQKVLinear
from vllm_eigen.vllm_internals import (
    Attention,
    RowParallelLinear,
    VllmConfig,
    cached_attention,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    rotary_cos_sin,
    score_options,
    set_weight_attrs,
)


class EigenAttention(Attention):
    """vLLM attention whose cache holds `rank_k + rank_v` elements a latent head and token.

    The base class derives the KV-cache specification from `head_size = rank_k` and
    `head_size_v = rank_v`; only the query may be wider (`query_size`).

    Attributes:
        full_elements: elements the uncompressed layer would cache a token on this rank.
        rebuild: how cached keys become full keys; None where they are used as they are.
        encode: how keys and values become latents; None where they come as latents.
    """

    rebuild: Rebuild | None = None
    encode: Encode | None = None

    def __init__(
        self, query_size: int, ranks: LayerRanks, full_elements: int, **options: Any
    ) -> None:
        from vllm_eigen.backend import EigenAttentionBackend

        super().__init__(
            head_size=ranks.rank_k,
            head_size_v=ranks.rank_v,
            attn_backend=EigenAttentionBackend,
            **options,
        )
        self.query_size = query_size
        self.full_elements = full_elements
        self._scales = ranks.k_scale, ranks.v_scale

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Pack the key basis, and set the scales of an fp8 cache, which vLLM resets to 1."""
        super().process_weights_after_loading(act_dtype)
        if self.rebuild is not None:
            # A new object: kernels keep a packed copy for as long as a Rebuild lives.
            self.rebuild = replace(self.rebuild)
            self.impl.kernels.prepare(self.rebuild, act_dtype, self.num_heads)
        self._k_scale_float, self._v_scale_float = self._scales
        self._k_scale.fill_(self._k_scale_float)
        self._v_scale.fill_(self._v_scale_float)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend to the cache after adding this step's tokens.

        Args:
            query: [num_tokens, num_heads * query_size].
            key: [num_tokens, num_kv_heads * rank_k], or as wide as `encode` takes them.
            value: [num_tokens, num_kv_heads * rank_v], or as wide.

        Returns:
            [num_tokens, num_heads * rank_v].
        """
        output = query.new_empty(query.shape[0], self.num_heads * self.head_size_v)
        cached_attention(
            self,
            query.view(-1, self.num_heads, self.query_size),
            key.view(-1, self.num_kv_heads, key.shape[1] // self.num_kv_heads),
            value.view(-1, self.num_kv_heads, value.shape[1] // self.num_kv_heads),
            output.view(-1, self.num_heads, self.head_size_v),
        )
        return output


class EigenSelfAttention(nn.Module):
    """Attention of a decoder layer, as `checkpoint.Projections` says.

    Latents that the projections do not make are made of what the stock module would cache: after
    its norms and clips, and in post-rope mode after rotation.

    Args:
        stock: the module to stand in for. Its rotary embedding, norms, clip, mask and biases carry
            over, and its projections, quantized or adapted as they may be, if untouched.
        eigen: the checkpoint's description.
        layer: index of the decoder layer.
    """

    def __init__(
        self,
        stock: Any,
        family: Family,
        eigen: EigenConfig,
        layer: int,
        vllm_config: VllmConfig,
    ) -> None:
        super().__init__()
        self.ranks = eigen.layers[layer]
        self.key_mode = eigen.key_mode
        self.head_size = eigen.head_size
        self.rotary_emb: Any = getattr(stock, "rotary_emb", None)
        self.q_norm: Any = getattr(stock, "q_norm", None)
        self.k_norm: Any = getattr(stock, "k_norm", None)
        self.clip_qkv: float | None = getattr(stock, "clip_qkv", None)
        tp_size = get_tensor_model_parallel_world_size()
        self.num_heads = eigen.num_heads // tp_size
        self.num_kv_heads = max(1, eigen.num_kv_heads // tp_size)
        query_size = eigen.head_size if eigen.key_mode == "pre-rope" else self.ranks.rank_k
        self.attn = EigenAttention(
            query_size,
            self.ranks,
            full_elements=2 * eigen.head_size * self.num_kv_heads,
            num_heads=self.num_heads,
            num_kv_heads=max(1, eigen.num_latent_heads // tp_size),
            cache_config=vllm_config.cache_config,
            prefix=stock.attn.layer_name,
            **score_options(stock.attn),
        )
        self._output = family.o_proj
        if eigen.projections == "untouched":
            self.qkv_proj: Any = stock.qkv_proj
            self.add_module(family.o_proj, getattr(stock, family.o_proj))
            sizes = self.num_heads, self.num_kv_heads, self.num_kv_heads
            self._widths = [heads * self.head_size for heads in sizes]
        else:
            self._fold(stock, eigen)
        for name, shape in basis_shapes(eigen, self.ranks).items():
            self._add_basis(name, shape)
        self._attach_bases(eigen)

    def forward(
        self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[num_tokens, hidden] to [num_tokens, hidden]."""
        qkv, _ = self.qkv_proj(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.split(self._widths, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.reshape(-1, self.head_size)).view(query.shape)
            key = self.k_norm(key.reshape(-1, self.head_size)).view(key.shape)
        if self.rotary_emb is not None:
            # In a compiled graph nothing is rotated in place: only what is returned counts. vLLM's
            # CPU kernel stores aligned vectors: rows must not begin at odd widths.
            if self.key_mode == "post-rope":
                query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
            else:
                query, _ = self.rotary_emb(positions, query.contiguous(), None)
        if self._maps_queries:
            query = _per_head(query, self._basis(KEY_BASIS).mT, self.num_heads)
        context = self.attn(query, key, value)
        if self._maps_context:
            context = _per_head(context, self._basis(VALUE_BASIS), self.num_heads)
        output, _ = getattr(self, self._output)(context)
        return output

    def _fold(self, stock: Any, eigen: EigenConfig) -> None:
        """Create `qkv_proj`, and the output projection under the family's name for it."""
        prefix = stock.attn.layer_name.rpartition(".")[0]
        stock_output: RowParallelLinear = getattr(stock, self._output)
        hidden_size = stock_output.output_size
        self.qkv_proj = EigenQKVLinear(
            hidden_size,
            *projected_sizes(eigen, self.ranks),
            self.ranks.rank_v,
            eigen.num_heads,
            eigen.num_latent_heads,
            bias=stock.qkv_proj.bias is not None,
            prefix=f"{prefix}.qkv_proj",
        )
        self._widths = list(self.qkv_proj.sizes.values())
        output = RowParallelLinear(
            eigen.num_heads * self.ranks.rank_v,
            hidden_size,
            bias=stock_output.bias is not None,
            prefix=f"{prefix}.{self._output}",
        )
        self.add_module(self._output, output)

    def _add_basis(self, name: str, shape: tuple[int, int, int]) -> None:
        """Create a parameter of `shape` [heads, ...] over all ranks, this rank's heads of it."""
        tp_size = get_tensor_model_parallel_world_size()
        heads = max(1, shape[0] // tp_size)
        first = get_tensor_model_parallel_rank() // max(1, tp_size // shape[0]) * heads

        def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            parameter.data.copy_(loaded.narrow(0, first, heads))

        parameter = nn.Parameter(torch.empty(heads, *shape[1:]), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": load})
        self.register_parameter(name, parameter)

    def _attach_bases(self, eigen: EigenConfig) -> None:
        """Say who applies the bases: the cache write, the attention kernels, or `forward`."""
        self._maps_queries = eigen.projections != "folded" and eigen.key_mode != "pre-rope"
        self._maps_context = eigen.projections == "untouched"
        if eigen.projections != "folded":
            value = self._basis(VALUE_ENCODER) if self._maps_context else None
            self.attn.encode = Encode(self._basis(KEY_ENCODER), value)
        if eigen.key_mode == "pre-rope":
            self.attn.rebuild = Rebuild(
                key_basis=self._basis(KEY_BASIS), **rotary_cos_sin(self.rotary_emb)
            )

    def _basis(self, name: str) -> torch.Tensor:
        """A parameter made by `_add_basis`."""
        return self.get_parameter(name)


def _per_head(rows: torch.Tensor, maps: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Multiply each head by its map, heads that share one in order.

    Args:
        rows: [num_tokens, num_heads * size].
        maps: [num_maps, size, new_size], num_maps dividing num_heads.

    Returns:
        [num_tokens, num_heads * new_size].
    """
    num_tokens, (num_maps, size, new_size) = rows.shape[0], maps.shape
    group = num_heads // num_maps
    # Map by map: half of einsum's time for the few tokens of a decode step on a CPU.
    heads = rows.reshape(num_tokens, num_maps, group, size).transpose(0, 1)
    mapped = torch.bmm(heads.reshape(num_maps, num_tokens * group, size), maps)
    return mapped.view(num_maps, num_tokens, group, new_size).transpose(0, 1).flatten(1)
