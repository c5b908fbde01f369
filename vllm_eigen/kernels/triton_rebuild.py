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
from .triton_tiles import MAX_BLOCK_N, MIN_DOT, padded, rank_chunks

FAR_STEP = MIN_DOT
"""Positions between two rows of the table of tile starts; divides every tile's size."""

_TABLE_TOLERANCE = 2e-2
"""Float32 tables err by position * 2^-24 radians; another scheme is wrong by the order of 1."""


@dataclass(frozen=True)
class PackedRebuild:
    """A `Rebuild` as the kernel reads it; built once, outside of any CUDA graph.

    basis: `[num_rebuilt_heads, head + tail chunk of rank_k, 2 * half + rest]`, zero padded, in the
        query's dtype; offset: float32 `[num_rebuilt_heads, 2 * half + rest]`, or None.
    half, rest: the number of planes and of dimensions that do not rotate (0: none), both padded.
    table: the caller's cosines and sines, `[max_position, rotary_dim]`.
    near, far: float32 cosines and sines of the positions 0 .. MAX_BLOCK_N - 1, and of every
        FAR_STEP-th, `[.., 2 * half]`; None where the table is not that of a plain rotation, or is
        too coarse to be multiplied.
    """

    basis: torch.Tensor
    offset: torch.Tensor | None
    half: int
    rest: int
    table: torch.Tensor
    near: torch.Tensor | None
    far: torch.Tensor | None


def padded_planes(rebuild: Rebuild) -> tuple[int, int]:
    """`half` and `rest` of a packed rebuild."""
    head_size = rebuild.key_basis.shape[2]
    return max(MIN_DOT, padded(rebuild.rotary_dim // 2)), padded(head_size - rebuild.rotary_dim)


def pack(rebuild: Rebuild, dtype: torch.dtype) -> PackedRebuild:
    """Pack `rebuild` for queries of `dtype`; waits for the device."""
    basis, planes = rebuild.key_basis, rebuild.rotary_dim // 2
    heads, rank_k, head_size = basis.shape
    half, rest = padded_planes(rebuild)
    unrotated = head_size - rebuild.rotary_dim
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
    table = rebuild.cos_sin.contiguous()
    near = far = None
    if _is_rotation(table):
        near = _pad_table(table[:MAX_BLOCK_N] / table[0, 0], MAX_BLOCK_N, half)
        far = _pad_table(table[::FAR_STEP], -(-table.shape[0] // FAR_STEP), half)
    return PackedRebuild(
        basis=columns(rows),
        offset=None if offset is None else columns(offset.float()),
        half=half,
        rest=rest,
        table=table,
        near=near,
        far=far,
    )


def _pad_table(table: torch.Tensor, rows: int, half: int) -> torch.Tensor:
    """`[positions, 2 * planes]` -> `[rows, 2 * half]`, cosines and sines each zero padded."""
    count, planes = table.shape[0], table.shape[1] // 2
    target = table.new_zeros(rows, 2, half)
    target[:count, :, :planes] = table.view(count, 2, planes)
    return target.view(rows, 2 * half)


def _is_rotation(table: torch.Tensor) -> bool:
    """Whether rows turn by equal angles a position, so that the parts of a position compose."""
    if table.dtype != torch.float32 or table.numel() == 0:
        return False
    cos, sin = table.chunk(2, dim=-1)
    # An odd stride meets every offset within a tile.
    position = torch.arange(0, table.shape[0], 7, device=table.device)
    start, step = position // MAX_BLOCK_N * MAX_BLOCK_N, position % MAX_BLOCK_N
    gain = cos[0, 0]
    turned_cos = (cos[start] * cos[step] - sin[start] * sin[step]) / gain
    turned_sin = (sin[start] * cos[step] + cos[start] * sin[step]) / gain
    error = (turned_cos - cos[position]).abs().max() + (turned_sin - sin[position]).abs().max()
    return bool(error < _TABLE_TOLERANCE * gain)


@triton.jit
def load_basis(
    basis,
    offset,
    head,
    rank_head: tl.constexpr,
    rank_tail: tl.constexpr,
    half: tl.constexpr,
    rest: tl.constexpr,
):
    """Rebuilt head `head` of the packed basis: chunks of the rank, turning and still columns.

    Returns (turning `[rank_head, 2 * half]`, the tail's, still `[rank_head, rest]`, the tail's,
    turning offset `[1, 2 * half]`, still offset `[1, rest]`); what a layer lacks is a stand-in.
    """
    width: tl.constexpr = 2 * half + rest
    turning_at = tl.arange(0, 2 * half)[None, :]
    basis += head * ((rank_head + rank_tail) * width)
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
        turning_offset = tl.load(offset + head * width + turning_at)
        if rest > 0:
            still_offset = tl.load(offset + head * width + still_at)
    return turning, turning_tail, still, still_tail, turning_offset, still_offset


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
        scores = tl.dot(keys, tl.trans(query), scores, input_precision=precision)
    else:
        scores = tl.dot(query, tl.trans(keys), scores, input_precision=precision)
    return scores


@triton.jit
def add_rebuilt_scores(
    scores,
    q_turning,
    q_still,
    keys,
    keys_tail,
    tiles,
    cos,
    sin,
    k_scale,
    has_tail: tl.constexpr,
    has_rest: tl.constexpr,
    has_offset: tl.constexpr,
    is_fp8: tl.constexpr,
    swap: tl.constexpr,
    precision: tl.constexpr,
):
    """Add the raw scores of one rebuilt head, as `add_scores` does.

    q_turning `[block_m, 2 * half]`, q_still `[block_m, rest]`; keys and keys_tail, latents by
    chunks of the rank; tiles from `load_basis`; cos, sin `[block_n, half]`.
    """
    turning, turning_tail, still, still_tail, turning_offset, still_offset = tiles
    rebuilt = _rebuild_columns(
        keys,
        keys_tail,
        turning,
        turning_tail,
        turning_offset,
        k_scale,
        has_tail,
        has_offset,
        is_fp8,
        precision,
    )
    scores = add_scores(scores, q_turning, rotate(rebuilt, cos, sin), swap, precision)
    if has_rest:
        unrotated = _rebuild_columns(
            keys,
            keys_tail,
            still,
            still_tail,
            still_offset,
            k_scale,
            has_tail,
            has_offset,
            is_fp8,
            precision,
        )
        scores = add_scores(scores, q_still, unrotated, swap, precision)
    return scores


@triton.jit
def _rebuild_columns(
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
