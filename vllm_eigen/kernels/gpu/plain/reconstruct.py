# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,assignment"
"""Reconstructed rotary keys on a GPU: the packed basis of a layer, and the scores of one tile.

The basis is stored with the two dimensions of each RoPE pair side by side, whatever the model's
style, and the unrotated dimensions last: one matrix product reconstructs a tile, and each thread
then holds both coordinates of a pair. Where the rotary table rotates every pair by a constant angle
a position, position p = p0 + i splits into a tile's start p0 and an offset i:
q . R(p0 + i) k = (R(-p0) q) . (R(i) k). The query is rotated once a tile, the keys by a table that
all tiles share, and no cosine is read for each cached token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from vllm_eigen.kernels.gpu.plain.latents import load_basis_rows, numbers_of
from vllm_eigen.kernels.gpu.tiles import MAX_BLOCK_N, MIN_DOT, padded, padded_pairs
from vllm_eigen.kernels.interface import KeyReconstruction
from vllm_eigen.kernels.rope import RotaryTable

TILE_START_STEP = MIN_DOT
"""Positions between two rows of the table of tile starts; divides every tile's size."""

PAIRS = tl.constexpr(32)
"""RoPE pairs that are reconstructed at once: all of them would not fit the registers."""


@dataclass(frozen=True, eq=False)
class PackedRotary:
    """A `RotaryTable` as the kernel reads it; layers that rotate alike share one.

    in_tile: float32 `[MAX_BLOCK_N, 2 * half]`, cosines and sines of the first positions.
    in_tile_halves: int32 `[MAX_BLOCK_N, half]`, the same as two float16, for queries of 16 bits.
        Their error of 2^-12 is that of float16 keys and an eighth of that of bfloat16 keys.
    tile_start: float32 `[.., 2 * half]`, those of every TILE_START_STEP-th position. All are None
        where some pair does not rotate by a constant angle a position.
    """

    table: RotaryTable
    in_tile: torch.Tensor | None
    in_tile_halves: torch.Tensor | None
    tile_start: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class PackedReconstruction:
    """A `KeyReconstruction` as the kernel reads it; built once, outside of any CUDA graph.

    basis: `[num_reconstructed_heads, padded rank_k, 2 * half + rest]`, zero padded, in the query's
        dtype; offset: float32 `[num_reconstructed_heads, 2 * half + rest]`, or None.
    half, rest: the number of RoPE pairs and of unrotated dimensions (0: none), both padded.
    """

    basis: torch.Tensor
    offset: torch.Tensor | None
    half: int
    rest: int
    rotary: PackedRotary


