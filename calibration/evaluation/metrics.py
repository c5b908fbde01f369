# SPDX-License-Identifier: Apache-2.0
"""Quality of a compressed model against its base on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_eigen.common.errors import InputError

_ROWS = 256
"""Positions compared at a time: a vocabulary of 128k makes 128 MiB of float32 of them."""


@dataclass(frozen=True)
class Quality:
    """Averages over predicted tokens.

    Attributes:
        base_perplexity, eigen_perplexity: exp of the mean negative log-likelihood.
        top1_agreement: share of positions where both models' likeliest tokens are the same.
        kl_per_token: mean KL(base || eigen) of the next-token distributions, in nats; nan where
            it was not measured.
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
        """Add logits [batch, length, vocab_size] of both models for tokens [batch, length].

        Raises:
            InputError: they hold NaN or infinity.
        """
        targets = tokens[:, 1:].reshape(-1).to(base.device)
        pairs = zip(
            torch.split(base[:, :-1].flatten(0, 1), _ROWS),
            torch.split(eigen[:, :-1].flatten(0, 1), _ROWS),
            torch.split(targets, _ROWS),
            strict=True,
        )
        for left, right, target in pairs:
            for name, logits in (("base", left), ("compressed", right)):
                if not bool(torch.isfinite(logits).all()):
                    raise InputError(
                        f"the {name} model's output holds NaN or infinity; its weights are damaged "
                        "or too large for float32"
                    )
            p = left.float().log_softmax(-1)
            q = right.float().log_softmax(-1)
            self.add_logprobs(
                p.gather(-1, target[:, None]),
                q.gather(-1, target[:, None]),
                p.argmax(-1) == q.argmax(-1),
                kl_sum(p, q),
            )

    def add_logprobs(
        self, base: torch.Tensor, eigen: torch.Tensor, agree: torch.Tensor, kl: float
    ) -> None:
        """Add some positions.

        Args:
            base, eigen: log-probabilities of the tokens that follow, in nats.
            agree: whether both models' likeliest tokens are the same, per position.
            kl: sum of their divergences; nan where it is not measured.
        """
        self._base -= base.double().sum().item()
        self._eigen -= eigen.double().sum().item()
        self._agree += int(agree.sum())
        self._kl += kl
        self._tokens += agree.numel()

    def result(self) -> Quality:
        """The averages so far; at least one token must have been added."""
        count = max(1, self._tokens)
        return Quality(
            _perplexity(self._base / count),
            _perplexity(self._eigen / count),
            self._agree / count,
            self._kl / count if math.isnan(self._kl) else max(0.0, self._kl / count),
            self._tokens,
        )


def kl_sum(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum of KL(p || q) over rows of log-probabilities [positions, vocab_size], in nats."""
    return (p.exp() * (p - q)).double().sum().item()


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
