"""Likelihoods of token sequences: what multiple-choice tasks ask of a model, whatever runs it.

A `Scorer` is a model behind one function; here is transformers', `served` has vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scored:
    """One sequence as a model sees it.

    Attributes:
        likelihoods: [length - 1], float32: log-probability of each token after the first, in nats.
        greedy: [length - 1], bool: whether the token is the model's likeliest there.
    """

    likelihoods: torch.Tensor
    greedy: torch.Tensor

    def last(self, count: int) -> tuple[float, bool]:
        """Log-likelihood of the last `count` tokens, and whether the model would pick them all."""
        count = min(count, len(self.likelihoods))
        start = len(self.likelihoods) - count
        return float(self.likelihoods[start:].double().sum()), bool(self.greedy[start:].all())


Scorer = Callable[[Iterable[list[int]]], Iterator[Scored]]
"""Scores sequences of at least two tokens, in their order."""


def transformers_scorer(model: Any) -> Scorer:
    """Scores with a transformers model, one sequence at a time."""

    def score(sequences: Iterable[list[int]]) -> Iterator[Scored]:
        for sequence in sequences:
            tokens = torch.tensor([sequence], device=model.device)
            with torch.inference_mode():
                logits = model(tokens, use_cache=False).logits[0, :-1].float()
            found = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
            yield Scored(found.cpu(), (logits.argmax(-1) == tokens[0, 1:]).cpu())

    return score
