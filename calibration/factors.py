"""A folded layer taken apart: projections of the base's head size, latents, bases between them.

Folding multiplies a basis into the query and the output projection. Here the product is undone,
up to a rotation that changes no output: every head's score is `q . (k' key_basis)` again, of the
base's head size, and every head's value `v' value_basis`. Unfolding and fine-tuning start here;
`folded` goes back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from calibration.fold import Tensors, repeat
from vllm_eigen.checkpoint import KEY_BASIS, EigenConfig
from vllm_eigen.families import Family, KeyMode


@dataclass(frozen=True)
class KeyFactors:
    """What makes one layer's scores; the last column of q and k is their bias, or zeros.

    Attributes:
        q: [num_heads, head_size, hidden_size + 1]
        k: [num_latent_heads, rank_k, hidden_size + 1]
        basis: [num_kv_heads, rank_k, head_size]
    """

    q: torch.Tensor
    k: torch.Tensor
    basis: torch.Tensor

    def folded(self, family: Family, key_mode: KeyMode) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors by their names in the attention module, all biases included."""
        if key_mode == "folded":
            q = repeat(self.basis, len(self.q)) @ self.q
            return _rows(family.q_proj, q) | _rows(family.k_proj, self.k)
        tensors = _rows(family.q_proj, self.q) | _rows(family.k_proj, self.k)
        return tensors | {KEY_BASIS: self.basis}


@dataclass(frozen=True)
class ValueFactors:
    """What makes one layer's output; the last column of v is its bias, or zeros.

    Attributes:
        v: [num_latent_heads, rank_v, hidden_size + 1]
        o: [hidden_size, num_heads, head_size]
        basis: [num_kv_heads, rank_v, head_size]
    """

    v: torch.Tensor
    o: torch.Tensor
    basis: torch.Tensor

    def folded(self, family: Family) -> dict[str, torch.Tensor]:
        """As `KeyFactors.folded`."""
        o = torch.einsum("xjd,jrd->xjr", self.o, repeat(self.basis, self.o.shape[1]))
        return _rows(family.v_proj, self.v) | {f"{family.o_proj}.weight": o.flatten(1)}


def read_keys(
    weights: Tensors, path: str, family: Family, eigen: EigenConfig, index: int
) -> KeyFactors:
    """Take the scores of the attention module at `path`, of layer `index`, apart; float64."""
    q = _with_bias(weights, f"{path}.{family.q_proj}")
    k = _with_bias(weights, f"{path}.{family.k_proj}")
    q = q.reshape(eigen.num_heads, -1, q.shape[-1])
    if eigen.key_mode == "folded":
        basis = _span(q, eigen.num_kv_heads, eigen.head_size)
        q = repeat(basis, eigen.num_heads).mT @ q
    else:
        basis = weights.get(f"{path}.{KEY_BASIS}").double()
    k = k.reshape(eigen.num_latent_heads, eigen.layers[index].rank_k, -1)
    return KeyFactors(q, k, basis)


def read_values(
    weights: Tensors, path: str, family: Family, eigen: EigenConfig, index: int
) -> ValueFactors:
    """Take the output of the attention module at `path`, of layer `index`, apart; float64."""
    rank = eigen.layers[index].rank_v
    v = _with_bias(weights, f"{path}.{family.v_proj}")
    o = weights.get(f"{path}.{family.o_proj}.weight").double()
    o = o.reshape(-1, eigen.num_heads, rank)
    basis = _span(o.permute(1, 2, 0), eigen.num_kv_heads, eigen.head_size)
    return ValueFactors(
        v.reshape(eigen.num_latent_heads, rank, -1),
        torch.einsum("xjr,jrd->xjd", o, repeat(basis, eigen.num_heads)),
        basis,
    )


def _rows(name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weight and bias of a projection of heads with their bias last."""
    return {f"{name}.weight": rows[..., :-1].flatten(0, 1), f"{name}.bias": rows[..., -1].flatten()}


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
