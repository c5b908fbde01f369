"""Latent attention in plain PyTorch: the implementation to trust, on any device and dtype.

It defines what the fast kernels must compute and serves as the engine's fallback back end. Pages
are token-major ("diffkv"): each token's K latent, then its V latent. One sequence at a time, all
of its scores at once, in float32 (float64 where the inputs are).
"""

from __future__ import annotations

import torch

from .interface import FP8_DTYPES, Encode, Rebuild, ScoreOptions


class ReferenceKernels:
    """See `interface.Kernels`."""

    name = "reference"

    def prepare(self, rebuild: Rebuild, dtype: torch.dtype, num_heads: int) -> None:
        """Nothing to do: keys are rebuilt from the tensors as they are."""

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        encode: Encode | None = None,
    ) -> None:
        """See `interface.Kernels.write_cache`."""
        if encode is not None:
            key, value = encode.latents(key, value)
        pages = _typed(kv_cache)
        num_tokens = slot_mapping.shape[0]
        kept = slot_mapping >= 0
        slots = slot_mapping[kept]
        block, offset = slots // pages.shape[2], slots % pages.shape[2]
        rows = torch.cat(
            [
                _stored(key[:num_tokens][kept], pages.dtype, k_scale),
                _stored(value[:num_tokens][kept], pages.dtype, v_scale),
            ],
            dim=-1,
        )
        # index_put on fp8 is not implemented everywhere; bytes always are.
        bits, pages = _bytes(rows), _bytes(pages)
        pages[block, :, offset] = bits

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        options: ScoreOptions,
        rebuild: Rebuild | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        *,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        """See `interface.Kernels.attend`."""
        rank_v = output.shape[-1]
        rank_k = kv_cache.shape[-1] - rank_v
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        is_fp8 = kv_cache.dtype in FP8_DTYPES
        starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
        for i, seq_len in enumerate(lengths):
            rows = slice(starts[i], starts[i + 1])
            if rows.stop <= rows.start or seq_len <= 0:
                continue
            latents = _gather(kv_cache, block_table[i], seq_len).to(exact)
            keys, values = latents[..., :rank_k], latents[..., rank_k:]
            if is_fp8:
                keys, values = keys * k_scale, values * v_scale
            if rebuild is not None:
                keys = rebuild_keys(keys, rebuild)
            output[rows] = _softmax_attention(query[rows].to(exact), keys, values, options).to(
                output.dtype
            )


def rebuild_keys(latents: torch.Tensor, rebuild: Rebuild) -> torch.Tensor:
    """`[num_kv_heads, seq_len, rank_k]` latents of positions 0.. -> rotated keys.

    Returns `[num_rebuilt_heads, seq_len, head_size]`.
    """
    basis = rebuild.key_basis.to(latents)
    keys = latents.repeat_interleave(basis.shape[0] // latents.shape[0], dim=0) @ basis
    if rebuild.key_offset is not None:
        keys = keys + rebuild.key_offset.to(keys)[:, None]
    rotary_dim = rebuild.rotary_dim
    cos, sin = rebuild.cos_sin[: keys.shape[1]].to(keys).chunk(2, dim=-1)
    turning, rest = keys[..., :rotary_dim], keys[..., rotary_dim:]
    if rebuild.is_neox_style:
        x, y = turning.chunk(2, dim=-1)
        turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
    else:
        x, y = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([x * cos - y * sin, y * cos + x * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def _softmax_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: ScoreOptions
) -> torch.Tensor:
    """`[n, num_heads, query_size]` against one sequence's `[heads, seq_len, ..]`, causal."""
    num_queries, num_heads, _ = query.shape
    seq_len = keys.shape[1]
    keys = keys.repeat_interleave(num_heads // keys.shape[0], dim=0)
    values = values.repeat_interleave(num_heads // values.shape[0], dim=0)
    logits = query.transpose(0, 1) @ keys.transpose(1, 2) * options.scale
    if options.soft_cap is not None:
        logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
    key_at = torch.arange(seq_len, device=query.device)
    query_at = key_at[seq_len - num_queries :, None]
    if options.alibi_slopes is not None:
        logits = logits + options.alibi_slopes.to(logits)[:, None, None] * (key_at - query_at)
    hidden = key_at > query_at
    if options.sliding_window is not None:
        hidden = hidden | (key_at <= query_at - options.sliding_window)
    weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
    # Keys outside every window may live in freed pages: 0 * NaN must stay 0.
    values = values.masked_fill(hidden.all(dim=0)[:, None], 0.0)
    return (weights @ values).transpose(0, 1)


def _gather(kv_cache: torch.Tensor, blocks: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The first seq_len tokens of one sequence, `[num_kv_heads, seq_len, rank_k + rank_v]`."""
    block_size = kv_cache.shape[2]
    needed = blocks[: -(-seq_len // block_size)].long()
    pages = _bytes(kv_cache)[needed].transpose(0, 1).flatten(1, 2)[:, :seq_len]
    return pages.view(_typed(kv_cache).dtype)


def _stored(latents: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Latents as the cache keeps them; fp8 saturates, as PyTorch's own cast does not."""
    if dtype not in FP8_DTYPES:
        return latents.to(dtype)
    limit = torch.finfo(dtype).max
    return (latents.float() / scale).clamp(-limit, limit).to(dtype)


def _typed(kv_cache: torch.Tensor) -> torch.Tensor:
    return kv_cache.view(torch.float8_e4m3fn) if kv_cache.dtype == torch.uint8 else kv_cache


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in FP8_DTYPES else tensor
