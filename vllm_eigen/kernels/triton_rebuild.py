# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Rebuilt rotary keys on a GPU: what is packed once per layer, and the scores of one tile.

The basis is stored with the two dimensions of each rotary plane side by side, whatever the model's
style, and those that do not rotate last: one matrix product rebuilds a tile, and each thread then
holds both coordinates of a plane. Where the rotary table is
that of a plain rotation, position p = p0 + i splits into a tile's start p0 and an offset i:
q . R(p0 + i) k = (R(-p0) q) . (R(i) k). The query turns once a tile, the keys by a table that all
tiles share, and no cosine is read for each cached token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .interface import Rebuild

MIN_DOT = 16
"""The smallest side of a matrix-unit operand."""

_TABLE_TOLERANCE = 2e-2
"""Float32 tables err by position * 2^-24 radians; another scheme is wrong by the order of 1."""


def rank_chunks(rank: int) -> tuple[int, int]:
    """Split a rank into two powers of two (the second may be 0): 77 is 64 + 16, not 128."""
    whole = max(MIN_DOT, triton.next_power_of_2(rank))
    head = whole // 2
    tail = max(MIN_DOT, triton.next_power_of_2(rank - head))
    return (head, tail) if head >= MIN_DOT and tail < head else (whole, 0)


@dataclass(frozen=True)
class PackedRebuild:
    """A `Rebuild` as the kernel reads it; built once, outside of any CUDA graph.

    basis: `[num_rebuilt_heads, head + tail chunk of rank_k, 2 * half + rest]`, zero padded, in the
        query's dtype; offset: float32 `[num_rebuilt_heads, 2 * half + rest]`, or None.
    half, rest: the number of planes and of dimensions that do not rotate (0: none), both padded.
    relative: rotate by tile start and offset; near then holds the offsets' cosines and sines,
        float32 `[block_n, 2 * half]`, and far those of every tile's start. Otherwise both are the
        caller's own table.
    """

    basis: torch.Tensor
    offset: torch.Tensor | None
    half: int
    rest: int
    relative: bool
    near: torch.Tensor
    far: torch.Tensor


def pack(rebuild: Rebuild, dtype: torch.dtype, block_n: int, relative: bool) -> PackedRebuild:
    """Pack `rebuild` for queries of `dtype` and tiles of `block_n` keys.

    `relative` is a wish: a table in low precision, or not that of a plain rotation, is kept.
    Synchronises with the device.
    """
    basis, planes = rebuild.key_basis, rebuild.rotary_dim // 2
    heads, rank_k, head_size = basis.shape
    half = max(MIN_DOT, triton.next_power_of_2(planes))
    unrotated = head_size - rebuild.rotary_dim
    rest = max(MIN_DOT, triton.next_power_of_2(unrotated)) if unrotated else 0
    turning = torch.arange(rebuild.rotary_dim, device=basis.device)
    turning = turning.view(2, -1) if rebuild.is_neox_style else turning.view(-1, 2).t()

    def columns(full: torch.Tensor) -> torch.Tensor:
        """`[.., head_size]` -> `[.., 2 * half + rest]`: planes x0 y0 x1 y1 .., then the rest."""
        packed = full.new_zeros(*full.shape[:-1], 2 * half + rest)
        packed[..., 0 : 2 * planes : 2] = full[..., turning[0]]
        packed[..., 1 : 2 * planes : 2] = full[..., turning[1]]
        packed[..., 2 * half : 2 * half + unrotated] = full[..., rebuild.rotary_dim :]
        return packed

    rows = basis.new_zeros(heads, sum(rank_chunks(rank_k)), head_size, dtype=dtype)
    rows[:, :rank_k] = basis
    offset = rebuild.key_offset
    table = rebuild.cos_sin
    relative = relative and _is_rotation(table, block_n)
    if relative:
        near, far = table[:block_n] / table[0, 0], table[::block_n]
        near = torch.nn.functional.pad(near, (0, 0, 0, block_n - near.shape[0]))
        near, far = _pad_planes(near, half), _pad_planes(far, half)
    else:
        near = far = table.contiguous()
    return PackedRebuild(
        basis=columns(rows),
        offset=None if offset is None else columns(offset.float()).contiguous(),
        half=half,
        rest=rest,
        relative=relative,
        near=near,
        far=far,
    )


