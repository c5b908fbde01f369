# SPDX-License-Identifier: Apache-2.0
"""The training loop of fine-tuning: next-token loss, early stopping on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vllm_eigen.calibration.model.text import Windows
from vllm_eigen.common.progress import Reporter

BATCH_TOKENS = 4096
"""Tokens of one step, in whole windows."""
_EVALUATIONS = 20
"""Times the held-out loss is measured in a whole run."""
_PATIENCE = 4
"""Evaluations without gain after which training stops."""
_WARM_UP = 0.1
"""Share of the steps over which the learning rate rises."""
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        steps: at most this many.
        learning_rate: peak of AdamW's, which has a linear warm-up and a cosine decay.
        seed: of the order of windows and of the deltas.
    """

    steps: int
    learning_rate: float
    seed: int


Losses = list[tuple[int, float]]
"""Steps and the held-out loss after them, in nats a token."""


def train(
    model: Any,
    parameters: Sequence[nn.Parameter],
    windows: Windows,
    training: Training,
    reporter: Reporter,
) -> Losses:
    """Train in place; the parameters of the lowest held-out loss are kept, at worst the first.

    Args:
        model: a transformers model whose other parameters are frozen.
        windows: to train on, and held out to measure the loss on.
    """
    losses = [(0, mean_loss(model, windows.held_out))]
    best, kept, without_gain = losses[0][1], _copy(parameters), 0
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(training.seed)
    chosen = windows.chosen
    batch = max(1, BATCH_TOKENS // chosen.shape[1])
    interval = max(1, training.steps // _EVALUATIONS)
    order = torch.empty(0, dtype=torch.int64)
    reporter.stage("fine-tuning", training.steps)
    for step in range(1, training.steps + 1):
        if not len(order):
            order = torch.randperm(len(chosen), generator=generator)
        picked, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _rate(step / training.steps)
        optimizer.zero_grad()
        _loss(model, chosen[picked]).backward()
        nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        reporter.step()
        if step % interval and step < training.steps:
            continue
        losses.append((step, mean_loss(model, windows.held_out)))
        if losses[-1][1] < best:
            best, kept, without_gain = losses[-1][1], _copy(parameters), 0
        else:
            without_gain += 1
        if without_gain == _PATIENCE:
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
    """Learning rate relative to its peak, at a share of the steps."""
    return min(progress / _WARM_UP, (1 + math.cos(math.pi * progress)) / 2)
