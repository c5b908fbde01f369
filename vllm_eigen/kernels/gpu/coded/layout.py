# SPDX-License-Identifier: Apache-2.0
"""How the GPU kernels order the codes of a block, and in which tiles they read them.

One head's part of a block is, for keys and then for values,

    unit 0 of every token | unit 1 of every token | ..        16 bits each
    scale of every token, if there are scales                 bfloat16

so 8 tokens of a unit are 16 bytes that begin on 16, whatever the widths. Units hold the 8-bit codes
first, then those of 4, then those of 2 bits, earlier directions in lower bits: of `n` units of a
width, unit i holds directions i, i + n, .. of that width.

A kernel reads "wide" units, those of 8 and 4 bits, as four planes of 4 bits, the others as eight
planes of 2 bits, or fewer where few units are folded. The odd planes of wide units count 16 times,
so that two planes of an 8-bit code add up to it, 16 (high - 7.5) + low - 7.5 = code - 127.5; what
multiplies an odd plane of 4-bit codes is divided by 16. Every number of a plane is exact in 16
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels.gpu.tiles import rank_chunks


class CodeTile(NamedTuple):
    """Some units as a kernel holds them; constant when it is compiled.

    units: padded to a power of two. planes: 4 of wide units, 8 / folds of those with 2-bit codes.
    first_unit: among wide units, 0 in a tile of 2-bit codes.
    first_plane, first_number: among those of all tiles.
    bits: of a plane's numbers.
    folds: how often units are there, each time shifted by 16 / folds bits more: few units of 2-bit
        codes fill the tile of a product with some planes of theirs each time.
    """

    units: int
    planes: int
    first_unit: int
    first_plane: int
    first_number: int
    bits: int
    folds: int


def code_tiles(wide: int, two: int, least: int) -> tuple[CodeTile, ...]:
    """The tiles of so many wide units and units of 2-bit codes, up to two and one.

    two: a power of two, or 0. least: units of a tile of 2-bit codes.
    """
    tiles: list[CodeTile] = []
    if wide:
        head, tail = rank_chunks(wide)
        tiles.append(CodeTile(head, 4, 0, 0, 0, 4, 1))
        if tail:
            tiles.append(CodeTile(tail, 4, head, 4, 4 * head, 4, 1))
    if two:
        planes = sum(tile.planes for tile in tiles)
        units = max(two, least)
        folds = units // two
        tiles.append(CodeTile(units, 8 // folds, 0, planes, padded_codes(tiles), 2, folds))
    return tuple(tiles)


def code_units(code: Code) -> tuple[int, int, int]:
    """Units of 8-bit, 4-bit and 2-bit codes."""
    return code.eight // 2, code.four // 4, code.two // 8


def padded_codes(tiles: Sequence[CodeTile]) -> int:
    """Numbers of all planes of all tiles."""
    return sum(tile.units * tile.planes for tile in tiles)


def plane_order(code: Code, tiles: Sequence[CodeTile]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the planes of the tiles stand for, plane after plane, `padded_codes` of them.

    Returns:
        int64 directions, 0 where there is none, and float32 factors, 0 where there is none.
    """
    eight, four, two = code_units(code)
    directions, factors = [], []
    for units, planes, first, _, _, bits, folds in tiles:
        unit = first + torch.arange(units)
        for plane in range(planes):
            if bits == 4:
                is_eight = unit < eight
                direction = torch.where(
                    is_eight, unit + plane // 2 * eight, eight + unit + plane * four
                )
                factor = torch.where(is_eight, 1.0, 16.0 ** -(plane % 2))
                exists = unit < eight + four
            else:
                fold, folded = unit // (units // folds), unit % (units // folds)
                direction = 2 * eight + 4 * four + folded + (plane + fold * planes) * two
                factor = torch.ones(units)
                exists = folded < two
            directions.append(torch.where(exists, direction, 0))
            factors.append(torch.where(exists, factor, 0.0))
    return torch.cat(directions), torch.cat(factors)
