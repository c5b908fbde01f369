# SPDX-License-Identifier: Apache-2.0
"""Latent attention in plain PyTorch: the implementation to trust, on any device and dtype.

It defines what the fast kernels must compute and serves as the engine's fallback. Blocks are
token-major ("diffkv"): each token's K latent, then its V latent, both as `coding.py` packs them
where the layer has codes. One sequence at a time, all of its scores at once, in float32 (float64
where the inputs are).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import coding
from vllm_eigen.kernels.interface import (
    FP8_DTYPES,
    KeyReconstruction,
    LayerSpec,
    Limits,
    Plan,
    PlanGeometry,
    PreparedLayer,
    ScoreOptions,
    Step,
)


class ReferenceKernels:
    """See `interface.Kernels`."""

    name = "reference"
    supports_graphs = False

    def prepare(self, layer: LayerSpec) -> ReferenceLayer:
        """Nothing is packed: keys are reconstructed from the tensors as they are."""
        return ReferenceLayer(layer)

    def reserve(self, limits: Limits, layers: Sequence[PreparedLayer]) -> None:
        """See `interface.Kernels.reserve`: these allocate as they go."""

    def warm_up(self, limits: Limits, layers: Sequence[PreparedLayer], block_size: int) -> None:
        """See `interface.Kernels.warm_up`: nothing is compiled."""

    def plan(self, step: Step, geometry: PlanGeometry) -> Plan:
        """Nothing is divided: sequences are computed one after the other."""
        return Plan(step, geometry)


@dataclass(frozen=True, eq=False)
class ReferenceLayer:
    """See `interface.PreparedLayer`."""

    spec: LayerSpec

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See `interface.PreparedLayer.write_cache`."""
        spec = self.spec
        if spec.down_projection is not None:
            key, value = spec.down_projection.latents(key, value)
        num_tokens = slot_mapping.shape[0]
        kept = slot_mapping >= 0
        slots = slot_mapping[kept]
        block, offset = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
        rows = torch.cat(
            [
                self._key_storage.write(key[:num_tokens][kept]),
                self._value_storage.write(value[:num_tokens][kept]),
            ],
            dim=-1,
        )
        # index_put on fp8 is not implemented everywhere; bytes always are.
        bits, blocks = _bytes(rows), _bytes(kv_cache)
        blocks[block, :, offset] = bits

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor, plan: Plan
    ) -> None:
        """See `interface.PreparedLayer.attend`."""
        spec, step = self.spec, plan.step
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
        for i, seq_len in enumerate(lengths):
            queries = slice(starts[i], starts[i + 1])
            if queries.stop <= queries.start or seq_len <= 0:
                continue
            rows = _gather(_bytes(kv_cache), step.block_table[i], seq_len)
            stored = rows.split([spec.key_width, spec.value_width], dim=-1)
            keys = self._key_storage.read(stored[0], exact)
            values = self._value_storage.read(stored[1], exact)
            if spec.reconstruction is not None:
                keys = reconstruct_keys(keys, spec.reconstruction)
            found = _softmax_attention(query[queries].to(exact), keys, values, spec.scores)
            output[queries] = found.to(output.dtype)

    @property
    def _key_storage(self) -> _Storage:
        return _Storage(self.spec.cache_dtype, self.spec.k_scale, self.spec.key_code)

    @property
    def _value_storage(self) -> _Storage:
        return _Storage(self.spec.cache_dtype, self.spec.v_scale, self.spec.value_code)


@dataclass(frozen=True)
class _Storage:
    """How the cache keeps keys or values."""

    cache_dtype: torch.dtype
    scale: float
    code: Code | None

    def write(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as cache elements; fp8 saturates, as PyTorch's own cast does not."""
        if self.code is not None:
            return coding.to_bytes(latents, self.code)
        if self.cache_dtype not in FP8_DTYPES:
            return latents.to(self.cache_dtype)
        limit = torch.finfo(self._fp8_type).max
        return (latents.float() / self.scale).clamp(-limit, limit).to(self._fp8_type)

    def read(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What cache elements, or bytes of fp8, stand for."""
        if self.code is not None:
            return coding.from_bytes(stored, self.code).to(dtype)
        if self.cache_dtype not in FP8_DTYPES:
            return stored.to(dtype)
        return stored.view(self._fp8_type).to(dtype) * self.scale

    @property
    def _fp8_type(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.cache_dtype == torch.uint8 else self.cache_dtype


def reconstruct_keys(latents: torch.Tensor, reconstruction: KeyReconstruction) -> torch.Tensor:
    """`[num_kv_heads, seq_len, rank_k]` latents of positions 0.. -> rotated keys.

    Returns `[num_reconstructed_heads, seq_len, head_size]`.
    """
    basis, rotary = reconstruction.key_basis.to(latents), reconstruction.rotary
    keys = latents.repeat_interleave(basis.shape[0] // latents.shape[0], dim=0) @ basis
    if reconstruction.key_offset is not None:
        keys = keys + reconstruction.key_offset.to(keys)[:, None]
    cos, sin = rotary.cos_sin[: keys.shape[1]].to(keys).chunk(2, dim=-1)
    rotating, rest = keys[..., : rotary.rotary_dim], keys[..., rotary.rotary_dim :]
    if rotary.is_neox_style:
        x, y = rotating.chunk(2, dim=-1)
        rotated = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
    else:
        x, y = rotating[..., 0::2], rotating[..., 1::2]
        rotated = torch.stack([x * cos - y * sin, y * cos + x * sin], dim=-1).flatten(-2)
    return torch.cat([rotated, rest], dim=-1)


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
    probs = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
    # Keys outside every window may live in freed blocks: 0 * NaN must stay 0.
    values = values.masked_fill(hidden.all(dim=0)[:, None], 0.0)
    if bool(values.isfinite().all()):
        return (probs @ values).transpose(0, 1)
    # Likewise a value that is not finite and hidden from some of the queries.
    seen = ~hidden
    rows = [probs[:, i : i + 1, seen[i]] @ values[:, seen[i]] for i in range(num_queries)]
    return torch.cat(rows, dim=1).transpose(0, 1)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The first seq_len tokens of one sequence, `[num_kv_heads, seq_len, key and value]`."""
    block_size = cache.shape[2]
    needed = blocks[: -(-seq_len // block_size)].long()
    return cache[needed].transpose(0, 1).flatten(1, 2)[:, :seq_len]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in FP8_DTYPES else tensor
