# SPDX-License-Identifier: Apache-2.0
"""Every kernel of a layer launched once over nothing, so that none is compiled in a step.

A kernel is compiled for the types of its arguments, for its constants, and for what Triton makes of
a value: whether an integer is 1, whether it or an address is divisible by 16. What depends on the
step in these is exempt in the kernels (`do_not_specialize`), so one launch stands for all.
"""

from __future__ import annotations

import torch
import triton

from vllm_eigen.kernels.gpu.layer import GpuLayer
from vllm_eigen.kernels.interface import Kernels, Step


def warm_up(kernels: Kernels, layer: GpuLayer, block_size: int, device: torch.device) -> None:
    """Write no token into a cache of one block, and attend in one sequence without tokens.

    The bounds of the step are those of a prompt and of several splits, so that decode, its
    combination and prefill are all launched.
    """
    spec = layer.spec
    heads, width = spec.num_kv_heads, spec.key_width + spec.value_width
    cache = torch.zeros(1, heads, block_size, width, dtype=spec.cache_dtype, device=device)
    key, value = (
        torch.zeros(1, heads, size, dtype=spec.dtype, device=device) for size in spec.written_sizes
    )
    layer.write_cache(key, value, cache, torch.full((1,), -1, dtype=torch.int64, device=device))
    num_queries = layer.tuning.max_decode + 1
    num_blocks = triton.cdiv(2 * layer.tuning.decode_split, block_size)
    step = Step(
        query_start_loc=torch.zeros(2, dtype=torch.int32, device=device),
        seq_lens=torch.zeros(1, dtype=torch.int32, device=device),
        block_table=torch.zeros(1, num_blocks, dtype=torch.int32, device=device),
        num_actual_tokens=num_queries,
    )
    query = torch.zeros(
        num_queries, spec.num_heads, spec.query_size, dtype=spec.dtype, device=device
    )
    output = torch.zeros(num_queries, spec.num_heads, spec.rank_v, dtype=spec.dtype, device=device)
    layer.attend(query, cache, output, kernels.plan(step, spec.plan_geometry(block_size)))
