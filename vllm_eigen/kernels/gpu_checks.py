"""Whether the tensors of a call fit together, before a Triton kernel reads them.

Shapes and layouts alone are looked at: nothing here waits for the device.
"""

from __future__ import annotations

import torch

from vllm_eigen.errors import KernelError

from .interface import FP8_DTYPES, Encode, Rebuild, ScoreOptions
from .triton_rebuild import padded_planes
from .triton_tiles import Shape

MAX_RANK = 256


def check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    num_tokens: int,
    encode: Encode | None,
) -> tuple[int, int]:
    """The ranks of what is stored; KernelError where the tensors do not fit together."""
    _require(key.shape[1] == value.shape[1] == pages.shape[1], "heads of key, value and cache")
    _require(min(key.shape[0], value.shape[0]) >= num_tokens, "tokens of key, value and slots")
    _require(key.stride(2) == value.stride(2) == 1, "layout of key and value")
    is_fp8 = pages.dtype in FP8_DTYPES
    _require(is_fp8 or key.dtype == value.dtype == pages.dtype, "dtype of latents and cache")
    rank_k, rank_v = key.shape[2], value.shape[2]
    if encode is not None:
        rank_k = _check_basis(encode.key, key)
        rank_v = rank_v if encode.value is None else _check_basis(encode.value, value)
    _require(rank_k + rank_v == pages.shape[3], "ranks of key, value and cache")
    return rank_k, rank_v


def _check_basis(basis: torch.Tensor, rows: torch.Tensor) -> int:
    """The rank of the latents that it makes of rows."""
    _require(basis.shape[:2] == rows.shape[1:], "bases of key and value")
    _require(basis.is_contiguous() and basis.dtype == rows.dtype, "layout of the bases")
    return basis.shape[2]


def check_attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    options: ScoreOptions,
    rebuild: Rebuild | None,
) -> Shape:
    """The head counts and ranks of a call; KernelError where its tensors do not fit together."""
    _, num_heads, query_size = query.shape
    num_kv_heads, rank_v = pages.shape[1], output.shape[2]
    rank_k = pages.shape[3] - rank_v
    num_rebuilt, columns = num_kv_heads, 0
    _require(query.dtype in (torch.float32, torch.float16, torch.bfloat16), "dtype of the query")
    _require(pages.dtype in FP8_DTYPES or pages.dtype == query.dtype, "dtype of query and cache")
    _require(0 < rank_k <= MAX_RANK and 0 < rank_v <= MAX_RANK, f"ranks 1..{MAX_RANK}")
    _require(output.shape[:2] == query.shape[:2], "shape of query and output")
    if rebuild is None:
        _require(query_size == rank_k, "width of the query and rank of the keys")
    else:
        num_rebuilt, basis_rank, head_size = rebuild.key_basis.shape
        _require((basis_rank, head_size) == (rank_k, query_size), "key basis, query and cache")
        _require(num_rebuilt % num_kv_heads == 0, "heads of key basis and cache")
        _require(
            rebuild.cos_sin.shape[1] == rebuild.rotary_dim <= head_size, "rotary table and head"
        )
        half, rest = padded_planes(rebuild)
        columns = 2 * half + rest
    _require(num_heads % num_rebuilt == 0, "heads of query and keys")
    _require(query.stride(2) == output.stride(2) == block_table.stride(1) == 1, "layout")
    slopes = options.alibi_slopes
    if slopes is not None:
        _require(slopes.shape == (num_heads,) and slopes.device == query.device, "ALiBi slopes")
    return Shape(
        num_heads=num_heads,
        heads_per_latent=num_heads // num_kv_heads,
        heads_per_rebuilt=num_heads // num_rebuilt,
        rank_k=rank_k,
        rank_v=rank_v,
        columns=columns,
        element_size=query.element_size(),
        cached_size=pages.element_size(),
    )


def typed_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache with its element type spelled out: uint8 means float8_e4m3fn."""
    width = kv_cache.shape[3]
    _require(kv_cache.stride(3) == 1 and kv_cache.stride(2) == width, "layout of the cache")
    return kv_cache.view(torch.float8_e4m3fn) if kv_cache.dtype == torch.uint8 else kv_cache


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise KernelError(f"gpu kernels: {what} do not fit; see vllm_eigen.kernels.Kernels")
