# SPDX-License-Identifier: Apache-2.0
"""Gradients of the attention output with respect to its queries, keys and values.

For a random direction u_t at the output of every token t, one backward step through softmax and
values alone gives g_s = d(sum_t u_t . out_t) / d(key_s). For independent signs in u the mean of
g^T g is the metric S of

    sum_t |out_t(key + e) - out_t(key)|^2  ~  sum_s e_s S e_s^T

averaged over tokens: the Gauss-Newton matrix of the attention output (Hutchinson's estimator; the
layer-wise relative of Fisher-weighted SVD, Hsu et al. 2022, arXiv 2207.00112). It contains the
softmax, the rotary embedding at the distances that attention looks at, the values and the output
projection, and needs no other layer, so that it is summed over a stream like any moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_eigen.calibration.statistics.rotary import rotate

if TYPE_CHECKING:
    from vllm_eigen.calibration.statistics.batch import Batch

TILE = 256
"""Queries at a time where a matrix of queries by keys is needed."""


@dataclass(frozen=True)
class AttentionGradients:
    """Gradients for fixed random signs u at the attention output of every token.

    Attributes:
        query: f_t = d(sum_t u_t . out_t) / d(query_t) after the rotary embedding,
            [batch, length, num_heads, head_size]
        key: g_s after the rotary embedding, [batch, length, num_kv_heads, head_size]. With
            y = W_o^T u: d(logit)_ts = p_ts (y_t . v_s - y_t . c_t), g_s = sum_t d(logit)_ts q_t
            times the softmax scale.
        value: sum over query heads of p^T W_o^T u, [batch, length, num_kv_heads, head_size]
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def attention_gradients(batch: Batch) -> AttentionGradients:
    """All three from one pass over the attention matrix.

    d(sum_t u_t . out_t) / d(logit_ts) is as large as the attention matrix, so it is made in tiles
    that stay in a CPU's cache, and only up to the diagonal.

    Raises:
        ValueError: the batch was captured without probabilities or output projection.
    """
    if batch.probs is None or batch.o_proj is None:
        raise ValueError("the batch was captured without probabilities or output projection")
    target = cotangent(batch)
    query = rotate(batch.query, batch.rotation)
    key = rotate(batch.key, batch.rotation)
    length, heads, size = query.shape[1:]
    shared = heads // key.shape[2]
    mean = (target * batch.context).sum(-1, keepdim=True)
    by_key, by_value, by_query = (torch.zeros_like(query) for _ in range(3))
    for head in range(heads):
        keys, values = key[:, :, head // shared], batch.value[:, :, head // shared]
        for start in range(0, length, TILE):
            rows, seen = slice(start, start + TILE), slice(0, start + TILE)
            probs = batch.probs[:, head, rows, seen]
            aim = target[:, rows, head]
            score = (aim @ values[:, seen].mT).sub_(mean[:, rows, head]).mul_(probs)
            by_value[:, seen, head] += probs.mT @ aim
            by_key[:, seen, head] += score.mT @ query[:, rows, head]
            by_query[:, rows, head] = score @ keys[:, seen]
    scale = math.sqrt(size)
    return AttentionGradients(
        query=by_query / scale,
        key=_sum_groups(by_key, key.shape[2]) / scale,
        value=_sum_groups(by_value, key.shape[2]),
    )


def cotangent(batch: Batch) -> torch.Tensor:
    """W_o^T u of random signs u at the attention output, [batch, length, num_heads, head_size].

    The same signs for every batch: the activations differ, and a resumed run must not.
    """
    if batch.o_proj is None:
        raise ValueError("the batch was captured without the output projection")
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.key.shape[:2], batch.o_proj.shape[0])
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    signs = signs.to(device=batch.o_proj.device, dtype=batch.o_proj.dtype) * 2 - 1
    return torch.einsum("blx,xhd->blhd", signs, batch.o_proj)


def _sum_groups(gradient: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Sum over the query heads of each KV head, dimension 2."""
    batches, length, _, size = gradient.shape
    return gradient.reshape(batches, length, num_kv_heads, -1, size).sum(3)
