"""The C++ kernels behind `interface.Kernels`: checks, pointers, and nothing else.

The library is compiled by `build.py` and called through ctypes with the structures of `args.py`.
Pages are laid out as `page.h` says.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from vllm_eigen.errors import KernelError

from . import build
from .args import AttendArgs, Cache, WriteArgs, rebuild_args
from .interface import Encode, Rebuild, ScoreOptions
from .packed import PackedRebuild, Reader, pack

_QUERY_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CACHE_TYPES = {
    **_QUERY_TYPES,
    torch.float8_e4m3fn: 3,
    torch.uint8: 3,
    torch.float8_e5m2: 4,
}
_BLOCK_MULTIPLE = 16
REBUILD_PAIRS_FLAG = "-DEIGEN_REBUILD_PAIRS"
_PROBLEMS = {
    1: "unknown cache type",
    2: "a sequence is longer than the table of rotary cosines",
    3: "a block or slot lies outside the cache",
    4: "a sequence is longer than its row of the block table",
}


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
        # `Bfloat16::Rebuilt` in element.h.
        self._rebuilds_pairs = self.isa == "avx512bf16" or REBUILD_PAIRS_FLAG in extra_flags
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
        encode: Encode | None = None,
    ) -> None:
        """See `interface.Kernels.write_cache`."""
        if encode is not None:
            key, value = encode.latents(key, value)
        args = WriteArgs.from_buffer_copy(
            _write_args(
                _layout(key),
                _layout(value),
                _layout(kv_cache),
                _layout(slot_mapping),
                k_scale,
                v_scale,
            )
        )
        args.cache.pages = kv_cache.data_ptr()
        args.key, args.value = key.data_ptr(), value.data_ptr()
        args.slots = slot_mapping.data_ptr()
        args.threads = torch.get_num_threads()
        _raise_if(self._library.eigen_write_cache(ctypes.byref(args)))

    def prepare(self, rebuild: Rebuild, dtype: torch.dtype, num_heads: int) -> object:
        """See `interface.Kernels.prepare`."""
        return self._pack(rebuild, dtype, dtype, num_heads)

    def _pack(
        self, rebuild: Rebuild, dtype: torch.dtype, cache_dtype: torch.dtype, num_heads: int
    ) -> PackedRebuild:
        pairs = cache_dtype == torch.bfloat16 and self._rebuilds_pairs
        return pack(rebuild, Reader(pairs, dtype, num_heads // rebuild.key_basis.shape[0]))

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
        args = AttendArgs.from_buffer_copy(
            _attend_args(
                _layout(query),
                _layout(kv_cache),
                _layout(output),
                (_layout(query_start_loc), _layout(seq_lens), _layout(block_table)),
                (options.scale, options.soft_cap or 0.0, options.sliding_window or 0),
                None if options.alibi_slopes is None else _layout(options.alibi_slopes),
                None if rebuild is None else rebuild.key_basis.shape,
                k_scale,
                v_scale,
            )
        )
        args.cache.pages = kv_cache.data_ptr()
        args.query, args.output = query.data_ptr(), output.data_ptr()
        args.query_start_loc, args.seq_lens = query_start_loc.data_ptr(), seq_lens.data_ptr()
        args.block_table = block_table.data_ptr()
        if options.alibi_slopes is not None:
            args.alibi_slopes = options.alibi_slopes.data_ptr()
        if rebuild is not None:
            packed = self._pack(rebuild, query.dtype, kv_cache.dtype, query.shape[1])
            args.rebuild = ctypes.addressof(rebuild_args(packed))
        args.threads = torch.get_num_threads()
        _raise_if(self._library.eigen_attend(ctypes.byref(args)))


# What checks and structures depend on. A model's layers and steps share few of these, and a check
# in Python costs as much as a small batch's attention: each is done once.
class _Layout(NamedTuple):
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


def _layout(tensor: torch.Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype)


@functools.lru_cache(maxsize=4096)
def _write_args(
    key: _Layout,
    value: _Layout,
    kv_cache: _Layout,
    slots: _Layout,
    k_scale: float,
    v_scale: float,
) -> WriteArgs:
    """Checked arguments of a write; pointers and threads are still to be filled in."""
    num_tokens, num_kv_heads = slots.shape[0], kv_cache.shape[1]
    for name, (shape, strides, _) in (("key", key), ("value", value)):
        _check(
            len(shape) == 3
            and shape[0] >= num_tokens
            and shape[1] == num_kv_heads
            and strides[2] == 1,
            f"{name} must be [num_tokens, {num_kv_heads}, rank], is {list(shape)}",
        )
    _check(value.dtype == key.dtype, "key and value differ in dtype")
    _check(
        slots.dtype == torch.int64
        and len(slots.shape) == 1
        and (num_tokens < 2 or slots.strides == (1,)),
        "slot_mapping must be contiguous int64",
    )
    return WriteArgs(
        cache=_cache(kv_cache, key.shape[2], value.shape[2], k_scale, v_scale),
        type=_type(key.dtype, "key"),
        key_token_stride=key.strides[0],
        key_head_stride=key.strides[1],
        value_token_stride=value.strides[0],
        value_head_stride=value.strides[1],
        num_tokens=num_tokens,
    )


@functools.lru_cache(maxsize=4096)
def _attend_args(
    query: _Layout,
    kv_cache: _Layout,
    output: _Layout,
    tables: tuple[_Layout, _Layout, _Layout],
    score: tuple[float, float, int],
    slopes: _Layout | None,
    basis: torch.Size | None,
    k_scale: float,
    v_scale: float,
) -> AttendArgs:
    """Checked arguments of an attention; pointers and threads are still to be filled in."""
    (_, num_heads, size), strides, dtype = query
    rank_v = output.shape[2]
    rank_k = kv_cache.shape[3] - rank_v
    cache = _cache(kv_cache, rank_k, rank_v, k_scale, v_scale)
    _check(
        output.shape[:2] == query.shape[:2]
        and output.dtype == dtype
        and strides[2] == output.strides[2] == 1,
        f"output {list(output.shape)} does not fit query {list(query.shape)}",
    )
    for name, table in zip(("query_start_loc", "seq_lens", "block_table"), tables, strict=True):
        _check(table.dtype == torch.int32 and table.strides[-1] == 1, f"{name} must be int32")
    starts, lengths, blocks = tables
    num_seqs = lengths.shape[0]
    _check(
        starts.shape[0] == num_seqs + 1 and blocks.shape[0] == num_seqs,
        "query_start_loc, seq_lens and block_table disagree on the number of sequences",
    )
    if slopes is not None:
        _check(
            slopes.dtype == torch.float32 and slopes.shape == (num_heads,),
            f"alibi_slopes must be float32 [{num_heads}]",
        )
    heads, query_size = cache.num_kv_heads, rank_k
    if basis is not None:
        heads, query_size = basis[0], basis[2]
        _check(
            basis[1] == rank_k and heads % cache.num_kv_heads == 0,
            f"key_basis {list(basis)} does not fit rank_k {rank_k} and "
            f"{cache.num_kv_heads} KV heads",
        )
    _check(
        size == query_size and num_heads % heads == 0,
        f"query {list(query.shape)} does not fit {heads} heads of size {query_size}",
    )
    scale, soft_cap, window = score
    return AttendArgs(
        cache=cache,
        type=_type(dtype, "query"),
        query_token_stride=strides[0],
        query_head_stride=strides[1],
        output_token_stride=output.strides[0],
        output_head_stride=output.strides[1],
        num_heads=num_heads,
        query_size=size,
        num_seqs=num_seqs,
        block_table_stride=blocks.strides[0],
        block_table_width=blocks.shape[1],
        scale=scale,
        soft_cap=soft_cap,
        window=window,
    )


def _cache(kv_cache: _Layout, rank_k: int, rank_v: int, k_scale: float, v_scale: float) -> Cache:
    (num_blocks, num_kv_heads, block_size, width), strides, dtype = kv_cache
    _check(
        width == rank_k + rank_v
        and min(rank_k, rank_v) > 0
        and block_size % _BLOCK_MULTIPLE == 0
        and strides[2:] == (width, 1),
        f"kv_cache {list(kv_cache.shape)} must be pages of rank {rank_k} + {rank_v}, each "
        f"contiguous, of a multiple of {_BLOCK_MULTIPLE} tokens",
    )
    kind = _CACHE_TYPES.get(dtype)
    if kind is None:
        raise KernelError(f"the CPU kernels do not know a cache of {dtype}")
    is_fp8 = kind >= _CACHE_TYPES[torch.uint8]
    return Cache(
        type=kind,
        block_stride=strides[0],
        head_stride=strides[1],
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        rank_k=rank_k,
        rank_v=rank_v,
        k_scale=k_scale if is_fp8 else 1.0,
        v_scale=v_scale if is_fp8 else 1.0,
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
