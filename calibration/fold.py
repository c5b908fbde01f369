"""Fold low-rank maps into the projections of one attention layer (paper, section 3.2).

Weights are in the paper's row-vector sense `q = h W_q`; torch stores their transposes. Everything
is computed in float64 and rounded once, when written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_eigen.checkpoint import KEY_BASIS, KEY_ENCODER, VALUE_BASIS, VALUE_ENCODER
from vllm_eigen.families import Family, Geometry, KeyMode

Maps = tuple[torch.Tensor, torch.Tensor]
"""Encoder [num_latent_heads, latent_size, rank], decoder [num_latent_heads, rank, latent_size]."""


class Tensors(Protocol):
    """Named tensors, read one at a time; `get` raises for a missing one."""

    def get(self, name: str) -> torch.Tensor:
        """The tensor called `name`."""

    def __contains__(self, name: str) -> bool:
        """Whether there is one."""


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of one layer split into heads, float64; biases None where there are none.

    Attributes:
        q: [num_heads, head_size, hidden_size]
        k, v: [num_kv_heads, head_size, hidden_size]
        o: [hidden_size, num_heads, head_size]
        q_bias: [num_heads, head_size]
        k_bias, v_bias: [num_kv_heads, head_size]
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None


def read_attention(
    tensors: Tensors, path: str, family: Family, geometry: Geometry
) -> AttentionWeights:
    """Collect the projections of the attention module at `path`."""
    size = geometry.head_size

    def weight(name: str) -> torch.Tensor:
        return tensors.get(f"{path}.{name}.weight").to(torch.float64)

    def bias(name: str) -> torch.Tensor | None:
        full = f"{path}.{name}.bias"
        if full not in tensors:
            return None
        return tensors.get(full).to(torch.float64).reshape(-1, size)

    if family.qkv_proj:
        q, k, v = weight(family.qkv_proj).chunk(3)
    else:
        q, k, v = (weight(name) for name in (family.q_proj, family.k_proj, family.v_proj))
    o = weight(family.o_proj)
    return AttentionWeights(
        q.reshape(-1, size, q.shape[-1]),
        k.reshape(-1, size, k.shape[-1]),
        v.reshape(-1, size, v.shape[-1]),
        o.reshape(o.shape[0], -1, size),
        bias(family.q_proj),
        bias(family.k_proj),
        bias(family.v_proj),
    )


def fold_keys(
    weights: AttentionWeights, key: Maps, family: Family, key_mode: KeyMode
) -> dict[str, torch.Tensor]:
    """The tensors that make queries and key latents, by their names inside the attention module.

    Float64; shapes are those of `vllm_eigen.checkpoint.tensor_shapes`, here and below.
    """
    decoder = per_head(key[1], weights.k.shape[1])
    tensors = {f"{family.k_proj}.weight": encode(weights.k, key[0]).flatten(0, 1)}
    if weights.k_bias is not None:
        tensors[f"{family.k_proj}.bias"] = encode(weights.k_bias[..., None], key[0]).flatten()
    if key_mode == "folded":
        # q k_hat^T = q (k' D)^T = (q D^T) k'^T
        maps = repeat(decoder, weights.q.shape[0])
        tensors[f"{family.q_proj}.weight"] = (maps @ weights.q).flatten(0, 1)
        if weights.q_bias is not None:
            bias = (maps @ weights.q_bias[..., None]).flatten()
            tensors[f"{family.q_proj}.bias"] = bias
    else:
        tensors[f"{family.q_proj}.weight"] = weights.q.flatten(0, 1)
        if weights.q_bias is not None:
            tensors[f"{family.q_proj}.bias"] = weights.q_bias.flatten()
        tensors[KEY_BASIS] = decoder
    return tensors


def fold_values(weights: AttentionWeights, value: Maps, family: Family) -> dict[str, torch.Tensor]:
    """The tensors that make value latents and take them back to the hidden state."""
    decoder = per_head(value[1], weights.v.shape[1])
    tensors = {
        f"{family.v_proj}.weight": encode(weights.v, value[0]).flatten(0, 1),
        f"{family.o_proj}.weight": torch.einsum(
            "xjd,jrd->xjr", weights.o, repeat(decoder, weights.o.shape[1])
        ).flatten(1),
    }
    if weights.v_bias is not None:
        tensors[f"{family.v_proj}.bias"] = encode(weights.v_bias[..., None], value[0]).flatten()
    return tensors


def keep_keys(key: Maps, head_size: int) -> dict[str, torch.Tensor]:
    """The tensors that stand beside the base model's query and key projections."""
    return {KEY_ENCODER: key[0], KEY_BASIS: per_head(key[1], head_size)}


def keep_values(value: Maps, head_size: int) -> dict[str, torch.Tensor]:
    """The tensors that stand beside the base model's value and output projections."""
    return {VALUE_ENCODER: value[0], VALUE_BASIS: per_head(value[1], head_size)}


def encode(weight: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
    """`W E` for rows of all heads: [num_kv_heads, head_size, n] to [num_latent_heads, rank, n]."""
    latent = weight.reshape(encoder.shape[0], encoder.shape[1], -1)
    return encoder.mT @ latent


def per_head(decoder: torch.Tensor, head_size: int) -> torch.Tensor:
    """The part of a latent head's decoder that makes each KV head: [num_kv_heads, rank, d]."""
    count, rank, size = decoder.shape
    parts = decoder.reshape(count, rank, size // head_size, head_size)
    return parts.transpose(1, 2).reshape(-1, rank, head_size).contiguous()


def per_latent(basis: torch.Tensor, num_latent_heads: int) -> torch.Tensor:
    """Inverse of `per_head`: [num_kv_heads, rank, d] to [num_latent_heads, rank, latent_size]."""
    rank, size = basis.shape[1:]
    parts = basis.reshape(num_latent_heads, -1, rank, size).transpose(1, 2)
    return parts.reshape(num_latent_heads, rank, -1)


def repeat(maps: torch.Tensor, num_heads: int) -> torch.Tensor:
    """KV heads' maps for their query heads: [num_kv_heads, ...] to [num_heads, ...]."""
    return maps.repeat_interleave(num_heads // maps.shape[0], dim=0)
