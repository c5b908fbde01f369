# SPDX-License-Identifier: Apache-2.0
"""What the attention of one decoder layer computed for a few windows of text.

Captured by the hooks of the layer-wise pass, read by the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_eigen.calibration.statistics.gradients import AttentionGradients, attention_gradients
from vllm_eigen.calibration.statistics.rotary import Rotation


@dataclass(frozen=True)
class Batch:
    """Inputs and outputs of attention.

    Queries and keys are those before the rotary embedding, after q/k norms where the family has
    them, i.e. what the low-rank map is applied to in key mode `pre-rope`.

    Attributes:
        query: [batch, length, num_heads, head_size]
        key, value: [batch, length, num_kv_heads, head_size]
        context: the attention output before the output projection,
            [batch, length, num_heads, head_size]
        rotation: the rotary embedding; None without it.
        probs: attention probabilities, [batch, num_heads, length, length]; None where the
            attention implementation does not give them.
        o_proj: weight of the output projection, [hidden_size, num_heads, head_size].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    context: torch.Tensor
    rotation: Rotation | None = None
    probs: torch.Tensor | None = None
    o_proj: torch.Tensor | None = None

    @cached_property
    def gradients(self) -> AttentionGradients:
        """Gradients of the attention output, computed once for all statistics that need them.

        Raises:
            ValueError: the batch was captured without probabilities or output projection.
        """
        return attention_gradients(self)

    @property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return self.key.shape[0] * self.key.shape[1]