def _pad_planes(table: torch.Tensor, half: int) -> torch.Tensor:
    """`[positions, 2 * planes]` -> `[positions, 2 * half]`, cosines and sines zero padded."""
    parts = table.view(table.shape[0], 2, -1)
    padding = half - parts.shape[-1]
    return torch.nn.functional.pad(parts, (0, padding)).reshape(table.shape[0], 2 * half)


def _is_rotation(table: torch.Tensor, block_n: int) -> bool:
    """Whether each row is the rotation of its tile's start after that of its offset."""
    if table.dtype not in (torch.float32, torch.float64):
        return False
    cos, sin = table.double().chunk(2, dim=-1)
    position = torch.arange(table.shape[0], device=table.device)
    start, step = position // block_n * block_n, position % block_n
    gain = cos[0, 0]
    turned_cos = (cos[start] * cos[step] - sin[start] * sin[step]) / gain
    turned_sin = (sin[start] * cos[step] + cos[start] * sin[step]) / gain
    error = torch.maximum((turned_cos - cos).abs().max(), (turned_sin - sin).abs().max())
    return bool(error < _TABLE_TOLERANCE * gain)


@triton.jit
def load_basis(
    basis,
    offset,
    rank_head: tl.constexpr,
    rank_tail: tl.constexpr,
    half: tl.constexpr,
    rest: tl.constexpr,
):
    """One rebuilt head's packed basis, by chunks of the rank and by turning and still columns.

    Returns (turning `[rank_head, 2 * half]`, the tail's, still `[rank_head, rest]`, the tail's,
    turning offset `[1, 2 * half]`, still offset `[1, rest]`); what a layer lacks is a stand-in.
    """
    width: tl.constexpr = 2 * half + rest
    turning_at = tl.arange(0, 2 * half)[None, :]
    rows = basis + tl.arange(0, rank_head)[:, None] * width
    turning = tl.load(rows + turning_at)
    turning_tail, still, still_tail = turning, turning, turning
    if rank_tail > 0:
        tail_rows = basis + (rank_head + tl.arange(0, rank_tail)[:, None]) * width
        turning_tail = tl.load(tail_rows + turning_at)
    if rest > 0:
        still_at = 2 * half + tl.arange(0, rest)[None, :]
        still = tl.load(rows + still_at)
        if rank_tail > 0:
            still_tail = tl.load(tail_rows + still_at)
    turning_offset, still_offset = turning, turning
    if offset is not None:
        turning_offset = tl.load(offset + turning_at)
        if rest > 0:
            still_offset = tl.load(offset + still_at)
    return turning, turning_tail, still, still_tail, turning_offset, still_offset


@triton.jit
def rebuild_columns(
    keys,
    keys_tail,
    basis,
    basis_tail,
    offset,
    k_scale,
    has_tail: tl.constexpr,
    has_offset: tl.constexpr,
    is_fp8: tl.constexpr,
    precision: tl.constexpr,
):
    """Latents `[block_n, rank]` times basis columns `[rank, n]`, unquantised, plus the offset."""
    product = tl.dot(keys, basis, input_precision=precision)
    if has_tail:
        product = tl.dot(keys_tail, basis_tail, product, input_precision=precision)
    if is_fp8:
        product *= k_scale
    if has_offset:
        product += offset
    return product


@triton.jit
def rotate(planes, cos, sin):
    """Rotate `[rows, 2 * half]`, planes side by side, by cos and sin `[rows or 1, half]`."""
    rows: tl.constexpr = planes.shape[0]
    half: tl.constexpr = planes.shape[1] // 2
    x, y = tl.split(tl.reshape(planes, [rows, half, 2]))
    turned = tl.join(x * cos - y * sin, y * cos + x * sin)
    return tl.reshape(turned, [rows, 2 * half])


@triton.jit
def add_scores(scores, query, keys, swap: tl.constexpr, precision: tl.constexpr):
    """scores + query @ keys^T `[block_m, block_n]`, or with `swap` its transpose.

    With swap the many keys, not the few queries, fill the rows of the matrix unit, and keys just
    computed are its left operand where they lie, in registers.
    """
    keys = keys.to(query.dtype)
    if swap:
        return tl.dot(keys, tl.trans(query), scores, input_precision=precision)
    return tl.dot(query, tl.trans(keys), scores, input_precision=precision)
