"""The structures of `args.h`, field by field, and those that point into packed tensors."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import Structure, c_double, c_int64, c_void_p

from .packed import Absorbed, PackedRebuild


class Cache(Structure):
    """The pages of a layer and how they are laid out."""

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


class WriteArgs(Structure):
    """Of `eigen_write_cache`."""

    _fields_ = (
        ("cache", Cache),
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


class AbsorbArgs(Structure):
    """Planes that a single query does not rebuild."""

    _fields_ = (
        ("basis", c_void_p),
        ("waves", c_void_p),
        ("blend", c_void_p),
        ("bands", c_void_p),
        ("num_bands", c_int64),
        ("num_waves", c_int64),
        ("direct_planes", c_int64),
        ("basis_stride", c_int64),
    )


class RebuildArgs(Structure):
    """Keys rebuilt from latents."""

    _fields_ = (
        ("basis", c_void_p),
        ("offset", c_void_p),
        ("order", c_void_p),
        ("depth", c_void_p),
        ("cos_sin", c_void_p),
        ("num_heads", c_int64),
        ("planes", c_int64),
        ("rotary_planes", c_int64),
        ("positions", c_int64),
        ("absorb", c_void_p),
    )


class AttendArgs(Structure):
    """Of `eigen_attend`."""

    _fields_ = (
        ("cache", Cache),
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


# The structures that point into a packed object, kept as long as it lives.
_rebuilds: weakref.WeakKeyDictionary[PackedRebuild, tuple[RebuildArgs, AbsorbArgs | None]] = (
    weakref.WeakKeyDictionary()
)


def rebuild_args(packed: PackedRebuild) -> RebuildArgs:
    """The structure that points into `packed`, made once."""
    if packed not in _rebuilds:
        absorb = None if packed.absorbed is None else _absorb_args(packed.absorbed)
        rebuild = RebuildArgs(
            packed.basis.data_ptr(),
            packed.offset.data_ptr() if packed.offset is not None else None,
            packed.order.data_ptr(),
            packed.depth.data_ptr(),
            packed.table.data_ptr(),
            packed.basis.shape[0],
            packed.basis.shape[1] // 2,
            packed.rotary_planes,
            packed.positions,
            None if absorb is None else ctypes.addressof(absorb),
        )
        _rebuilds[packed] = rebuild, absorb
    return _rebuilds[packed][0]


def _absorb_args(absorbed: Absorbed) -> AbsorbArgs:
    waves = absorbed.waves
    return AbsorbArgs(
        absorbed.basis.data_ptr(),
        waves.waves.data_ptr(),
        absorbed.blend.data_ptr(),
        absorbed.bands.data_ptr(),
        absorbed.bands.shape[0],
        waves.waves.shape[0],
        waves.direct_planes,
        absorbed.basis.shape[2],
    )
