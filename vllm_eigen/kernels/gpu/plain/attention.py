# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,assignment,var-annotated"
# mypy: disable-error-code="unreachable"
"""Attention over paged KV blocks of latents on a GPU: one kernel for decode and prefill.

A program owns a tile of queries - some tokens times all the heads that read one latent head - and
a run of keys. In decode the keys of a sequence are cut into splits of a fixed size, so that a
sequence's arithmetic does not depend on its batch; `combine.py` combines them in their order. In
prefill a program loops over all keys that its queries attend to. m_i, l_i and acc are the running
maximum, sum and accumulator of the online softmax (FlashAttention-2, Dao 2023).

A NaN reaches the rows that attend to it: it is skipped by the maximum and makes the sum NaN. A NaN
in a value may also reach rows of the same tile of queries that do not attend to it, since the
product multiplies it by a probability of zero, as in FlashAttention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_eigen.kernels.gpu.plain.latents import (
    load_latents,
    load_query_chunks,
    numbers_of,
    store_sums,
    zero_sums,
)
from vllm_eigen.kernels.gpu.plain.reconstruct import (
    PAIRS,
    add_reconstructed,
    add_scores,
    load_columns,
    load_in_tile,
    load_pairs,
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
    do_not_specialize=(*STEP_INTEGERS, "k_units", "v_units"),
    do_not_specialize_on_alignment=STEP_POINTERS,
)
def paged_attention_kernel(
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
    offset,
    in_tile_cos_sin,
    tile_start_cos_sin,
    rotary_table,
    num_seqs,
    num_slots,
    num_splits,
    split_size,
    query_stride_token,
    query_stride_head,
    output_stride_token,
    output_stride_head,
    cache_stride_block,
    cache_stride_head,
    table_stride,
    scale,
    soft_cap,
    k_scale,
    v_scale,
    k_units,
    v_units,
    num_heads: tl.constexpr,
    heads_per_tile: tl.constexpr,
    tiles_per_latent: tl.constexpr,
    reconstructed_per_tile: tl.constexpr,
    unit: tl.constexpr,
    planes: tl.constexpr,
    k_chunks: tl.constexpr,
    v_chunks: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    has_cap: tl.constexpr,
    is_fp8: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    precision: tl.constexpr,
):
    """Attend from one tile of queries to one run of keys.

    query `[num_tokens, num_heads, head_size or rank_k]`, output `[num_tokens, num_heads, rank_v]`,
    cache as in `Kernels`. Decode covers sequences of at most max_decode queries, prefill (one
    split) the longer ones. Program (tile of heads + number of such tiles * tile of tokens), in
    decode (that of a sequence's tokens, sequence, split).
    partial_acc `[num_seqs, num_slots, num_heads, num_splits, padded rank_v]`, partial_m and
    partial_l without the last dimension receive the float32 results of sequences of several splits;
    num_slots is what a decoded sequence may have of queries. Chunks and planes: `latents.py`.
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
    # Ranks are known to be multiples of a unit, so that whole units are loaded at once.
    k_words = k_units * (unit // planes)
    v_words = v_units * (unit // planes)
    width = k_words + v_words
    is_e5m2: tl.constexpr = cache.dtype.element_ty == tl.float8e5
    # float16 holds e4m3: one instruction for two numbers, where bfloat16 takes five.
    value_dtype: tl.constexpr = tl.float16 if is_fp8 and dtype == tl.bfloat16 else dtype
    key_dtype: tl.constexpr = value_dtype if reconstruct else dtype

    query_row = query + token[:, None] * query_stride_token + head[:, None] * query_stride_head
    valid = row_valid[:, None]
    if reconstruct:
        # Loaded here, bases stay in shared memory; other heads of a group are read again and again.
        first_reconstructed = head_tile * reconstructed_per_tile
        row_reconstructed = valid
        if reconstructed_per_tile > 1:
            row_head = tl.arange(0, BLOCK_M) % heads_per_tile
            row_reconstructed = (row_head // (heads_per_tile // reconstructed_per_tile))[:, None]
        pairs: tl.constexpr = min(half, PAIRS)
        basis_width: tl.constexpr = 2 * half + rest
        # Those for wide keys would not fit the registers, and come from the L1 cache.
        keeps_queries: tl.constexpr = half // pairs <= 2
        q_rotary = ()
        cos_sin = ()
        bases = ()
        for c in tl.static_range(half // pairs):
            pair = c * pairs + tl.arange(0, pairs)[None, :]
            if keeps_queries:
                q_pairs = load_pairs(query_row, pair, valid, rotary_dim // 2, is_neox)
                q_rotary = q_rotary + (q_pairs,)
            bases = bases + (
                load_columns(
                    basis,
                    offset,
                    first_reconstructed,
                    *(2 * pairs * c, 2 * pairs, basis_width, k_chunks, planes),
                ),
            )
            if keeps_angles:
                cos_sin = cos_sin + (load_in_tile(in_tile_cos_sin, pair, half, BLOCK_N),)
        if rest > 0:
            pass_at = rotary_dim + tl.arange(0, rest)[None, :]
            q_pass = tl.load(query_row + pass_at, mask=valid & (pass_at < head_size), other=0.0)
            bases = bases + (
                load_columns(
                    basis,
                    offset,
                    first_reconstructed,
                    *(2 * half, rest, basis_width, k_chunks, planes),
                ),
            )
    else:
        q_chunks = load_query_chunks(query_row, valid, k_words, k_chunks, planes)
    if is_fp8 and offset is None:
        scale *= k_scale
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head, mask=row_valid, other=0.0)[:, None] * LOG2E

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_sums(v_chunks, planes, BLOCK_M, swap_ab)
    words = cache
    if planes > 1:
        words = cache.to(tl.pointer_type(tl.uint16), bitcast=True)
    stride_block = cache_stride_block // planes
    words += (head_tile // tiles_per_latent).to(tl.int64) * (cache_stride_head // planes)
    table = block_table + sequence.to(tl.int64) * table_stride

    first = begin // BLOCK_N * BLOCK_N
    for start in tl.range(first, end, BLOCK_N, disable_licm=not hoists):
        key_at = start + tl.arange(0, BLOCK_N)
        key_valid = (key_at >= begin) & (key_at < end)
        zero = varying_zero(start)
        if block_size % BLOCK_N == 0:
            block = tl.load(table + start // block_size).to(tl.int64)
            tokens = start % block_size + zero + tl.arange(0, BLOCK_N)
            latents = words + block * stride_block + tokens[:, None] * width
        else:
            block = tl.load(table + key_at // block_size, mask=key_valid, other=0).to(tl.int64)
            tokens = block * stride_block + key_at % block_size * width
            latents = words + tokens[:, None]
        key_mask = key_valid[:, None]
        keys = load_latents(latents, key_mask, k_words, k_chunks)

        logits = tl.zeros([BLOCK_N, BLOCK_M] if swap_ab else [BLOCK_M, BLOCK_N], tl.float32)
        if reconstruct:
            for c in tl.static_range(half // pairs):
                pair = c * pairs + tl.arange(0, pairs)[None, :]
                start_row = start // tile_start_step * (2 * half) + pair
                start_row = start_row, start_row + half
                if keeps_queries:
                    q_pairs = q_rotary[c]
                else:
                    q_pairs = load_pairs(query_row + zero, pair, valid, rotary_dim // 2, is_neox)
                q_tile = rotated_query(
                    q_pairs, tile_start_cos_sin, zero, start_row, relative, dtype
                )
                if keeps_angles:
                    cos, sin = unpacked_cos_sin(cos_sin[c])
                elif relative:
                    loaded = load_in_tile(in_tile_cos_sin + zero, pair, half, BLOCK_N)
                    cos, sin = unpacked_cos_sin(loaded)
                else:
                    table_row = rotary_table + key_at[:, None] * rotary_dim + pair
                    in_table = key_mask & (pair < rotary_dim // 2)
                    cos = tl.load(table_row, mask=in_table, other=0.0).to(tl.float32)
                    sin = tl.load(table_row + rotary_dim // 2, mask=in_table, other=0.0)
                    sin = sin.to(tl.float32)
                logits = add_reconstructed(
                    *(logits, q_tile, keys, bases[c], cos, sin, k_scale, basis),
                    offset,
                    *(first_reconstructed, row_reconstructed),
                    *(2 * pairs * c, 2 * pairs, basis_width, k_chunks, planes, is_e5m2),
                    *(reconstructed_per_tile, is_fp8, swap_ab, precision),
                )
            if rest > 0:
                logits = add_reconstructed(
                    *(logits, q_pass, keys, bases[half // pairs]),
                    None,
                    None,
                    *(k_scale, basis),
                    offset,
                    *(first_reconstructed, row_reconstructed),
                    *(2 * half, rest, basis_width, k_chunks, planes, is_e5m2),
                    *(reconstructed_per_tile, is_fp8, swap_ab, precision),
                )
        else:
            for c in tl.static_range(len(k_chunks)):
                for plane in tl.static_range(planes):
                    numbers = numbers_of(keys[c], plane, planes, is_e5m2, key_dtype)
                    q_chunk = q_chunks[c * planes + plane]
                    logits = add_scores(logits, q_chunk, numbers, swap_ab, precision)
        if swap_ab:
            logits = tl.trans(logits)
        if reconstruct:
            # Made again: while keys are reconstructed, every register is in use.
            key_at = start + varying_zero(start + 1) + tl.arange(0, BLOCK_N)
            key_valid = (key_at >= begin) & (key_at < end)
            key_mask = key_valid[:, None]

        probs, alpha, m_i, l_i, _ = online_softmax(
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
        probs = probs.to(value_dtype)
        # Not before keys are done with: both would not fit the registers.
        values = load_latents(latents + k_words, key_mask, v_words, v_chunks)
        new_acc = ()
        for c in tl.static_range(len(v_chunks)):
            for plane in tl.static_range(planes):
                numbers = numbers_of(values[c], plane, planes, is_e5m2, value_dtype)
                some = acc[c * planes + plane]
                new_acc = new_acc + (
                    add_values(some, probs, tl.trans(numbers), alpha, swap_ab, precision),
                )
        acc = new_acc

    if only_split:
        inverse = (v_scale if is_fp8 else 1.0) / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
        target = output + token[:, None] * output_stride_token + head[:, None] * output_stride_head
        store_sums(target, acc, inverse, valid, v_words, v_chunks, planes, swap_ab)
    elif is_decode:
        slot = (sequence.to(tl.int64) * num_slots + row_query) * num_heads + head
        slot = slot * num_splits + tl.program_id(2)
        tl.store(partial_m + slot, m_i, mask=row_valid)
        tl.store(partial_l + slot, l_i, mask=row_valid)
        last: tl.constexpr = len(v_chunks) - 1
        padded_words: tl.constexpr = v_chunks[last][0] + v_chunks[last][1]
        partial = partial_acc + slot[:, None] * (planes * padded_words)
        one = tl.full([BLOCK_M, 1], 1.0, tl.float32)
        store_sums(partial, acc, one, valid, padded_words, v_chunks, planes, swap_ab)
