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

import torch

from calibration.methods.base import Batch, Statistic
from calibration.moments import add_outer, add_per_head, rotate
from vllm_eigen.families import Geometry

TILE = 256
"""Queries at a time where a matrix of queries by keys is needed."""


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
        if self.head_group == 1:
            shared = batch.context.shape[2] // total.shape[0]
            add_per_head(
                total, batch.context.unflatten(2, (-1, shared)).transpose(2, 3).flatten(1, 2)
            )
            return
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
    return _gradients(batch)["value_gradient"]


def key_gradient(batch: Batch) -> torch.Tensor:
    """g of the keys after the rotary embedding, [batch, length, num_kv_heads, head_size].

    With y = W_o^T u: d(logit)_ts = p_ts (y_t . v_s - y_t . c_t), g_s = sum_t d(logit)_ts q_t,
    times the softmax scale.
    """
    return _gradients(batch)["key_gradient"]


def query_gradient(batch: Batch) -> torch.Tensor:
    """f of the queries after the rotary embedding, [batch, length, num_heads, head_size]."""
    return _gradients(batch)["query_gradient"]


def _gradients(batch: Batch) -> dict[str, torch.Tensor]:
    """All three, from one pass over the attention and d(sum_t u_t . out_t) / d(logit_ts).

    The latter is as large as the attention, so it is made in tiles that stay in a CPU's cache, and
    only up to the diagonal.
    """
    if "key_gradient" in batch.derived:
        return batch.derived
    weights, target = batch.attention(), cotangent(batch)
    query = rotate(batch.query, batch.cos, batch.sin)
    key = rotate(batch.key, batch.cos, batch.sin)
    length, heads, size = query.shape[1:]
    shared = heads // key.shape[2]
    mean = (target * batch.context).sum(-1, keepdim=True)
    by_key, by_value, by_query = (torch.zeros_like(query) for _ in range(3))
    for head in range(heads):
        keys, values = key[:, :, head // shared], batch.value[:, :, head // shared]
        for start in range(0, length, TILE):
            rows, seen = slice(start, start + TILE), slice(0, start + TILE)
            attention = weights[:, head, rows, seen]
            aim = target[:, rows, head]
            score = (aim @ values[:, seen].mT).sub_(mean[:, rows, head]).mul_(attention)
            by_value[:, seen, head] += attention.mT @ aim
            by_key[:, seen, head] += score.mT @ query[:, rows, head]
            by_query[:, rows, head] = score @ keys[:, seen]
    scale = math.sqrt(size)
    batch.derived.update(
        key_gradient=_share(by_key, key.shape[2]) / scale,
        value_gradient=_share(by_value, key.shape[2]),
        query_gradient=by_query / scale,
    )
    return batch.derived


def _share(gradient: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Sum over the query heads of each KV head, dimension 2."""
    batches, length, _, size = gradient.shape
    return gradient.reshape(batches, length, num_kv_heads, -1, size).sum(3)
