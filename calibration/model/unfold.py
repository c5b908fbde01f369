# SPDX-License-Identifier: Apache-2.0
"""Read an Eigen checkpoint's attention as full-size projections and maps; the inverse of `fold`.

Every compressed layer is described in one way, however its checkpoint stores it: projections of
the base model's shapes, and for keys and for values a pair of maps that are applied to what the
projections make,

    k' = k down_projection,    k_hat = k' reconstruction

and what is added to both, where the checkpoint has offsets that no projection's bias holds.

Maps that stand beside the projections are returned as they are. Where a down-projection was
folded into the projection, the projection makes latents: these are padded with zeros to full size,
and the down-projection is the first columns of the identity, which drops the padding again. So
the latents are exact. `hooks.compress` applies the maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vllm_eigen.calibration.methods.basis import Maps
from vllm_eigen.calibration.model.fold import Tensors, per_latent, repeat
from vllm_eigen.calibration.model.hooks import Offset
from vllm_eigen.checkpoint.config import EigenConfig, LayerRanks
from vllm_eigen.checkpoint.families import Family
from vllm_eigen.checkpoint.shapes import (
    KEY_BASIS,
    KEY_ENCODER,
    KEY_ENCODER_BIAS,
    KEY_OFFSET,
    VALUE_BASIS,
    VALUE_ENCODER,
    VALUE_ENCODER_BIAS,
    VALUE_OFFSET,
    basis_shapes,
)


@dataclass(frozen=True)
class UnfoldedLayer:
    """One layer's attention.

    Attributes:
        projections: full-size weights and biases that take the place of folded ones, by name in
            the base model's attention module, float64. Those that are not folded are not in it.
        key, value: the maps; of the stored type where they are stored.
        key_offset, value_offset: what is added beside the projections' biases.
    """

    projections: Mapping[str, torch.Tensor]
    key: Maps
    value: Maps
    key_offset: Offset | None = None
    value_offset: Offset | None = None


def unfold_layer(
    tensors: Tensors, path: str, family: Family, eigen: EigenConfig, ranks: LayerRanks
) -> UnfoldedLayer:
    """Read the attention module at `path`, of a layer with these ranks.

    Raises:
        InputError: a tensor is missing or damaged.
    """
    stored = _Stored(tensors, path, family, eigen, ranks)
    projections: dict[str, torch.Tensor] = {}
    if eigen.projections.folds_keys:
        found, key = stored.unfold_keys()
        projections |= found
    else:
        key = stored.maps(KEY_ENCODER, KEY_BASIS)
    if eigen.projections.folds_values:
        found, value = stored.unfold_values()
        projections |= found
    else:
        value = stored.maps(VALUE_ENCODER, VALUE_BASIS)
    if family.qkv_proj and eigen.projections.folds_values:
        projections = stored.fused(projections)
    return UnfoldedLayer(
        projections,
        key,
        value,
        stored.offset(KEY_ENCODER_BIAS, KEY_OFFSET),
        stored.offset(VALUE_ENCODER_BIAS, VALUE_OFFSET),
    )


@dataclass(frozen=True)
class _Stored:
    """The attention tensors of one layer of a checkpoint, in the module at `path`."""

    tensors: Tensors
    path: str
    family: Family
    eigen: EigenConfig
    ranks: LayerRanks

    def maps(self, encoder: str, basis: str) -> Maps:
        """Maps that stand beside the projections."""
        decoder = self.tensors.get(f"{self.path}.{basis}")
        down_projection = self.tensors.get(f"{self.path}.{encoder}")
        return down_projection, per_latent(decoder, self.eigen.num_latent_heads)

    def offset(self, bias: str, offset: str) -> Offset | None:
        """What stands beside the maps; None where nothing does."""
        names = basis_shapes(self.eigen, self.ranks)
        found = [
            self.tensors.get(f"{self.path}.{name}") if name in names else None
            for name in (bias, offset)
        ]
        return Offset(*found) if any(item is not None for item in found) else None

    def unfold_keys(self) -> tuple[dict[str, torch.Tensor], Maps]:
        """Query and key projections of full size, and the maps of keys."""
        eigen, family = self.eigen, self.family
        q = self._rows(family.q_proj, eigen.num_heads)
        k = self._rows(family.k_proj, eigen.num_latent_heads)
        if eigen.key_mode.has_rope:
            basis = self.tensors.get(f"{self.path}.{KEY_BASIS}")
        else:
            # q holds the reconstruction too: q k_hat^T = (q D^T) k'^T. Any D that spans it does.
            basis = _spanning(q, eigen.num_kv_heads, eigen.head_size)
            q = repeat(basis, eigen.num_heads).mT @ q
        projections = self._named(family.q_proj, q) | self._named(family.k_proj, self._pad(k))
        return projections, self._selecting(self.ranks.rank_k, basis)

    def unfold_values(self) -> tuple[dict[str, torch.Tensor], Maps]:
        """Value and output projections of full size, and the maps of values."""
        eigen, family = self.eigen, self.family
        v = self._rows(family.v_proj, eigen.num_latent_heads)
        o = self.tensors.get(f"{self.path}.{family.o_proj}.weight").double()
        o = o.reshape(-1, eigen.num_heads, self.ranks.rank_v)
        # o holds the reconstruction too: v_hat W_o = v' (D W_o). Any D that spans it does.
        basis = _spanning(o.permute(1, 2, 0), eigen.num_kv_heads, eigen.head_size)
        o = torch.einsum("xjr,jrd->xjd", o, repeat(basis, eigen.num_heads))
        projections = self._named(family.v_proj, self._pad(v))
        projections[f"{family.o_proj}.weight"] = o.flatten(1)
        return projections, self._selecting(self.ranks.rank_v, basis)

    def fused(self, projections: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same with queries, keys and values as one projection, which has a bias if one has.

        Args:
            projections: those that were folded; queries and keys may be stored as they are.
        """
        found = dict(projections)
        names = (self.family.q_proj, self.family.k_proj, self.family.v_proj)
        for name in names:
            if f"{name}.weight" not in found:
                found |= self._named(name, self._rows(name, 1))
        weights = [found.pop(f"{name}.weight") for name in names]
        biases = [found.pop(f"{name}.bias", None) for name in names]
        found[f"{self.family.qkv_proj}.weight"] = torch.cat(weights)
        if any(bias is not None for bias in biases):
            pairs = zip(biases, weights, strict=True)
            parts = [w.new_zeros(len(w)) if b is None else b for b, w in pairs]
            found[f"{self.family.qkv_proj}.bias"] = torch.cat(parts)
        return found

    def _selecting(self, rank: int, basis: torch.Tensor) -> Maps:
        """Maps of padded latents: keep the first `rank`, reconstruct with the basis."""
        count = self.eigen.num_latent_heads
        down_projection = torch.eye(self._latent_size, rank).expand(count, -1, -1)
        return down_projection, per_latent(basis, count)

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of latents to full size: [num_latent_heads, rank, n] to [.., latent_size, n]."""
        return pad(rows, (0, 0, 0, self._latent_size - rows.shape[1]))

    @property
    def _latent_size(self) -> int:
        return self.eigen.head_group * self.eigen.head_size

    def _rows(self, name: str, heads: int) -> torch.Tensor:
        """A projection, its bias (or zeros) as the last column, [heads, size, hidden_size + 1]."""
        weight = self.tensors.get(f"{self.path}.{name}.weight").double()
        bias = weight.new_zeros(len(weight))
        if f"{self.path}.{name}.bias" in self.tensors:
            bias = self.tensors.get(f"{self.path}.{name}.bias").double()
        return torch.cat([weight, bias[:, None]], dim=1).reshape(heads, -1, weight.shape[1] + 1)

    def _named(self, name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weight, and bias where the checkpoint has one, of rows as `_rows` gives them."""
        found = {f"{name}.weight": rows[..., :-1].flatten(0, 1)}
        if f"{self.path}.{name}.bias" in self.tensors:
            found[f"{name}.bias"] = rows[..., -1].flatten()
        return found


def _spanning(rows: torch.Tensor, num_kv_heads: int, size: int) -> torch.Tensor:
    """Orthonormal directions that span the latents' side, [num_kv_heads, rank, size].

    Args:
        rows: of each query head, [num_heads, rank, n]. Where `rank > size`, those of the query
            heads of one KV head together span at most `size` dimensions.
    """
    rank = rows.shape[1]
    if rank <= size:
        return torch.eye(rank, size, dtype=rows.dtype).expand(num_kv_heads, -1, -1)
    groups = rows.reshape(num_kv_heads, -1, rank, rows.shape[-1])
    stacked = groups.transpose(1, 2).flatten(2)
    basis = torch.linalg.svd(stacked, full_matrices=False)[0][:, :, :size]
    return pad(basis, (0, size - basis.shape[-1]))
