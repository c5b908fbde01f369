# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Cache write on a GPU: latents as they come, or made from whole heads on the way to the cache."""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)
"""A clamp must not turn a model's NaN into a finite latent."""

WRITE_INTEGERS = (
    *("num_tokens", "key_stride_token", "key_stride_head"),
    *("value_stride_token", "value_stride_head", "k_units", "v_units"),
)
WRITE_POINTERS = ("key", "value", "slot_mapping")
"""Arguments that Triton must not compile for, as in `tile_steps.py`: keys and values are columns of
a wider product."""


@triton.jit(do_not_specialize=WRITE_INTEGERS, do_not_specialize_on_alignment=WRITE_POINTERS)
def cache_write_kernel(
    key,
    value,
    cache,
    slot_mapping,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    cache_stride_block,
    cache_stride_head,
    k_scale,
    v_scale,
    k_units,
    v_units,
    num_heads: tl.constexpr,
    unit: tl.constexpr,
    block_size: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    fp8_limit: tl.constexpr,
):
    """key `[num_tokens, num_heads, rank_k]`, value `[.., rank_v]` into token-major blocks.

    Program (token, block of heads). fp8_limit is the largest fp8 value, 0 where the cache is not
    fp8: stored values saturate there.
    """
    rank_k = k_units * unit
    rank_v = v_units * unit
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_RANK)[None, :]
    row = (slot // block_size) * cache_stride_block + (slot % block_size) * (rank_k + rank_v)
    target = cache + row + head * cache_stride_head + column
    in_key = (head < num_heads) & (column < rank_k)
    in_value = (head < num_heads) & (column < rank_v)
    keys = tl.load(
        key + token * key_stride_token + head * key_stride_head + column, mask=in_key, other=0.0
    )
    values = tl.load(
        value + token * value_stride_token + head * value_stride_head + column,
        mask=in_value,
        other=0.0,
    )
    _store(target, keys, in_key, k_scale, fp8_limit)
    _store(target + rank_k, values, in_value, v_scale, fp8_limit)


@triton.jit(do_not_specialize=WRITE_INTEGERS, do_not_specialize_on_alignment=WRITE_POINTERS)
def down_project_and_write_kernel(
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
    k_scale,
    v_scale,
    k_units,
    v_units,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    projects_values: tl.constexpr,
    unit: tl.constexpr,
    block_size: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    fp8_limit: tl.constexpr,
    precision: tl.constexpr,
):
    """key `[num_tokens, num_heads, key_size]` @ key_basis `[num_heads, key_size, rank_k]`, and the
    same of values, into token-major blocks; bases are contiguous. Biases `[num_heads, rank]` are
    added, or None. Without projects_values, values are latents and value_basis is not read.

    Program (tokens, head, keys or values). The products are added in float32 and rounded once.
    """
    rank_k = k_units * unit
    rank_v = v_units * unit
    head = tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        _down_project(
            key + head * key_stride_head,
            key_stride_token,
            key_basis + head * key_size * rank_k,
            key_bias,
            cache + head * cache_stride_head,
            slot_mapping,
            num_tokens,
            cache_stride_block,
            k_scale,
            rank_k,
            rank_k + rank_v,
            key_size,
            block_size,
            BLOCK_TOKENS,
            BLOCK_D,
            BLOCK_RANK,
            fp8_limit,
            precision,
            True,
        )
    else:
        _down_project(
            value + head * value_stride_head,
            value_stride_token,
            value_basis + head * value_size * rank_v,
            value_bias,
            cache + head * cache_stride_head + rank_k,
            slot_mapping,
            num_tokens,
            cache_stride_block,
            v_scale,
            rank_v,
            rank_k + rank_v,
            value_size,
            block_size,
            BLOCK_TOKENS,
            BLOCK_D,
            BLOCK_RANK,
            fp8_limit,
            precision,
            projects_values,
        )


@triton.jit
def _down_project(
    rows,
    stride_token,
    basis,
    bias,
    target,
    slot_mapping,
    num_tokens,
    stride_block,
    scale,
    rank,
    width,
    size: tl.constexpr,
    block_size: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    fp8_limit: tl.constexpr,
    precision: tl.constexpr,
    projects: tl.constexpr,
):
    """Some tokens' rows `[BLOCK_TOKENS, size]` of one head through its basis `[size, rank]`, or as
    they are."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_RANK)
    if projects:
        latents = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), tl.float32)
        for start in tl.range(0, size, BLOCK_D):
            part = start + tl.arange(0, BLOCK_D)
            x = tl.load(
                rows + token[:, None] * stride_token + part[None, :],
                mask=(token[:, None] < num_tokens) & (part[None, :] < size),
                other=0.0,
            )
            maps = tl.load(
                basis + part[:, None] * rank + column[None, :],
                mask=(part[:, None] < size) & (column[None, :] < rank),
                other=0.0,
            )
            latents = tl.dot(x, maps, latents, input_precision=precision)
        if bias is not None:
            added = tl.load(bias + tl.program_id(1) * rank + column, mask=column < rank, other=0.0)
            latents += added.to(tl.float32)[None, :]
    else:
        latents = tl.load(
            rows + token[:, None] * stride_token + column[None, :],
            mask=(token[:, None] < num_tokens) & (column[None, :] < rank),
            other=0.0,
        )
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1).to(tl.int64)
    place = (slot // block_size) * stride_block + (slot % block_size) * width
    mask = (slot[:, None] >= 0) & (column[None, :] < rank)
    _store(target + place[:, None] + column[None, :], latents, mask, scale, fp8_limit)


@triton.jit
def _store(target, latents, mask, scale, fp8_limit: tl.constexpr):
    """Latents as the cache keeps them."""
    if fp8_limit > 0:
        latents = tl.clamp(latents.to(tl.float32) / scale, -fp8_limit, fp8_limit, NAN)
    tl.store(target, latents.to(target.dtype.element_ty), mask=mask)
