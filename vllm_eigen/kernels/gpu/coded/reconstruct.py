# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,assignment,var-annotated"
"""Rotary keys reconstructed from planes of codes on a GPU; `plain/reconstruct.py` for coded blocks.

A basis has a row for each number of each plane, divided by what the plane counts too much, so that
the planes' products add up to the latents' product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels.gpu.coded.codes import plane_of
from vllm_eigen.kernels.gpu.coded.layout import CodeTile, plane_order
from vllm_eigen.kernels.gpu.plain.reconstruct import PackedReconstruction, load_offset


def by_planes(
    packed: PackedReconstruction, code: Code, tiles: Sequence[CodeTile]
) -> PackedReconstruction:
    """The basis with a row `[2 * half + rest]` for each number of the tiles."""
    directions, factors = (part.to(packed.basis.device) for part in plane_order(code, tiles))
    rows = packed.basis[:, directions].float() * factors[:, None]
    return replace(packed, basis=rows.to(packed.basis.dtype).contiguous())


@triton.jit
def load_plane_rows(
    basis,
    head,
    t: tl.constexpr,
    plane: tl.constexpr,
    tiles: tl.constexpr,
    first: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
):
    """Rows `[tile.units, columns]` of a plane of tile t, columns from `first` on of `width`."""
    last: tl.constexpr = len(tiles) - 1
    numbers: tl.constexpr = tiles[last][4] + tiles[last][0] * tiles[last][1]
    row = tiles[t][4] + plane * tiles[t][0] + tl.arange(0, tiles[t][0])
    column = first + tl.arange(0, columns)[None, :]
    return tl.load(basis + head.to(tl.int64) * (numbers * width) + row[:, None] * width + column)


@triton.jit
def load_basis_columns(
    basis,
    offset,
    head,
    tiles: tl.constexpr,
    first: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
):
    """Columns from `first` on of the head's basis of `width` columns.

    Returns `[tile.units, columns]` of each plane of each tile, and the offset `[1, columns]`, 0
    where there is none.
    """
    loaded = ()
    for t in tl.static_range(len(tiles)):
        for plane in tl.static_range(tl.constexpr(tiles[t][1])):
            rows = load_plane_rows(basis, head, t, plane, tiles, first, columns, width)
            loaded = loaded + (rows,)
    added = 0.0
    if offset is not None:
        added = load_offset(offset, head, first, columns, width)
    return loaded, added


@triton.jit
def reconstruct_columns(
    units,
    bases,
    index: tl.constexpr,
    basis,
    offset,
    head,
    key_scale,
    streams: tl.constexpr,
    tiles: tl.constexpr,
    scaled: tl.constexpr,
    first: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
    precision: tl.constexpr,
):
    """Columns of keys, float32 `[BLOCK_N, columns]`, before they are rotated.

    units from `load_keys`, key_scale `[BLOCK_N]`, bases[index] from `load_basis_columns`. With
    streams, the basis is read where it is multiplied instead.
    """
    keys = tl.zeros([units[0].shape[0], columns], tl.float32)
    for t in tl.static_range(len(tiles)):
        for plane in tl.static_range(tl.constexpr(tiles[t][1])):
            if streams:
                rows = load_plane_rows(basis, head, t, plane, tiles, first, columns, width)
            else:
                rows = bases[index][0][tiles[t][3] + plane]
            numbers = plane_of(units[t], plane, tiles[t][5], rows.dtype)
            keys = tl.dot(numbers, rows, keys, input_precision=precision)
    if scaled:
        keys *= key_scale[:, None]
    if offset is not None:
        if streams:
            keys += load_offset(offset, head, first, columns, width)
        else:
            keys += bases[index][1]
    return keys
