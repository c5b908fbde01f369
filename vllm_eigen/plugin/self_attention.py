# SPDX-License-Identifier: Apache-2.0
"""The attention module of a decoder layer: project, rotate, cache and attend, project back.

`CompressedAttention` stands in the place of the stock model's attention module, with projections
that have bases multiplied in, and the other bases beside them. How it is called depends on whose
model it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_eigen.checkpoint.config import EigenConfig, LayerRanks
from vllm_eigen.checkpoint.families import Family
from vllm_eigen.checkpoint.shapes import (
    KEY_BASIS,
    KEY_ENCODER,
    KEY_ENCODER_BIAS,
    KEY_OFFSET,
    VALUE_BASIS,
    VALUE_ENCODER,
    VALUE_ENCODER_BIAS,
    VALUE_OFFSET,
    basis_shapes,
    needed_biases,
    projected_sizes,
)
from vllm_eigen.kernels import DownProjection, KeyReconstruction, RotaryTable
from vllm_eigen.plugin.attention import Beside, EigenAttention, LayerBases
from vllm_eigen.plugin.qkv_linear import EigenQKVLinear
from vllm_eigen.plugin.step_planner import StepPlanner
from vllm_eigen.plugin.vllm_api import (
    RowParallelLinear,
    VllmConfig,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    projected,
    rotate_query,
    score_options,
    set_weight_attrs,
)


@dataclass(frozen=True)
class Shared:
    """What the attention modules of one model share."""

    family: Family
    eigen: EigenConfig
    vllm_config: VllmConfig
    planner: StepPlanner


class CompressedAttention(nn.Module):
    """Attention of a decoder layer, as `checkpoint.modes.Projections` says.

    Latents that the projections do not make are made of what the stock module would cache: after
    its norms and clips, and in post-rope mode after RoPE.

    Args:
        stock: the module to stand in for. Its norms, clip, mask and biases carry over, and its
            projections, quantized or adapted as they may be, if untouched.
        ranks: of the decoder layer.
        rotary_emb: vLLM's rotary embedding; None without RoPE.
        rotary: its table, needed where keys are reconstructed.
    """

    def __init__(
        self,
        stock: Any,
        ranks: LayerRanks,
        shared: Shared,
        rotary_emb: Any,
        rotary: RotaryTable | None,
    ) -> None:
        super().__init__()
        eigen = shared.eigen
        self.ranks = ranks
        self.key_mode = eigen.key_mode
        self.head_size = eigen.head_size
        self.rotary_emb = rotary_emb
        self.q_norm: Any = getattr(stock, "q_norm", None)
        self.k_norm: Any = getattr(stock, "k_norm", None)
        self._wide_norms = shared.family.wide_norms
        self.clip_qkv: float | None = getattr(stock, "clip_qkv", None)
        tp_size = get_tensor_model_parallel_world_size()
        self.num_heads = eigen.num_heads // tp_size
        self.num_kv_heads = max(1, eigen.num_kv_heads // tp_size)
        self._output = shared.family.o_proj
        if eigen.projections.folds_values:
            self._fold(stock, shared.family, eigen)
        else:
            self.qkv_proj: Any = stock.qkv_proj
            self.add_module(self._output, getattr(stock, self._output))
            sizes = self.num_heads, self.num_kv_heads, self.num_kv_heads
            self._widths = [heads * self.head_size for heads in sizes]
        for name, shape in basis_shapes(eigen, self.ranks).items():
            self._add_basis(name, shape)
        # Reconstructed keys meet full queries, and folded projections make the queries' latents.
        self._maps_queries = not (eigen.projections.folds_keys or eigen.key_mode.reconstructs_keys)
        self._maps_context = not eigen.projections.folds_values
        self._has_value_offset = self._maps_context and eigen.value_offset
        self.attn = EigenAttention(
            self.ranks,
            self._kernel_bases(eigen, rotary),
            query_size=eigen.head_size if eigen.key_mode.reconstructs_keys else self.ranks.rank_k,
            full_elements=2 * eigen.head_size * self.num_kv_heads,
            beside=Beside(len(eigen.kept_layers), eigen.layers) if eigen.kept_layers else None,
            planner=shared.planner,
            num_heads=self.num_heads,
            num_kv_heads=max(1, eigen.num_latent_heads // tp_size),
            cache_config=shared.vllm_config.cache_config,
            prefix=stock.attn.layer_name,
            **score_options(stock.attn),
        )

    def attend(self, hidden_states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """[num_tokens, hidden] to [num_tokens, hidden]."""
        qkv = projected(self.qkv_proj, hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.split(self._widths, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        if self.rotary_emb is not None:
            # In a compiled graph nothing is rotated in place: only what is returned counts. vLLM's
            # CPU kernel stores aligned vectors: rows must not begin at odd widths.
            if self.key_mode.caches_rotated_keys:
                query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
            else:
                query = rotate_query(self.rotary_emb, positions, query.contiguous())
        if self._maps_queries:
            query = _per_head(query, self._basis(KEY_BASIS).mT, self.num_heads)
        context = self.attn(query, key, value)
        if self._maps_context:
            context = _per_head(context, self._basis(VALUE_BASIS), self.num_heads)
            if self._has_value_offset:
                # The weights of a softmax sum to 1: each head's output lacks exactly the offset.
                group = self.num_heads // self.num_kv_heads
                offset = self._basis(VALUE_OFFSET).repeat_interleave(group, dim=0)
                context = context + offset.flatten()
        return projected(getattr(self, self._output), context)

    def _normed(self, norm: Any, rows: torch.Tensor) -> torch.Tensor:
        """Queries or keys after their norm, of each head or of all together."""
        size = rows.shape[-1] if self._wide_norms else self.head_size
        normed: torch.Tensor = norm(rows.reshape(-1, size))
        return normed.view(rows.shape)

    def _fold(self, stock: Any, family: Family, eigen: EigenConfig) -> None:
        """Create `qkv_proj`, and the output projection under the family's name for it."""
        biases = needed_biases(eigen, family)
        prefix = stock.attn.layer_name.rpartition(".")[0]
        stock_output: RowParallelLinear = getattr(stock, self._output)
        hidden_size = stock_output.output_size
        query_size, key_size = projected_sizes(eigen, self.ranks)
        self.qkv_proj = EigenQKVLinear(
            hidden_size,
            query_size=query_size,
            rank_k=key_size,
            rank_v=self.ranks.rank_v,
            total_num_heads=eigen.num_heads,
            total_num_kv_heads=eigen.num_latent_heads,
            bias=stock.qkv_proj.bias is not None or bool(biases),
            prefix=f"{prefix}.qkv_proj",
        )
        self._widths = list(self.qkv_proj.sizes.values())
        output = RowParallelLinear(
            eigen.num_heads * self.ranks.rank_v,
            hidden_size,
            bias=stock_output.bias is not None or self._output in biases,
            prefix=f"{prefix}.{self._output}",
        )
        self.add_module(self._output, output)

    def _add_basis(self, name: str, shape: tuple[int, ...]) -> None:
        """Create a parameter of `shape` [heads, ...] over all ranks, this rank's heads of it."""
        tp_size = get_tensor_model_parallel_world_size()
        heads = max(1, shape[0] // tp_size)
        first = get_tensor_model_parallel_rank() // max(1, tp_size // shape[0]) * heads

        # vLLM passes the parameter by this name where it loads weights again.
        def load(param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
            param.data.copy_(loaded_weight.narrow(0, first, heads))

        parameter = nn.Parameter(torch.empty(heads, *shape[1:]), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": load})
        self.register_parameter(name, parameter)

    def _kernel_bases(self, eigen: EigenConfig, rotary: RotaryTable | None) -> LayerBases:
        """The bases that are left to the cache write and to the attention kernels."""
        reconstruction = down_projection = None
        if eigen.key_mode.reconstructs_keys:
            assert rotary is not None
            reconstruction = KeyReconstruction(
                self._basis(KEY_BASIS), rotary, self._optional(KEY_OFFSET)
            )
        if not eigen.projections.folds_keys:
            value = self._basis(VALUE_ENCODER) if self._maps_context else None
            down_projection = DownProjection(
                self._basis(KEY_ENCODER),
                value,
                self._optional(KEY_ENCODER_BIAS),
                self._optional(VALUE_ENCODER_BIAS),
            )
        return LayerBases(reconstruction, down_projection)

    def _basis(self, name: str) -> torch.Tensor:
        """A parameter made by `_add_basis`."""
        return self.get_parameter(name)

    def _optional(self, name: str) -> torch.Tensor | None:
        """The parameter, or None where the checkpoint has none."""
        return self._basis(name) if hasattr(self, name) else None


class EigenSelfAttention(CompressedAttention):
    """In one of vLLM's own models."""

    def forward(
        self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[num_tokens, hidden] to [num_tokens, hidden]."""
        return self.attend(hidden_states, positions)


class TransformersSelfAttention(CompressedAttention):
    """In a model of transformers that vLLM runs."""

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """[1, num_tokens, hidden] to the same, and no probabilities.

        Args:
            position_ids: [1, num_tokens].
            options: mask and rotary tables, which a paged cache does not need.
        """
        return self.attend(hidden_states[0], position_ids[0])[None], None


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
