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


@dataclass(frozen=True)
class Continuation:
    """What a task asks about: the last tokens of a text.

    Attributes:
        tokens: context and continuation, at least two tokens.
        count: tokens of the continuation. The first token of all is never predicted.
    """

    tokens: list[int]
    count: int

    @property
    def start(self) -> int:
        """Index of its first predicted token."""
        return max(1, len(self.tokens) - self.count)


Score = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding gives all of it."""
Scorer = Callable[[Iterable[Continuation]], Iterator[Score]]
"""Scores continuations in their order."""

_BATCH_TOKENS = 256
"""Tokens of a batch, padding included: their logits take memory."""


def transformers_scorer(model: Any) -> Scorer:
    """Scores with a transformers model, short sequences in batches.

    They are padded on the right, where causal attention does not look. Logits are made from the
    first continuation on: with a large vocabulary they are a good part of the work.
    """

    def score(asked: Iterable[Continuation]) -> Iterator[Score]:
        for batch in _batches(asked):
            width = max(len(item.tokens) for item in batch)
            padded = [[*item.tokens, *[0] * (width - len(item.tokens))] for item in batch]
            first = min(item.start for item in batch) - 1
            with torch.inference_mode():
                logits = model(
                    torch.tensor(padded, device=model.device),
                    use_cache=False,
                    logits_to_keep=width - first,
                ).logits
            for item, rows in zip(batch, logits, strict=True):
                begin = item.start - 1 - first
                yield score_of(item, rows[begin : begin + len(item.tokens) - item.start])

    return score


def score_of(item: Continuation, logits: torch.Tensor) -> Score:
    """The score of a continuation by the logits that predict it, [its tokens, vocab_size]."""
    tokens = torch.tensor(item.tokens[item.start :], device=logits.device)
    logits = logits.float()
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])
    return float(logprobs.double().sum()), bool((logits.argmax(-1) == tokens).all())


def logprobs_scorer(
    logprobs: Callable[[Iterable[list[int]]], Iterator[TokenLogprobs]],
) -> Scorer:
    """Scores with what predicts whole sequences, such as `Engine.logprobs`."""

    def score(asked: Iterable[Continuation]) -> Iterator[Score]:
        asked = list(asked)
        predicted = logprobs(item.tokens for item in asked)
        for item, found in zip(asked, predicted, strict=True):
            part = slice(item.start - 1, None)
            greedy = found.top1[part] == found.tokens[part]
            yield float(found.logprobs[part].double().sum()), bool(greedy.all())

    return score


def _batches(asked: Iterable[Continuation]) -> Iterator[list[Continuation]]:
    """Neighbours together, padded to at most `_BATCH_TOKENS`; a longer sequence stands alone."""
    batch: list[Continuation] = []
    width = 0
    for item in asked:
        width = max(width, len(item.tokens))
        if batch and width * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch, width = [], len(item.tokens)
        batch.append(item)
    if batch:
        yield batch
