"""What an attention kernel over the latent cache must do: the words shared by every implementation.

The attention back end (one per layer) talks to a `Kernels` object and knows nothing of page
layouts or vector instructions; `reference.py` and `cpu.py` implement it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

FP8_DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ScoreOptions:
    """How a raw dot product becomes a softmax logit.

    logit = cap(scale * q.k) + slope * (t - p) for a key at position t and a query at p >= t.

    scale: 1 / sqrt(head size of the *original* model), not of the rank.
    alibi_slopes: float32 `[num_heads]`, or None.
    sliding_window: a query at p sees keys in (p - window, p]; None sees all of them.
    soft_cap: cap(x) = soft_cap * tanh(x / soft_cap); None leaves x alone.
    """

    scale: float
    alibi_slopes: torch.Tensor | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, eq=False)
class Rebuild:
    """How cached latents become rotary keys ("pre-rope" key mode, paper section 3.3).

    k_hat = k' @ key_basis + key_offset, then rotated by the token's own position. The tensors
    must not change after the first `attend`, since an implementation may keep a packed copy.

    key_basis: `[num_rebuilt_heads, rank_k, head_size]`. With g = num_rebuilt_heads / num_kv_heads,
        latent head j serves the rebuilt heads j*g .. j*g + g - 1.
    cos_sin: `[max_position, rotary_dim]`, vLLM's rotary cache: cosines, then sines.
    rotary_dim: leading dimensions of a head that rotate; the rest pass unrotated.
    is_neox_style: rotate the planes (i, i + rotary_dim/2); otherwise (2i, 2i + 1).
    key_offset: `[num_rebuilt_heads, head_size]`, or None.
    """

    key_basis: torch.Tensor
    cos_sin: torch.Tensor
    rotary_dim: int
    is_neox_style: bool = True
    key_offset: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Encode:
    """How keys and values become latents, where the projections do not make them: x' = x @ basis.

    key: `[num_kv_heads, key_size, rank_k]`.
    value: `[num_kv_heads, value_size, rank_v]`, or None where values come as latents.
    """

    key: torch.Tensor
    value: torch.Tensor | None

    def latents(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[num_tokens, num_kv_heads, size]` to `[.., rank]`, both."""
        key = (key.transpose(0, 1) @ self.key).transpose(0, 1)
        if self.value is not None:
            value = (value.transpose(0, 1) @ self.value).transpose(0, 1)
        return key, value


class Kernels(Protocol):
    """Write latents into the paged cache and attend over them.

    kv_cache is `[num_blocks, num_kv_heads, block_size, rank_k + rank_v]`; block_size is a multiple
    of 16, every head's page (the last two dimensions) is contiguous, and its inside belongs to the
    implementation: only pages written by the same object's `write_cache` may be read. The dtype
    is the query's (bfloat16, float16, float32), or fp8 (float8_e4m3fn, float8_e5m2, or uint8
    meaning e4m3), where a stored value stands for value * scale. Scales touch only fp8 caches.
    Memory never written may hold anything, NaN included, and never reaches an output.
    """

    name: str

    def prepare(self, rebuild: Rebuild, dtype: torch.dtype, num_heads: int) -> object:
        """Bring `rebuild` into the kernels' own order for `num_heads` query heads of `dtype`, once.

        `attend` does so at its first call; calling this before keeps that out of a captured graph.
        """
        ...

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
        """Store `key [num_tokens, num_kv_heads, rank_k]` and `value [.., rank_v]` in their slots.

        With `encode` they are `[num_tokens, num_kv_heads, size]`, those that it has a basis for,
        and what it makes of them is stored.
        slot_mapping: int64 `[num_tokens]`, block * block_size + offset; negative slots are
        padding and skipped. It may be shorter than key (vLLM pads the batch).
        Raises KernelError for shapes and dtypes that do not fit.
        """
        ...

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
        """Causal attention of `query [num_tokens, num_heads, query_size]` into `output`.

        output: `[num_tokens, num_heads, rank_v]`, latent values, to be decoded by the caller.
        query_start_loc: int32 `[num_seqs + 1]`; seq_lens: int32 `[num_seqs]`, cached tokens
        including this step's; block_table: int32 `[num_seqs, max_blocks]`. Query token i of the n
        of a sequence sits at position seq_len - n + i. Rows past query_start_loc[-1] stay as they
        are. query_size is rank_k, or head_size with `rebuild` (query already rotated).
        max_query_len, max_seq_len: upper bounds known on the host (in a captured graph: for all of
        its replays); they may spare work and change no result.
        Raises KernelError for shapes and dtypes that do not fit.
        """
        ...
