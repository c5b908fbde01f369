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

from vllm_eigen.kernels.gpu.plain.reconstruct import (
    PAIRS,
    add_scores,
    load_columns,
    load_in_tile,
    load_pairs,
    reconstruct_columns,
    rotate,
    rotated_query,
    unpacked_cos_sin,
)
from vllm_eigen.kernels.gpu.tile_steps import (
    LOG2E,
    STEP_INTEGERS,
    STEP_POINTERS,
    add_values,
    find_sequence,
    online_softmax,
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
    k_head: tl.constexpr,
    k_tail: tl.constexpr,
    v_head: tl.constexpr,
    v_tail: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    has_cap: tl.constexpr,
    is_fp8: tl.constexpr,
    reconstruct: tl.constexpr,
    relative: tl.constexpr,
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
    cache as in `Kernels`. Program (tile of heads + number of such tiles * tile of tokens, split).
    Decode covers sequences of at most max_decode queries, prefill (one split) the longer ones.
    partial_acc `[num_seqs, num_slots, num_heads, num_splits, v_head + v_tail]`, partial_m and
    partial_l without the last dimension receive the float32 results of sequences of several splits;
    num_slots is what a decoded sequence may have of queries.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // heads_per_tile
    # Ranks are known to be multiples of a unit, so that whole units are loaded at once.
    rank_k = k_units * unit
    rank_v = v_units * unit
    width = rank_k + rank_v
    num_tiles: tl.constexpr = num_heads // heads_per_tile
    dtype: tl.constexpr = query.dtype.element_ty
    # float16 holds e4m3: one instruction for two numbers, where bfloat16 takes five.
    value_dtype: tl.constexpr = tl.float16 if is_fp8 and dtype == tl.bfloat16 else dtype
    key_dtype: tl.constexpr = value_dtype if reconstruct else dtype
    head_tile = tl.program_id(0) % num_tiles
    q_block = tl.program_id(0) // num_tiles

    if is_decode:
        sequence = q_block
        q_block = 0
    else:
        sequence = find_sequence(q_block, query_start_loc, num_seqs, BLOCK_Q)
        q_block -= tl.load(query_start_loc + sequence) // BLOCK_Q + sequence
    first_token = tl.load(query_start_loc + sequence)
    num_queries = tl.load(query_start_loc + sequence + 1) - first_token
    seq_len = tl.load(seq_lens + sequence)
    if is_decode:
        if (num_queries > max_decode) | (num_queries <= 0) | (seq_len <= 0):
            return
    else:
        if (num_queries <= max_decode) | (q_block * BLOCK_Q >= num_queries) | (seq_len <= 0):
            return
        # The last queries see the most keys: start them first.
        q_block = (num_queries - 1) // BLOCK_Q - q_block

    # Rows of the tile: tokens, and for each of them the heads of this tile.
    row = tl.arange(0, BLOCK_M)
    row_query = q_block * BLOCK_Q + row // heads_per_tile
    row_head = row % heads_per_tile
    row_valid = (row < BLOCK_Q * heads_per_tile) & (row_query < num_queries)
    query_at = seq_len - num_queries + row_query
    token = (first_token + row_query).to(tl.int64)
    head = head_tile * heads_per_tile + row_head

    # Keys [begin, end) of all rows, then those of this split.
    end = seq_len - num_queries + tl.minimum((q_block + 1) * BLOCK_Q, num_queries)
    begin = 0
    if window > 0:
        begin = tl.maximum(seq_len - num_queries + q_block * BLOCK_Q - window + 1, 0)
    split = tl.program_id(1)
    only_split = True
    if is_decode:
        first_split = begin // split_size
        only_split = (end - 1) // split_size == first_split
        begin = tl.maximum(begin, (first_split + split) * split_size)
        end = tl.minimum(end, (first_split + split + 1) * split_size)
        if begin >= end:
            return

    query_row = query + token[:, None] * query_stride_token + head[:, None] * query_stride_head
    valid = row_valid[:, None]
    dim_k = tl.arange(0, k_head)[None, :]
    dim_k_tail = k_head + tl.arange(0, k_tail if k_tail > 0 else 16)[None, :]
    dim_v = tl.arange(0, v_head)[None, :]
    dim_v_tail = v_head + tl.arange(0, v_tail if v_tail > 0 else 16)[None, :]
    if reconstruct:
        # Loaded here, bases stay in shared memory; other heads of a group are read again and again.
        first_reconstructed = head_tile * reconstructed_per_tile
        row_reconstructed = (row_head // (heads_per_tile // reconstructed_per_tile))[:, None]
        pairs: tl.constexpr = min(half, PAIRS)
        basis_width: tl.constexpr = 2 * half + rest
        q_rotary = ()
        cos_sin = ()
        bases = ()
        for c in tl.static_range(half // pairs):
            pair = c * pairs + tl.arange(0, pairs)[None, :]
            q_rotary = q_rotary + (load_pairs(query_row, pair, valid, rotary_dim // 2, is_neox),)
            bases = bases + (
                load_columns(
                    basis,
                    offset,
                    first_reconstructed,
                    2 * pairs * c,
                    2 * pairs,
                    k_head,
                    k_tail,
                    basis_width,
                ),
            )
            if relative:
                cos_sin = cos_sin + (load_in_tile(in_tile_cos_sin, pair, half, BLOCK_N, dtype),)
        if rest > 0:
            pass_at = rotary_dim + tl.arange(0, rest)[None, :]
            q_pass = tl.load(query_row + pass_at, mask=valid & (pass_at < head_size), other=0.0)
            bases = bases + (
                load_columns(
                    basis,
                    offset,
                    first_reconstructed,
                    2 * half,
                    rest,
                    k_head,
                    k_tail,
                    basis_width,
                ),
            )
    else:
        q_head = tl.load(query_row + dim_k, mask=valid & (dim_k < rank_k), other=0.0)
        if k_tail > 0:
            q_tail = tl.load(query_row + dim_k_tail, mask=valid & (dim_k_tail < rank_k), other=0.0)
    if is_fp8 and offset is None:
        scale *= k_scale
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head, mask=row_valid, other=0.0)[:, None] * LOG2E

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([v_head, BLOCK_M] if swap_ab else [BLOCK_M, v_head], tl.float32)
    if v_tail > 0:
        acc_tail = tl.zeros([v_tail, BLOCK_M] if swap_ab else [BLOCK_M, v_tail], tl.float32)
    kv_head_cache = cache + (head_tile // tiles_per_latent).to(tl.int64) * cache_stride_head
    table = block_table + sequence.to(tl.int64) * table_stride

    first = begin // BLOCK_N * BLOCK_N
    for start in tl.range(first, end, BLOCK_N, disable_licm=not hoists):
        key_at = start + tl.arange(0, BLOCK_N)
        key_valid = (key_at >= begin) & (key_at < end)
        if block_size % BLOCK_N == 0:
            block = tl.load(table + start // block_size).to(tl.int64)
            tokens = start % block_size + tl.arange(0, BLOCK_N)
            latents = kv_head_cache + block * cache_stride_block + tokens[:, None] * width
        else:
            block = tl.load(table + key_at // block_size, mask=key_valid, other=0).to(tl.int64)
            tokens = block * cache_stride_block + key_at % block_size * width
            latents = kv_head_cache + tokens[:, None]
        key_mask = key_valid[:, None]

        keys = _load_latents(latents, dim_k, key_mask, rank_k, key_dtype)
        keys_tail = keys
        if k_tail > 0:
            keys_tail = _load_latents(latents, dim_k_tail, key_mask, rank_k, key_dtype)

        logits = tl.zeros([BLOCK_N, BLOCK_M] if swap_ab else [BLOCK_M, BLOCK_N], tl.float32)
        if reconstruct:
            for c in tl.static_range(half // pairs):
                pair = c * pairs + tl.arange(0, pairs)[None, :]
                start_row = start // tile_start_step * (2 * half) + pair
                start_row = start_row, start_row + half
                q_tile = rotated_query(q_rotary[c], tile_start_cos_sin, start_row, relative, dtype)
                if relative:
                    cos, sin = unpacked_cos_sin(cos_sin[c], dtype)
                else:
                    table_row = rotary_table + key_at[:, None] * rotary_dim + pair
                    in_table = key_mask & (pair < rotary_dim // 2)
                    cos = tl.load(table_row, mask=in_table, other=0.0).to(tl.float32)
                    sin = tl.load(table_row + rotary_dim // 2, mask=in_table, other=0.0)
                    sin = sin.to(tl.float32)
                for index in tl.static_range(reconstructed_per_tile):
                    columns = bases[c]
                    q_own = q_tile
                    if index > 0:
                        columns = load_columns(
                            basis,
                            offset,
                            first_reconstructed + index,
                            2 * pairs * c,
                            2 * pairs,
                            k_head,
                            k_tail,
                            basis_width,
                        )
                    if reconstructed_per_tile > 1:
                        q_own = tl.where(row_reconstructed == index, q_tile, 0.0)
                    of_key = reconstruct_columns(
                        keys,
                        keys_tail,
                        columns,
                        k_scale,
                        has_tail=k_tail > 0,
                        has_offset=offset is not None,
                        is_fp8=is_fp8,
                        precision=precision,
                    )
                    logits = add_scores(logits, q_own, rotate(of_key, cos, sin), swap_ab, precision)
            if rest > 0:
                for index in tl.static_range(reconstructed_per_tile):
                    columns = bases[half // pairs]
                    q_own = q_pass
                    if index > 0:
                        columns = load_columns(
                            basis,
                            offset,
                            first_reconstructed + index,
                            2 * half,
                            rest,
                            k_head,
                            k_tail,
                            basis_width,
                        )
                    if reconstructed_per_tile > 1:
                        q_own = tl.where(row_reconstructed == index, q_pass, 0.0)
                    of_key = reconstruct_columns(
                        keys,
                        keys_tail,
                        columns,
                        k_scale,
                        has_tail=k_tail > 0,
                        has_offset=offset is not None,
                        is_fp8=is_fp8,
                        precision=precision,
                    )
                    logits = add_scores(logits, q_own, of_key, swap_ab, precision)
        else:
            logits = add_scores(logits, q_head, keys, swap_ab, precision)
            if k_tail > 0:
                logits = add_scores(logits, q_tail, keys_tail, swap_ab, precision)
        if swap_ab:
            logits = tl.trans(logits)

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
        values = _load_latents(latents + rank_k, dim_v, key_mask, rank_v, value_dtype)
        acc = add_values(acc, probs, tl.trans(values), alpha, swap_ab, precision)
        if v_tail > 0:
            more = _load_latents(latents + rank_k, dim_v_tail, key_mask, rank_v, value_dtype)
            acc_tail = add_values(acc_tail, probs, tl.trans(more), alpha, swap_ab, precision)

    if swap_ab:
        acc = tl.trans(acc)
        if v_tail > 0:
            acc_tail = tl.trans(acc_tail)
    if only_split:
        inverse = (v_scale if is_fp8 else 1.0) / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
        target = output + token[:, None] * output_stride_token + head[:, None] * output_stride_head
        element = output.dtype.element_ty
        tl.store(target + dim_v, (acc * inverse).to(element), mask=valid & (dim_v < rank_v))
        if v_tail > 0:
            tl.store(
                target + dim_v_tail,
                (acc_tail * inverse).to(element),
                mask=valid & (dim_v_tail < rank_v),
            )
    elif is_decode:
        slot = (sequence.to(tl.int64) * num_slots + row_query) * num_heads + head
        slot = slot * num_splits + split
        tl.store(partial_m + slot, m_i, mask=row_valid)
        tl.store(partial_l + slot, l_i, mask=row_valid)
        accs = partial_acc + slot[:, None] * (v_head + v_tail)
        tl.store(accs + dim_v, acc, mask=valid)
        if v_tail > 0:
            tl.store(accs + dim_v_tail, acc_tail, mask=valid)


@triton.jit
def _load_latents(latents, dim, valid, rank, dtype: tl.constexpr):
    """One chunk of a tile's latents `[BLOCK_N, chunk]`, zero where not valid or past the rank."""
    loaded = tl.load(latents + dim, mask=valid & (dim < rank), other=0.0)
    return loaded.to(dtype)
