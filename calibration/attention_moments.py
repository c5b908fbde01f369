"""Sums that see through the attention: how much its output moves when a key or a value moves.

For a random direction u_t at the output of every token t, one backward step through softmax and
values alone gives g_s = d(sum_t u_t . out_t) / d(key_s), and for independent signs in u the mean
of g^T g is the metric S of

    sum_t |out_t(key + e) - out_t(key)|^2  ~  sum_s e_s S e_s^T

averaged over tokens: the Gauss-Newton matrix of the attention output. It knows the softmax, the
rotary embedding at the distances that attention looks at, the values and the output projection,
and needs no other layer, so that it streams like any moment (Hutchinson's estimator; the
layer-wise relative of Fisher-weighted SVD, Hsu et al. 2022, arXiv 2207.00112).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from calibration.methods.base import Batch, Statistic
from calibration.moments import add_outer, add_per_head, rotate
from vllm_eigen.families import Geometry


class RotatedKeySensitivity(Statistic):
    """sum g^T g of all KV heads' keys after the rotary embedding."""

    name = "rotated_key_sensitivity"
    needs_probabilities = True
    back = False

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        gradient = key_gradient(batch)
        if self.back:
            gradient = rotate(gradient, batch.cos, batch.sin, back=True)
        add_outer(total, gradient)


class KeySensitivity(RotatedKeySensitivity):
    """The same before the rotary embedding (or without one)."""

    name = "key_sensitivity"
    back = True


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
        add_per_head(total, query_gradient(batch))


class ValueSensitivity(Statistic):
    """sum g^T g of all KV heads' values."""

    name = "value_sensitivity"
    needs_probabilities = True

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_kv_heads * head_size, same]."""
        return (geometry.num_kv_heads * geometry.head_size,) * 2

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        add_outer(total, value_gradient(batch))


@functools.cache
def group_context(head_group: int) -> type[Statistic]:
    """The statistic `GroupContext` for latent heads that serve `head_group` KV heads."""
    return type(f"GroupContext{head_group}", (GroupContext,), {"head_group": head_group})


class GroupContext(Statistic):
    """sum c^T c with c_h = p_h V, query head h attending to the values of its whole group.

    The second moment of what a latent head's decoder receives: values weighted as attention
    mixes them. With one head to a group, that of the attention output.
    """

    name = "group_context"
    needs_probabilities = True
    head_group = 1

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """[num_latent_heads, latent_size, latent_size]."""
        size = self.head_group * geometry.head_size
        return (geometry.num_kv_heads // self.head_group, size, size)

    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch."""
        weights = batch.attention()
        batches, length, _, size = batch.value.shape
        values = batch.value.reshape(batches, length, -1, self.head_group * size)
        shared = weights.shape[1] // values.shape[2]
        for index in range(values.shape[2]):
            heads = weights[:, index * shared : (index + 1) * shared]
            mixed = heads @ values[:, None, :, index]
            rows = mixed.flatten(0, 2).to(torch.float64)
            total[index].addmm_(rows.mT, rows)


def cotangent(batch: Batch) -> torch.Tensor:
    """W_o^T u of random signs u at the attention output, [batch, length, num_heads, head_size].

    The same signs for every batch: the activations differ, and a resumed run must not.
    """
    weight = batch.output_weight()
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.key.shape[:2], weight.shape[0])
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    signs = signs.to(device=weight.device, dtype=weight.dtype) * 2 - 1
    return torch.einsum("blx,xhd->blhd", signs, weight)


def value_gradient(batch: Batch) -> torch.Tensor:
    """g of the values, [batch, length, num_kv_heads, head_size]: sum over heads of p^T W_o^T u."""
    weights, target = batch.attention(), cotangent(batch)
    gradient = torch.einsum("bhts,bthd->bshd", weights, target)
    return _share(gradient, batch.value.shape[2])


def key_gradient(batch: Batch) -> torch.Tensor:
    """g of the keys after the rotary embedding, [batch, length, num_kv_heads, head_size].

    With y = W_o^T u: d(logit)_ts = p_ts (y_t . v_s - y_t . c_t), g_s = sum_t d(logit)_ts q_t,
    times the softmax scale.
    """
    query = rotate(batch.query, batch.cos, batch.sin)
    gradient = torch.empty_like(query)
    for head, score in enumerate(_score_gradients(batch)):
        gradient[:, :, head] = score.mT @ query[:, :, head]
    return _share(gradient, batch.value.shape[2]) / math.sqrt(query.shape[-1])


def query_gradient(batch: Batch) -> torch.Tensor:
    """f of the queries after the rotary embedding, [batch, length, num_heads, head_size]."""
    key = rotate(batch.key, batch.cos, batch.sin)
    gradient = torch.empty_like(batch.query)
    shared = batch.query.shape[2] // key.shape[2]
    for head, score in enumerate(_score_gradients(batch)):
        gradient[:, :, head] = score @ key[:, :, head // shared]
    return gradient / math.sqrt(key.shape[-1])


def _score_gradients(batch: Batch) -> Iterator[torch.Tensor]:
    """d(sum_t u_t . out_t) / d(logit_ts) of one query head after the other, [batch, t, s]."""
    weights, target = batch.attention(), cotangent(batch)
    shared = target.shape[2] // batch.value.shape[2]
    for head in range(target.shape[2]):
        aim = target[:, :, head]
        score = aim @ batch.value[:, :, head // shared].mT
        score -= (aim * batch.context[:, :, head]).sum(-1, keepdim=True)
        yield score * weights[:, head]


def _share(gradient: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Sum over the query heads of each KV head, dimension 2."""
    batches, length, _, size = gradient.shape
    return gradient.reshape(batches, length, num_kv_heads, -1, size).sum(3)
