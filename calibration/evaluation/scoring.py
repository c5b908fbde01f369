# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of token sequences: what tasks and comparisons ask of a model.

A `Scorer` hides what runs the model: transformers here, vLLM in `engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenLogprobs:
    """A model's predictions of the tokens of a sequence after the first.

    Attributes:
        tokens: the predicted tokens, [length - 1].
        logprobs: their log-probabilities in nats, float32 [length - 1].
        top1: the likeliest tokens instead, [length - 1].
        vocab_logprobs: those of the whole vocabulary, [length - 1, vocab_size], if asked for.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    top1: torch.Tensor
    vocab_logprobs: torch.Tensor | None = None

    def last(self, count: int) -> tuple[float, bool]:
        """Log-likelihood of the last `count` tokens, and whether greedy decoding gives them all."""
        start = max(0, len(self.tokens) - count)
        greedy = self.top1[start:] == self.tokens[start:]
        return float(self.logprobs[start:].double().sum()), bool(greedy.all())


_BATCH_TOKENS = 256
"""Tokens of a batch, padding included: their logits are what takes memory."""

Scorer = Callable[[Iterable[list[int]]], Iterator[TokenLogprobs]]
"""Scores sequences of at least two tokens, in their order."""


def transformers_scorer(model: Any) -> Scorer:
    """Scores with a transformers model, short sequences in batches.

    They are padded on the right, where causal attention does not look.
    """

    def score(sequences: Iterable[list[int]]) -> Iterator[TokenLogprobs]:
        for batch in _batches(sequences):
            width = max(map(len, batch))
            padded = [[*sequence, *[0] * (width - len(sequence))] for sequence in batch]
            with torch.inference_mode():
                logits = model(torch.tensor(padded, device=model.device), use_cache=False).logits
            for sequence, rows in zip(batch, logits, strict=True):
                predicted = torch.tensor(sequence[1:], device=model.device)
                found = rows[: len(predicted)].float()
                logprobs = found.log_softmax(-1).gather(-1, predicted[:, None])[:, 0]
                yield TokenLogprobs(predicted.cpu(), logprobs.cpu(), found.argmax(-1).cpu())

    return score


def _batches(sequences: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """Neighbours together, padded to at most `_BATCH_TOKENS`; a longer sequence stands alone."""
    batch: list[list[int]] = []
    width = 0
    for sequence in sequences:
        width = max(width, len(sequence))
        if batch and width * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch, width = [], len(sequence)
        batch.append(sequence)
    if batch:
        yield batch
