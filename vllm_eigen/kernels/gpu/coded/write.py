# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,assignment,var-annotated"
"""Coded cache write on a GPU: latents, or whole heads made latents, encoded and stored in one pass.

Codes and scales are those of `checkpoint/codes.py` to the bit; `layout.py` has their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_eigen.kernels.gpu.coded.codes import plane_directions, tile_units
from vllm_eigen.kernels.gpu.plain.write import WRITE_INTEGERS, WRITE_POINTERS


@triton.jit(
    do_not_specialize=[
        *WRITE_INTEGERS,
        *("key_eight", "key_four", "key_two", "value_eight", "value_four", "value_two"),
    ],
    do_not_specialize_on_alignment=WRITE_POINTERS,
)
def coded_write_kernel(
    key,
    value,
    key_basis,
    value_basis,
    key_bias,
    value_bias,
    cache,
    slot_mapping,
    num_tokens,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    cache_stride_block,
    cache_stride_head,
    key_eight,
    key_four,
    key_two,
    value_eight,
    value_four,
    value_two,
    key_floor,
    value_floor,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    projects_keys: tl.constexpr,
    projects_values: tl.constexpr,
    key_tiles: tl.constexpr,
    value_tiles: tl.constexpr,
    key_scaled: tl.constexpr,
    value_scaled: tl.constexpr,
    block_size: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    precision: tl.constexpr,
):
    """key `[num_tokens, num_heads, rank_k]`, value `[.., rank_v]` into coded blocks; or, where they
    are projected, `[.., key_size]` @ key_basis `[num_heads, key_size, rank_k]` + key_bias
    `[num_heads, rank_k]`, bases contiguous, biases or None.

    Program (tokens, head, keys or values).
    """
    head = tl.program_id(1).to(tl.int64)
    part = cache + head * cache_stride_head
    if tl.program_id(2) == 0:
        rank = 2 * key_eight + 4 * key_four + 8 * key_two
        _encode(
            key + head * key_stride_head,
            key_stride_token,
            key_basis + head * key_size * rank,
            key_bias,
            part,
            slot_mapping,
            num_tokens,
            cache_stride_block,
            key_eight,
            key_four,
            key_two,
            key_floor,
            key_size,
            projects_keys,
            key_tiles,
            key_scaled,
            block_size,
            BLOCK_TOKENS,
            BLOCK_D,
            precision,
        )
    else:
        rank = 2 * value_eight + 4 * value_four + 8 * value_two
        key_units = key_eight + key_four + key_two + (1 if key_scaled else 0)
        _encode(
            value + head * value_stride_head,
            value_stride_token,
            value_basis + head * value_size * rank,
            value_bias,
            part + key_units * (2 * block_size),
            slot_mapping,
            num_tokens,
            cache_stride_block,
            value_eight,
            value_four,
            value_two,
            value_floor,
            value_size,
            projects_values,
            value_tiles,
            value_scaled,
            block_size,
            BLOCK_TOKENS,
            BLOCK_D,
            precision,
        )


@triton.jit
def _encode(
    rows,
    stride_token,
    basis,
    bias,
    part,
    slot_mapping,
    num_tokens,
    stride_block,
    eight,
    four,
    two,
    floor,
    size: tl.constexpr,
    projects: tl.constexpr,
    tiles: tl.constexpr,
    scaled: tl.constexpr,
    block_size: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    precision: tl.constexpr,
):
    """Some tokens of one head's keys or values; `part` is the head's part of block 0."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1).to(tl.int64)
    stored = slot >= 0
    offset = slot % block_size
    # In units of 16 bits.
    units_of_part = part.to(tl.pointer_type(tl.uint16), bitcast=True)
    block = units_of_part + slot // block_size * (stride_block // 2)

    latents = ()
    needed = tl.zeros([BLOCK_TOKENS], tl.float32) + floor
    nans = tl.zeros([BLOCK_TOKENS], tl.int32)
    for t in tl.static_range(len(tiles)):
        for plane in tl.static_range(tl.constexpr(tiles[t][1])):
            direction, exists, _ = plane_directions(tl.constexpr(tiles[t]), plane, eight, four, two)
            unit, _ = tile_units(tl.constexpr(tiles[t]), eight, four, two)
            if tiles[t][5] == 4 and plane % 2 == 1:
                exists &= unit >= eight
            x = _latents(
                rows,
                stride_token,
                basis,
                bias,
                token,
                stored,
                direction,
                exists,
                2 * eight + 4 * four + 8 * two,
                size,
                projects,
                BLOCK_TOKENS,
                BLOCK_D,
                precision,
            )
            is_nan = x != x
            x = tl.where(is_nan, 0.0, x)
            latents = latents + (x,)
            if scaled:
                nans = tl.maximum(nans, tl.max(is_nan.to(tl.int32), axis=1))
                if tiles[t][5] == 4:
                    middle = tl.where(unit < eight, 127.5, 7.5)[None, :]
                    most = tl.div_rn(tl.abs(x), middle + tl.zeros_like(x))
                    needed = tl.maximum(needed, tl.max(most, axis=1))

    scale = needed
    if scaled:
        # The next bfloat16 that is not below.
        bits = (needed.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
        bits = tl.where(nans > 0, 0x7FC00000, bits)
        scale = bits.to(tl.float32, bitcast=True)
        at = block + (eight + four + two) * block_size + offset
        tl.store(at, (bits >> 16).to(tl.uint16), mask=stored)
    for t in tl.static_range(len(tiles)):
        unit, exists = tile_units(tl.constexpr(tiles[t]), eight, four, two)
        units = tl.zeros([BLOCK_TOKENS, tl.constexpr(tiles[t][0])], tl.int32)
        for plane in tl.static_range(tl.constexpr(tiles[t][1])):
            steps = latents[tiles[t][3] + plane]
            if scaled:
                divisor = tl.where(scale == 0.0, 1.0, scale)[:, None] + tl.zeros_like(steps)
                steps = tl.div_rn(steps, divisor)
                # inf / inf, and any number of a scale that is 0 or not a number.
                is_number = (steps == steps) & (scale > 0.0)[:, None]
                steps = tl.where(is_number, steps, 0.0)
            half = tl.full([tl.constexpr(tiles[t][0])], 2.0, tl.float32)
            if tiles[t][5] == 4:
                half = tl.where(unit < eight, 128.0, 8.0)
            code = tl.floor(steps) + half[None, :]
            code = tl.minimum(tl.maximum(code, 0.0), 2 * half[None, :] - 1).to(tl.int32)
            if tiles[t][5] == 4 and plane % 2 == 1:
                code = tl.where((unit < eight)[None, :], 0, code)
            units |= code << (tiles[t][5] * plane)
        # Neighbouring tokens are neighbours in memory: as the last dimension, lanes run along them.
        at = block[None, :] + (unit * block_size)[:, None] + offset[None, :]
        tl.store(at, tl.trans(units).to(tl.uint16), mask=exists[:, None] & stored[None, :])


@triton.jit
def _latents(
    rows,
    stride_token,
    basis,
    bias,
    token,
    stored,
    direction,
    exists,
    rank,
    size: tl.constexpr,
    projects: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    precision: tl.constexpr,
):
    """float32 `[BLOCK_TOKENS, directions]`, 0 where there is none."""
    mask = stored[:, None] & exists[None, :]
    if projects:
        latents = tl.zeros((BLOCK_TOKENS, direction.shape[0]), tl.float32)
        for start in tl.range(0, size, BLOCK_D):
            part = start + tl.arange(0, BLOCK_D)
            x = tl.load(
                rows + token[:, None] * stride_token + part[None, :],
                mask=stored[:, None] & (part < size)[None, :],
                other=0.0,
            )
            maps = tl.load(
                basis + part[:, None] * rank + direction[None, :],
                mask=(part < size)[:, None] & exists[None, :],
                other=0.0,
            )
            latents = tl.dot(x, maps, latents, input_precision=precision)
        if bias is not None:
            at = bias + tl.program_id(1) * rank + direction
            latents += tl.load(at, mask=exists, other=0.0).to(tl.float32)[None, :]
    else:
        latents = tl.load(
            rows + token[:, None] * stride_token + direction[None, :], mask=mask, other=0.0
        ).to(tl.float32)
    return latents
