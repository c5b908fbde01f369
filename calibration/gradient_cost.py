# SPDX-License-Identifier: Apache-2.0
"""What the gradient pass costs, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_eigen.calibration.model.sampled_labels import TILE_ELEMENTS
from vllm_eigen.checkpoint.families import Geometry


@dataclass(frozen=True)
class GradientCost:
    """Of one gradient pass.

    Attributes:
        layer_flops, attention_flops, head_flops: of the layers' linear maps, of attention and of
            the output projection.
        memory_bytes: kept in memory at once besides a layer and what its forward needs.
        disk_bytes: hidden states past the memory limit, and samples past it.
    """

    layer_flops: float
    attention_flops: float
    head_flops: float
    memory_bytes: int
    disk_bytes: int


def gradient_cost(
    geometry: Geometry,
    *,
    layer_parameters: int,
    head_parameters: int,
    tokens: int,
    length: int,
    memory_limit: int,
) -> GradientCost:
    """The cost for some tokens in windows of `length`.

    Args:
        layer_parameters, head_parameters: of one layer, and of the output projection.
        memory_limit: bytes of hidden states kept in memory.
    """
    # Forward, forward again, and the backward's product with the transposed weights.
    layer_flops = 3 * 2.0 * tokens * geometry.num_layers * layer_parameters
    width = geometry.num_heads * geometry.head_size
    # Twice forward (2 products), once backward (5), half of them behind the diagonal.
    attention_flops = 9 * 2.0 * tokens * length * geometry.num_layers * width / 2
    slots = geometry.num_layers + 1
    states = 4 * tokens * geometry.hidden_size
    in_memory = min(slots, memory_limit // states)
    samples = 4 * 4 * tokens * geometry.num_kv_heads * geometry.head_size
    mapped = samples if samples // 4 > memory_limit else 0
    return GradientCost(
        layer_flops,
        attention_flops,
        head_flops=2 * 2.0 * tokens * head_parameters,
        memory_bytes=in_memory * states + samples - mapped + 2 * 4 * TILE_ELEMENTS,
        disk_bytes=(slots - in_memory) * states + mapped,
    )
