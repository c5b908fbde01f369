# SPDX-License-Identifier: Apache-2.0
"""Linear maps of a layer in bfloat16, where the device multiplies it faster.

Sums are float32 inside the products. Queries, keys and values stay in float32: a large bias, as
Qwen2's keys have, would take the precision of what varies.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_eigen.checkpoint.families import Family


class BFloat16Linear(nn.Module):
    """`linear` of float32 rows through a bfloat16 product, forward and backward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], float32."""
        result = functional.linear(rows.bfloat16(), self.weight).float()
        return result if self.bias is None else result + self.bias


def use_bfloat16(layer: nn.Module, family: Family) -> None:
    """Replace the layer's linear maps but those of queries, keys and values."""
    kept = {family.q_proj, family.k_proj, family.v_proj, family.qkv_proj}
    for name, module in list(layer.named_modules()):
        path, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear) and leaf not in kept:
            setattr(layer.get_submodule(path), leaf, BFloat16Linear(module))
