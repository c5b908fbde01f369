# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a call fit together, before a Triton kernel reads them.

Only shapes, types and layouts are read: nothing here waits for the device. Every failure is a
KernelError.
"""

from __future__ import annotations

import torch

from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.gpu.plan import GpuPlan
from vllm_eigen.kernels.interface import LayerSpec, Plan, Step

MAX_RANK = 256


def check_layer(layer: LayerSpec) -> None:
    """Refuse a layer that the kernels do not cover."""
    projection = layer.down_projection
    _require(layer.dtype in (torch.float32, torch.float16, torch.bfloat16), "dtype of the query")
    is_own = layer.is_coded or layer.is_fp8
    _require(is_own or layer.cache_dtype == layer.dtype, "dtype of query and cache")
    ranks = layer.rank_k, layer.rank_v
    _require(all(0 < rank <= MAX_RANK for rank in ranks), f"ranks 1..{MAX_RANK}")
    _require(layer.num_key_heads % layer.num_kv_heads == 0, "heads of key basis and cache")
    _require(layer.num_heads % layer.num_key_heads == 0, "heads of query and keys")
    if (reconstruction := layer.reconstruction) is not None:
        _, rank, head_size = reconstruction.key_basis.shape
        _require(rank == layer.rank_k, "rank of key basis and cache")
        _require(reconstruction.rotary.rotary_dim <= head_size, "rotary table and head")
    if (slopes := layer.scores.alibi_slopes) is not None:
        _require(slopes.shape == (layer.num_heads,), "ALiBi slopes")
    if projection is not None:
        for basis, rank in ((projection.key, layer.rank_k), (projection.value, layer.rank_v)):
            if basis is None:
                continue
            _require(basis.shape[::2] == (layer.num_kv_heads, rank), "bases of key and value")
            _require(basis.is_contiguous() and basis.dtype == layer.dtype, "layout of the bases")
        for bias, rank in (
            (projection.key_bias, layer.rank_k),
            (projection.value_bias, layer.rank_v),
        ):
            if bias is not None:
                _require(bias.shape == (layer.num_kv_heads, rank), "biases of key and value")
                _require(bias.is_contiguous(), "layout of the biases")


def check_step(step: Step) -> None:
    """Refuse a step whose tensors do not fit together."""
    tensors = step.query_start_loc, step.seq_lens, step.block_table
    _require(all(tensor.dtype == torch.int32 for tensor in tensors), "int32 tables of the step")
    num_seqs = step.seq_lens.shape[0]
    rows = step.query_start_loc.shape[0] - 1, step.block_table.shape[0]
    _require(rows == (num_seqs, num_seqs), "sequences of the step's tables")
    if (starts := step.query_start_loc_cpu) is not None:
        _require(starts.shape == step.query_start_loc.shape, "query_start_loc and its copy")
    _require(step.block_table.stride(1) == 1, "layout of the block table")


def check_write(layer: LayerSpec, key: torch.Tensor, value: torch.Tensor, num_tokens: int) -> None:
    """Refuse keys and values that are not what the layer caches or down-projects."""
    for rows, size in zip((key, value), layer.written_sizes, strict=True):
        _require(rows.shape[1:] == (layer.num_kv_heads, size), "heads and widths of key and value")
        _require(rows.shape[0] >= num_tokens, "tokens of key, value and slots")
        _require(rows.stride(2) == 1, "layout of key and value")
        is_own = layer.is_coded or layer.is_fp8
        _require(is_own or rows.dtype == layer.cache_dtype, "dtype of latents and cache")
        is_fit = layer.down_projection is None or rows.dtype == layer.dtype
        _require(is_fit, "dtype of rows and bases")


def check_attend(
    layer: LayerSpec, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor, plan: Plan
) -> GpuPlan:
    """Refuse tensors that do not fit the layer or the plan; returns the plan as these kernels'."""
    if not isinstance(plan, GpuPlan):
        raise KernelError("gpu kernels: the plan is another kernels'; make it with GpuKernels.plan")
    _require(plan.geometry == layer.plan_geometry(cache.shape[2]), "geometry of layer and plan")
    _require(query.dtype == output.dtype == layer.dtype, "dtype of query, output and layer")
    _require(query.shape[1:] == (layer.num_heads, layer.query_size), "shape of the query")
    _require(output.shape == (*query.shape[:2], layer.rank_v), "shape of query and output")
    _require(query.stride(2) == output.stride(2) == 1, "layout of query and output")
    return plan


def typed_cache(kv_cache: torch.Tensor, layer: LayerSpec) -> torch.Tensor:
    """The cache with its element type: vLLM hands fp8 caches over as bytes."""
    _require(kv_cache.shape[1] == layer.num_kv_heads, "heads of layer and cache")
    width = layer.key_width + layer.value_width
    _require(kv_cache.shape[3] == width, "widths of layer and cache")
    _require(kv_cache.stride(3) == 1 and kv_cache.stride(2) == width, "layout of the cache")
    is_e4m3 = layer.is_fp8 and layer.cache_dtype == torch.uint8
    # The kernels are compiled for such strides, whatever lies between a head's parts of blocks.
    _require(not any(some % 16 for some in kv_cache.stride()[:2]), "strides of the cache")
    dtype = torch.float8_e4m3fn if is_e4m3 else layer.cache_dtype
    _require(kv_cache.dtype in (dtype, torch.uint8), "dtype of layer and cache")
    _require(kv_cache.element_size() == dtype.itemsize, "element size of layer and cache")
    return kv_cache.view(dtype)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise KernelError(f"gpu kernels: {what} do not fit; see vllm_eigen.kernels.interface")
