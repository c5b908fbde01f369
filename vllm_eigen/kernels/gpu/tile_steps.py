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
