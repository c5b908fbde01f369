# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Combine the partial results of split-KV decode on a GPU (Flash-Decoding's second step)."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_eigen.kernels.gpu.tile_steps import STEP_POINTERS, first_key


@triton.jit(
    do_not_specialize=[
        *("num_slots", "num_splits", "split_size", "rank_v", "v_width"),
        *("output_stride_token", "output_stride_head"),
    ],
    do_not_specialize_on_alignment=STEP_POINTERS,
)
def combine_splits_kernel(
    output,
    partial_acc,
    partial_m,
    partial_l,
    query_start_loc,
    seq_lens,
    num_slots,
    num_splits,
    split_size,
    output_stride_token,
    output_stride_head,
    v_scale,
    rank_v,
    v_width,
    num_heads: tl.constexpr,
    BLOCK_V: tl.constexpr,
    window: tl.constexpr,
    max_decode: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Combine what `paged_attention_kernel` wrote for sequences of several splits, in order.

    Program (head, sequence, query of the sequence). v_width is the last dimension of partial_acc,
    BLOCK_V a power of two that is not below rank_v, BLOCK_SPLITS the splits loaded at once.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    query = tl.program_id(2)
    first_token = tl.load(query_start_loc + sequence)
    num_queries = tl.load(query_start_loc + sequence + 1) - first_token
    seq_len = tl.load(seq_lens + sequence)
    if (num_queries > max_decode) | (query >= num_queries) | (seq_len <= 0):
        return
    first_split = first_key(seq_len, num_queries, window) // split_size
    if (seq_len - 1) // split_size == first_split:
        return
    # Splits of this query's keys: other queries of the sequence may see more.
    begin = first_key(seq_len, num_queries - query, window) // split_size - first_split
    end = (seq_len - num_queries + query) // split_size - first_split + 1
    dim = tl.arange(0, BLOCK_V)
    token = (first_token + query).to(tl.int64)
    slot = ((sequence.to(tl.int64) * num_slots + query) * num_heads + head) * num_splits
    m_i = tl.full([], float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        m_split = tl.load(partial_m + slot + split, mask=split < end, other=float("-inf"))
        m_i = tl.maximum(m_i, tl.max(m_split, axis=0))
    l_i = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for first in range(begin, end, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        valid = split < end
        m_split = tl.load(partial_m + slot + split, mask=valid, other=float("-inf"))
        alpha = tl.exp2(m_split - m_i)
        l_split = tl.load(partial_l + slot + split, mask=valid, other=0.0)
        acc_split = tl.load(
            partial_acc + (slot + split)[:, None] * v_width + dim[None, :],
            mask=valid[:, None] & (dim < rank_v)[None, :],
            other=0.0,
        )
        l_i += tl.sum(l_split * alpha, axis=0)
        acc += tl.sum(acc_split * alpha[:, None], axis=0)
    target = output + token * output_stride_token + head * output_stride_head
    combined = (acc * (v_scale / l_i)).to(output.dtype.element_ty)
    tl.store(target + dim, combined, mask=dim < rank_v)
