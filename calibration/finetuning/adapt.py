# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning trains: low-rank deltas of the large matrices (LoRA), and the stored bases.

LoRA (arXiv 2106.09685) learns `W + B A` with A, B of small rank. Here W is a projection of the
*compressed* model, so that its latents keep their number; a delta of the base model's projection
would leave the low-rank subspace. Deltas are parametrizations of PyTorch and not of peft, which
adapts neither stacked projections part by part nor bare tensors such as the bases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from vllm_eigen.calibration.model.compressed import CompressedLayer

RANK = 16
"""Of the deltas."""


class Delta(nn.Module):
    """`W + up down`, with `up` zero at first.

    Args:
        weight: the matrix W, [rows, columns].
        rank: inner size, cut to what the matrix can have.
        parts: rows of W that are matrices with a delta of their own; the others stay.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        rank: int,
        generator: torch.Generator,
        parts: Sequence[slice] = (slice(None),),
    ) -> None:
        super().__init__()
        self._parts = parts
        columns = weight.shape[1]
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for part in parts:
            rows = len(weight[part])
            inner = min(rank, rows, columns)
            down = torch.randn(inner, columns, generator=generator) / columns**0.5
            self.down.append(nn.Parameter(down.to(weight.device)))
            self.up.append(nn.Parameter(torch.zeros(rows, inner, device=weight.device)))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The adapted matrix."""
        adapted = weight.clone()
        for part, up, down in zip(self._parts, self.up, self.down, strict=True):
            adapted[part] += up @ down
        return adapted


def adapt(
    model: nn.Module, layers: Sequence[CompressedLayer], seed: int, rank: int = RANK
) -> list[nn.Parameter]:
    """Freeze the model, add deltas, and return what is to be trained: these and the bases.

    Args:
        model: the compressed model.
        layers: the compression of its layers.
        seed: of the deltas.
    """
    generator = torch.Generator().manual_seed(seed)
    trained: list[nn.Parameter] = []
    model.requires_grad_(False)
    for layer in layers:
        for module, parts in layer.matrices():
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            delta = Delta(weight, rank, generator, parts)
            # `unsafe`: a delta cannot be computed back from the weight that is assigned.
            register_parametrization(module, "weight", delta, unsafe=True)
            trained += [*delta.down, *delta.up]
        trained += layer.bases()
    return trained
