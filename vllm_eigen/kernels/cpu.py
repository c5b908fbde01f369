"""The C++ kernels behind `interface.Kernels`: checks, pointers, and nothing else.

The library is compiled by `build.py` and called through ctypes; the structures below mirror
`args.h` field by field. Pages are laid out as `page.h` says.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p

import torch

from vllm_eigen.errors import KernelError

from . import build
from .interface import Rebuild, ScoreOptions
from .packed import pack

_QUERY_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CACHE_TYPES = {
    **_QUERY_TYPES,
    torch.float8_e4m3fn: 3,
    torch.uint8: 3,
    torch.float8_e5m2: 4,
}
_BLOCK_MULTIPLE = 16
_PROBLEMS = {
    1: "unknown cache type",
    2: "a sequence is longer than the table of rotary cosines",
    3: "a block or slot lies outside the cache",
    4: "a sequence is longer than its row of the block table",
}


class _Cache(Structure):
    _fields_ = (
        ("pages", c_void_p),
        ("type", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("num_blocks", c_int64),
        ("num_kv_heads", c_int64),
        ("block_size", c_int64),
        ("rank_k", c_int64),
        ("rank_v", c_int64),
        ("k_scale", c_double),
        ("v_scale", c_double),
    )


class _WriteArgs(Structure):
    _fields_ = (
        ("cache", _Cache),
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


class _RebuildArgs(Structure):
    _fields_ = (
        ("basis", c_void_p),
        ("offset", c_void_p),
        ("order", c_void_p),
        ("cos_sin", c_void_p),
        ("num_heads", c_int64),
        ("planes", c_int64),
        ("rotary_planes", c_int64),
        ("positions", c_int64),
    )


class _AttendArgs(Structure):
    _fields_ = (
        ("cache", _Cache),
        ("query", c_void_p),
        ("output", c_void_p),
        ("type", c_int64),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("output_token_stride", c_int64),
        ("output_head_stride", c_int64),
        ("num_heads", c_int64),
        ("query_size", c_int64),
        ("num_seqs", c_int64),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("block_table_width", c_int64),
        ("alibi_slopes", c_void_p),
        ("scale", c_double),
        ("soft_cap", c_double),
        ("window", c_int64),
        ("rebuild", c_void_p),
        ("threads", c_int64),
    )


class CpuKernels:
    """See `interface.Kernels`. A row's output depends on its sequence alone (README.md)."""

    name = "cpu"

    def __init__(self, isa: str | None = None, extra_flags: tuple[str, ...] = ()) -> None:
        """Load the library for `isa` (default: VLLM_EIGEN_CPU_ISA, else the machine's best).

        `extra_flags` go to the compiler and the linker (sanitizers).

        Raises:
            KernelError: it cannot be built or loaded here.
        """
        self.isa = isa or build.chosen_isa()
        path = build.compiled(self.isa, extra_flags)
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"cannot load {path.name}: {error}; delete it to rebuild") from error

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """See `interface.Kernels.write_cache`."""
        rank_k, rank_v = key.shape[-1], value.shape[-1]
        num_tokens, num_kv_heads = slot_mapping.shape[0], kv_cache.shape[1]
        for name, rows in (("key", key), ("value", value)):
            _check(
                rows.dim() == 3
                and rows.shape[0] >= num_tokens
                and rows.shape[1] == num_kv_heads
                and rows.stride(2) == 1,
                f"{name} must be [num_tokens, {num_kv_heads}, rank], is {list(rows.shape)}",
            )
        _check(value.dtype == key.dtype, "key and value differ in dtype")
        _check(
            slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous(),
            "slot_mapping must be contiguous int64",
        )
        args = _WriteArgs(
            _cache(kv_cache, rank_k, rank_v, k_scale, v_scale),
            key.data_ptr(),
            value.data_ptr(),
            _type(key.dtype, "key"),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            slot_mapping.data_ptr(),
            num_tokens,
            torch.get_num_threads(),
        )
        _raise_if(self._library.eigen_write_cache(ctypes.byref(args)))

    def prepare(self, rebuild: Rebuild, dtype: torch.dtype) -> object:
        """See `interface.Kernels.prepare`."""
        return pack(rebuild, self._pairs(dtype))

    def _pairs(self, dtype: torch.dtype) -> bool:
        """Whether latents of `dtype` are rebuilt in bfloat16 pairs (`Rebuilt` in element.h)."""
        return dtype == torch.bfloat16 and self.isa == "avx512bf16"

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        options: ScoreOptions,
        rebuild: Rebuild | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        *,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        """See `interface.Kernels.attend`."""
        num_heads, rank_v = query.shape[1], output.shape[2]
        rank_k = kv_cache.shape[3] - rank_v
        cache = _cache(kv_cache, rank_k, rank_v, k_scale, v_scale)
        _check(
            output.shape[:2] == query.shape[:2]
            and output.dtype == query.dtype
            and query.stride(2) == output.stride(2) == 1,
            f"output {list(output.shape)} does not fit query {list(query.shape)}",
        )
        for name, table in (
            ("query_start_loc", query_start_loc),
            ("seq_lens", seq_lens),
            ("block_table", block_table),
        ):
            _check(table.dtype == torch.int32 and table.stride(-1) == 1, f"{name} must be int32")
        num_seqs = seq_lens.shape[0]
        _check(
            query_start_loc.shape[0] == num_seqs + 1 and block_table.shape[0] == num_seqs,
            "query_start_loc, seq_lens and block_table disagree on the number of sequences",
        )
        slopes = options.alibi_slopes
        if slopes is not None:
            _check(
                slopes.dtype == torch.float32 and slopes.shape == (num_heads,),
                f"alibi_slopes must be float32 [{num_heads}]",
            )
        rebuild_args = None
        heads, query_size = kv_cache.shape[1], rank_k
        if rebuild is not None:
            heads, query_size = rebuild.key_basis.shape[0], rebuild.key_basis.shape[2]
            _check(
                rebuild.key_basis.shape[1] == rank_k and heads % kv_cache.shape[1] == 0,
                f"key_basis {list(rebuild.key_basis.shape)} does not fit rank_k {rank_k} and "
                f"{kv_cache.shape[1]} KV heads",
            )
            rebuild_args = ctypes.pointer(_rebuild(rebuild, self._pairs(kv_cache.dtype)))
        _check(
            query.shape[2] == query_size and num_heads % heads == 0,
            f"query {list(query.shape)} does not fit {heads} heads of size {query_size}",
        )
        args = _AttendArgs(
            cache,
            query.data_ptr(),
            output.data_ptr(),
            _type(query.dtype, "query"),
            query.stride(0),
            query.stride(1),
            output.stride(0),
            output.stride(1),
            num_heads,
            query_size,
            num_seqs,
            query_start_loc.data_ptr(),
            seq_lens.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            block_table.shape[1],
            slopes.data_ptr() if slopes is not None else None,
            options.scale,
            options.soft_cap or 0.0,
            options.sliding_window or 0,
            ctypes.cast(rebuild_args, c_void_p) if rebuild_args else None,
            torch.get_num_threads(),
        )
        _raise_if(self._library.eigen_attend(ctypes.byref(args)))


