# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,assignment,var-annotated"
# mypy: disable-error-code="unreachable"
"""Attention over paged blocks of codes on a GPU: one kernel for decode and prefill.

It divides the work as `plain/attention.py` does. Codes stay packed until they are in registers,
where each plane of them becomes the operand of a product (`codes.py`); the query, or the basis that
keys are reconstructed with, is divided beforehand by what a plane counts too much. Keys' token
scales multiply scores, or reconstructed keys; those of values multiply probabilities.

A NaN of a token scale reaches the rows that attend to it and no others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_eigen.kernels.gpu.coded.codes import (
    GROUP,
    load_keys,
    load_query_planes,
    load_values,
    plane_of,
    rows_first,
    store_planes,
    swaps_values,
    zero_planes,
)
from vllm_eigen.kernels.gpu.coded.reconstruct import (
    load_basis_columns,
    reconstruct_columns,
)
from vllm_eigen.kernels.gpu.plain.reconstruct import (
    PAIRS,
    add_scores,
    load_in_tile,
    load_pairs,
    rotate,
    rotated_query,
    unpacked_cos_sin,
)
from vllm_eigen.kernels.gpu.tile_steps import (
    LOG2E,
    STEP_INTEGERS,
    STEP_POINTERS,
    add_values,
    find_work,
    online_softmax,
    varying_zero,
)


@triton.jit(
    do_not_specialize=[
        *(*STEP_INTEGERS, "partial_width"),
        *("key_eight", "key_four", "key_two", "value_eight", "value_four", "value_two"),
    ],
    do_not_specialize_on_alignment=STEP_POINTERS,
)
def coded_attention_kernel(
    query,
    cache,
    output,
    partial_acc,
    partial_m,
    partial_l,
    query_start_loc,
    seq_lens,
    block_table,
    slopes,
    basis,
    key_offset,
    in_tile_cos_sin,
    tile_start_cos_sin,
    rotary_table,
    num_seqs,
    num_slots,
    num_splits,
    split_size,
    partial_width,
    query_stride_token,
    query_stride_head,
    output_stride_token,
    output_stride_head,
    cache_stride_block,
    cache_stride_head,
    table_stride,
    scale,
    soft_cap,
    key_eight,
    key_four,
    key_two,
    value_eight,
    value_four,
    value_two,
    num_heads: tl.constexpr,
    heads_per_tile: tl.constexpr,
    tiles_per_latent: tl.constexpr,
    key_tiles: tl.constexpr,
    value_tiles: tl.constexpr,
    key_scaled: tl.constexpr,
    value_scaled: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    has_cap: tl.constexpr,
    reconstruct: tl.constexpr,
    relative: tl.constexpr,
    keeps_angles: tl.constexpr,
    tile_start_step: tl.constexpr,
    is_neox: tl.constexpr,
    rotary_dim: tl.constexpr,
    head_size: tl.constexpr,
    half: tl.constexpr,
    rest: tl.constexpr,
    is_decode: tl.constexpr,
    max_decode: tl.constexpr,
    swap_ab: tl.constexpr,
    hoists: tl.constexpr,
    streams: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    precision: tl.constexpr,
):
    """Attend from one tile of queries to one run of keys, as `paged_attention_kernel`.

    key_eight, .. count units (`layout.py`). partial_acc is `[num_seqs, num_slots,
    num_heads, num_splits, partial_width]`. A tile of queries has heads of one key head.
    """
    dtype: tl.constexpr = query.dtype.element_ty
    exists, sequence, head_tile, begin, end, only_split, rows = find_work(
        query_start_loc,
        seq_lens,
        num_seqs,
        split_size,
        num_heads,
        heads_per_tile,
        window,
        is_decode,
        max_decode,
        BLOCK_M,
    )
    if not exists:
        return
    row_query, query_at, token, head, row_valid = rows
    query_row = query + token[:, None] * query_stride_token + head[:, None] * query_stride_head
    valid = row_valid[:, None]
    if reconstruct:
        # Loaded here, bases stay in shared memory; or they are read for each tile of keys.
        pairs: tl.constexpr = min(half, PAIRS)
        width: tl.constexpr = 2 * half + rest
        q_rotary = ()
        cos_sin = ()
        bases = ()
        for c in tl.static_range(half // pairs):
            pair = c * pairs + tl.arange(0, pairs)[None, :]
            q_rotary = q_rotary + (load_pairs(query_row, pair, valid, rotary_dim // 2, is_neox),)
            if not streams:
                bases = bases + (
                    load_basis_columns(
                        basis, key_offset, head_tile, key_tiles, 2 * pairs * c, 2 * pairs, width
                    ),
                )
            if keeps_angles:
                cos_sin = cos_sin + (load_in_tile(in_tile_cos_sin, pair, half, BLOCK_N),)
        if rest > 0:
            pass_at = rotary_dim + tl.arange(0, rest)[None, :]
            q_pass = tl.load(query_row + pass_at, mask=valid & (pass_at < head_size), other=0.0)
            if not streams:
                bases = bases + (
                    load_basis_columns(
                        basis, key_offset, head_tile, key_tiles, 2 * half, rest, width
                    ),
                )
    else:
        q_planes = load_query_planes(query_row, valid, key_eight, key_four, key_two, key_tiles)
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head, mask=row_valid, other=0.0)[:, None] * LOG2E

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_planes(value_tiles, BLOCK_M, swap_ab)
    part = cache + (head_tile // tiles_per_latent).to(tl.int64) * cache_stride_head
    key_codes = part.to(tl.pointer_type(tl.uint16), bitcast=True)
    key_scales = key_codes + (key_eight + key_four + key_two) * block_size
    value_codes = key_scales + (block_size if key_scaled else 0)
    value_scales = value_codes + (value_eight + value_four + value_two) * block_size
    unit_stride_block = cache_stride_block // 2
    table = block_table + sequence.to(tl.int64) * table_stride

    first = begin // BLOCK_N * BLOCK_N
    for start in tl.range(first, end, BLOCK_N, disable_licm=not hoists):
        key_at = start + tl.arange(0, BLOCK_N)
        key_valid = (key_at >= begin) & (key_at < end)
        # Whole groups of tokens are read: they are in one block, which some row sees.
        group_mask = (key_at // GROUP >= begin // GROUP) & (key_at // GROUP <= (end - 1) // GROUP)
        if block_size % BLOCK_N == 0:
            block = tl.load(table + start // block_size).to(tl.int64)
            # Triton 3.7 does not see that the remainder is a multiple, and would load single units.
            in_block = tl.multiple_of(start % block_size, BLOCK_N) + tl.arange(0, BLOCK_N)
        else:
            block = tl.load(table + key_at // block_size, mask=group_mask, other=0)
            block = tl.max_constancy(block, 16).to(tl.int64)
            in_block = key_at % block_size
        # In units of 16 bits; a head's part of a block begins on 16 bytes.
        at = tl.multiple_of(block * unit_stride_block, 8) + in_block
        keys = load_keys(
            key_codes, at, group_mask, key_eight, key_four, key_two, key_tiles, block_size
        )

        logits = tl.zeros([BLOCK_N, BLOCK_M] if swap_ab else [BLOCK_M, BLOCK_N], tl.float32)
        if reconstruct:
            zero = varying_zero(start)
            key_scale = _token_scales(key_scales + at, key_valid, key_scaled)
            for c in tl.static_range(half // pairs):
                pair = c * pairs + tl.arange(0, pairs)[None, :]
                start_row = start // tile_start_step * (2 * half) + pair
                start_row = start_row, start_row + half
                q_tile = rotated_query(
                    q_rotary[c], tile_start_cos_sin, zero, start_row, relative, dtype
                )
                if keeps_angles:
                    cos, sin = unpacked_cos_sin(cos_sin[c])
                elif relative:
                    loaded = load_in_tile(in_tile_cos_sin + zero, pair, half, BLOCK_N)
                    cos, sin = unpacked_cos_sin(loaded)
                else:
                    table_row = rotary_table + key_at[:, None] * rotary_dim + pair
                    in_table = key_valid[:, None] & (pair < rotary_dim // 2)
                    cos = tl.load(table_row, mask=in_table, other=0.0).to(tl.float32)
                    sin = tl.load(table_row + rotary_dim // 2, mask=in_table, other=0.0)
                    sin = sin.to(tl.float32)
                columns = reconstruct_columns(
                    *(keys, bases, c, basis),
                    key_offset,
                    *(head_tile, key_scale, streams),
                    *(key_tiles, key_scaled, 2 * pairs * c, 2 * pairs, width, precision),
                )
                logits = add_scores(logits, q_tile, rotate(columns, cos, sin), swap_ab, precision)
            if rest > 0:
                columns = reconstruct_columns(
                    *(keys, bases, half // pairs, basis),
                    key_offset,
                    *(head_tile, key_scale, streams),
                    *(key_tiles, key_scaled, 2 * half, rest, width, precision),
                )
                logits = add_scores(logits, q_pass, columns, swap_ab, precision)
        else:
            for t in tl.static_range(len(key_tiles)):
                for plane in tl.static_range(tl.constexpr(key_tiles[t][1])):
                    numbers = plane_of(keys[t], plane, key_tiles[t][5], dtype)
                    q_plane = q_planes[key_tiles[t][3] + plane]
                    logits = add_scores(logits, q_plane, numbers, swap_ab, precision)
        if swap_ab:
            logits = tl.trans(logits)
        if key_scaled and not reconstruct:
            key_scale = _token_scales(key_scales + at, key_valid, key_scaled)
            logits *= key_scale[None, :]

        probs, alpha, m_i, l_i, seen = online_softmax(
            logits,
            m_i,
            l_i,
            key_at,
            key_valid,
            query_at,
            slope,
            scale,
            soft_cap,
            slopes is not None,
            has_cap,
            window,
        )
        if value_scaled:
            value_scale = _token_scales(value_scales + at, key_valid, value_scaled)
            # Not 0 * NaN where a row does not see the token.
            probs = tl.where(seen, probs * value_scale[None, :], 0.0)
        probs = probs.to(dtype)
        # Not before keys are done with: both would not fit the registers.
        values = load_values(
            value_codes,
            at,
            group_mask,
            value_eight,
            value_four,
            value_two,
            value_tiles,
            block_size,
        )
        new_acc = ()
        for t in tl.static_range(len(value_tiles)):
            for plane in tl.static_range(tl.constexpr(value_tiles[t][1])):
                new_acc = new_acc + (
                    add_values(
                        acc[value_tiles[t][3] + plane],
                        probs,
                        plane_of(values[t], plane, value_tiles[t][5], dtype),
                        alpha,
                        swaps_values(tl.constexpr(value_tiles[t]), swap_ab),
                        precision,
                    ),
                )
        acc = new_acc

    acc = rows_first(acc, value_tiles, swap_ab)
    if only_split:
        inverse = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
        target = output + token[:, None] * output_stride_token + head[:, None] * output_stride_head
        store_planes(target, acc, inverse, valid, value_eight, value_four, value_two, value_tiles)
    elif is_decode:
        slot = (sequence.to(tl.int64) * num_slots + row_query) * num_heads + head
        slot = slot * num_splits + tl.program_id(2)
        tl.store(partial_m + slot, m_i, mask=row_valid)
        tl.store(partial_l + slot, l_i, mask=row_valid)
        partial = partial_acc + slot[:, None] * partial_width
        one = tl.full([BLOCK_M, 1], 1.0, tl.float32)
        store_planes(partial, acc, one, valid, value_eight, value_four, value_two, value_tiles)


@triton.jit
def _token_scales(scales, valid, exists: tl.constexpr):
    """Scales `[BLOCK_N]` of tokens, 0 where not valid; a placeholder where there are none."""
    loaded = valid
    if exists:
        bits = tl.load(scales, mask=valid, other=0).to(tl.int32) << 16
        loaded = bits.to(tl.float32, bitcast=True)
    return loaded
