# SPDX-License-Identifier: Apache-2.0
"""Fold low-rank maps into the projections of one attention layer (paper, section 3.2).

Weights are in the paper's row-vector sense `q = h W_q`; torch stores their transposes. Everything
is computed in float64 and rounded once, when written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_eigen.calibration.methods.basis import LayerMaps, Maps
from vllm_eigen.checkpoint.config import EigenConfig
from vllm_eigen.checkpoint.families import Family, Geometry
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.checkpoint.shapes import (
    KEY_BASIS,
    KEY_ENCODER,
    KEY_ENCODER_BIAS,
    KEY_OFFSET,
    VALUE_BASIS,
    VALUE_ENCODER,
    VALUE_ENCODER_BIAS,
    VALUE_OFFSET,
)


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
        o_bias: [hidden_size]
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None


def read_attention(
    tensors: Tensors, path: str, family: Family, geometry: Geometry
) -> AttentionWeights:
    """Collect the projections of the attention module at `path`."""
    size = geometry.head_size

    def weight(name: str) -> torch.Tensor:
        return tensors.get(f"{path}.{name}.weight").to(torch.float64)

    def bias(name: str) -> torch.Tensor | None:
        full = f"{path}.{name}.bias"
        return tensors.get(full).to(torch.float64) if full in tensors else None

    names = (family.q_proj, family.k_proj, family.v_proj)
    if family.qkv_proj:
        weights = weight(family.qkv_proj).split(geometry.qkv_sizes)
        fused = bias(family.qkv_proj)
        biases = (None,) * 3 if fused is None else fused.split(geometry.qkv_sizes)
    else:
        weights = tuple(weight(name) for name in names)
        biases = tuple(bias(name) for name in names)
    q, k, v = (item.unflatten(0, (-1, size)) for item in weights)
    q_bias, k_bias, v_bias = (None if b is None else b.unflatten(0, (-1, size)) for b in biases)
    o = weight(family.o_proj).unflatten(1, (-1, size))
    return AttentionWeights(q, k, v, o, q_bias, k_bias, v_bias, bias(family.o_proj))


def fold_keys(
    weights: AttentionWeights,
    key: Maps,
    family: Family,
    key_mode: KeyMode,
    offset: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that make queries and key latents, by their names inside the attention module.

    Float64; shapes are those of `vllm_eigen.checkpoint.shapes.tensor_shapes`, here and below.

    Args:
        offset: o of k' = (k - o) E, [num_kv_heads, head_size].
    """
    decoder = per_head(key[1], weights.k.shape[1])
    tensors = {f"{family.k_proj}.weight": down_project(weights.k, key[0]).flatten(0, 1)}
    bias = _without(weights.k_bias, offset)
    if bias is not None:
        tensors[f"{family.k_proj}.bias"] = latent_offset(bias, key[0]).flatten()
    if not key_mode.has_rope:
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
        if offset is not None:
            tensors[KEY_OFFSET] = offset
    return tensors


def fold_values(
    weights: AttentionWeights,
    value: Maps,
    family: Family,
    offset: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that make value latents and take them back to the hidden state.

    Args:
        offset: o of v' = (v - o) E, [num_kv_heads, head_size].
    """
    decoder = per_head(value[1], weights.v.shape[1])
    tensors = {
        f"{family.v_proj}.weight": down_project(weights.v, value[0]).flatten(0, 1),
        f"{family.o_proj}.weight": torch.einsum(
            "xjd,jrd->xjr", weights.o, repeat(decoder, weights.o.shape[1])
        ).flatten(1),
    }
    bias = _without(weights.v_bias, offset)
    if bias is not None:
        tensors[f"{family.v_proj}.bias"] = latent_offset(bias, value[0]).flatten()
    if offset is not None:
        # Attention's weights sum to 1: every head's output lacks exactly o.
        back = torch.einsum("xjd,jd->x", weights.o, repeat(offset, weights.o.shape[1]))
        own = 0 if weights.o_bias is None else weights.o_bias
        tensors[f"{family.o_proj}.bias"] = own + back
    return tensors


def compressed_tensors(
    tensors: Tensors,
    path: str,
    family: Family,
    geometry: Geometry,
    eigen: EigenConfig,
    maps: LayerMaps,
) -> dict[str, torch.Tensor]:
    """A layer's new tensors in a checkpoint, by their names inside the attention module.

    Args:
        tensors: full-size projections, in the attention module at `path`.
        maps: in float64, of the layer's ranks. A layer without the offset that the checkpoint has
            gets one of zeros.

    Raises:
        ValueError: it has an offset that the checkpoint does not have.
    """
    key_offset = _offset("key_offset", maps.key_offset, eigen.key_offset, eigen)
    value_offset = _offset("value_offset", maps.value_offset, eigen.value_offset, eigen)
    if not eigen.projections.folds_values:
        return keep_keys(maps.key, eigen, key_offset) | keep_values(maps.value, eigen, value_offset)
    weights = read_attention(tensors, path, family, geometry)
    made = fold_values(weights, maps.value, family, value_offset)
    if eigen.projections.folds_keys:
        return made | fold_keys(weights, maps.key, family, eigen.key_mode, key_offset)
    if family.qkv_proj:
        made |= _apart(weights, family)
    return made | keep_keys(maps.key, eigen, key_offset)


def _apart(weights: AttentionWeights, family: Family) -> dict[str, torch.Tensor]:
    """Query and key projections as they are, where the values of the fused one are folded."""
    q, k = family.q_proj, family.k_proj
    tensors = {f"{q}.weight": weights.q.flatten(0, 1), f"{k}.weight": weights.k.flatten(0, 1)}
    for name, bias in ((q, weights.q_bias), (k, weights.k_bias)):
        if bias is not None:
            tensors[f"{name}.bias"] = bias.flatten()
    return tensors


def keep_keys(
    key: Maps, eigen: EigenConfig, offset: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that stand beside the base model's query and key projections."""
    tensors = {KEY_ENCODER: key[0], KEY_BASIS: per_head(key[1], eigen.head_size)}
    if offset is not None:
        tensors[KEY_ENCODER_BIAS] = -latent_offset(offset, key[0])
        if eigen.key_mode.reconstructs_keys:
            tensors[KEY_OFFSET] = offset
    return tensors


def keep_values(
    value: Maps, eigen: EigenConfig, offset: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that stand beside the base model's value and output projections."""
    tensors = {VALUE_ENCODER: value[0], VALUE_BASIS: per_head(value[1], eigen.head_size)}
    if offset is not None:
        tensors |= {VALUE_ENCODER_BIAS: -latent_offset(offset, value[0]), VALUE_OFFSET: offset}
    return tensors


def latent_offset(offset: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
    """`o E` of o [num_kv_heads, head_size]: [num_latent_heads, rank]."""
    return down_project(offset.to(encoder)[..., None], encoder)[..., 0]


def _offset(
    name: str, found: torch.Tensor | None, stored: bool, eigen: EigenConfig
) -> torch.Tensor | None:
    """A layer's offset, in float64."""
    if found is not None and not stored:
        raise ValueError(f"a layer has a {name} and the checkpoint's configuration none")
    if not stored:
        return None
    if found is None:
        return torch.zeros(eigen.num_kv_heads, eigen.head_size, dtype=torch.float64)
    return found.to(torch.float64)


def _without(bias: torch.Tensor | None, offset: torch.Tensor | None) -> torch.Tensor | None:
    """`bias - offset`, None where there is neither."""
    if offset is None:
        return bias
    return -offset if bias is None else bias - offset


def down_project(weight: torch.Tensor, encoder: torch.Tensor) -> torch.Tensor:
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
