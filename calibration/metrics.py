"""Quality of a compressed model against its base on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_ROWS = 256
"""Positions compared at a time: a vocabulary of 128k makes 128 MiB of float32 of them."""


@dataclass(frozen=True)
class Quality:
    """Averages over predicted tokens.

    Attributes:
        base_perplexity, eigen_perplexity: exp of the mean negative log-likelihood.
        top1_agreement: share of positions where both models' likeliest tokens are the same.
        kl_per_token: mean KL(base || eigen) of the next-token distributions, in nats.
        tokens: predicted tokens, one fewer a window than it has.
    """

    base_perplexity: float
    eigen_perplexity: float
    top1_agreement: float
    kl_per_token: float
    tokens: int


class Comparison:
    """Sums the differences of two models window by window, in float64."""

    def __init__(self) -> None:
        self._base = self._eigen = self._kl = 0.0
        self._agree = self._tokens = 0

    def add(self, base: torch.Tensor, eigen: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add logits [batch, length, vocab_size] of both models for tokens [batch, length]."""
        targets = tokens[:, 1:].reshape(-1).to(base.device)
        pairs = zip(
            torch.split(base[:, :-1].flatten(0, 1), _ROWS),
            torch.split(eigen[:, :-1].flatten(0, 1), _ROWS),
            torch.split(targets, _ROWS),
            strict=True,
        )
        for left, right, target in pairs:
            p = left.float().log_softmax(-1)
            q = right.float().log_softmax(-1)
            self._base -= p.gather(-1, target[:, None]).double().sum().item()
            self._eigen -= q.gather(-1, target[:, None]).double().sum().item()
            self._kl += (p.exp() * (p - q)).double().sum().item()
            self._agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            self._tokens += len(target)

    def result(self) -> Quality:
        """The averages so far; at least one token must have been added."""
        count = max(1, self._tokens)
        return Quality(
            _perplexity(self._base / count),
            _perplexity(self._eigen / count),
            self._agree / count,
            max(0.0, self._kl / count),
            self._tokens,
        )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
