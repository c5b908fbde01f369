"""The training loop of fine-tuning: next-token loss, early stop on windows that are held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from calibration.progress import Reporter

BATCH_TOKENS = 4096
"""Tokens of one step, in whole windows."""
_CHECKS = 20
"""Times the held-out loss is measured in a whole run."""
_PATIENCE = 4
"""Measurements without gain after which training stops."""
_WARM_UP = 0.1
_CLIP = 1.0


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        steps: at most this many.
        learning_rate: of AdamW at its highest, after a linear rise, before a cosine fall.
        seed: of the order of windows and of the deltas.
    """

    steps: int
    learning_rate: float
    seed: int


Losses = list[tuple[int, float]]
"""Steps and the held-out loss after them, in nats a token."""


def heal(
    model: Any,
    parameters: Sequence[nn.Parameter],
    windows: torch.Tensor,
    held_out: torch.Tensor,
    training: Training,
    reporter: Reporter,
) -> Losses:
    """Train in place; the parameters end where the held-out loss was lowest, at worst unchanged.

    Args:
        model: a transformers model whose other parameters are frozen.
        windows: tokens to train on, [num_windows, length].
        held_out: tokens to watch, [num_held_out, length].
    """
    losses = [(0, mean_loss(model, held_out))]
    best, kept, waited = losses[0][1], _copy(parameters), 0
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(training.seed)
    batch = max(1, BATCH_TOKENS // windows.shape[1])
    interval = max(1, training.steps // _CHECKS)
    order = torch.empty(0, dtype=torch.int64)
    reporter.stage("fine-tuning", training.steps)
    for step in range(1, training.steps + 1):
        if not len(order):
            order = torch.randperm(len(windows), generator=generator)
        chosen, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _rate(step / training.steps)
        optimizer.zero_grad()
        _loss(model, windows[chosen]).backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        reporter.step()
        if step % interval and step < training.steps:
            continue
        losses.append((step, mean_loss(model, held_out)))
        if losses[-1][1] < best:
            best, kept, waited = losses[-1][1], _copy(parameters), 0
        else:
            waited += 1
        if waited == _PATIENCE:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return losses


def mean_loss(model: Any, tokens: torch.Tensor) -> float:
    """Next-token loss of tokens [num_windows, length], in nats a token."""
    with torch.no_grad():
        parts = [float(_loss(model, window)) for window in torch.split(tokens, 1)]
    return sum(parts) / len(parts)


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.to(model.device)
    logits = model(tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _copy(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _rate(progress: float) -> float:
    """Share of the highest learning rate, at a share of the steps."""
    return min(progress / _WARM_UP, (1 + math.cos(math.pi * progress)) / 2)
