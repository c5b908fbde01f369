# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
"""Cache write on a GPU: one program stores one token's latents, of a few heads, in its page."""

from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(tl.PropagateNan.ALL)
"""A clamp must not turn a model's NaN into a finite latent."""


@triton.jit
def write_latents(
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
    num_heads: tl.constexpr,
    rank_k: tl.constexpr,
    rank_v: tl.constexpr,
    page_size: tl.constexpr,
    block_heads: tl.constexpr,
    block_rank: tl.constexpr,
    fp8_limit: tl.constexpr,
):
    """key `[num_tokens, num_heads, rank_k]`, value `[.., rank_v]` into token-major pages.

    Program (token, block of heads). fp8_limit is the largest fp8 value, 0 where the cache is not
    fp8: stored values saturate there.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    column = tl.arange(0, block_rank)[None, :]
    row = (slot // page_size) * cache_stride_block + (slot % page_size) * (rank_k + rank_v)
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
    if fp8_limit > 0:
        keys = tl.clamp(keys.to(tl.float32) / k_scale, -fp8_limit, fp8_limit, NAN)
        values = tl.clamp(values.to(tl.float32) / v_scale, -fp8_limit, fp8_limit, NAN)
    tl.store(target, keys.to(cache.dtype.element_ty), mask=in_key)
    tl.store(target + rank_k, values.to(cache.dtype.element_ty), mask=in_value)
