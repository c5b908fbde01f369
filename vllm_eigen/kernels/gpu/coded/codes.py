# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,assignment,var-annotated"
"""Codes on a GPU: tiles of a block, their planes in registers, and the numbers that meet them.

`layout.py` has the order and the words. `tiles` are `CodeTile`s throughout; eight, four and
two count the units of each width, so that one compiled kernel serves layers of other widths.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(16)
"""Tokens that are loaded together: never of two blocks."""


@triton.jit
def tile_units(tile: tl.constexpr, eight, four, two):
    """Units `[tile.units]` of a tile among all of a token's, and which of them exist."""
    unit = tile[2] + tl.arange(0, tile[0])
    exists = unit < eight + four
    if tile[5] == 2:
        unit = unit % (tile[0] // tile[6])
        exists = unit < two
        unit += eight + four
    return unit, exists


@triton.jit
def plane_directions(tile: tl.constexpr, plane: tl.constexpr, eight, four, two):
    """Directions `[tile.units]` of a plane, which exist, and how often it counts too much.

    An odd plane of 8-bit codes has the directions of the plane before it.
    """
    unit = tile[2] + tl.arange(0, tile[0])
    if tile[5] == 4:
        is_eight = unit < eight
        direction = tl.where(is_eight, unit + plane // 2 * eight, eight + unit + plane * four)
        exists = unit < eight + four
        factor = tl.where(is_eight, 1.0, 1.0 / 16 ** (plane % 2))
    else:
        plane_of_unit = plane + unit // (tile[0] // tile[6]) * tile[1]
        unit = unit % (tile[0] // tile[6])
        direction = 2 * eight + 4 * four + unit + plane_of_unit * two
        exists = unit < two
        factor = tl.full([tl.constexpr(tile[0])], 1.0, tl.float32)
    return direction, exists, factor


@triton.jit
def load_keys(codes, at, valid, eight, four, two, tiles: tl.constexpr, stride: tl.constexpr):
    """Units `[BLOCK_N, tile.units]` of each tile, as products with queries take them.

    codes: uint16 pointer to the head's first unit in block 0. at `[BLOCK_N]`: of the tokens in a
    unit; stride: from unit to unit. valid is that of whole groups of tokens: units of tokens that
    are not there are read, and hold some code.
    """
    loaded = ()
    for t in tl.static_range(len(tiles)):
        unit, exists = tile_units(tl.constexpr(tiles[t]), eight, four, two)
        places = codes + at[:, None] + (unit * stride)[None, :]
        units = tl.load(places, mask=valid[:, None] & exists[None, :], other=0)
        if tiles[t][6] > 1:
            units = units >> _fold_shift(tl.constexpr(tiles[t]))[None, :]
        loaded = loaded + (units,)
    return loaded


@triton.jit
def load_values(codes, at, valid, eight, four, two, tiles: tl.constexpr, stride: tl.constexpr):
    """As `load_keys`, `[tile.units, BLOCK_N]`, as products with probabilities take them."""
    loaded = ()
    for t in tl.static_range(len(tiles)):
        unit, exists = tile_units(tl.constexpr(tiles[t]), eight, four, two)
        places = codes + at[None, :] + (unit * stride)[:, None]
        units = tl.load(places, mask=valid[None, :] & exists[:, None], other=0)
        if tiles[t][6] > 1:
            units = units >> _fold_shift(tl.constexpr(tiles[t]))[:, None]
        loaded = loaded + (units,)
    return loaded


@triton.jit
def _fold_shift(tile: tl.constexpr):
    """Bits by which units `[tile.units]` are shifted, so that planes of a fold are the lowest."""
    fold = tl.arange(0, tile[0]) // (tile[0] // tile[6])
    return (fold * (16 // tile[6])).to(tl.uint16)


@triton.constexpr_function
def unpacking(plane, bits, is_float16):
    """PTX for plane `plane` of two units at once: 16-bit units in, numbers of `plane_of` out.

    The bits of a code become the upper bits of a mantissa, 1 + code / 16, or of the upper one of
    two 2-bit codes, 1 + code / 4; from there one multiplication and addition, exact, leads to the
    number. Three instructions make two numbers, of which planes share the shifts.
    """

    def twice(number: float) -> str:
        """Both halves of 32 bits: a number of magnitude 1 or more that 16 bits hold."""
        bits, bias = (10, 15) if is_float16 else (7, 127)
        sign = 0x8000 if number < 0 else 0
        fraction, exponent = -number if number < 0 else number, 0
        while fraction >= 2:
            fraction, exponent = fraction / 2, exponent + 1
        pattern = sign | exponent + bias << bits | int((fraction - 1) * 2**bits)
        return f"{pattern << 16 | pattern:#x}"

    element = "f16" if is_float16 else "bf16"
    below, one = (6, 0x3C00) if is_float16 else (3, 0x3F80)
    is_wide = bits == 4
    # Two planes of 2-bit codes lie where one of 4-bit codes does.
    first, is_upper = (4 * plane, False) if is_wide else (plane // 2 * 4, plane % 2 == 1)
    shift = f"shr.b32 x, $1, {first - below};"
    if first < below:
        shift = f"shl.b32 x, $1, {below - first};"
    mask = (15 if is_wide else 12 if is_upper else 3) << below
    counts = 16 if is_wide and plane % 2 == 1 else 1
    times = counts * (4 if is_upper else 16)
    added = -times - counts * (7.5 if is_wide else 1.5)
    return (
        "{ .reg .b32 x, times, added; "
        f"mov.b32 times, {twice(times)}; mov.b32 added, {twice(added)}; "
        f"{shift} lop3.b32 x, x, {mask << 16 | mask:#x}, {one << 16 | one:#x}, 0xEA; "
        f"fma.rn.{element}x2 $0, x, times, added; }}"
    )


@triton.jit
def plane_of(units, plane: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr):
    """Codes of a plane less their middle, exactly; 16 times that in odd planes of wide units."""
    is_float16: tl.constexpr = dtype == tl.float16
    return tl.inline_asm_elementwise(
        unpacking(plane, bits, is_float16),
        "=r,r",
        [units],
        dtype=tl.float16 if is_float16 else tl.bfloat16,
        is_pure=True,
        pack=2,
    ).to(dtype)


@triton.jit
def load_query_planes(query_row, valid, eight, four, two, tiles: tl.constexpr):
    """What planes of keys are multiplied by: `[BLOCK_M, tile.units]` of each plane of each tile.

    query_row `[BLOCK_M, 1]`: pointers to queries `[rank_k]`; valid `[BLOCK_M, 1]`.
    """
    loaded = ()
    for t in tl.static_range(len(tiles)):
        for plane in tl.static_range(tl.constexpr(tiles[t][1])):
            direction, exists, factor = plane_directions(
                tl.constexpr(tiles[t]), plane, eight, four, two
            )
            some = tl.load(query_row + direction[None, :], mask=valid & exists[None, :], other=0.0)
            loaded = loaded + ((some.to(tl.float32) * factor[None, :]).to(some.dtype),)
    return loaded


@triton.constexpr_function
def swaps_values(tile, swap_ab):
    """Whether a tile of values is multiplied by probabilities, rather than they by it.

    With fewer than 64 units it would not fill the rows of a warp group's matrix product: warps
    would hold the same numbers.
    """
    return swap_ab and tile[0] >= 64


@triton.jit
def zero_planes(tiles: tl.constexpr, BLOCK_M: tl.constexpr, swap_ab: tl.constexpr):
    """Sums over each plane of each tile, `[BLOCK_M, tile.units]`, or transposed."""
    sums = ()
    for t in tl.static_range(len(tiles)):
        for _ in tl.static_range(tl.constexpr(tiles[t][1])):
            if swaps_values(tl.constexpr(tiles[t]), swap_ab):
                sums = sums + (tl.zeros([tl.constexpr(tiles[t][0]), BLOCK_M], tl.float32),)
            else:
                sums = sums + (tl.zeros([BLOCK_M, tl.constexpr(tiles[t][0])], tl.float32),)
    return sums


@triton.jit
def rows_first(sums, tiles: tl.constexpr, swap_ab: tl.constexpr):
    """The sums with queries as rows, whatever `zero_planes` made."""
    turned = ()
    for t in tl.static_range(len(tiles)):
        for plane in tl.static_range(tl.constexpr(tiles[t][1])):
            some = sums[tiles[t][3] + plane]
            if swaps_values(tl.constexpr(tiles[t]), swap_ab):
                turned = turned + (tl.trans(some),)
            else:
                turned = turned + (some,)
    return turned


@triton.jit
def store_planes(target, sums, factor, valid, eight, four, two, tiles: tl.constexpr):
    """Latents from sums over planes, times a factor of each row.

    target `[BLOCK_M, 1]`: pointers to rows `[rank_v]`; sums: `[BLOCK_M, tile.units]` of each plane
    of each tile; factor, valid `[BLOCK_M, 1]`.
    """
    element: tl.constexpr = target.dtype.element_ty
    for t in tl.static_range(len(tiles)):
        unit, _ = tile_units(tl.constexpr(tiles[t]), eight, four, two)
        for plane in tl.static_range(tl.constexpr(tiles[t][1])):
            direction, stored, divided = plane_directions(
                tl.constexpr(tiles[t]), plane, eight, four, two
            )
            some = sums[tiles[t][3] + plane] * divided[None, :]
            if tiles[t][5] == 4:
                if plane % 2 == 0:
                    high = sums[tiles[t][3] + plane + 1]
                    some += tl.where((unit < eight)[None, :], high, 0.0)
                else:
                    stored &= unit >= eight
            tl.store(
                target + direction[None, :],
                (some * factor).to(element),
                mask=valid & stored[None, :],
            )
