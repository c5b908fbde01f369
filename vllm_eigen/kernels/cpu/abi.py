# SPDX-License-Identifier: Apache-2.0
"""The structures of `csrc/args.h` field by field, and the constants that C++ and Python share."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_char_p, c_double, c_int64, c_void_p

import torch

from vllm_eigen.kernels.cpu.absorb import KV_CHUNK, PAIRS_AT_ONCE

BLOCK_MULTIPLE = 16
"""A cache block holds a multiple of so many tokens."""

MOST_CODES = 1024
"""Directions of a coded latent: the kernels' integer sums hold so many."""

TABLE_TOKENS = 16
"""Positions side by side in the packed table of cosines."""

ROW_MULTIPLE = 16
"""Of the numbers in a row of `Absorbed.basis`."""

QUERY_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CACHE_TYPES = {
    **QUERY_TYPES,
    torch.float8_e4m3fn: 3,
    torch.uint8: 3,
    torch.float8_e5m2: 4,
}

CODES = 5
"""The cache type of a cache of codes."""


class AbsorbArgs(Structure):
    """RoPE pairs that a single query does not reconstruct."""

    _fields_ = (
        ("basis", c_void_p),
        ("functions", c_void_p),
        ("coefficients", c_void_p),
        ("bands", c_void_p),
        ("num_bands", c_int64),
        ("num_functions", c_int64),
        ("direct_pairs", c_int64),
        ("basis_stride", c_int64),
    )


class ReconstructArgs(Structure):
    """Keys reconstructed from latents."""

    _fields_ = (
        ("basis", c_void_p),
        ("offset", c_void_p),
        ("order", c_void_p),
        ("depth", c_void_p),
        ("cos_sin", c_void_p),
        ("num_heads", c_int64),
        ("pairs", c_int64),
        ("rotary_pairs", c_int64),
        ("positions", c_int64),
        ("absorb", c_void_p),
        ("row_scale", c_void_p),
        ("row_offset", c_void_p),
        ("low_units", c_int64),
    )


class CodeArgs(Structure):
    """How latents are coded."""

    _fields_ = (
        ("eight", c_int64),
        ("four", c_int64),
        ("two", c_int64),
        ("token_scale", c_int64),
        ("scale_floor", c_double),
    )


class LayerArgs(Structure):
    """Constant for a layer."""

    _fields_ = (
        ("type", c_int64),
        ("cache_type", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("rank_k", c_int64),
        ("rank_v", c_int64),
        ("query_size", c_int64),
        ("k_scale", c_double),
        ("v_scale", c_double),
        ("scale", c_double),
        ("soft_cap", c_double),
        ("window", c_int64),
        ("alibi_slopes", c_void_p),
        ("reconstruct", c_void_p),
        ("key_code", c_void_p),
        ("value_code", c_void_p),
    )


class CacheArgs(Structure):
    """The cache blocks of a layer."""

    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("num_blocks", c_int64),
        ("block_size", c_int64),
    )


class WriteArgs(Structure):
    """Of `vllm_eigen_write_cache`."""

    _fields_ = (
        ("layer", c_void_p),
        ("cache", CacheArgs),
        ("key", c_void_p),
        ("value", c_void_p),
        ("type", c_int64),
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
        ("slots", c_void_p),
        ("num_tokens", c_int64),
        ("threads", c_int64),
    )


class StepArgs(Structure):
    """Of `vllm_eigen_plan`."""

    _fields_ = (
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("num_seqs", c_int64),
        ("block_table_stride", c_int64),
        ("block_table_width", c_int64),
        ("num_heads", c_int64),
        ("num_key_heads", c_int64),
        ("block_size", c_int64),
        ("reconstructs", c_int64),
        ("threads", c_int64),
    )


class AttendArgs(Structure):
    """Of `vllm_eigen_attend`."""

    _fields_ = (
        ("layer", c_void_p),
        ("cache", CacheArgs),
        ("query", c_void_p),
        ("output", c_void_p),
        ("num_tokens", c_int64),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("output_token_stride", c_int64),
        ("output_head_stride", c_int64),
    )


class Constant(Structure):
    """Of `vllm_eigen_describe`."""

    _fields_ = (("name", c_char_p), ("value", c_int64))


STRUCTURES = (
    *(AbsorbArgs, ReconstructArgs, CodeArgs, LayerArgs),
    *(CacheArgs, WriteArgs, StepArgs, AttendArgs),
)

SHARED: dict[str, int] = {
    **{f"sizeof {structure.__name__}": ctypes.sizeof(structure) for structure in STRUCTURES},
    **{str(dtype).removeprefix("torch."): code for dtype, code in CACHE_TYPES.items()},
    "codes": CODES,
    "most codes": MOST_CODES,
    "kv chunk": KV_CHUNK,
    "block multiple": BLOCK_MULTIPLE,
    "table tokens": TABLE_TOKENS,
    "pairs at once": PAIRS_AT_ONCE,
    "row multiple": ROW_MULTIPLE,
}
"""What the library must say of itself, by the names of `vllm_eigen_describe`."""
del SHARED["uint8"]  # bytes stand for float8_e4m3fn
