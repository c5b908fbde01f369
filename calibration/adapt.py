"""What fine-tuning may change: low-rank deltas on the large matrices (LoRA), the bases themselves.

LoRA (arXiv 2106.09685) learns `W + B A` with A, B of small rank. It acts here on the matrices of
the *compressed* model, so that the cache's ranks stay what they are: on a base model's projections
it would leave the subspace. Written as a parametrization instead of with peft: latent projections
are modules of our own and bases are bare tensors, of which peft adapts neither as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from calibration.lowrank import LowRankLayer

RANK = 16
"""Of the deltas."""


class Delta(nn.Module):
    """`W + up down`; zero at first.

    Args:
        weight: the matrix it acts on, [rows, columns].
        rank: inner size, cut to what the matrix can have.
    """

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The adapted matrix."""
        return weight + self.up @ self.down


def adapt(
    model: nn.Module, layers: Sequence[LowRankLayer], seed: int, rank: int = RANK
) -> list[nn.Parameter]:
    """Freeze everything, then make trainable what fine-tuning changes; returns that."""
    generator = torch.Generator().manual_seed(seed)
    trained: list[nn.Parameter] = []
    model.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(False)
        for module in layer.matrices():
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            delta = Delta(weight, rank, generator)
            # Deltas start at zero: there is nothing to initialise them from.
            register_parametrization(module, "weight", delta, unsafe=True)
            trained += [delta.down, delta.up]
        for basis in layer.bases():
            basis.requires_grad_(True)
            trained.append(basis)
    return trained