def _cache(
    kv_cache: torch.Tensor, rank_k: int, rank_v: int, k_scale: float, v_scale: float
) -> _Cache:
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    _check(
        width == rank_k + rank_v
        and min(rank_k, rank_v) > 0
        and block_size % _BLOCK_MULTIPLE == 0
        and kv_cache.stride()[2:] == (width, 1),
        f"kv_cache {list(kv_cache.shape)} must be pages of rank {rank_k} + {rank_v}, each "
        f"contiguous, of a multiple of {_BLOCK_MULTIPLE} tokens",
    )
    kind = _CACHE_TYPES.get(kv_cache.dtype)
    if kind is None:
        raise KernelError(f"the CPU kernels do not know a cache of {kv_cache.dtype}")
    is_fp8 = kind >= _CACHE_TYPES[torch.uint8]
    return _Cache(
        kv_cache.data_ptr(),
        kind,
        kv_cache.stride(0),
        kv_cache.stride(1),
        num_blocks,
        num_kv_heads,
        block_size,
        rank_k,
        rank_v,
        k_scale if is_fp8 else 1.0,
        v_scale if is_fp8 else 1.0,
    )


def _rebuild(rebuild: Rebuild, pairs: bool) -> _RebuildArgs:
    packed = pack(rebuild, pairs)
    return _RebuildArgs(
        packed.basis.data_ptr(),
        packed.offset.data_ptr() if packed.offset is not None else None,
        packed.order.data_ptr(),
        packed.table.data_ptr(),
        packed.basis.shape[0],
        packed.basis.shape[1] // 2,
        packed.rotary_planes,
        packed.positions,
    )


def _type(dtype: torch.dtype, name: str) -> int:
    kind = _QUERY_TYPES.get(dtype)
    if kind is None:
        raise KernelError(f"the CPU kernels do not compute with a {name} of {dtype}")
    return kind


def _check(fits: bool, problem: str) -> None:
    if not fits:
        raise KernelError(problem)


def _raise_if(code: int) -> None:
    if code:
        raise KernelError(_PROBLEMS.get(code, f"the CPU kernels failed with code {code}"))
