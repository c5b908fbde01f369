"""A folded layer taken apart: projections of the base's head size, latents, bases between them.

Folding multiplies a basis into the query and the output projection. Here the product is undone,
up to a rotation that changes no output: every head's score is `q . (k' key_basis)` again, of the
base's head size, and every head's value `v' value_basis`. Unfolding and fine-tuning start here;
`Factors.folded` goes back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from calibration.fold import Tensors, repeat
from vllm_eigen.checkpoint import KEY_BASIS, EigenConfig
from vllm_eigen.families import Family, KeyMode


@dataclass(frozen=True)
class Factors:
    """One layer; the last column of q, k and v is their bias, or zeros.

    Attributes:
        q: [num_heads, head_size, hidden_size + 1]
        k: [num_latent_heads, rank_k, hidden_size + 1]
        v: [num_latent_heads, rank_v, hidden_size + 1]
        o: [hidden_size, num_heads, head_size]
        key_basis: [num_kv_heads, rank_k, head_size]
        value_basis: [num_kv_heads, rank_v, head_size]
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    key_basis: torch.Tensor
    value_basis: torch.Tensor

    def folded(self, family: Family, key_mode: KeyMode) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors by their names in the attention module, all biases included."""
        value_maps = repeat(self.value_basis, self.o.shape[1])
        q = self.q
        if key_mode == "folded":
            q = repeat(self.key_basis, len(q)) @ q
        tensors = {
            f"{family.o_proj}.weight": torch.einsum("xjd,jrd->xjr", self.o, value_maps).flatten(1)
        }
        if key_mode == "pre-rope":
            tensors[KEY_BASIS] = self.key_basis
        for name, rows in ((family.q_proj, q), (family.k_proj, self.k), (family.v_proj, self.v)):
            tensors[f"{name}.weight"] = rows[..., :-1].flatten(0, 1)
            tensors[f"{name}.bias"] = rows[..., -1].flatten()
        return tensors


def read_factors(
    weights: Tensors, path: str, family: Family, eigen: EigenConfig, index: int
) -> Factors:
    """Take the attention module at `path`, of layer `index`, apart; float64."""
    ranks, size = eigen.layers[index], eigen.head_size
    heads, kv_heads, latent_heads = eigen.num_heads, eigen.num_kv_heads, eigen.num_latent_heads
    q, k, v = (
        _with_bias(weights, f"{path}.{name}")
        for name in (family.q_proj, family.k_proj, family.v_proj)
    )
    o = weights.get(f"{path}.{family.o_proj}.weight").double().reshape(-1, heads, ranks.rank_v)
    q = q.reshape(heads, -1, q.shape[-1])
    if eigen.key_mode == "folded":
        key_basis = _span(q, kv_heads, size)
        q = repeat(key_basis, heads).mT @ q
    else:
        key_basis = weights.get(f"{path}.{KEY_BASIS}").double()
    value_basis = _span(o.permute(1, 2, 0), kv_heads, size)
    return Factors(
        q,
        k.reshape(latent_heads, ranks.rank_k, -1),
        v.reshape(latent_heads, ranks.rank_v, -1),
        torch.einsum("xjr,jrd->xjd", o, repeat(value_basis, heads)),
        key_basis,
        value_basis,
    )


def _with_bias(weights: Tensors, path: str) -> torch.Tensor:
    """Weight with the bias (or zeros) as its last column, [rows, hidden_size + 1]."""
    weight = weights.get(f"{path}.weight").double()
    name = f"{path}.bias"
    bias = weights.get(name).double() if name in weights else weight.new_zeros(len(weight))
    return torch.cat([weight, bias[:, None]], dim=1)


def _span(outer: torch.Tensor, num_kv_heads: int, size: int) -> torch.Tensor:
    """Orthonormal directions that hold the rows of each KV head, [num_kv_heads, rank, size].

    Args:
        outer: one side of a dot product per query head, [num_heads, rank, n]. If `rank > size`,
            the rows of the query heads of one KV head span at most `size` dimensions.
    """
    rank = outer.shape[1]
    if rank <= size:
        return torch.eye(rank, size, dtype=outer.dtype).expand(num_kv_heads, -1, -1)
    groups = outer.reshape(num_kv_heads, -1, rank, outer.shape[-1])
    stacked = groups.transpose(1, 2).flatten(2)
    basis = torch.linalg.svd(stacked, full_matrices=False)[0][:, :, :size]
    return pad(basis, (0, size - basis.shape[-1]))
