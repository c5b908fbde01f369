# SPDX-License-Identifier: Apache-2.0
"""The fused QKV projection of an Eigen layer: query, key and value heads of three widths."""

from __future__ import annotations

from typing import Any

import torch

from vllm_eigen.plugin.vllm_api import (
    ColumnParallelLinear,
    QKVParallelLinear,
    get_tensor_model_parallel_world_size,
)


class EigenQKVLinear(QKVParallelLinear):
    """vLLM's fused, tensor-parallel QKV projection, with a key width of its own.

    Output on one rank, concatenated: query [num_heads * query_size],
    key [num_kv_heads * rank_k], value [num_kv_heads * rank_v]. When there are more ranks than KV
    heads, each KV head is replicated, as in vLLM.

    Args:
        hidden_size: width of the input.
        query_size: width of a query head.
        rank_k, rank_v: widths of a key and of a value head.
        total_num_heads, total_num_kv_heads: heads over all ranks.
        options: passed on to vLLM's `ColumnParallelLinear` (bias, quant_config, prefix).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        query_size: int,
        rank_k: int,
        rank_v: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        **options: Any,
    ) -> None:
        tp_size = get_tensor_model_parallel_world_size()
        self.hidden_size = hidden_size
        self.total_num_heads = total_num_heads
        self.total_num_kv_heads = total_num_kv_heads
        self.num_heads = total_num_heads // tp_size
        self.num_kv_heads = max(1, total_num_kv_heads // tp_size)
        self.num_kv_head_replicas = max(1, tp_size // total_num_kv_heads)
        self.head_size = query_size
        self.v_head_size = rank_v
        self.sizes = {
            "q": self.num_heads * query_size,
            "k": self.num_kv_heads * rank_k,
            "v": self.num_kv_heads * rank_v,
        }
        self.output_sizes = [size * tp_size for size in self.sizes.values()]
        # Not QKVParallelLinear's __init__: it would give keys the width of queries.
        ColumnParallelLinear.__init__(
            self, hidden_size, sum(self.output_sizes), gather_output=False, **options
        )
        if self.bias is not None:
            # A checkpoint may have a bias of its keys or values alone, which holds an offset.
            self.bias.data.zero_()

    def weight_loader(
        self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: str
    ) -> None:
        """Copy this rank's heads of one projection's weight or bias into the fused parameter."""
        offset, size = self._get_shard_offset_mapping(shard_id), self.sizes[shard_id]
        rank = self.tp_rank if shard_id == "q" else self.tp_rank // self.num_kv_head_replicas
        param.data.narrow(0, offset, size).copy_(loaded_weight.narrow(0, rank * size, size))

    def _get_shard_offset_mapping(self, loaded_shard_id: str) -> int:
        offsets = {"q": 0, "k": self.sizes["q"], "v": self.sizes["q"] + self.sizes["k"]}
        return offsets[loaded_shard_id]

    def _get_shard_size_mapping(self, loaded_shard_id: str) -> int:
        return self.sizes[loaded_shard_id]