def pack_rotary(rotary: RotaryTable) -> PackedRotary:
    """Pack a table; waits for the device."""
    table = rotary.cos_sin.contiguous()
    in_tile = in_tile_halves = tile_start = None
    frequencies = rotary.frequencies
    if frequencies and None not in frequencies:
        half, pairs = max(MIN_DOT, padded(table.shape[1] // 2)), table.shape[1] // 2
        gain = table[0, 0]
        # Angles must be 0 at position 0, or those of start and offset would not add up.
        if bool((table[0, :pairs] == gain).all()) and not bool(table[0, pairs:].any()):
            in_tile = _pad_table(table[:MAX_BLOCK_N] / gain, MAX_BLOCK_N, half)
            both = in_tile.half().view(MAX_BLOCK_N, 2, half).transpose(1, 2).contiguous()
            in_tile_halves = both.view(torch.int32).squeeze(2)
            rows = -(-table.shape[0] // TILE_START_STEP)
            tile_start = _pad_table(table[::TILE_START_STEP], rows, half)
    return PackedRotary(replace(rotary, cos_sin=table), in_tile, in_tile_halves, tile_start)


def pack(
    reconstruction: KeyReconstruction, rotary: PackedRotary, dtype: torch.dtype, padded_rank: int
) -> PackedReconstruction:
    """Pack a basis for queries of `dtype`, with `padded_rank` rows."""
    basis, rotary_dim = reconstruction.key_basis, rotary.table.rotary_dim
    heads, rank_k, head_size = basis.shape
    half, rest = padded_pairs(reconstruction)
    dims = torch.arange(rotary_dim, device=basis.device)
    dims = dims.view(2, -1) if rotary.table.is_neox_style else dims.view(-1, 2).t()

    def columns(full: torch.Tensor) -> torch.Tensor:
        """`[.., head_size]` -> `[.., 2 * half + rest]`: pairs x0 y0 x1 y1 .., then unrotated."""
        packed = full.new_zeros(*full.shape[:-1], 2 * half + rest)
        packed[..., 0:rotary_dim:2] = full[..., dims[0]]
        packed[..., 1:rotary_dim:2] = full[..., dims[1]]
        packed[..., 2 * half : 2 * half + head_size - rotary_dim] = full[..., rotary_dim:]
        return packed

    rows = basis.new_zeros(heads, padded_rank, head_size, dtype=dtype)
    rows[:, :rank_k] = basis
    offset = reconstruction.key_offset
    return PackedReconstruction(
        basis=columns(rows),
        offset=None if offset is None else columns(offset.float()),
        half=half,
        rest=rest,
        rotary=rotary,
    )


def _pad_table(table: torch.Tensor, rows: int, half: int) -> torch.Tensor:
    """`[positions, 2 * pairs]` -> `[rows, 2 * half]`, cosines and sines each zero padded."""
    count, pairs = table.shape[0], table.shape[1] // 2
    target = table.new_zeros(rows, 2, half)
    target[:count, :, :pairs] = table.view(count, 2, pairs)
    return target.view(rows, 2 * half)


@triton.jit
def _pack_halves(low, high):
    """Two tensors of 16-bit numbers in one of int32.

    What stays in registers through a loop takes half of them so: two separate numbers of 16 bits
    take one register each.
    """
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    packed = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    # The compiler would look through it and keep the two.
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [packed], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _unpack_halves(packed, dtype: tl.constexpr):
    """What `_pack_halves` packed."""
    low = packed.to(tl.int16).to(dtype, bitcast=True)
    return low, (packed >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def load_pairs(query_row, pair, valid, num_pairs: tl.constexpr, is_neox: tl.constexpr):
    """RoPE pairs of queries, twice `[BLOCK_M, pairs]`, 0 where there are none; 16-bit ones packed
    in one."""
    x_at = pair if is_neox else 2 * pair
    y_at = pair + num_pairs if is_neox else 2 * pair + 1
    mask = valid & (pair < num_pairs)
    x = tl.load(query_row + x_at, mask=mask, other=0.0)
    y = tl.load(query_row + y_at, mask=mask, other=0.0)
    loaded = (_pack_halves(x, y),) if x.dtype.primitive_bitwidth == 16 else (x, y)
    return loaded


@triton.jit
def side_by_side(x, y):
    """Both coordinates of pairs, `[rows, 2 * pairs]`."""
    rows: tl.constexpr = x.shape[0]
    pairs: tl.constexpr = x.shape[1]
    return tl.reshape(tl.join(x, y), [rows, 2 * pairs])


@triton.jit
def rotated_query(
    loaded, tile_start_cos_sin, zero, row, relative: tl.constexpr, dtype: tl.constexpr
):
    """Queries `[BLOCK_M, 2 * pairs]`, from `load_pairs`; turned back by a tile's start if relative.

    zero: of `varying_zero`. row: of the tile's start in the table, one for cosines and one for
    sines.
    """
    if dtype.primitive_bitwidth == 16:
        x, y = _unpack_halves(loaded[0] + zero, dtype)
    else:
        x, y = loaded
    if relative:
        cos = tl.load(tile_start_cos_sin + row[0])
        sin = tl.load(tile_start_cos_sin + row[1])
        x, y = x.to(tl.float32), y.to(tl.float32)
        x, y = (x * cos + y * sin).to(dtype), (y * cos - x * sin).to(dtype)
    return side_by_side(x, y)


@triton.jit
def load_in_tile(table, pair, half: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cosines and sines `[BLOCK_N, pairs]` of pairs of `PackedRotary.in_tile`, or both in one of
    `in_tile_halves`."""
    row = tl.arange(0, BLOCK_N)[:, None]
    if table.dtype.element_ty == tl.int32:
        loaded = (tl.load(table + row * half + pair),)
    else:
        at = table + row * (2 * half) + pair
        loaded = (tl.load(at), tl.load(at + half))
    return loaded


@triton.jit
def unpacked_cos_sin(loaded):
    """Cosines and sines in float32, from `load_in_tile`."""
    if loaded[0].dtype == tl.int32:
        cos, sin = _unpack_halves(loaded[0], tl.float16)
        cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    else:
        cos, sin = loaded
    return cos, sin


@triton.jit
def load_columns(
    basis,
    offset,
    head,
    first: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
    chunks: tl.constexpr,
    planes: tl.constexpr,
):
    """Columns from `first` on of the head's packed basis of `width` columns.

    Returns `[words, columns]` of each plane of each chunk (`latents.py`), and the offset
    `[1, columns]`, 0 where there is none.
    """
    last: tl.constexpr = len(chunks) - 1
    rank: tl.constexpr = planes * (chunks[last][0] + chunks[last][1])
    rows = load_basis_rows(basis + head * (rank * width), first, columns, width, chunks, planes)
    added = 0.0
    if offset is not None:
        added = load_offset(offset, head, first, columns, width)
    return rows, added


@triton.jit
def load_offset(offset, head, first: tl.constexpr, columns: tl.constexpr, width: tl.constexpr):
    """Columns `[1, columns]` from `first` on of the offsets of a head's keys."""
    return tl.load(offset + head * width + first + tl.arange(0, columns)[None, :])


@triton.jit
def rotate(pairs, cos, sin):
    """Rotate `[rows, 2 * half]`, pairs side by side, by cos and sin `[rows or 1, half]`."""
    rows: tl.constexpr = pairs.shape[0]
    half: tl.constexpr = pairs.shape[1] // 2
    x, y = tl.split(tl.reshape(pairs, [rows, half, 2]))
    return side_by_side(x * cos - y * sin, y * cos + x * sin)


@triton.jit
def add_scores(scores, query, keys, swap_ab: tl.constexpr, precision: tl.constexpr):
    """scores + query @ keys^T `[BLOCK_M, BLOCK_N]`, or with `swap_ab` its transpose.

    With swap_ab the many keys, not the few queries, fill the rows of the matrix unit, and keys just
    computed are its left operand where they lie, in registers.
    """
    keys = keys.to(query.dtype)
    if swap_ab:
        scores = tl.dot(keys, tl.trans(query), scores, input_precision=precision)
    else:
        scores = tl.dot(query, tl.trans(keys), scores, input_precision=precision)
    return scores


@triton.jit
def add_reconstructed(
    scores,
    query,
    words,
    first_basis,
    cos,
    sin,
    k_scale,
    basis,
    offset,
    first_head,
    row_head,
    first: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
    chunks: tl.constexpr,
    planes: tl.constexpr,
    is_e5m2: tl.constexpr,
    heads: tl.constexpr,
    is_fp8: tl.constexpr,
    swap_ab: tl.constexpr,
    precision: tl.constexpr,
):
    """`add_scores` of some columns of keys, reconstructed from `load_latents` and rotated.

    Rows of the query `[BLOCK_M, columns]` meet keys of one of `heads` heads from first_head on:
    row_head `[BLOCK_M, 1]` where there are several. first_basis, from `load_columns`, is that of
    the first; those of others are read here. cos and sin are None where nothing is rotated.
    """
    for index in tl.static_range(heads):
        own = first_basis
        q_own = query
        if index > 0:
            own = load_columns(
                basis, offset, first_head + index, first, columns, width, chunks, planes
            )
        if heads > 1:
            q_own = tl.where(row_head == index, query, 0.0)
        keys = tl.zeros([words[0].shape[0], columns], tl.float32)
        for c in tl.static_range(len(chunks)):
            for plane in tl.static_range(planes):
                rows = own[0][c * planes + plane]
                numbers = numbers_of(words[c], plane, planes, is_e5m2, rows.dtype)
                keys = tl.dot(numbers, rows, keys, input_precision=precision)
        if is_fp8 and offset is not None:
            # Without, it multiplies the scores.
            keys *= k_scale
        if offset is not None:
            keys += own[1]
        if cos is not None:
            keys = rotate(keys, cos, sin)
        scores = add_scores(scores, q_own, keys, swap_ab, precision)
    return scores
