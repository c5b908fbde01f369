# SPDX-License-Identifier: Apache-2.0
"""Second moments of gradients through the attention, and of attended values.

Unlike the moments of keys and values alone they weigh a direction by what it does to the attention
output (`gradients`).
"""

from __future__ import annotations

import torch

from vllm_eigen.calibration.statistics.batch import Batch
from vllm_eigen.calibration.statistics.moments import add_outer, add_per_head
from vllm_eigen.calibration.statistics.rotary import rotate
from vllm_eigen.calibration.statistics.statistic import Statistic
from vllm_eigen.checkpoint.families import Geometry


class RotatedKeySensitivity(Statistic):
    """sum g^T g of all KV heads' keys after the rotary embedding."""

    name = "rotated_key_sensitivity"
    needs_probabilities = True
    rotated = True

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        gradient = batch.gradients.key
        if not self.rotated:
            gradient = rotate(gradient, batch.rotation, back=True)
        add_outer(total, gradient)


class KeySensitivity(RotatedKeySensitivity):
    """The same before the rotary embedding (or without one)."""

    name = "key_sensitivity"
    rotated = False


class QuerySensitivity(Statistic):
    """sum f^T f of every query head, f_t = d(sum_t u_t . out_t) / d(query_t), without rotation.

    A map M of keys, k_hat = k M, changes the output of token t by u_t . out_t = f_t M^T q_t exactly
    to first order, f_t being a sum over all keys that t attends to. What is common to these keys
    drops out of f, as it does out of the softmax; a sum over single keys cannot know that.
    """

    name = "query_sensitivity"
    needs_probabilities = True

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_heads, head_size, head_size]."""
        return (geometry.num_heads, geometry.head_size, geometry.head_size)

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_per_head(total, batch.gradients.query)


class ValueSensitivity(Statistic):
    """sum g^T g of all KV heads' values."""

    name = "value_sensitivity"
    needs_probabilities = True

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, batch.gradients.value)


class GroupContext(Statistic):
    """sum c^T c with c_h = p_h V, query head h attending to the values of its whole group.

    The second moment of what a latent head's decoder receives: values weighted as attention
    mixes them. With one head to a group, that of the attention output.

    Args:
        head_group: KV heads of a latent head.
    """

    name = "group_context"
    needs_probabilities = True

    def __init__(self, head_group: int) -> None:
        self.head_group = head_group

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_latent_heads, latent_size, latent_size]."""
        size = self.head_group * geometry.head_size
        return (geometry.num_kv_heads // self.head_group, size, size)

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        if self.head_group == 1:
            shared = batch.context.shape[2] // total.shape[0]
            add_per_head(
                total, batch.context.unflatten(2, (-1, shared)).transpose(2, 3).flatten(1, 2)
            )
            return
        if batch.probs is None:
            raise ValueError("the batch was captured without attention probabilities")
        batches, length, _, size = batch.value.shape
        values = batch.value.reshape(batches, length, -1, self.head_group * size)
        shared = batch.probs.shape[1] // values.shape[2]
        for index in range(values.shape[2]):
            heads = batch.probs[:, index * shared : (index + 1) * shared]
            mixed = heads @ values[:, None, :, index]
            rows = mixed.flatten(0, 2).to(torch.float64)
            total[index].addmm_(rows.mT, rows)
