# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Attention over pages of latents on a GPU: one kernel for decode and prefill, one to merge splits.

A program owns a tile of queries - some tokens times all the heads that read one latent head - and
a run of keys. In decode the keys of a sequence are cut into splits of a fixed size, so that a
sequence's arithmetic never depends on its batch; `merge_splits` joins them in their order. In
prefill a program walks all keys its queries see.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rebuild import add_rebuilt_scores, add_scores, load_basis, rotate

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_seqs", "num_slots", "num_splits", "split_size"])
def attend_tile(
    query,
    cache,
    output,
    partial,
    partial_max,
    partial_sum,
    query_start_loc,
    seq_lens,
    block_table,
    slopes,
    basis,
    offset,
    near,
    far,
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
    num_heads: tl.constexpr,
    heads_per_tile: tl.constexpr,
    tiles_per_latent: tl.constexpr,
    rebuilt_per_tile: tl.constexpr,
    rank_k: tl.constexpr,
    rank_v: tl.constexpr,
    k_head: tl.constexpr,
    k_tail: tl.constexpr,
    v_head: tl.constexpr,
    v_tail: tl.constexpr,
    page_size: tl.constexpr,
    window: tl.constexpr,
    has_cap: tl.constexpr,
    is_fp8: tl.constexpr,
    rebuild: tl.constexpr,
    relative: tl.constexpr,
    far_step: tl.constexpr,
    is_neox: tl.constexpr,
    rotary_dim: tl.constexpr,
    head_size: tl.constexpr,
    half: tl.constexpr,
    rest: tl.constexpr,
    is_decode: tl.constexpr,
    max_decode: tl.constexpr,
    swap: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    precision: tl.constexpr,
):
    """Attend from one tile of queries to one run of keys.

    query `[num_tokens, num_heads, head_size or rank_k]`, output `[num_tokens, num_heads, rank_v]`,
    cache as in `Kernels`. Program (tile of heads + number of such tiles * tile of tokens, split).
    Decode covers sequences of at most max_decode queries, prefill (one split) the longer ones.
    partial `[num_seqs, num_slots, num_heads, num_splits, v_head + v_tail]`, partial_max and
    partial_sum without the last dimension receive the float32 sums of sequences of several splits;
    num_slots is what a decoded sequence may have of queries.
    """
    block_q: tl.constexpr = block_m // heads_per_tile
    width_k: tl.constexpr = rank_k + rank_v
    num_tiles: tl.constexpr = num_heads // heads_per_tile
    head_tile = tl.program_id(0) % num_tiles
    block = tl.program_id(0) // num_tiles

    if is_decode:
        sequence = block
        block = 0
    else:
        sequence = _owner(block, query_start_loc, num_seqs, block_q)
        block -= tl.load(query_start_loc + sequence) // block_q + sequence
    first_token = tl.load(query_start_loc + sequence)
    num_queries = tl.load(query_start_loc + sequence + 1) - first_token
    seq_len = tl.load(seq_lens + sequence)
    if is_decode:
        if (num_queries > max_decode) | (num_queries <= 0) | (seq_len <= 0):
            return
    else:
        if (num_queries <= max_decode) | (block * block_q >= num_queries) | (seq_len <= 0):
            return
        # The last queries see the most keys: start them first.
        block = (num_queries - 1) // block_q - block

    # Rows of the tile: tokens, and for each of them the heads of this tile.
    row = tl.arange(0, block_m)
    row_query = block * block_q + row // heads_per_tile
    row_head = row % heads_per_tile
    row_live = (row < block_q * heads_per_tile) & (row_query < num_queries)
    query_at = seq_len - num_queries + row_query
    token = (first_token + row_query).to(tl.int64)
    head = head_tile * heads_per_tile + row_head

    # Keys [begin, end) of all rows, then those of this split.
    end = seq_len - num_queries + tl.minimum((block + 1) * block_q, num_queries)
    begin = 0
    if window > 0:
        begin = tl.maximum(seq_len - num_queries + block * block_q - window + 1, 0)
    split = tl.program_id(1)
    only_split = True
    if is_decode:
        first_split = begin // split_size
        only_split = (end - 1) // split_size == first_split
        begin = tl.maximum(begin, (first_split + split) * split_size)
        end = tl.minimum(end, (first_split + split + 1) * split_size)
        if begin >= end:
            return

    source = query + token[:, None] * query_stride_token + head[:, None] * query_stride_head
    live = row_live[:, None]
    dim_k = tl.arange(0, k_head)[None, :]
    dim_k_tail = k_head + tl.arange(0, k_tail if k_tail > 0 else 16)[None, :]
    dim_v = tl.arange(0, v_head)[None, :]
    dim_v_tail = v_head + tl.arange(0, v_tail if v_tail > 0 else 16)[None, :]
    if rebuild:
        plane = tl.arange(0, half)[None, :]
        in_plane = plane < rotary_dim // 2
        x_at = plane if is_neox else 2 * plane
        y_at = plane + rotary_dim // 2 if is_neox else 2 * plane + 1
        qx = tl.load(source + x_at, mask=live & in_plane, other=0.0)
        qy = tl.load(source + y_at, mask=live & in_plane, other=0.0)
        q_turning = tl.reshape(tl.join(qx, qy), [block_m, 2 * half])
        q_still = q_turning
        if rest > 0:
            still_at = rotary_dim + tl.arange(0, rest)[None, :]
            q_still = tl.load(source + still_at, mask=live & (still_at < head_size), other=0.0)
        # Loaded here it stays in shared memory; other heads of a group are read again and again.
        first_rebuilt = head_tile * rebuilt_per_tile
        first_tiles = load_basis(basis, offset, first_rebuilt, k_head, k_tail, half, rest)
        row_rebuilt = (row_head // (heads_per_tile // rebuilt_per_tile))[:, None]
        if relative:
            table_row = tl.arange(0, block_n)[:, None] * (2 * half)
            cos = tl.load(near + table_row + plane)
            sin = tl.load(near + table_row + half + plane)
    else:
        q_head = tl.load(source + dim_k, mask=live & (dim_k < rank_k), other=0.0)
        if k_tail > 0:
            q_tail = tl.load(source + dim_k_tail, mask=live & (dim_k_tail < rank_k), other=0.0)
        if is_fp8:
            scale *= k_scale
    if slopes is not None:
        slope = tl.load(slopes + head, mask=row_live, other=0.0)[:, None] * LOG2E

    highest = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    result = tl.zeros([v_head, block_m] if swap else [block_m, v_head], tl.float32)
    if v_tail > 0:
        result_tail = tl.zeros([v_tail, block_m] if swap else [block_m, v_tail], tl.float32)
    pages = cache + (head_tile // tiles_per_latent).to(tl.int64) * cache_stride_head
    table = block_table + sequence.to(tl.int64) * table_stride

    for start in range(begin // block_n * block_n, end, block_n):
        key_at = start + tl.arange(0, block_n)
        key_live = (key_at >= begin) & (key_at < end)
        if page_size % block_n == 0:
            page = tl.load(table + start // page_size).to(tl.int64)
            tokens = start % page_size + tl.arange(0, block_n)
            latents = pages + page * cache_stride_block + tokens[:, None] * width_k
        else:
            page = tl.load(table + key_at // page_size, mask=key_live, other=0).to(tl.int64)
            tokens = page * cache_stride_block + key_at % page_size * width_k
            latents = pages + tokens[:, None]
        loaded = key_live[:, None]

        keys = _load_latents(latents, dim_k, loaded, rank_k, k_head).to(query.dtype.element_ty)
        keys_tail = keys
        if k_tail > 0:
            keys_tail = _load_latents(latents, dim_k_tail, loaded, rank_k, k_head + k_tail)
            keys_tail = keys_tail.to(query.dtype.element_ty)
        values = _load_latents(latents + rank_k, dim_v, loaded, rank_v, v_head)

        logits = tl.zeros([block_n, block_m] if swap else [block_m, block_n], tl.float32)
        if rebuild:
            q_turned = q_turning
            if relative:
                start_row = far + start // far_step * (2 * half)
                start_cos = tl.load(start_row + plane)
                start_sin = tl.load(start_row + half + plane)
                q_turned = rotate(q_turning.to(tl.float32), start_cos, -start_sin)
                q_turned = q_turned.to(query.dtype.element_ty)
            else:
                table_row = rotary_table + key_at[:, None] * rotary_dim
                in_table = loaded & in_plane
                cos = tl.load(table_row + plane, mask=in_table, other=0.0).to(tl.float32)
                sin = tl.load(table_row + rotary_dim // 2 + plane, mask=in_table, other=0.0)
                sin = sin.to(tl.float32)
            for index in tl.static_range(rebuilt_per_tile):
                tiles = first_tiles
                if index > 0:
                    tiles = load_basis(
                        basis, offset, first_rebuilt + index, k_head, k_tail, half, rest
                    )
                q_rotated, q_unrotated = q_turned, q_still
                if rebuilt_per_tile > 1:
                    q_rotated = tl.where(row_rebuilt == index, q_turned, 0.0)
                    q_unrotated = tl.where(row_rebuilt == index, q_still, 0.0)
                logits = add_rebuilt_scores(
                    logits,
                    q_rotated,
                    q_unrotated,
                    keys,
                    keys_tail,
                    tiles,
                    cos,
                    sin,
                    k_scale,
                    has_tail=k_tail > 0,
                    has_rest=rest > 0,
                    has_offset=offset is not None,
                    is_fp8=is_fp8,
                    swap=swap,
                    precision=precision,
                )
        else:
            logits = add_scores(logits, q_head, keys, swap, precision)
            if k_tail > 0:
                logits = add_scores(logits, q_tail, keys_tail, swap, precision)
        if swap:
            logits = tl.trans(logits)

        if has_cap:
            # tanh(x) = 2 sigmoid(2 x) - 1
            bounded = 2 * tl.sigmoid(2 * scale / soft_cap * logits) - 1
            logits = soft_cap * LOG2E * bounded
        else:
            logits *= scale * LOG2E
        distance = key_at[None, :] - query_at[:, None]
        if slopes is not None:
            logits += slope * distance
        seen = (distance <= 0) & key_live[None, :]
        if window > 0:
            seen &= distance > -window
        logits = tl.where(seen, logits, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        # A row that has seen no key yet has no highest logit to subtract.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(logits - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, axis=1)
        highest = new_highest
        weights = weights.to(query.dtype.element_ty)
        values = values.to(query.dtype.element_ty)
        result = _add_values(result, weights, values, fade, swap, precision)
        if v_tail > 0:
            more = _load_latents(latents + rank_k, dim_v_tail, loaded, rank_v, v_head + v_tail)
            more = more.to(query.dtype.element_ty)
            result_tail = _add_values(result_tail, weights, more, fade, swap, precision)

    if swap:
        result = tl.trans(result)
        if v_tail > 0:
            result_tail = tl.trans(result_tail)
    if only_split:
        inverse = (v_scale if is_fp8 else 1.0) / tl.where(total == 0.0, 1.0, total)[:, None]
        target = output + token[:, None] * output_stride_token + head[:, None] * output_stride_head
        element = output.dtype.element_ty
        tl.store(target + dim_v, (result * inverse).to(element), mask=live & (dim_v < rank_v))
        if v_tail > 0:
            tl.store(
                target + dim_v_tail,
                (result_tail * inverse).to(element),
                mask=live & (dim_v_tail < rank_v),
            )
    elif is_decode:
        slot = (sequence.to(tl.int64) * num_slots + row_query) * num_heads + head
        slot = slot * num_splits + split
        tl.store(partial_max + slot, highest, mask=row_live)
        tl.store(partial_sum + slot, total, mask=row_live)
        sums = partial + slot[:, None] * (v_head + v_tail)
        tl.store(sums + dim_v, result, mask=live)
        if v_tail > 0:
            tl.store(sums + dim_v_tail, result_tail, mask=live)


@triton.jit(do_not_specialize=["num_slots", "num_splits", "split_size"])
def merge_splits(
    output,
    partial,
    partial_max,
    partial_sum,
    query_start_loc,
    seq_lens,
    num_slots,
    num_splits,
    split_size,
    output_stride_token,
    output_stride_head,
    v_scale,
    num_heads: tl.constexpr,
    rank_v: tl.constexpr,
    v_width: tl.constexpr,
    block_v: tl.constexpr,
    window: tl.constexpr,
    max_decode: tl.constexpr,
    block_splits: tl.constexpr,
):
    """Join what `attend_tile` left for sequences of several splits, first split to last.

    Program (head, sequence). v_width is partial's last dimension, block_v the power of two over it,
    block_splits the splits taken at once.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    first_token = tl.load(query_start_loc + sequence)
    num_queries = tl.load(query_start_loc + sequence + 1) - first_token
    seq_len = tl.load(seq_lens + sequence)
    if (num_queries > max_decode) | (num_queries <= 0) | (seq_len <= 0):
        return
    begin = 0
    if window > 0:
        begin = tl.maximum(seq_len - num_queries - window + 1, 0)
    live_splits = (seq_len - 1) // split_size - begin // split_size + 1
    if live_splits == 1:
        return
    dim = tl.arange(0, block_v)
    for query in range(num_queries):
        token = (first_token + query).to(tl.int64)
        slot = ((sequence.to(tl.int64) * num_slots + query) * num_heads + head) * num_splits
        highest = tl.full([], float("-inf"), tl.float32)
        for first in range(0, live_splits, block_splits):
            split = first + tl.arange(0, block_splits)
            peaks = tl.load(
                partial_max + slot + split, mask=split < live_splits, other=float("-inf")
            )
            highest = tl.maximum(highest, tl.max(peaks, axis=0))
        total = tl.full([], 0.0, tl.float32)
        result = tl.zeros([block_v], tl.float32)
        for first in range(0, live_splits, block_splits):
            split = first + tl.arange(0, block_splits)
            live = split < live_splits
            peaks = tl.load(partial_max + slot + split, mask=live, other=float("-inf"))
            fade = tl.exp2(peaks - highest)
            sums = tl.load(partial_sum + slot + split, mask=live, other=0.0)
            rows = tl.load(
                partial + (slot + split)[:, None] * v_width + dim[None, :],
                mask=live[:, None] & (dim < v_width)[None, :],
                other=0.0,
            )
            total += tl.sum(sums * fade, axis=0)
            result += tl.sum(rows * fade[:, None], axis=0)
        target = output + token * output_stride_token + head * output_stride_head
        merged = (result * (v_scale / total)).to(output.dtype.element_ty)
        tl.store(target + dim, merged, mask=dim < rank_v)


@triton.jit
def _owner(block, query_start_loc, num_seqs, block_q: tl.constexpr):
    """The sequence a tile of queries belongs to, tiles being counted with one spare a sequence."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(query_start_loc + middle) // block_q + middle
        is_before = before <= block
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _add_values(result, weights, values, fade, swap: tl.constexpr, precision: tl.constexpr):
    """result * fade + weights @ values, `[block_m, chunk of rank_v]`, or all of it transposed."""
    if swap:
        faded = result * fade[None, :]
        result = tl.dot(tl.trans(values), tl.trans(weights), faded, input_precision=precision)
    else:
        result = tl.dot(weights, values, result * fade[:, None], input_precision=precision)
    return result


@triton.jit
def _load_latents(latents, dim, live, rank: tl.constexpr, padded: tl.constexpr):
    """One chunk of a tile's latents `[block_n, chunk]`, zero where not live or past the rank."""
    if padded > rank:
        live = live & (dim < rank)
    return tl.load(latents + dim, mask=live, other=0.0)
