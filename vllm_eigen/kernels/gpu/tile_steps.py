# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Steps that the attention kernels over plain and coded caches share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

STEP_INTEGERS = (
    *("num_seqs", "num_slots", "num_splits", "split_size", "table_stride"),
    *("query_stride_token", "query_stride_head", "output_stride_token", "output_stride_head"),
)
"""Arguments of an attention kernel that may be 1, or divisible by 16, in one step and not in
another: compiling for that would compile in the middle of serving."""

STEP_POINTERS = (
    *("query", "output", "partial_m", "partial_l", "query_start_loc", "seq_lens", "block_table"),
)
"""The same of addresses: what begins within a buffer, at the mercy of the step."""


@triton.jit
def find_sequence(q_block, query_start_loc, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence of a tile of queries; every sequence has one tile to spare."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(query_start_loc + middle) // BLOCK_Q + middle
        is_before = before <= q_block
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def first_key(seq_len, num_queries, window: tl.constexpr):
    """The first key that any of a sequence's last num_queries queries sees."""
    begin = 0
    if window > 0:
        begin = tl.maximum(seq_len - num_queries - window + 1, 0)
    return begin


@triton.jit
def find_work(
    query_start_loc,
    seq_lens,
    num_seqs,
    split_size,
    num_heads: tl.constexpr,
    heads_per_tile: tl.constexpr,
    window: tl.constexpr,
    is_decode: tl.constexpr,
    max_decode: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The queries and keys of this program; see `paged_attention_kernel`.

    Returns:
        whether there are any; the sequence and the tile of heads; keys begin and end, and whether
        the sequence has no other split; of the tile's rows `[BLOCK_M]` the query's number in the
        sequence, its position, its token among all queries, its head, and which exist.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // heads_per_tile
    num_tiles: tl.constexpr = num_heads // heads_per_tile
    head_tile = tl.program_id(0) % num_tiles
    q_block = tl.program_id(0) // num_tiles
    if is_decode:
        # Blocks of a sequence's queries run beside each other, and read the same keys from L2.
        sequence = tl.program_id(1)
    else:
        sequence = find_sequence(q_block, query_start_loc, num_seqs, BLOCK_Q)
        q_block -= tl.load(query_start_loc + sequence) // BLOCK_Q + sequence
    first_token = tl.load(query_start_loc + sequence)
    num_queries = tl.load(query_start_loc + sequence + 1) - first_token
    seq_len = tl.load(seq_lens + sequence)
    exists = (q_block * BLOCK_Q < num_queries) & (seq_len > 0)
    if is_decode:
        exists &= num_queries <= max_decode
    else:
        exists &= num_queries > max_decode
        # The last queries see the most keys: start them first.
        q_block = (num_queries - 1) // BLOCK_Q - q_block

    # Rows of the tile: tokens, and for each of them the heads of this tile.
    row = tl.arange(0, BLOCK_M)
    row_query = q_block * BLOCK_Q + row // heads_per_tile
    row_valid = (row < BLOCK_Q * heads_per_tile) & (row_query < num_queries)
    query_at = seq_len - num_queries + row_query
    token = (first_token + row_query).to(tl.int64)
    head = head_tile * heads_per_tile + row % heads_per_tile

    # Keys [begin, end) of all rows, then those of this split.
    end = seq_len - num_queries + tl.minimum((q_block + 1) * BLOCK_Q, num_queries)
    begin = first_key(seq_len, num_queries - q_block * BLOCK_Q, window)
    only_split = True
    if is_decode:
        # Splits are numbered from the first key that the sequence's first query sees.
        first_split = first_key(seq_len, num_queries, window) // split_size
        only_split = (seq_len - 1) // split_size == first_split
        split = first_split + tl.program_id(2)
        begin = tl.maximum(begin, split * split_size)
        end = tl.minimum(end, (split + 1) * split_size)
        exists &= begin < end
    rows = row_query, query_at, token, head, row_valid
    return exists, sequence, head_tile, begin, end, only_split, rows


@triton.jit
def varying_zero(start):
    """0, of which the compiler knows only that it comes from `start`, the step of a loop.

    What it is added to stays in the loop: Triton 3.7 does not hand `disable_licm` on to LLVM.
    """
    zero = tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0;", "=r,r", [start], dtype=tl.int32, is_pure=True, pack=1
    )
    return tl.multiple_of(zero, 16)


@triton.jit
def online_softmax(
    logits,
    m_i,
    l_i,
    key_at,
    key_valid,
    query_at,
    slope,
    scale,
    soft_cap,
    has_slope: tl.constexpr,
    has_cap: tl.constexpr,
    window: tl.constexpr,
):
    """One step of the online softmax (FlashAttention-2, Dao 2023).

    logits `[BLOCK_M, BLOCK_N]`: dot products of queries at `query_at` with keys at `key_at`; slope
    `[BLOCK_M, 1]`: of ALiBi, times LOG2E. Returns probabilities relative to the new maximum, what
    rescales earlier sums, the new maximum and sum, and which keys a row sees.
    """
    if has_cap:
        # tanh(x) = 2 sigmoid(2 x) - 1
        bounded = 2 * tl.sigmoid(2 * scale / soft_cap * logits) - 1
        logits = soft_cap * LOG2E * bounded
    else:
        logits *= scale * LOG2E
    distance = key_at[None, :] - query_at[:, None]
    if has_slope:
        logits += slope * distance
    seen = (distance <= 0) & key_valid[None, :]
    if window > 0:
        seen &= distance > -window
    logits = tl.where(seen, logits, float("-inf"))

    m_ij = tl.maximum(m_i, tl.max(logits, axis=1))
    # A row that has seen no key yet has no m_i logit to subtract.
    m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
    probs = tl.exp2(logits - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(probs, axis=1)
    return probs, alpha, m_ij, l_i, seen


@triton.jit
def add_values(acc, probs, values, alpha, swap_ab: tl.constexpr, precision: tl.constexpr):
    """acc * alpha + probs @ values^T, values `[some, BLOCK_N]`; or all of it transposed."""
    if swap_ab:
        scaled = acc * alpha[None, :]
        acc = tl.dot(values, tl.trans(probs), scaled, input_precision=precision)
    else:
        acc = tl.dot(probs, tl.trans(values), acc * alpha[:, None], input_precision=precision)
    return acc
