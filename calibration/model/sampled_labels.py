# SPDX-License-Identifier: Apache-2.0
"""The gradient at the top of the model: of labels drawn from the model's own prediction.

For a label y ~ p(. | tokens) the gradient of -log p(y) has the second moment of the true Fisher
matrix, which is the second-order term of the KL divergence (Martens 2020, arXiv 1412.1193, section
5). The text's own next tokens would give the "empirical Fisher" instead.
"""

from __future__ import annotations

import torch

from vllm_eigen.calibration.model.layerwise import LayerwiseModel

TILE_ELEMENTS = 1 << 24
"""Most logits in memory at once; there are as many probabilities beside them."""
_BLOCK = 256
"""Probabilities that are summed before the sum is searched: no cumulative sum of all."""


def uniforms(windows: range, length: int, seed: int) -> torch.Tensor:
    """Numbers in [0, 1), float64 [num_windows, length]; a window's own whatever is beside it."""
    generators = (torch.Generator().manual_seed(seed + window) for window in windows)
    rows = [torch.rand(length, generator=item, dtype=torch.float64) for item in generators]
    return torch.stack(rows)


def loss_gradient(
    model: LayerwiseModel, hidden: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Gradient of the summed -log p(sampled label) in the last layer's output.

    Args:
        hidden: the last layer's output, float32 [windows, length, hidden_size].
        uniform: picks each token's label, [windows, length].

    Returns:
        [windows, length, hidden_size] on the model's device.
    """
    states = hidden.to(model.device).flatten(0, 1)
    draws = uniform.to(model.device).flatten()
    tile = max(1, TILE_ELEMENTS // model.source.vocab_size)
    parts: list[torch.Tensor] = []
    for start in range(0, len(states), tile):
        rows = states[start : start + tile].detach().requires_grad_()
        logits = model.token_logits(rows)
        # A softmax of its own: the head's backward may need its output (a soft cap).
        probs = logits.detach().float().softmax(-1)
        labels = sample(probs, draws[start : start + tile])
        probs.scatter_add_(1, labels[:, None], probs.new_full((len(rows), 1), -1.0))
        parts += torch.autograd.grad(logits, rows, probs.to(logits.dtype))
    return torch.cat(parts).view(hidden.shape)


def sample(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Labels by inversion of the cumulative distribution.

    Args:
        probs: float32 [tokens, vocab_size], rows that sum to 1.
        uniform: [tokens], in [0, 1).

    Returns:
        int64 [tokens]
    """
    tokens, size = probs.shape
    whole = size // _BLOCK * _BLOCK
    blocks = probs[:, :whole].view(tokens, -1, _BLOCK).sum(-1)
    if whole < size:
        blocks = torch.cat([blocks, probs[:, whole:].sum(-1, keepdim=True)], -1)
    edges = blocks.double().cumsum(-1)
    target = (uniform * edges[:, -1])[:, None]
    block = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    before = edges.gather(1, block) - blocks.gather(1, block)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(1, columns.clamp(max=size - 1)).double() * (columns < size)
    offset = torch.searchsorted(before + inside.cumsum(-1), target, right=True)
    last = (inside > 0).int().mul(torch.arange(1, _BLOCK + 1, device=probs.device)).argmax(-1)
    return block.squeeze(1) * _BLOCK + torch.minimum(offset.squeeze(1), last)
